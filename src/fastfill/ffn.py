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

from fastfill.eight_bits import on_grid
from fastfill.kernels import int8, rounded
from fastfill.kernels.int8 import Scales

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
    """gate, up: (F, H). down: (H, F). gate_bias, up_bias: (F,), down_bias: (H,), or None. activation: one of `ACTIVATIONS`.

    scales: of weights in eight bits; activations are then rounded on the way (`kernels.int8`). dtype: what is computed in.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    scales: Scales | None = None
    compute: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of tokens and biases: that of the weights, but for weights in eight bits."""
        return self.compute or self.gate.dtype

    @property
    def neurons(self) -> int:
        """F."""
        return self.gate.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.gate.shape[1]

    def unpacked(self) -> FFN:
        """As the sparse op reads it: itself, but for packed weights, whose int8 rows hold until this thread's next call."""
        return self

    def wide(self, dtype: torch.dtype | None = None) -> FFN:
        """Packed weights in the model's type, or in another; any other FFN as it is."""
        return self

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
        if self.scales:
            rows = x.reshape(-1, x.shape[-1])
            gate = int8.linear(rows, self.gate, self.scales.gate, self.gate_bias)
            up = int8.linear(rows, self.up, self.scales.up, self.up_bias)
            return gate.view(*x.shape[:-1], -1), up.view(*x.shape[:-1], -1)
        return F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias)

    def output(self, h: Tensor) -> Tensor:
        """(..., F) -> (..., H)."""
        if self.scales:
            y = int8.down(h.reshape(-1, h.shape[-1]), self.down.t(), self.scales.down)
            y = y if self.down_bias is None else y + self.down_bias
            return y.view(*h.shape[:-1], -1).to(self.dtype)
        return F.linear(h, self.down, self.down_bias)

    def start(self, x: Tensor, y: Tensor | None = None) -> Tensor | None:
        """What the sparse op adds to, and may overwrite, for x (T, H): y (T, H) with down's bias; None where neither is."""
        if self.down_bias is None:
            return y
        return self.down_bias.expand_as(x).clone() if y is None else y + self.down_bias

    @torch.no_grad()
    def int8(self, scales: Scales | None = None) -> FFN:
        """The same with weights in eight bits, each row (of down: each channel of H) over its largest magnitude / 127. scales:
        those of int8 rows that the weights are made of already (`eight_bits.on_grid`, which raises UserError)."""
        weights = (self.gate, self.up, self.down)
        ways = [(w, None) for w in weights] if scales is None else list(zip(weights, scales, strict=True))
        (gate, g), (up, u), (down, d) = (rounded(w) if by is None else (on_grid(w, by), by) for w, by in ways)
        down = down.t().contiguous().t()  # rows of down^T are what the kernel reads
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        b, c, e = (None if bias is None else bias.detach() for bias in biases)
        return FFN(gate, up, down, self.activation, b, c, e, Scales(g, u, d), self.dtype)

    def down_norm(self) -> Tensor:
        """(F,): the length of each neuron's column of down. fp32."""
        down = self.down.float()
        return (down if self.scales is None else down * self.scales.down[:, None]).norm(dim=0)

    def importance(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, F): (h_tj ||down_j||)^2, the energy that neuron j adds to token t's output. fp32. Ours."""
        return energy(self.hidden(x), self.down_norm())


def energy(h: Tensor, norm: Tensor) -> Tensor:
    """`FFN.importance` from h (T, F) and `FFN.down_norm` (F,)."""
    return (h.float() * norm).square()
