"""FFN weights that stay as a GGUF file has them, 4 to 8 bits each, and are unpacked where they are used.

Sparse prompts are computed in eight bits: a layer is unpacked to int8 once a call, with the largest magnitude of a row over
127 as its scale, and the op runs on that. All else is computed with the values in the file: long calls unpack a Linear to the
model's type, short ones multiply block by block.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.kernels import packed
from fastfill.kernels.int8 import Scales

FEW = 8
"""Tokens up to which a Linear multiplies block by block; more are faster with the weight unpacked."""


class PackedLinear(nn.Module):
    """A Linear without bias whose weight (O, I) is packed. blocks: (O, bytes) uint8, the rows as in the file. kind: GGUF's name
    of their type. like: empty, of the model's type, with which it is cast."""

    blocks: Tensor
    like: Tensor

    def __init__(self, blocks: Tensor, kind: str, dtype: torch.dtype):
        super().__init__()
        found = packed.KINDS[kind]
        self.kind = kind
        self.out_features, self.in_features = len(blocks), blocks.shape[1] // found.bytes * found.columns
        self.register_buffer("blocks", blocks)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return self.like.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > FEW or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.values(x.dtype))
        return packed.linear(rows, self.blocks, self.kind).view(*x.shape[:-1], self.out_features)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I), in the model's type where no other is given."""
        return packed.unpack(self.blocks, self.kind, dtype or self.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


@dataclass(frozen=True, eq=False)
class PackedFFN(FFN):
    """An FFN of which gate, up (F, bytes) and down (H, bytes) are blocks. linears: those that hold them, in this order.
    inverses: how their rows are rounded to int8 (`kernels.packed.scales`); with scales, once they are known."""

    linears: tuple[PackedLinear, ...] = ()
    inverses: tuple[Tensor, ...] = ()

    @property
    def hidden_size(self) -> int:
        return len(self.down)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.wide().halves(x)

    def output(self, h: Tensor) -> Tensor:
        return F.linear(h, self.linears[2].values())

    def down_norm(self) -> Tensor:
        return self.wide().down_norm()

    def wide(self, dtype: torch.dtype | None = None) -> FFN:
        gate, up, down = (linear.values(dtype) for linear in self.linears)
        return FFN(gate, up, down, self.activation)

    @torch.no_grad()
    def int8(self, scales: Scales | None = None) -> PackedFFN:
        """With the scales of the rows that it is unpacked to."""
        found = [packed.scales(linear.blocks, linear.kind) for linear in self.linears]
        return dataclasses.replace(
            self, scales=Scales(*(one.scale for one in found)), inverses=tuple(one.inverse for one in found)
        )

    @torch.no_grad()
    def unpacked(self) -> FFN:
        gate, up, down_t = _memory.of(self.neurons, self.hidden_size)
        for linear, inverse, out in zip(self.linears, self.inverses, (gate, up, down_t), strict=True):
            packed.unpack_int8(linear.blocks, linear.kind, inverse, out, transposed=out is down_t)
        return FFN(gate, up, down_t.t(), self.activation, scales=self.scales, compute=self.compute)


class _Memory(threading.local):
    """A layer's rows in eight bits: three matrices (F, H), kept between calls because fresh pages cost more than unpacking."""

    _held: Tensor | None = None

    def of(self, neurons: int, hidden: int) -> Tensor:
        """(3, F, H) int8."""
        if self._held is None or self._held.shape[1:] != (neurons, hidden):
            with torch.inference_mode(False):  # what is made under it could not be written to outside
                self._held = torch.empty(3, neurons, hidden, dtype=torch.int8)
        return self._held


_memory = _Memory()


def ffn_of(linears: Sequence[PackedLinear], activation: str) -> PackedFFN:
    """The FFN that packed Linears are: gate, up, down."""
    gate, up, down = linears
    return PackedFFN(gate.blocks, up.blocks, down.blocks, activation, compute=gate.dtype, linears=(gate, up, down))


def put(model: nn.Module, name: str, blocks: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Replace the Linear of that name in a model. Raises UserError for values that are not finite."""
    parent, _, child = name.rpartition(".")
    if not bool(packed.scales(blocks, kind).scale.isfinite().all()):
        raise UserError(f"The file is damaged: {name} has values that are not finite.")
    setattr(model.get_submodule(parent), child, PackedLinear(blocks, kind, dtype))
