"""The ops in Triton, for CUDA. Imported on first use only: nothing else of the package needs Triton.

The sparse FFN is two launches for all blocks of a prompt. `_up_half` computes the chosen columns alone of
``h = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)``; `_down_half` computes ``init + h @ down_t[ids]``. Both read rows
of the weights where they lie, by their ids. Programs that run side by side have the same tile of (sorted) ids of different
blocks, so that rows which blocks share come from L2 and the weights are read from memory about once and not once per block.

Nothing here waits for the device. Where blocks begin and end comes from the CPU and is copied ahead, once per layout
(`_layout`); ids stay on the device and are not checked: an id outside [0, F) is read as the nearest one inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import torch_ref

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on CPU tensors, slowly, for tests
PAD = 64  # rows of h are padded to a multiple of it: aligned loads, and no mask in the inner loop of `_down_half`
_PRECISION = "upcast" if INTERPRETED else "ieee"
MAX_NEURONS = 32768  # of a row in `_top_k`, which one program holds in registers


@dataclass(frozen=True)
class Tile:
    """What one program computes: `tokens` x `columns` in steps of `depth`, with so many warps and pipeline stages."""

    tokens: int
    columns: int
    depth: int
    warps: int
    stages: int


Tiles = dict[int, tuple[tuple[Tile, ...], tuple[Tile, ...]]]

# By the number of a block's tokens that a tile takes: candidates for the two halves, the one that is used first.
# Hopper has 227 KiB of shared memory for a program, A100 163, consumer cards 99. In `_down_half` rows are found by ids that
# are themselves loaded, so that Triton makes half the buffers of its stages: 5 stages give 3, 7 give 4. On an H200 the first
# of each were the fastest (benchmarks/results/gpu.jsonl), but for 1 % at 128 tokens.
_HOPPER: Tiles = {
    128: (
        (Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 64, 64, 4, 4)),
        (Tile(128, 256, 64, 8, 5), Tile(128, 256, 64, 8, 7), Tile(128, 128, 64, 4, 5)),
    ),
    64: (
        (Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 8, 4), Tile(64, 256, 32, 8, 4)),
        (Tile(64, 128, 64, 4, 5), Tile(64, 256, 64, 8, 7), Tile(64, 256, 64, 4, 5)),
    ),
    32: ((Tile(32, 128, 64, 4, 4),), (Tile(32, 128, 64, 4, 5),)),
}
_AMPERE: Tiles = {
    128: (
        (Tile(128, 64, 32, 4, 4), Tile(128, 64, 64, 8, 3), Tile(128, 128, 32, 8, 3)),
        (Tile(128, 128, 32, 4, 5), Tile(128, 128, 64, 8, 5), Tile(128, 256, 32, 8, 5)),
    ),
    64: (
        (Tile(64, 64, 64, 4, 3), Tile(64, 128, 32, 8, 4)),
        (Tile(64, 128, 64, 4, 5), Tile(64, 256, 32, 8, 5)),
    ),
    32: ((Tile(32, 64, 64, 4, 3),), (Tile(32, 128, 64, 4, 5),)),
}
_CONSUMER: Tiles = {
    128: (
        (Tile(128, 64, 32, 4, 3), Tile(128, 64, 32, 8, 4)),
        (Tile(128, 128, 32, 4, 5), Tile(128, 128, 32, 8, 5)),
    ),
    64: ((Tile(64, 64, 32, 4, 4), Tile(64, 64, 64, 4, 3)), (Tile(64, 128, 32, 4, 5), Tile(64, 128, 64, 4, 5))),
    32: ((Tile(32, 64, 64, 4, 3),), (Tile(32, 128, 64, 4, 5),)),
}
_FP32: Tiles = {n: ((Tile(n, 32, 32, 4, 2),), (Tile(n, 64, 32, 4, 2),)) for n in (32, 64, 128)}
_INTERPRETER: Tiles = {n: ((Tile(32, 32, 32, 1, 1),), (Tile(32, 32, 32, 1, 1),)) for n in (32, 64, 128)}


def candidates(arch: int, dtype: torch.dtype, longest: int) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """Tiles to try for `_up_half` and `_down_half`, the default first. arch: compute capability, 90 for 9.0; 0: interpreter.
    longest: tokens of the longest block."""
    if arch == 0:
        table = _INTERPRETER
    elif dtype == torch.float32:
        table = _FP32
    else:
        table = _AMPERE if arch == 80 else _HOPPER if arch in (90, 100, 103) else _CONSUMER
    return table[128 if longest > 64 else 64 if longest > 32 else 32]


_tuned: dict[tuple[int, torch.dtype, int], tuple[Tile, Tile]] = {}


def use(arch: int, dtype: torch.dtype, longest: int, tiles: tuple[Tile, Tile]) -> None:
    """From now on take these tiles (for tuning; captured graphs keep theirs)."""
    _tuned[arch, dtype, candidates(arch, dtype, longest)[0][0].tokens] = tiles


def tiles_for(arch: int, dtype: torch.dtype, longest: int) -> tuple[Tile, Tile]:
    """The tiles in use for the two halves."""
    ups, downs = candidates(arch, dtype, longest)
    return _tuned.get((arch, dtype, ups[0].tokens), (ups[0], downs[0]))


def biased(tile: Tile) -> Tile:
    """The tile of `_up_half` for an FFN with biases: 4 warps of 128 tokens have no register left for them (A100: 254 of 255
    taken)."""
    return replace(tile, warps=8) if tile.tokens == 128 else tile


def problem(x: Tensor) -> str | None:
    """Why the ops cannot run on tensors like x, or None."""
    if not x.is_cuda and not INTERPRETED:
        return f"it runs on CUDA and x is on {x.device}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"it needs compute capability 8.0 and {x.device} has less"
    return None if x.dtype in DTYPES else f"it knows bfloat16, float16 and float32 and x is {x.dtype}"


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "upcast":  # the interpreter takes bf16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return g * tl.sigmoid(g)
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        return tl.where(g < 0, 0.0, g)  # NaN stays NaN


@triton.jit
def _neuron(ids, n, kept, neurons):
    """The n-th of a block's ids; beyond the last of them the last, and outside [0, F) the nearest inside."""
    neuron = tl.load(ids + tl.minimum(n, kept - 1)).to(tl.int64)
    return tl.minimum(tl.maximum(neuron, 0), neurons - 1)


