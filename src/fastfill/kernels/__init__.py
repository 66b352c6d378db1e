"""One op, one signature: the FFN of blocks of tokens, each block with its own selected neurons.

`sparse_ffn` is the op. Two kernels compute it: ``native`` (C++, reads the selected rows in place) and ``torch``
(gather, then multiply; also the reference). Which of them runs is decided in `choose` and nowhere else.
"""

from itertools import pairwise

import torch
from torch import Tensor

from . import cpu, torch_ref

__all__ = ["ACTIVATIONS", "available", "choose", "describe", "sparse_ffn"]

KERNELS = ("native", "torch")
ACTIVATIONS = tuple(torch_ref.ACTIVATIONS)


def available() -> dict[str, str]:
    """Name of each kernel -> one line that says whether it can run here, and why (not)."""
    return {"native": cpu.status(), "torch": "usable everywhere; copies the selected rows"}


def choose(kernel: str = "auto", x: Tensor | None = None, grad: bool = False) -> str:
    """The kernel that will run: ``"native"`` or ``"torch"``.

    ``kernel`` is a name or ``"auto"``, which takes ``native`` where it is built, knows the device and dtype of ``x``
    and no gradient is wanted (``grad``), and ``torch`` otherwise. Raises ValueError for a name that does not exist or
    cannot run here.
    """
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"unknown kernel {kernel!r}: there are {', '.join(('auto', *KERNELS))}")
    if kernel == "torch":
        return "torch"
    problem = None
    if not cpu.usable():
        problem = cpu.status()
    elif grad:
        problem = "it has no gradient and an input requires one (use torch.no_grad or kernel='torch')"
    elif x is not None and x.device.type != "cpu":
        problem = f"it runs on the CPU and x is on {x.device}"
    elif x is not None and x.dtype not in cpu.DTYPES:
        problem = f"it knows bfloat16 and float32 and x is {x.dtype}"
    if problem is None:
        return "native"
    if kernel == "native":
        raise ValueError(f"kernel 'native' cannot run: {problem}")
    return "torch"


def describe() -> str:
    """Which kernel runs here, on which instruction set and with how many threads, and why; for ``fastfill env``."""
    threads = f"{torch.get_num_threads()} threads (torch.get_num_threads())"
    if choose() == "native":
        threads += f", {cpu.threads_from()}"
    return f"kernel {choose()}: {cpu.status()}\n{threads}"


def _boundaries(name: str, bounds: Tensor, n: int | None, total: int) -> list[int]:
    """Check cumulative boundaries 0 = b[0] <= ... <= b[-1] = total and give them as a list."""
    if bounds.dim() != 1 or bounds.dtype not in (torch.int64, torch.int32) or bounds.numel() == 0:
        raise ValueError(f"{name} must be N + 1 int64 boundaries, not {bounds.dtype} {list(bounds.shape)}")
    b: list[int] = bounds.tolist()
    if n is not None and len(b) != n + 1:
        raise ValueError(f"{name} has {len(b)} boundaries, but there are {n} blocks: expected {n + 1}")
    if b[0] != 0 or b[-1] != total or any(lo > hi for lo, hi in pairwise(b)):
        raise ValueError(f"{name} must rise from 0 to {total} without falling")
    return b


