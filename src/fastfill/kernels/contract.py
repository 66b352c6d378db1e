"""What callers of the ops must keep to, checked for every kernel alike: shapes, dtypes, boundaries, ids, and memory.

The kernels read and write through bare pointers. What would give wrong numbers there is refused here.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import torch_ref
from .int8 import WIDEST, Scales

LARGEST = 2**31 - 1  # neurons and widths are 32-bit numbers in the kernels


class Bounds(tuple[int, ...]):
    """Cumulative boundaries that start at 0 and do not fall, checked when they are made: one layout for many calls."""

    def __new__(cls, values: Iterable[int]) -> "Bounds":
        made = super().__new__(cls, values)
        if not made or made[0] != 0 or any(low > high for low, high in pairwise(made)):
            raise ValueError("boundaries must rise from 0 without falling")
        return made


def boundaries(name: str, bounds: Tensor | Bounds, n: int | None, total: int) -> Sequence[int]:
    """Check cumulative boundaries 0 = b[0] <= ... <= b[-1] = total."""
    if isinstance(bounds, Bounds):
        if bounds[-1] != total or (n is not None and len(bounds) != n + 1):
            raise ValueError(f"{name} has {len(bounds)} boundaries up to {bounds[-1]}, not {n} + 1 up to {total}")
        return bounds
    if bounds.dim() != 1 or bounds.dtype not in (torch.int64, torch.int32) or bounds.numel() == 0:
        raise ValueError(f"{name} must be N + 1 int64 boundaries, not {bounds.dtype} {list(bounds.shape)}")
    if bounds.device.type != "cpu":  # reading them would wait for the device
        raise ValueError(f"{name} must be on the CPU, not on {bounds.device}")
    b: list[int] = bounds.tolist()
    if n is not None and len(b) != n + 1:
        raise ValueError(f"{name} has {len(b)} boundaries, but there are {n} blocks: expected {n + 1}")
    if b[0] != 0 or b[-1] != total or any(lo > hi for lo, hi in pairwise(b)):
        raise ValueError(f"{name} must rise from 0 to {total} without falling")
    return b


def check_ids(ids: Tensor, id_offsets: Sequence[int], n_neurons: int) -> None:
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


def check_low_rank(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor) -> None:
    """Raise ValueError for inputs of `block_scores` and `compensate` that do not fit together."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (T, H), not {x.dtype} {list(x.shape)}")
    if w_in.dim() != 2 or w_in.shape[1] != x.shape[1]:
        raise ValueError(f"w_in must be (r, {x.shape[1]}), not {list(w_in.shape)}")
    if w_out.dim() != 2 or w_out.shape[1] != w_in.shape[0]:
        raise ValueError(f"w_out must have {w_in.shape[0]} columns, the rows of w_in, not {list(w_out.shape)}")
    if bias.shape != w_out.shape[:1]:
        raise ValueError(f"bias must be ({w_out.shape[0]},) like the rows of w_out, not {list(bias.shape)}")
    for label, t in (("w_in", w_in), ("w_out", w_out), ("bias", bias)):
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{label} is {t.dtype} on {t.device}, but x is {x.dtype} on {x.device}")
    check_memory(x=x, w_in=w_in, w_out=w_out, bias=bias)