@triton.jit
def _up_half(
    x, gate, up, gate_bias, up_bias, h, ids, tiles, groups, x_stride, gate_stride, up_stride, hidden, neurons,
    GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PADDING: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of h: TOKENS of one block x COLUMNS of its neurons."""
    program = tl.program_id(0)
    starts = tl.load(groups + tl.arange(0, GROUPS))
    group = tl.sum((starts <= program).to(tl.int32), 0) - 1
    inside = program - tl.load(groups + group)
    count = tl.load(groups + 2 * GROUPS + group)
    tile = tiles + 6 * (tl.load(groups + GROUPS + group) + inside % count)  # neighbours: the same neurons of other blocks
    row, length, first, kept = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    h += tl.load(tile + 4).to(tl.int64) * PADDING
    wide = tl.load(tile + 5) * PADDING

    m, k = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    n = inside // count * COLUMNS + tl.arange(0, COLUMNS)
    # Beyond the block's tokens and neurons the last one is read again: no mask in the loop, and nothing foreign is touched.
    neuron = _neuron(ids + first, n, kept, neurons)
    x += (row + tl.minimum(m, length - 1)).to(tl.int64)[:, None] * x_stride + k[None, :]
    gate += neuron[None, :] * gate_stride + k[:, None]
    up += neuron[None, :] * up_stride + k[:, None]
    g = tl.zeros((TOKENS, COLUMNS), tl.float32)
    u = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for at in range(0, hidden, DEPTH):
        if WHOLE:
            a, b, c = tl.load(x), tl.load(gate), tl.load(up)
        else:
            left = k < hidden - at
            a = tl.load(x, mask=left[None, :], other=0.0)
            b = tl.load(gate, mask=left[:, None], other=0.0)
            c = tl.load(up, mask=left[:, None], other=0.0)
        g = _dot(a, b, g, PRECISION)
        u = _dot(a, c, u, PRECISION)
        x += DEPTH
        gate += DEPTH
        up += DEPTH
    if gate_bias is not None:  # behind the loop: before it, the largest tile spills
        g += tl.load(gate_bias + _neuron(ids + first, n, kept, neurons)).to(tl.float32)[None, :]
    if up_bias is not None:
        u += tl.load(up_bias + _neuron(ids + first, n, kept, neurons)).to(tl.float32)[None, :]
    out = tl.where((n < kept)[None, :], _activate(g, ACTIVATION) * u, 0.0)  # the padding is multiplied in `_down_half`
    mask = (m < length)[:, None] & (n < wide)[None, :]
    tl.store(h + m.to(tl.int64)[:, None] * wide + n[None, :], out.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _down_half(
    h, down_t, init, out, ids, tiles, n_tiles, down_stride, init_stride, out_stride, hidden, neurons,
    GROUP: tl.constexpr, INIT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, PADDING: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the output: TOKENS of one block x COLUMNS of H."""
    program = tl.program_id(0)
    per_group = GROUP * tl.cdiv(hidden, COLUMNS)
    begin = program // per_group * GROUP
    count = tl.minimum(GROUP, n_tiles - begin)
    inside = program % per_group
    tile = tiles + 6 * (begin + inside % count)
    row, length, first, kept = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    h += tl.load(tile + 4).to(tl.int64) * PADDING
    wide = tl.load(tile + 5) * PADDING

    m, k = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    n = inside // count * COLUMNS + tl.arange(0, COLUMNS)
    columns = (n < hidden)[None, :]
    h += tl.minimum(m, length - 1).to(tl.int64)[:, None] * wide + k[None, :]
    down_t += n[None, :]
    y = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for at in range(0, wide, DEPTH):
        neuron = _neuron(ids + first, at + k, kept, neurons)
        a = tl.load(h + at)
        if WHOLE:
            b = tl.load(down_t + neuron[:, None] * down_stride)
        else:
            b = tl.load(down_t + neuron[:, None] * down_stride, mask=columns, other=0.0)
        y = _dot(a, b, y, PRECISION)
    mask = (m < length)[:, None] & columns
    rows = (row + m).to(tl.int64)[:, None]
    if INIT:
        y += tl.load(init + rows * init_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * out_stride + n[None, :], y.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Layout:
    """Where the tiles of tokens lie. tiles: (n, 6) int32 on the device: first row, tokens, first id, ids, where its h begins
    and how wide a row of it is (both in units of PAD); tiles that keep most neurons first. groups: (3, G) int32 on the
    device, for `_up_half`: first program, first tile, tiles. programs: of `_up_half`. size: elements of h."""

    tiles: Tensor
    groups: Tensor
    programs: int
    size: int


_captured: list[Layout] = []  # a CUDA graph reads them as long as it lives, which nobody tells us


@lru_cache(maxsize=512)  # some KB each; every layer of a model has its own K
def _layout(rows: tuple[int, ...], offsets: tuple[int, ...], tile: Tile, group: int, device: torch.device) -> Layout:
    tiles, at = [], 0
    for n in range(len(rows) - 1):
        kept = offsets[n + 1] - offsets[n]
        wide = -(-kept // PAD)
        for row in range(rows[n], rows[n + 1], tile.tokens):
            length = min(tile.tokens, rows[n + 1] - row)
            tiles.append((row, length, offsets[n], kept, at, wide))
            at += length * wide
    tiles.sort(key=lambda t: -t[5])  # the longest first: no long one is left over at the end
    groups: list[list[int]] = []
    program = begin = 0
    while begin < len(tiles) and tiles[begin][5]:
        end = begin
        while end < min(len(tiles), begin + group) and tiles[end][5] == tiles[begin][5]:
            end += 1
        groups.append([program, begin, end - begin])
        program += (end - begin) * -(-tiles[begin][5] * PAD // tile.columns)
        begin = end
    if max(at, program, offsets[-1]) >= 2**31:
        raise ValueError("too many tokens for one call: the prompt must be split")
    padded = max(16, triton.next_power_of_2(len(groups)))
    groups += [[2**31 - 1, 0, 1]] * (padded - len(groups))
    host = [torch.tensor(tiles, dtype=torch.int32), torch.tensor(groups, dtype=torch.int32).t().contiguous()]
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("run a prompt of this length once before capturing it in a CUDA graph")
        host = [t.pin_memory().to(device, non_blocking=True) for t in host]
    return Layout(host[0], host[1], program, at * PAD)


def _group(device: torch.device, tile: Tile, row_bytes: int) -> int:
    """Tiles of tokens that run side by side: their x, which every tile of neurons reads again, takes half of L2."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(8, min(64, cache // 2 // (tile.tokens * row_bytes)))


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Sequence[int],
    id_offsets: Sequence[int],
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    init: Tensor | None,
    out: Tensor,
) -> None:
    """As `torch_ref.sparse_ffn`. Shapes and dtypes are checked by the caller, the ids by nobody: see the module."""
    tokens, hidden = x.shape
    if not tokens * hidden:
        return
    neurons = gate.shape[0]
    x, init = _unit_rows(x), None if init is None else _unit_rows(init)
    gate_bias, up_bias = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias))
    inner = torch.float32 if INTERPRETED else x.dtype  # the interpreter cuts bits off where it should round to bf16
    target = out if out.stride(1) == 1 and out.dtype == inner else torch.empty_like(x, dtype=inner)
    longest = max(b - a for a, b in pairwise(rows))
    first, second = tiles_for(arch_of(x.device), x.dtype, longest)
    if gate_bias is not None or up_bias is not None:
        first = biased(first)
    group = _group(x.device, first, hidden * x.element_size())
    layout = _layout(tuple(rows), tuple(id_offsets), first, group, x.device)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(layout)
    h = x.new_empty(layout.size, dtype=inner)
    n_tiles = len(layout.tiles)
    with torch.cuda.device_of(x):
        if layout.programs:
            _up_half[(layout.programs,)](
                x, gate, up, gate_bias, up_bias, h, ids, layout.tiles, layout.groups,
                x.stride(0), gate.stride(0), up.stride(0), hidden, neurons,
                GROUPS=layout.groups.shape[1], ACTIVATION=activation, WHOLE=hidden % first.depth == 0, **_sizes(first),
            )  # fmt: skip
        _down_half[(n_tiles * -(-hidden // second.columns),)](
            h, down_t, target if init is None else init, target, ids, layout.tiles, n_tiles,
            down_t.stride(0), target.stride(0) if init is None else init.stride(0), target.stride(0), hidden, neurons,
            GROUP=group, INIT=init is not None, WHOLE=hidden % second.columns == 0, **_sizes(second),
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def _sizes(tile: Tile) -> dict:
    sizes = {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return sizes | {"PADDING": PAD, "PRECISION": _PRECISION, "num_warps": tile.warps, "num_stages": tile.stages}


@triton.jit
def _logits(
    inner, w_out, bias, rows, tokens, n, rank, columns, inner_stride, w_stride, PRECISION: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Logits of rows (TOKENS,) and neurons n (COLUMNS,); -inf beyond the last neuron."""
    inside = n < columns
    k = tl.arange(0, DEPTH)
    a_at = inner + rows.to(tl.int64)[:, None] * inner_stride + k[None, :]
    b_at = w_out + n.to(tl.int64)[None, :] * w_stride + k[:, None]
    logits = tl.zeros((rows.shape[0], n.shape[0]), tl.float32)
    for at in range(0, rank, DEPTH):
        left = k < rank - at
        a = tl.load(a_at + at, mask=tokens[:, None] & left[None, :], other=0.0)
        b = tl.load(b_at + at, mask=left[:, None] & inside[None, :], other=0.0)
        logits = _dot(a, b, logits, PRECISION)
    logits += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], logits, float("-inf"))


@triton.jit
def _softmax_sums(
    inner, w_out, bias, sums, tokens, rank, columns, inner_stride, w_stride,
    steps, PRECISION: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Largest logit of TOKENS tokens in one part of the neurons, and the sum of exp beyond it: sums (2, parts, T)."""
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    real = rows < tokens
    part = tl.program_id(1)
    high = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for step in range(0, steps):
        n = (part * steps + step) * COLUMNS + tl.arange(0, COLUMNS)
        logits = _logits(inner, w_out, bias, rows, real, n, rank, columns, inner_stride, w_stride, PRECISION, DEPTH)
        new = tl.maximum(high, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a part may be all -inf; the sum is 0, not NaN
        total = total * tl.exp(high - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        high = new
    at = part.to(tl.int64) * tokens + rows
    tl.store(sums + at, high, mask=real)
    tl.store(sums + tl.num_programs(1) * tokens + at, total, mask=real)


@triton.jit
def _block_sums(
    inner, w_out, bias, sums, scores, tokens, rank, columns, block_size, inner_stride, w_stride,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Probabilities of COLUMNS neurons, summed over the tokens of one block."""
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.program_id(1)
    part = tl.arange(0, PARTS)
    score = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, block_size, TOKENS):
        m = begin + tl.arange(0, TOKENS)
        rows = block * block_size + m
        real = m < block_size
        at = sums + part.to(tl.int64)[:, None] * tokens + rows[None, :]
        highs = tl.load(at, mask=real[None, :], other=0.0)
        totals = tl.load(at + tokens * PARTS, mask=real[None, :], other=1.0)
        high = tl.max(highs, 0)
        total = tl.sum(totals * tl.exp(highs - high[None, :]), 0)
        logits = _logits(inner, w_out, bias, rows, real, n, rank, columns, inner_stride, w_stride, PRECISION, DEPTH)
        p = tl.exp(logits - high[:, None]) / total[:, None]
        score += tl.sum(tl.where(real[:, None], p, 0.0), 0)
    tl.store(scores + block.to(tl.int64) * columns + n, score, mask=n < columns)


def score_tile(dtype: torch.dtype, block_size: int) -> Tile:
    """Of both kernels behind `block_scores`. More tokens than a block has are computed for nothing: with blocks of 32, tiles of
    32 take 0.30 ms and of 64 0.43 (H200, 4,096 tokens, 14,336 neurons)."""
    if INTERPRETED:
        return Tile(32, 32, 32, 1, 1)
    if dtype == torch.float32:
        return Tile(32, 64, 32, 4, 2)
    return Tile(32 if block_size <= 32 else 64, 128, 32, 4, 3)


def block_scores(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int) -> Tensor:
    """As `torch_ref.block_scores`, with logits in fp32, in three launches: cuBLAS for the thin ``w_in``, then the logits
    twice, for their softmax and for the sums. torch, which writes (T, F) in bf16, takes 0.24 ms where this takes 0.26 (H200,
    4,096 tokens, 14,336 neurons): cuBLAS's logits alone take 0.06."""
    tokens, rank = x.shape[0], w_in.shape[0]
    columns = w_out.shape[0]
    if not tokens * columns * rank * x.shape[1]:
        return torch_ref.block_scores(x, w_in, w_out, bias, block_size)
    inner, w_out, bias = F.linear(x, w_in), _unit_rows(w_out), bias.contiguous()
    tile = score_tile(x.dtype, block_size)
    many, wide = tile.tokens, tile.columns
    parts, step = 4, max(1, triton.cdiv(columns, 4 * wide))
    while parts < 32 and not INTERPRETED and parts * triton.cdiv(tokens, many) < 512 and step > 1:
        parts, step = 2 * parts, triton.cdiv(step, 2)
    sums = torch.empty(2, parts, tokens, dtype=torch.float32, device=x.device)
    scores = torch.empty(tokens // block_size, columns, dtype=torch.float32, device=x.device)
    sizes = {name: value for name, value in _sizes(tile).items() if name != "PADDING"}
    with torch.cuda.device_of(x):
        _softmax_sums[(triton.cdiv(tokens, many), parts)](
            inner, w_out, bias, sums, tokens, rank, columns, inner.stride(0), w_out.stride(0), step, **sizes
        )
        _block_sums[(triton.cdiv(columns, wide), tokens // block_size)](
            inner, w_out, bias, sums, scores, tokens, rank, columns, block_size, inner.stride(0), w_out.stride(0),
            PARTS=parts, **sizes,
        )  # fmt: skip
    return scores


@triton.jit
def _keys(scores, at, neurons):
    """Integers that rise with the scores at (columns,), and 0 beyond the last neuron: NaN as infinity, -0 as 0."""
    inside = at < neurons
    bits = tl.load(scores + at, mask=inside, other=0.0).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size > 0x7F800000, 0x7F800000, bits)
    bits = tl.where(size == 0, 0, bits)
    keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(inside, keys, 0)


@triton.jit
def _top_k(scores, ids, stride, neurons, kept, WIDTH: tl.constexpr, PART: tl.constexpr):
    """One row: the largest limit that `kept` scores reach, bit by bit; then what is above it, and of what equals it the
    first. The row stays in registers: 32 counts take less time than writing a histogram. It is read again, in parts, to
    write the ids, because keys and places together do not fit."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    ids += row * kept
    keys = _keys(scores, tl.arange(0, WIDTH), neurons)
    limit = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        higher = limit | bit
        limit = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= kept, higher, limit)
        bit = bit >> 1
    free = kept - tl.sum((keys > limit).to(tl.int32), 0)  # places for those that equal the limit
    written = 0
    for begin in range(0, neurons, PART):
        at = begin + tl.arange(0, PART)
        part = _keys(scores, at, neurons)
        equal = (part == limit).to(tl.int32)
        keep = (part > limit) | ((equal > 0) & (tl.cumsum(equal, 0) <= free))
        tl.store(ids + written + tl.cumsum(keep.to(tl.int32), 0) - 1, at, mask=keep)
        free -= tl.sum(equal, 0)
        written += tl.sum(keep.to(tl.int32), 0)


def top_k(scores: Tensor, kept: int) -> Tensor:
    """As `torch_ref.top_k`, in one launch."""
    n, neurons = scores.shape
    if kept in (0, neurons) or n == 0 or neurons > MAX_NEURONS:
        return torch_ref.top_k(scores, kept)
    scores = _unit_rows(scores.float())
    ids = torch.empty(n, kept, dtype=torch.int32, device=scores.device)
    with torch.cuda.device_of(scores):
        _top_k[(n,)](scores, ids, scores.stride(0), neurons, kept, **_row(neurons))
    return ids


def _row(neurons: int) -> dict[str, int]:
    """Sizes of `_top_k`: at most 32 scores to a thread."""
    width = triton.next_power_of_2(neurons)
    part = min(width, 128 if INTERPRETED else 4096)
    return {"WIDTH": width, "PART": part, "num_warps": max(4, min(32, width // 512))}


def compensate(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int) -> Tensor:
    """As `torch_ref.compensate`. cuBLAS: both products are thin and what lies between is small."""
    inner = F.linear(x, w_in)
    if linear_rank < inner.shape[1]:
        F.silu(inner[:, linear_rank:], inplace=True)
    return F.linear(inner, w_out, bias)


def _unit_rows(t: Tensor) -> Tensor:
    """``t`` itself if its rows are contiguous, else a copy."""
    return t if t.stride(1) == 1 else t.contiguous()
