"""The attention's Linears in eight bits, beside the FFNs': in a prompt they would be what takes most of the time left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastfill import compiling, eight_bits, kernels, tensors
from fastfill.kernels import int8
from fastfill.sparse_ffn import current_plan, dense_in_int8, without_gradient


class Last(threading.local):
    """The last input that was rounded: query, key and value are asked for one behind the other, of the same states."""

    _of: tuple[torch.Tensor, int | None, tuple[torch.Tensor, torch.Tensor]] | None = None

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        version = None if x.is_inference() else x._version
        if self._of is None or self._of[0] is not x or self._of[1] != version:
            self._of = x, version, kernels.rounded(x.reshape(-1, x.shape[-1]))
        return self._of[2]


class Projection:
    """Stands in for the forward of one Linear: in eight bits in prompts with sparse blocks, and, with dense_int8, in all other
    calls of the model. By torch's own product of int8 matrices; the rounding is that of the FFNs (`kernels.int8`)."""

    def __init__(self, linear: nn.Linear, dense_int8: bool, last: Last):
        self.linear, self.dense, self.dense_int8, self.on = linear, linear.forward, dense_int8, True
        self.always = False  # in every call, while something is measured
        self._last = last
        self.renew()

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Round the weight that is there now, or take the int8 rows that it stands for."""
        weight = self._stored()
        self._stamp, self._sample = tensors.stamp(weight), tensors.diagonal(weight).clone()
        self.weight, self.scale = eight_bits.rows(self.linear) or kernels.rounded(self.linear.weight)

    def stale(self, samples: bool = True) -> bool:
        weight = self._stored()
        if self._stamp != tensors.stamp(weight):
            return True
        # Writing through `weight.data` leaves no other trace. Bytes: NaN equals NaN.
        return samples and not torch.equal(tensors.diagonal(weight).clone().view(torch.uint8), self._sample.view(torch.uint8))

    @property
    def nbytes(self) -> int:
        own = self.weight.data_ptr() == self._stored().data_ptr()
        return self.scale.nbytes + (0 if own else self.weight.nbytes)

    def _stored(self) -> torch.Tensor:
        return eight_bits.stored(self.linear.weight).detach()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., K) -> (..., N)."""
        if torch.compiler.is_dynamo_compiling():
            return compiling.traced_states(self, x)
        eight = self.always or dense_in_int8(self.dense_int8) or current_plan.get() is not None
        if not self.on or not eight:
            return self.dense(x)
        return without_gradient(self._eight, x, self.linear.weight, self.linear.bias)

    def _eight(self, x: torch.Tensor) -> torch.Tensor:
        y = int8.scaled(*self._last.rounded(x), self.weight, self.scale, self.linear.bias)
        here = x.device.type
        dtype = torch.get_autocast_dtype(here) if torch.is_autocast_enabled(here) else self.linear.weight.dtype
        return y.view(*x.shape[:-1], -1).to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is detached."""
        return copy.deepcopy(self.dense, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.dense,)


def of(attentions: Iterable[nn.Module], dense_int8: bool, came_rounded: bool = False) -> list[Projection]:
    """Those of the attentions' own plain Linears; what carries an adapter stays as it is. came_rounded: a model that came in
    eight bits; what it has in floating point stays so, too."""
    linears = (child for attention in attentions for child in attention.children() if type(child) is nn.Linear)
    last = Last()
    return [Projection(one, dense_int8, last) for one in linears if not came_rounded or eight_bits.scale(one) is not None]
