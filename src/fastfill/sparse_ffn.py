"""START HERE: the sparse feed-forward network, one layer, one call. It reads like the picture in docs/design.md.

Shape letters used everywhere: T tokens, N blocks, B block size, H hidden size, F intermediate size, K neurons kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from fastfill import kernels, select
from fastfill.blocks import Plan
from fastfill.compensator import Compensator
from fastfill.predictor import Predictor

# The plan of the call that is running now; set around the base model's forward, local to thread and task.
current_plan: ContextVar[Plan | None] = ContextVar("fastfill_plan", default=None)


@dataclass
class SparseFFN:
    """Stands in for the forward of one FFN module. gate, up, down_t: (F, H). kept: K."""

    dense: Callable[[torch.Tensor], torch.Tensor]
    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    kept: int
    predictor: Predictor
    compensator: Compensator | None
    kernel: str = "auto"
    observer: Callable[[Plan, torch.Tensor], None] | None = field(default=None, repr=False)

    @property
    def extra_bytes(self) -> int:
        """Memory beside the model's own weights: transposed down, predictor, compensator."""
        parts = [self.down_t, *vars(self.predictor).values(), *(vars(self.compensator).values() if self.compensator else ())]
        return sum(part.numel() * part.element_size() for part in parts if isinstance(part, torch.Tensor))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, T, H) -> (batch, T, H)."""
        plan = current_plan.get()
        if plan is None or self.kept == self.gate.shape[0] or x.shape[:-1] != (plan.batch, plan.tokens):
            return self.dense(x)
        flat = x.reshape(-1, x.shape[-1])  # (batch * T, H)
        scores = self.predictor.scores(flat, plan)  # (N, F)
        ids = select.top_k(scores, self.kept, self.kernel)  # (N, K)
        if self.observer:
            self.observer(plan, ids)
        y = plan.clear_dense(self.compensator(flat)) if self.compensator else None  # (batch * T, H)
        # Dense rows ride along as blocks that keep all neurons; in a call of their own they cost 5 % of the FFN at T = 2,048.
        all_ids, bounds = plan.with_dense(ids, self.gate.shape[0])
        weights = self.gate, self.up, self.down_t
        y = kernels.sparse_ffn(flat, *weights, all_ids, rows=plan.rows, id_offsets=bounds, init=y, out=y, kernel=self.kernel)
        plan.runs.append(True)
        return y.view_as(x)
