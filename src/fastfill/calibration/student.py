"""The sparse forward in a differentiable form, for distillation: skipped neurons are masked, not left out.

Equal to `sparse_ffn.SparseFFN` to rounding (a test holds them together); only this one has gradients.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from fastfill import kernels
from fastfill.calibration.fit import block_scores
from fastfill.families import Anatomy
from fastfill.ffn import FFN
from fastfill.swap import swapped

Weights = dict[str, torch.Tensor]


class StudentFFN:
    """Stands in for one FFN's forward during distillation.

    The first `head` tokens of the sequence, whole blocks (`PrefillConfig.first_sparse`), and what does not fill a block stay
    dense, and so does the share `answer` at the sequence's end, teacher-forced after a sparse prompt. The predictor
    gets its gradient through a soft gate (straight-through, ours): forward 1 for kept and 0 for skipped neurons, backward the
    slope of sigmoid((log score - log score of the K-th) / temperature).
    """

    def __init__(
        self,
        ffn: FFN,
        weights: Weights,
        kept: int,
        linear_rank: int,
        block: int,
        head: int,
        temperature: float,
        answer: float = 0.0,
    ):
        self.ffn, self.weights, self.kept, self.linear_rank = ffn, weights, kept, linear_rank
        self.block, self.head, self.temperature, self.answer = block, head, temperature, answer

    def stop(self, tokens: int) -> int:
        """Where the sparse part of a sequence of so many tokens ends. One block is sparse if any can be."""
        prompt = min(tokens, max(self.head + self.block, int(tokens * (1 - self.answer))))
        return prompt // self.block * self.block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, T, H) -> (1, T, H)."""
        stop = self.stop(x.shape[1])
        if self.kept == self.ffn.neurons or stop <= self.head:
            return self.ffn(x)
        rows = x[0, self.head : stop]
        y = _MaskedFFN.apply(x[0], self.gate(rows), self.ffn, slice(self.head, stop))
        correction = F.pad(self.compensate(rows), (0, 0, self.head, x.shape[1] - stop))
        return (y + correction)[None]

    def gate(self, rows: torch.Tensor) -> torch.Tensor:
        weights = {name: self.weights[f"predictor.{name}"] for name in ("w_in", "w_out", "bias")}
        scores = block_scores(rows, weights, self.block).clamp_min(1e-12).log()
        ids = kernels.top_k(scores.detach(), self.kept).long()
        hard = torch.zeros_like(scores).scatter_(1, ids, 1.0)
        if not scores.requires_grad:
            return hard
        threshold = scores.detach().gather(1, ids).amin(1, keepdim=True)
        soft = torch.sigmoid((scores - threshold) / self.temperature)
        return hard + soft - soft.detach()

    def compensate(self, rows: torch.Tensor) -> torch.Tensor:
        w_in, w_out, bias = (self.weights[f"compensator.{n}"].to(rows.dtype) for n in ("w_in", "w_out", "bias"))
        if not len(w_in):  # as in `Artifact.compensator`: without any rank there is none, bias included
            return torch.zeros_like(rows)
        inner = F.linear(rows, w_in)
        mixed = torch.cat([inner[:, : self.linear_rank], F.silu(inner[:, self.linear_rank :])], 1)
        return F.linear(mixed, w_out, bias)


class _MaskedFFN(torch.autograd.Function):
    """`FFN` with h * mask in place of h; gradients for x and mask, none for the weights. By hand: autograd
    keeps eight (T, F) tensors where two do.

    x: (T, H). mask: (N, F), over the blocks of the tokens `rows`; all others are not masked.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, ffn: FFN, rows: slice) -> torch.Tensor:
        gate, up = ffn.halves(x)
        ctx.save_for_backward(gate, up, mask)
        ctx.ffn, ctx.rows = ffn, rows
        ctx.precision = torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type)
        return ffn.output(_masked(ffn.act.run(gate).mul_(up), mask, rows))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        gate, up, mask = ctx.saved_tensors
        dtype, enabled = ctx.precision
        with torch.autocast(gate.device.type, dtype, enabled=enabled):
            dh = F.linear(grads[0], ctx.ffn.down.T)
            bent = ctx.ffn.act.run(gate)
            slope = (dh[ctx.rows] * bent[ctx.rows]).mul_(up[ctx.rows])
            dmask = slope.view(len(mask), -1, mask.shape[1]).sum(1, dtype=mask.dtype)
            dh = _masked(dh, mask, ctx.rows)
            dup = dh * bent
            dgate = ctx.ffn.act.backward(dh.mul_(up), gate)
            return F.linear(dgate, ctx.ffn.gate.T) + F.linear(dup, ctx.ffn.up.T), dmask, None, None


def _masked(h: torch.Tensor, mask: torch.Tensor, rows: slice) -> torch.Tensor:
    """h (T, F), its `rows` times their block's mask (N, F), in place."""
    h[rows].view(len(mask), -1, h.shape[1]).mul_(mask[:, None].to(h.dtype))
    return h


def stand_ins(anatomy: Anatomy, students: list[StudentFFN]) -> AbstractContextManager[None]:
    """Run the model with the students in place of its FFNs."""
    return swapped((ffn.module, student) for ffn, student in zip(anatomy.ffns, students, strict=True))
