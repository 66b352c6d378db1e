"""START HERE: the sparse feed-forward network, one layer, one call. It reads like the picture in docs/design.md.

Shape letters used everywhere: T tokens, N blocks, B block size, H hidden size, F intermediate size, K neurons kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from fastfill import kernels, select
from fastfill.blocks import Plan
from fastfill.compensator import Compensator
from fastfill.errors import UserError
from fastfill.predictor import Predictor

# The plan of the call that is running now; set around the base model's forward, local to thread and task.
current_plan: ContextVar[Plan | None] = ContextVar("fastfill_plan", default=None)
# Whether such a call is running at all: a dense one has no plan either.
in_call: ContextVar[bool] = ContextVar("fastfill_in_call", default=False)


@dataclass
class SparseFFN:
    """Stands in for the forward of one FFN module. gate, up, down_t: (F, H). kept: K.

    down: (H, F), what `down_t` was made from, where a gradient may be wanted of it. on: False passes every call to `dense`.
    """

    dense: Callable[[torch.Tensor], torch.Tensor]
    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    kept: int
    predictor: Predictor
    compensator: Compensator | None
    kernel: str = "auto"
    observer: Callable[[Plan, torch.Tensor], None] | None = field(default=None, repr=False)
    down: torch.Tensor | None = None
    on: bool = True

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held beside the model's own weights: transposed down, predictor, compensator."""
        parts = [self.down_t, *vars(self.predictor).values(), *(vars(self.compensator).values() if self.compensator else ())]
        return [part for part in parts if isinstance(part, torch.Tensor)]

    @property
    def extra_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, T, H) -> (batch, T, H)."""
        plan = current_plan.get()
        if not self.on or self.kept == self.gate.shape[0]:
            return self.dense(x)
        if plan is None or x.shape[:-1] != (plan.batch, plan.tokens):
            _refuse_recomputation()
            return self.dense(x)
        with torch.autocast(x.device.type, enabled=False):  # the weights' type is computed in, autocast or not
            return self._sparse(x.reshape(-1, x.shape[-1]).to(self.gate.dtype), plan).view_as(x).to(x.dtype)

    def _sparse(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x: (batch * T, H) -> (batch * T, H)."""
        scores = self.predictor.scores(x.detach(), plan)  # (N, F)
        ids = select.top_k(scores, self.kept, self.kernel)  # (N, K)
        if self.observer:
            self.observer(plan, ids)
        y = plan.clear_dense(self.compensator(x)) if self.compensator else None  # (batch * T, H)
        # Dense rows ride along as blocks that keep all neurons; in a call of their own they cost 5 % of the FFN at T = 2,048.
        all_ids, bounds = plan.with_dense(ids, self.gate.shape[0])
        weights = self.gate, self.up, self._down_t()
        y = kernels.sparse_ffn(x, *weights, all_ids, rows=plan.rows, id_offsets=bounds, init=y, out=y, kernel=self.kernel)
        plan.runs.append(True)
        return y

    def _down_t(self) -> torch.Tensor:
        """Made anew where `down` learns: the copy that is kept has no gradient."""
        if self.down is not None and self.down.requires_grad and torch.is_grad_enabled():
            return self.down.t().contiguous()
        return self.down_t

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is detached: it gets the forward that this one stands in for, bound to the copy."""
        return copy.deepcopy(self.dense, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """So is a pickled model, and reading it needs nothing of ours."""
        return copy.copy, (self.dense,)


def _refuse_recomputation() -> None:
    """Raise UserError inside a backward pass that computes the FFN again without its call, and so without its plan."""
    if torch.is_grad_enabled() and not in_call.get() and torch._C._current_graph_task_id() != -1:
        raise UserError(
            "The backward pass computes an FFN again outside of the model's call: only the model's own activation "
            "checkpointing is followed (model.gradient_checkpointing_enable()); use that, or detach for training."
        )
