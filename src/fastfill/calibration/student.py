"""The sparse forward in a differentiable form, for distillation: skipped neurons are masked rather than left out.

Equal to `sparse_ffn.SparseFFN` to rounding (a test holds them together); only this one has gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from fastfill import select
from fastfill.calibration.fit import block_scores
from fastfill.families import FFN, Anatomy

Weights = dict[str, torch.Tensor]


class StudentFFN:
    """Stands in for one FFN's forward during distillation.

    The dense head (the first `dense_head` tokens of the sequence) and what does not fill a block stay dense, and so does the
    share `answer` at the sequence's end, which reads a sparse prompt as an answer does. The predictor gets its gradient
    through a soft gate (straight-through, ours): forward 1 for kept and 0 for skipped neurons, backward the slope of
    sigmoid((log score - log score of the K-th) / temperature).
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
        self.block, self.head, self.temperature, self.answer = block, -(-head // block) * block, temperature, answer

    def stop(self, tokens: int) -> int:
        """Where the sparse part of a sequence of so many tokens ends. One block is sparse if any can be."""
        prompt = min(tokens, max(self.head + self.block, int(tokens * (1 - self.answer))))
        return prompt // self.block * self.block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, T, H) -> (1, T, H)."""
        h = F.silu(F.linear(x, self.ffn.gate)) * F.linear(x, self.ffn.up)
        stop = self.stop(x.shape[1])
        if self.kept == h.shape[-1] or stop <= self.head:
            return F.linear(h, self.ffn.down)
        rows = x[0, self.head : stop]
        gate = self.gate(rows).to(h.dtype)  # (N, F)
        middle = h[0, self.head : stop].view(-1, self.block, h.shape[-1]) * gate[:, None]
        masked = torch.cat([h[0, : self.head], middle.view(-1, h.shape[-1]), h[0, stop:]])
        y = F.linear(masked, self.ffn.down)
        correction = F.pad(self.compensate(rows), (0, 0, self.head, x.shape[1] - stop))
        return (y + correction)[None]

    def gate(self, rows: torch.Tensor) -> torch.Tensor:
        weights = {name: self.weights[f"predictor.{name}"] for name in ("w_in", "w_out", "bias")}
        scores = block_scores(rows, weights, self.block).clamp_min(1e-12).log()
        ids = select.top_k(scores.detach(), self.kept).long()
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


@contextmanager
def swapped(anatomy: Anatomy, students: list[StudentFFN]) -> Iterator[None]:
    """Run the model with the students in place of its FFNs; restored in any case."""
    before = [ffn.module.__dict__.get("forward") for ffn in anatomy.ffns]
    try:
        for ffn, student in zip(anatomy.ffns, students, strict=True):
            ffn.module.forward = student
        yield
    finally:
        for ffn, forward in zip(anatomy.ffns, before, strict=True):
            ffn.module.__dict__.pop("forward", None)
            if forward is not None:
                ffn.module.forward = forward
