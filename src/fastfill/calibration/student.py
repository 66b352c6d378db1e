"""The sparse forward in a differentiable form, for distillation: skipped neurons are masked, not left out.

Equal to `sparse_ffn.SparseFFN` to rounding (a test holds them together); only this one has gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from fastfill import kernels
from fastfill.calibration.fit import TENSORS, block_sums, cross_entropy, logits
from fastfill.families import Anatomy
from fastfill.ffn import FFN
from fastfill.swap import swapped

Weights = dict[str, torch.Tensor]


class StudentFFN:
    """Stands in for one FFN's forward during distillation.

    The first `head` tokens of the sequence, whole blocks (`PrefillConfig.first_sparse`), and what does not fill a block stay
    dense, and so does the share `answer` at the sequence's end, teacher-forced after a sparse prompt. Where gradients are
    made, the predictor gets that of its fit (`fit.cross_entropy`), on the inputs and activations of this run (ours): what
    it selects has none.
    """

    def __init__(
        self,
        ffn: FFN,
        weights: Weights,
        kept: int,
        linear_rank: int,
        block: int,
        head: int,
        answer: float = 0.0,
    ):
        self.ffn, self.weights, self.kept, self.linear_rank = ffn, weights, kept, linear_rank
        self.block, self.head, self.answer = block, head, answer
        self.norm = ffn.down_norm()

    def stop(self, tokens: int) -> int:
        """Where the sparse part of a sequence of so many tokens ends. One block is sparse if any can be."""
        prompt = min(tokens, max(self.head + self.block, int(tokens * (1 - self.answer))))
        return prompt // self.block * self.block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, T, H) -> (1, T, H)."""
        stop = self.stop(x.shape[1])
        if self.kept == self.ffn.neurons or stop <= self.head:
            return self.ffn(x)
        rows = slice(self.head, stop)
        learning = torch.is_grad_enabled() and self.weights["predictor.w_in"].requires_grad
        select = functools.partial(self.select, learning=learning)
        y = _MaskedFFN.apply(x[0], self.ffn, rows, select)
        correction = F.pad(self.compensate(x[0, rows]), (0, 0, self.head, x.shape[1] - stop))
        return (y + correction)[None]

    def select(self, x: torch.Tensor, h: torch.Tensor, learning: bool) -> torch.Tensor:
        """x: (N * B, H). h: (N * B, F), its activations, none left out. Returns (N, F): 1 for kept neurons, 0 for others."""
        weights = {name: self.weights[f"predictor.{name}"] for name in TENSORS}
        with torch.set_grad_enabled(learning):
            predicted = logits(x, weights)
            if learning:
                cross_entropy(predicted, h, self.norm).mean().backward()
        scores = block_sums(predicted.detach(), self.block)
        return torch.zeros_like(scores).scatter_(1, kernels.top_k(scores, self.kept).long(), 1.0)

    def compensate(self, rows: torch.Tensor) -> torch.Tensor:
        w_in, w_out, bias = (self.weights[f"compensator.{n}"].to(rows.dtype) for n in TENSORS)
        if not len(w_in):  # as in `Artifact.compensator`: without any rank there is none, bias included
            return torch.zeros_like(rows)
        inner = F.linear(rows, w_in)
        mixed = torch.cat([inner[:, : self.linear_rank], F.silu(inner[:, self.linear_rank :])], 1)
        return F.linear(mixed, w_out, bias)


class _MaskedFFN(torch.autograd.Function):
    """`FFN` with h * mask in place of h; a gradient for x, none for the weights. By hand: autograd keeps eight (T, F) tensors
    where two do.

    x: (T, H). select: of the tokens `rows` of x, and of h, makes the mask (N, F) over their blocks; others are not masked.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ffn: FFN, rows: slice, select: Callable[..., torch.Tensor]) -> torch.Tensor:
        gate, up = ffn.halves(x)
        h = ffn.act.run(gate).mul_(up)
        mask = select(x[rows], h[rows])
        ctx.save_for_backward(gate, up, mask)
        ctx.ffn, ctx.rows = ffn, rows
        ctx.precision = torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type)
        return ffn.output(_masked(h, mask, rows))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gate, up, mask = ctx.saved_tensors
        dtype, enabled = ctx.precision
        with torch.autocast(gate.device.type, dtype, enabled=enabled):
            dh = _masked(F.linear(grads[0], ctx.ffn.down.T), mask, ctx.rows)
            dup = dh * ctx.ffn.act.run(gate)
            dgate = ctx.ffn.act.backward(dh.mul_(up), gate)
            return F.linear(dgate, ctx.ffn.gate.T) + F.linear(dup, ctx.ffn.up.T), None, None, None


def _masked(h: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """h (T, F), its `rows` times their block's mask (N, F), in place."""
    h[rows].view(len(mask), -1, h.shape[1]).mul_(mask[:, None].to(h.dtype))
    return h


def stand_ins(anatomy: Anatomy, students: list[StudentFFN]) -> AbstractContextManager[None]:
    """Run the model with the students in place of its FFNs."""
    return swapped((ffn.module, student) for ffn, student in zip(anatomy.ffns, students, strict=True))
