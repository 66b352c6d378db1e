"""The arithmetic of one feed-forward network, here and nowhere else: y = (act(x gate^T + b) * (x up^T + c)) down^T + d.

T tokens, H hidden size, F intermediate size. A neuron is a row of gate, a row of up and a column of down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ops = torch.ops.aten


class Activation(NamedTuple):
    """run: z -> act(z). backward: (gradient of act(z), z) -> gradient of z."""

    run: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


# Name, as the kernels know it -> activation. The first is SwiGLU's, those of Gemma are "gelu_tanh".
ACTIVATIONS = {
    "silu": Activation(F.silu, _ops.silu_backward),
    "gelu": Activation(F.gelu, _ops.gelu_backward),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda grad, z: _ops.gelu_backward(grad, z, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, z: _ops.threshold_backward(grad, z, 0)),
}


@dataclass(frozen=True, eq=False)
class FFN:
    """gate, up: (F, H). down: (H, F). gate_bias, up_bias: (F,), down_bias: (H,), or None. activation: one of `ACTIVATIONS`."""

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def neurons(self) -> int:
        """F."""
        return self.gate.shape[0]

    @property
    def act(self) -> Activation:
        return ACTIVATIONS[self.activation]

    def __call__(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H): dense."""
        return self.output(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., F): what each neuron makes of each token."""
        gate, up = self.halves(x)
        return self.act.run(gate) * up

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) -> two (..., F): before the activation, and what it is multiplied by."""
        return F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)

    def output(self, h: Tensor) -> Tensor:
        """(..., F) -> (..., H)."""
        return F.linear(h, self.down, self.down_bias)

    def down_norm(self) -> Tensor:
        """(F,): the length of each neuron's column of down. fp32."""
        return self.down.float().norm(dim=0)

    def importance(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, F): (h_tj ||down_j||)^2, the energy that neuron j adds to token t's output. fp32. Ours."""
        return energy(self.hidden(x), self.down_norm())


def energy(h: Tensor, norm: Tensor) -> Tensor:
    """`FFN.importance` from h (T, F) and `FFN.down_norm` (F,)."""
    return (h.float() * norm).square()
