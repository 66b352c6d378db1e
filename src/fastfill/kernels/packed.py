"""Weights as GGUF files hold them, in blocks of 4 to 8 bits a weight: what csrc/packed.h computes of their rows.

blocks: uint8 (R, bytes), R rows of whole blocks; a slice of rows, with any stride, is one too. C is the number of columns that
they hold. Where the native kernel cannot run, the package ``gguf`` unpacks them: the same bits, but for `linear`.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import cpu, int8


class Kind(NamedTuple):
    """A format: its number in GGUF, and the columns and bytes of a block."""

    code: int
    columns: int
    bytes: int


KINDS = {
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q4_K": Kind(12, 256, 144),
    "Q5_K": Kind(13, 256, 176),
    "Q6_K": Kind(14, 256, 210),
}


class RowScales(NamedTuple):
    """How rows are rounded to int8. Both (R,) in fp32.

    scale is what `int8.rounded` gives: a weight is about q * scale. inverse is 127 / largest magnitude, what weights are
    multiplied by, and 0 for rows of zeros or with NaN; 1 / scale would be other bits.
    """

    scale: Tensor
    inverse: Tensor


def unpack(blocks: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values (R, C) in fp32, as `gguf.dequantize` gives them, or rounded to dtype."""
    columns = _columns(blocks, kind)
    out = torch.empty(len(blocks), columns, dtype=dtype, device=blocks.device)
    if not cpu.usable() or cpu.problem(out):
        return _dequantised(blocks, kind).to(dtype)
    cpu.unpack(blocks, KINDS[kind].code, out)
    return out


def scales(blocks: Tensor, kind: str) -> RowScales:
    """What `unpack_int8` takes; a pass over all rows."""
    columns = _columns(blocks, kind)
    if not _native(blocks):
        return RowScales(*int8.scales(_dequantised(blocks, kind)))
    return RowScales(*cpu.packed_scales(blocks, KINDS[kind].code, columns))


def unpack_int8(blocks: Tensor, kind: str, inverse: Tensor, out: Tensor | None = None, transposed: bool = False) -> Tensor:
    """int8 (R, C), or transposed (C, R): the bits of `int8.rounded` of the values. inverse: of `scales`, of these rows.

    out is written and returned; its rows may have any stride.
    """
    shape = (len(blocks), _columns(blocks, kind))
    if transposed:
        shape = shape[::-1]
    if inverse.shape != blocks.shape[:1] or inverse.dtype != torch.float32 or inverse.device != blocks.device:
        raise ValueError(f"inverse must be fp32 ({len(blocks)},) on {blocks.device}, as `scales` gives it: {_is(inverse)}")
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=blocks.device)
    elif out.shape != shape or out.dtype != torch.int8 or out.device != blocks.device:
        raise ValueError(f"out must be int8 {shape} on {blocks.device}: {_is(out)}")
    elif out.numel() and out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"the rows of out must be contiguous: its strides are {out.stride()}")
    if not _native(blocks):
        q = int8.rounded_by(_dequantised(blocks, kind), inverse)
        return out.copy_(q.t() if transposed else q)
    cpu.unpack_int8(blocks, KINDS[kind].code, inverse, out, transposed)
    return out


def linear(x: Tensor, blocks: Tensor, kind: str) -> Tensor:
    """x (T, C) in fp32 or bf16 -> x W^T (T, R) in its dtype, sums in fp32. For few tokens: the blocks are read, not unpacked.

    A token's result does not depend on the other tokens.
    """
    columns = _columns(blocks, kind)
    if x.ndim != 2 or x.shape[1] != columns or not x.is_floating_point() or x.device != blocks.device:
        raise ValueError(f"x must be floating point (T, {columns}) on {blocks.device}: {_is(x)}")
    if not cpu.usable() or cpu.problem(x) or (x.requires_grad and torch.is_grad_enabled()):
        return functional.linear(x, _dequantised(blocks, kind).to(x.dtype))
    return cpu.packed_linear(x, blocks, KINDS[kind].code)


def _columns(blocks: Tensor, kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: there are {', '.join(KINDS)}")
    size = KINDS[kind].bytes
    if blocks.ndim != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % size:
        raise ValueError(f"blocks of {kind} must be uint8 (R, a multiple of {size}): {_is(blocks)}")
    return blocks.shape[1] // size * KINDS[kind].columns


def _is(t: Tensor) -> str:
    return f"it is {t.dtype} {tuple(t.shape)} on {t.device}"


def _native(blocks: Tensor) -> bool:
    return cpu.usable() and blocks.device.type == "cpu"


def _dequantised(blocks: Tensor, kind: str) -> Tensor:
    import gguf

    if not blocks.numel():
        return torch.empty(len(blocks), _columns(blocks, kind), device=blocks.device)
    raw = np.ascontiguousarray(blocks.cpu().numpy())
    with np.errstate(all="ignore"):
        values = gguf.dequantize(raw, gguf.GGMLQuantizationType(KINDS[kind].code))
    return torch.from_numpy(values).to(blocks.device)
