"""The attention's Linears in eight bits, beside the FFNs': in a prompt they would be what takes most of the time left."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastfill.kernels import int8
from fastfill.sparse_ffn import as_loaded, current_plan, in_call


class Projection:
    """Stands in for the forward of one Linear: in eight bits in prompts with sparse blocks, and, with dense_int8, in all other
    calls of the model. By torch's own product of int8 matrices; the rounding is that of the FFNs (`kernels.int8`)."""

    def __init__(self, linear: nn.Linear, dense_int8: bool):
        self.linear, self.dense, self.dense_int8, self.on = linear, linear.forward, dense_int8, True
        self.renew()

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Round the weight that is there now."""
        self._stamp = self._now()
        self.weight, self.scale = int8.rounded(self.linear.weight)

    def stale(self) -> bool:
        return self._stamp != self._now()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def _now(self) -> tuple[Any, ...]:
        weight = self.linear.weight
        step = max(1, weight.numel() // 64)  # writing through `weight.data` leaves no other trace
        entries = weight.detach().reshape(-1)[::step].tolist() if weight.is_contiguous() else None
        return weight.data_ptr(), None if weight.is_inference() else weight._version, weight.dtype, entries

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) -> (..., N)."""
        eight = current_plan.get() is not None or (self.dense_int8 and in_call.get() and not as_loaded.get())
        if not self.on or not eight:
            return self.dense(x)
        y = int8.linear(x.reshape(-1, x.shape[-1]), self.weight, self.scale, self.linear.bias)
        return y.view(*x.shape[:-1], -1).to(self.linear.weight.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is detached."""
        return copy.deepcopy(self.dense, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.dense,)


def of(attentions: Iterable[nn.Module], dense_int8: bool) -> list[Projection]:
    """Those of the attentions' own plain Linears; what carries an adapter stays as it is."""
    linears = (child for attention in attentions for child in attention.children())
    return [Projection(linear, dense_int8) for linear in linears if type(linear) is nn.Linear]
