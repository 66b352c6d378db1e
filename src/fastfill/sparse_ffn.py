"""START HERE: the sparse feed-forward network, one layer, one call. It reads like the picture in docs/design.md.

Shape letters used everywhere: T tokens, N blocks, B block size, H hidden size, F intermediate size, K neurons kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fastfill import compiling
from fastfill.blocks import Plan
from fastfill.compensator import Compensator
from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.kernels import Kernel
from fastfill.predictor import Predictor

# The plan of the call that is running now; set around the base model's forward, local to thread and task.
current_plan: ContextVar[Plan | None] = ContextVar("fastfill_plan", default=None)
# Whether such a call is running at all: a dense one has no plan either.
in_call: ContextVar[bool] = ContextVar("fastfill_in_call", default=False)
# Whether the model computes as it was loaded, though eight bits are asked for: inside `Attachment.dense()`.
as_loaded: ContextVar[bool] = ContextVar("fastfill_as_loaded", default=False)

# Told of each step of a sparse forward: (step, layer's FFN, plan, what it gave). The steps in their order, and what they give:
#   "input" (batch * T, H), "scores" (N, F), "selected" ids (N, K), "corrected" (batch * T, H) or None, "output" (batch * T, H).
Tap = Callable[[str, "SparseFFN", Plan, torch.Tensor | None], None]
Value = TypeVar("Value", bound="torch.Tensor | None")


@dataclass(eq=False)
class SparseFFN:
    """Stands in for the forward of one FFN module.

    dense: that forward. ffn: its weights. down_t: (F, H), a copy of its down, transposed. kept: K. taps: observers, clocks.
    on: False passes every call to `dense`. all_neurons: the dense FFN in eight bits, where the weights are: for layers that
    skip nothing, with dense_int8 for calls without a plan. own: the module's weights that eight bits stand for. copied: whether
    rows in eight bits are beside the module's own. last: of the last layer, whose output no other layer reads.
    """

    dense: Callable[[torch.Tensor], torch.Tensor]
    ffn: FFN
    down_t: torch.Tensor
    kept: int
    predictor: Predictor
    compensator: Compensator | None
    kernel: Kernel
    taps: list[Tap] = field(default_factory=list, repr=False)
    on: bool = True
    all_neurons: AllNeurons | None = None
    dense_int8: bool = False
    own: tuple[torch.Tensor | None, ...] = ()
    copied: bool = True
    last: bool = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is held beside the model's own weights: transposed down, predictor, compensator."""
        eight = (self.ffn.gate, self.ffn.up, *self.ffn.scales) if self.ffn.scales and self.copied else ()
        parts = [
            self.down_t,
            *eight,
            *vars(self.predictor).values(),
            *(vars(self.compensator).values() if self.compensator else ()),
        ]
        return [part for part in parts if isinstance(part, torch.Tensor)]

    @property
    def extra_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, T, H) -> (batch, T, H)."""
        if torch.compiler.is_dynamo_compiling():
            return compiling.traced_states(self, x)
        plan = current_plan.get()
        eight, thin = self.all_neurons, self.kept < self.ffn.neurons
        if not self.on or not (thin or eight):
            return self.dense(x)
        if plan is None or x.shape[:-1] != (plan.batch, plan.tokens):
            _refuse_recomputation()
            return without_gradient(eight, x, *self.own) if eight and dense_in_int8(self.dense_int8) else self.dense(x)
        if eight and not thin:
            plan.runs.append(True)
            return without_gradient(eight, x, *self.own)
        return without_gradient(self._planned, x, *self.own) if eight else self._planned(x)

    def _planned(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, T, H) -> (batch, T, H), in a call with a plan."""
        plan = current_plan.get()
        assert plan is not None
        with torch.autocast(x.device.type, enabled=False):  # the weights' type is computed in, autocast or not
            return self._sparse(x.reshape(-1, x.shape[-1]).to(self.ffn.dtype), plan).view_as(x).to(x.dtype)

    def _sparse(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x: (batch * T, H) -> (batch * T, H)."""
        if not plan.spans or (plan.unread and self.last):
            return self._dense_rows(x, plan)
        ffn, kernel = self.ffn, self.kernel
        self._tell("input", plan, x)
        scores = self._tell("scores", plan, self.predictor.scores(x.detach(), plan, kernel))  # (N, F)
        ids = self._tell("selected", plan, kernel.top_k(scores, self.kept))  # (N, K)
        correction = self._tell("corrected", plan, self._correction(x, plan))  # (batch * T, H)
        # Dense rows ride along as blocks that keep all neurons; in a call of their own they cost 5 % of the FFN at T = 2,048.
        all_ids, bounds = plan.with_dense(ids, ffn.neurons)
        weights = ffn.unpacked()
        y = kernel.sparse_ffn(x, weights, self._down_t(weights), all_ids, rows=plan.rows, id_offsets=bounds, init=correction)
        plan.runs.append(True)
        return self._tell("output", plan, y)

    def _dense_rows(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x: (batch * T, H) -> (batch * T, H). There are no sparse rows, or nobody reads them: their blocks keep no neuron, and
        nothing is predicted or corrected."""
        none = torch.empty(plan.blocks, 0, dtype=torch.int32, device=x.device)
        ids, bounds = plan.with_dense(none, self.ffn.neurons)
        weights = self.ffn.unpacked()
        start = self.ffn.start(x, None)
        y = self.kernel.sparse_ffn(x, weights, self._down_t(weights), ids, rows=plan.rows, id_offsets=bounds, init=start)
        for span in plan.spans:
            y[span.start : span.stop] = plan.blank
        plan.runs.append(False)
        return y

    def _correction(self, x: torch.Tensor, plan: Plan) -> torch.Tensor | None:
        """What the kernel adds to: the compensator's output on sparse rows, down's bias on all."""
        return self.ffn.start(x, plan.clear_dense(self.compensator(x, self.kernel)) if self.compensator else None)

    def _tell(self, step: str, plan: Plan, value: Value) -> Value:
        for tap in self.taps:
            tap(step, self, plan, value)
        return value

    def _down_t(self, weights: FFN) -> torch.Tensor:
        """Made anew where down learns: the copy that is kept has no gradient. That of packed weights is unpacked with them."""
        if self.ffn.down.requires_grad and torch.is_grad_enabled():
            return self.ffn.down.t().contiguous()
        return self.down_t if weights is self.ffn else weights.down.t()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is detached: it gets the forward that this one stands in for, bound to the copy."""
        return copy.deepcopy(self.dense, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """So is a pickled model, and loading it needs nothing of ours."""
        return copy.copy, (self.dense,)


class AllNeurons:
    """The dense FFN by the sparse kernel: all neurons kept, nothing predicted or corrected."""

    def __init__(self, ffn: FFN, down_t: torch.Tensor, kernel: Kernel):
        self.ffn, self.down_t, self.kernel = ffn, down_t, kernel
        self.ids = torch.arange(ffn.neurons, dtype=torch.int32, device=ffn.gate.device)[None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, T, H) -> (batch, T, H)."""
        rows, weights = x.reshape(-1, x.shape[-1]).to(self.ffn.dtype), self.ffn.unpacked()
        down_t = self.down_t if weights is self.ffn else weights.down.t()
        y = self.kernel.sparse_ffn(rows, weights, down_t, self.ids, init=self.ffn.start(rows))
        return y.view_as(x).to(x.dtype)


def dense_in_int8(wanted: bool) -> bool:
    """Whether a part without a plan computes in eight bits now. wanted: by `PrefillConfig.dense_weights`."""
    return wanted and in_call.get() and not as_loaded.get()


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *weights: Any) -> torch.Tensor:
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UserError('Eight bits have no gradient; for training, attach with weights="model".')


def without_gradient(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *weights: torch.Tensor | None
) -> torch.Tensor:
    """run(x), in eight bits made of the weights. A gradient of x or of the weights would be wrong or missing: the backward pass
    raises UserError."""
    if not torch.is_grad_enabled():
        return run(x)
    y: torch.Tensor = _NoGradient.apply(run, x, *weights)
    return y


def _refuse_recomputation() -> None:
    """Raise UserError inside a backward pass that computes the FFN again without its call, and so without its plan."""
    if torch.is_grad_enabled() and not in_call.get() and torch._C._current_graph_task_id() != -1:
        raise UserError(
            "The backward pass computes an FFN again outside of the model's call: only the model's own activation "
            "checkpointing is followed (model.gradient_checkpointing_enable()); use that, or detach for training."
        )


@contextmanager
def tapped(ffns: Sequence[SparseFFN], tap: Tap) -> Iterator[None]:
    """While the block runs, the layers tell `tap`; afterwards, an exception or not, they do not."""
    try:
        for ffn in ffns:
            ffn.taps.append(tap)
        yield
    finally:
        for ffn in ffns:
            if tap in ffn.taps:
                ffn.taps.remove(tap)