def _check_ids(ids: Tensor, id_offsets: list[int], n_neurons: int) -> None:
    """Raise ValueError unless ids are inside [0, F) and strictly rising within each block."""
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= n_neurons:
        raise ValueError(f"ids must lie in [0, {n_neurons}): found {int(low)} to {int(high)}")
    rising = ids[1:] > ids[:-1]
    starts = torch.tensor(id_offsets[1:-1], device=ids.device, dtype=torch.int64) - 1  # pairs across blocks are free
    starts = starts[(starts >= 0) & (starts < rising.numel())]
    rising[starts] = True
    if not bool(rising.all()):
        raise ValueError("ids must be sorted and unique within each block")


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    *,
    rows: Tensor | None = None,
    id_offsets: Tensor | None = None,
    activation: str = "silu",
    init: Tensor | None = None,
    out: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """FFN of ``N`` blocks of tokens, each with the neurons it keeps: per block

    ``y = init + (act(x @ gate[ids].T) * (x @ up[ids].T)) @ down_t[ids]``, sums in fp32, result in the dtype of ``x``.

    Args:
        x: ``(T, H)``, the tokens of all blocks one after the other.
        gate, up, down_t: ``(F, H)`` weights, one row per neuron (``down_t`` is the down projection transposed).
        ids: ``(N, K)`` int32 or int64, sorted and unique within a row; or 1-D ``(S,)`` together with ``id_offsets``.
        rows: ``(N + 1,)`` int64 on the CPU, cumulative token boundaries of the blocks; None: N blocks of T / N tokens.
        id_offsets: ``(N + 1,)`` int64 on the CPU, cumulative boundaries of the blocks in 1-D ``ids``.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        init: ``(T, H)`` added to the result (the compensator's output), or None.
        out: ``(T, H)`` to write into; may be ``init`` itself, must not overlap ``x``. None: a new tensor.
        kernel: ``"auto"``, ``"native"`` or ``"torch"``; see `choose`.

    Returns:
        ``(T, H)`` in the dtype of ``x``: ``out`` if given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, ids out of range, unsorted or repeated, unknown names.
    """
    if torch.compiler.is_compiling():  # one opaque node in the graph
        y = _op(x, gate, up, down_t, ids, rows, id_offsets, activation, init, kernel)
        return y if out is None else out.copy_(y)
    tensors = (x, gate, up, down_t) if init is None else (x, gate, up, down_t, init)
    name = choose(kernel, x, grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    bounds, offsets = _check(x, gate, up, down_t, ids, rows, id_offsets, activation, init, out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if name == "native":
        cpu.sparse_ffn(x, gate, up, down_t, ids.reshape(-1), bounds, offsets, activation, init, out)
        return out
    flat = ids.reshape(-1)
    _check_ids(flat, offsets, gate.shape[0])
    torch_ref.sparse_ffn(x, gate, up, down_t, flat, bounds, offsets, activation, init, out)
    return out


@torch.library.custom_op("fastfill::sparse_ffn", mutates_args=())
def _op(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    id_offsets: Tensor | None,
    activation: str,
    init: Tensor | None,
    kernel: str,
) -> Tensor:
    """`sparse_ffn` as a torch operator: no gradient, a new output."""
    return sparse_ffn(
        x, gate, up, down_t, ids, rows=rows, id_offsets=id_offsets, activation=activation, init=init, kernel=kernel
    )


@_op.register_fake
def _(x, gate, up, down_t, ids, rows, id_offsets, activation, init, kernel):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Tensor | None,
    id_offsets: Tensor | None,
    activation: str,
    init: Tensor | None,
    out: Tensor | None,
) -> tuple[list[int], list[int]]:
    """Raise ValueError for what does not fit together; else the boundaries of the blocks in x and in flat ids."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (T, H), not {x.dtype} {list(x.shape)}")
    n_tokens, hidden = x.shape
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if w.dim() != 2 or w.shape[1] != hidden or w.shape != gate.shape:
            raise ValueError(f"{label} must be (F, {hidden}) like gate, not {list(w.shape)} (gate: {list(gate.shape)})")
    for label, t in (("init", init), ("out", out)):
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{label} must be {list(x.shape)} like x, not {list(t.shape)}")
    for label, t in (("gate", gate), ("up", up), ("down_t", down_t), ("init", init), ("out", out)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{label} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if hidden > 1 and w.stride(1) != 1:  # a copy per call would cost more than the op
            raise ValueError(f"the rows of {label} must be contiguous: make {label}.contiguous() once, ahead")
    if ids.device != x.device:
        raise ValueError(f"ids are on {ids.device}, but x is on {x.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, not {ids.dtype}")
    if ids.dim() == 2 and id_offsets is None:
        n, k = ids.shape
        offsets = list(range(0, n * k + 1, k)) if k else [0] * (n + 1)
    elif ids.dim() == 1 and id_offsets is not None:
        offsets = _boundaries("id_offsets", id_offsets, None, ids.numel())
        n = len(offsets) - 1
    else:
        raise ValueError("ids must be (N, K) without id_offsets, or 1-D with id_offsets")
    if rows is not None:
        bounds = _boundaries("rows", rows, n, n_tokens)
    elif n == 0 or n_tokens % n:
        raise ValueError(f"{n_tokens} tokens do not make {n} equal blocks: give rows")
    else:
        bounds = [i * (n_tokens // n) for i in range(n + 1)]
    return bounds, offsets