def check(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Tensor | Bounds | None,
    id_offsets: Tensor | Bounds | None,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    init: Tensor | None,
    out: Tensor | None,
    scales: Scales | None = None,
) -> tuple[Sequence[int], Sequence[int]]:
    """Raise ValueError for inputs of `sparse_ffn` that do not fit together; else the boundaries of the blocks in x and in
    flat ids."""
    if activation not in torch_ref.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: there are {', '.join(torch_ref.ACTIVATIONS)}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a floating point (T, H), not {x.dtype} {list(x.shape)}")
    n_tokens, hidden = x.shape
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if w.dim() != 2 or w.shape[1] != hidden or w.shape != gate.shape:
            raise ValueError(f"{label} must be (F, {hidden}) like gate, not {list(w.shape)} (gate: {list(gate.shape)})")
    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    for label, t in biases.items():
        if t is not None and t.shape != gate.shape[:1]:
            raise ValueError(f"{label} must be ({gate.shape[0]},) like the rows of gate, not {list(t.shape)}")
    for label, t in (("init", init), ("out", out)):
        if t is not None and t.shape != x.shape:
            raise ValueError(f"{label} must be {list(x.shape)} like x, not {list(t.shape)}")
    weights = {"gate": gate, "up": up, "down_t": down_t}
    for label, t in {**weights, **biases, "init": init, "out": out}.items():
        dtype = torch.int8 if scales and label in weights else x.dtype
        if t is not None and (t.dtype != dtype or t.device != x.device):
            meant = f"must be {dtype} with scales" if dtype != x.dtype else f"x is {x.dtype}"
            raise ValueError(f"{label} is {t.dtype} on {t.device}, but {meant} on {x.device}")
    if scales:
        check_scales(scales, x, gate.shape[0])
    for label, w in (("gate", gate), ("up", up), ("down_t", down_t)):
        if hidden > 1 and w.stride(1) != 1:  # a copy per call would cost more than the op
            raise ValueError(f"the rows of {label} must be contiguous: make {label}.contiguous() once, ahead")
    if ids.device != x.device:
        raise ValueError(f"ids are on {ids.device}, but x is on {x.device}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, not {ids.dtype}")
    if ids.dim() == 2 and id_offsets is None:
        n, k = ids.shape
        offsets: Sequence[int] = list(range(0, n * k + 1, k)) if k else [0] * (n + 1)
    elif ids.dim() == 1 and id_offsets is not None:
        offsets = boundaries("id_offsets", id_offsets, None, ids.numel())
        n = len(offsets) - 1
    else:
        raise ValueError("ids must be (N, K) without id_offsets, or 1-D with id_offsets")
    if rows is not None:
        bounds: Sequence[int] = boundaries("rows", rows, n, n_tokens)
    elif n == 0 or n_tokens % n:
        raise ValueError(f"{n_tokens} tokens do not make {n} equal blocks: give rows")
    else:
        bounds = [i * (n_tokens // n) for i in range(n + 1)]
    factors = {f"scales.{name}": t for name, t in scales._asdict().items()} if scales else {}
    check_memory(x=x, gate=gate, up=up, down_t=down_t, ids=ids, init=init, out=out, **biases, **factors)
    if out is not None:
        read = {"x": x, "gate": gate, "up": up, "down_t": down_t, "ids": ids, **biases, **factors}
        check_out(out, init, {label: t for label, t in read.items() if t is not None})
    return bounds, offsets


def check_scales(scales: Scales, x: Tensor, neurons: int) -> None:
    """Raise ValueError unless the scales are those of F neurons and of the columns of x (T, H)."""
    for label, t, n in (("gate", scales.gate, neurons), ("up", scales.up, neurons), ("down", scales.down, x.shape[1])):
        if t.shape != (n,) or t.dtype != torch.float32 or t.device != x.device:
            raise ValueError(
                f"the scales of {label} must be ({n},) float32 on {x.device}, not {list(t.shape)} {t.dtype} on {t.device}"
            )
    if x.shape[1] > WIDEST:
        raise ValueError(f"int8 weights have at most {WIDEST} columns, not {x.shape[1]}: their sums would leave 32 bits")


def check_memory(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that a kernel cannot read through its pointer."""
    for label, t in tensors.items():
        if t is None:
            continue
        if t.data_ptr() % t.element_size():
            raise ValueError(f"{label} is not aligned to its {t.element_size()}-byte elements: pass {label}.clone()")
        if t.is_neg():  # torch negates lazily: the memory has the other sign
            raise ValueError(f"{label} is a view of negated numbers: pass {label}.resolve_neg()")
        if max(t.shape) > LARGEST:
            raise ValueError(f"{label} has {max(t.shape)} rows or columns; at most {LARGEST} can be counted")


def check_out(out: Tensor, init: Tensor | None, read: dict[str, Tensor]) -> None:
    """Raise ValueError unless each element of out (T, H) has a place of its own, where nothing lies that is read.

    init may be out itself: the same elements in the same places.
    """
    small, large = sorted((stride, size) for stride, size in zip(out.stride(), out.shape, strict=True))
    if out.numel() and ((small[1] > 1 and small[0] < 1) or (large[1] > 1 and large[0] < small[0] * (small[1] - 1) + 1)):
        raise ValueError(
            "out is an expanded or overlapping view, in which elements share their memory: pass a tensor of its own"
        )
    for label, t in read.items():
        if overlap(out, t):
            raise ValueError(f"out must not overlap {label}, which is read while out is written")
    if init is not None and overlap(out, init) and places(out) != places(init):
        raise ValueError("out must be init itself, element by element, or not overlap it")


def places(t: Tensor) -> tuple[int, list[int]]:
    """Where the elements of a tensor lie; the stride of a dimension of size 1 says nothing."""
    return t.data_ptr(), [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have memory in common. Exact for columns of one matrix; otherwise from first to last byte."""
    if not a.numel() or not b.numel():
        return False
    (first_a, last_a), (first_b, last_b) = _extent(a), _extent(b)
    if last_a <= first_b or last_b <= first_a:
        return False
    row = a.stride(0) * a.element_size()
    if a.dim() == b.dim() == 2 and row == b.stride(0) * b.element_size() and a.stride(1) == b.stride(1) == 1:
        apart = (first_b - first_a) % row if row else 0  # bytes from a column of a to the first of b, in a row
        return apart < a.shape[1] * a.element_size() or apart + b.shape[1] * b.element_size() > row
    return True


def _extent(t: Tensor) -> tuple[int, int]:
    """Address of the first byte, and behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
