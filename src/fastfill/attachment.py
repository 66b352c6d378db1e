"""Put an artifact on a loaded model: swap the forward of each FFN instance, and put it back bit-identical afterwards."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import blocks, families, kernels
from fastfill.artifact import Artifact
from fastfill.blocks import Plan
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.predictor import BASELINES, Predictor
from fastfill.sparse_ffn import SparseFFN, current_plan

LEARNED = "learned"


@dataclasses.dataclass
class Stats:
    """Tokens (padding not counted) that passed through the model while attached, and forward calls."""

    sparse_tokens: int = 0
    dense_tokens: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0

    @property
    def sparse_share(self) -> float:
        return self.sparse_tokens / max(1, self.sparse_tokens + self.dense_tokens)


class Attachment:
    """A model with an artifact on it. Use it in a `with` statement, or call `detach()` yourself.

    config: the settings in force. kept: neurons kept per layer. stats: sparse and dense tokens so far.
    extra_bytes: memory that attaching added (transposed down weights, predictors, compensators).
    """

    def __init__(self, model: Any, anatomy: families.Anatomy, config: PrefillConfig, ffns: list[SparseFFN]):
        self.model, self.config = model, config
        self.kept = [ffn.kept for ffn in ffns]
        self.ffns = ffns
        self.stats = Stats()
        self._anatomy = anatomy
        self._lock = threading.Lock()
        self._force_dense = threading.local()
        self._running = threading.local()
        self._thins = any(ffn.kept < anatomy.intermediate for ffn in ffns)  # False at sparsity 0: all of it is dense
        self._parameters = list(inspect.signature(anatomy.base.forward).parameters)
        self._restore: list[tuple[torch.nn.Module, Any]] = []
        self._hooks: list[Any] = []

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The FFN modules, layer by layer."""
        return [ffn.module for ffn in self._anatomy.ffns]

    @property
    def choices(self) -> dict[str, Any]:
        """What results depend on beside `config`."""
        first = self.ffns[0]
        predictor, compensator = type(first.predictor).__name__, first.compensator is not None
        return {"kernel": kernels.choose(first.kernel, first.gate), "predictor": predictor, "compensator": compensator}

    @property
    def extra_bytes(self) -> int:
        return sum(ffn.extra_bytes for ffn in self.ffns)

    def _swap(self) -> None:
        for part, sparse in zip(self._anatomy.ffns, self.ffns, strict=True):
            self._restore.append((part.module, part.module.__dict__.get("forward")))
            part.module.forward = sparse
        base = self._anatomy.base
        self._hooks.append(base.register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks.append(base.register_forward_hook(self._after, always_call=True))

    def detach(self) -> None:
        """Restore the model. Safe to call twice."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._restore:
            module, forward = self._restore.pop()
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, this thread's calls are dense, whatever their length."""
        before = getattr(self._force_dense, "on", False)
        self._force_dense.on = True
        try:
            yield
        finally:
            self._force_dense.on = before

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = current_plan.get()  # of a model that is running around this one
        current_plan.set(None)
        self._outer().append(outer)
        named = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return  # the model will say what is missing
        shape = (tokens.shape[0], tokens.shape[1])
        rows = call_rows(shape, named.get("attention_mask"), named)
        valid = sum(last - first for first, last, _ in rows) if rows else shape[0] * shape[1]
        plan = None
        if rows and self._thins and not getattr(self._force_dense, "on", False):
            plan = blocks.make_plan(rows, shape[1], self.config)
        current_plan.set(plan)
        sparse = plan.sparse_tokens if plan else 0
        with self._lock:
            self.stats.sparse_tokens += sparse
            self.stats.dense_tokens += valid - sparse
            self.stats.sparse_calls += sparse > 0
            self.stats.dense_calls += sparse == 0

    def _after(self, *_: Any) -> None:
        outer = self._outer()
        current_plan.set(outer.pop() if outer else None)

    def _outer(self) -> list[Plan | None]:
        """This thread's plans of the calls around the running one; nearly always empty."""
        if not hasattr(self._running, "outer"):
            self._running.outer = []
        return self._running.outer


def call_rows(shape: tuple[int, int], mask: Any, kwargs: dict[str, Any]) -> list[tuple[int, int, int]] | None:
    """Which rows of a base-model call are tokens, and at which positions; None where that cannot be told: such a call is dense.

    shape: (batch, T). mask: the 2-D attention mask, or None. Packed batches (cu_seq_lens, positions that restart) and
    ready-made 4-D masks are not understood and stay dense.
    """
    batch, tokens = shape
    if tokens < 2 or any("cu_seq" in name and value is not None for name, value in kwargs.items()):
        return None
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= past + tokens:
        rows = blocks.rows_from_mask(mask[:, : past + tokens], past)  # a static cache may bring a longer mask
    elif mask is None:
        rows = [(0, tokens, past)] * batch
    else:
        return None
    positions = kwargs.get("position_ids")
    if rows and isinstance(positions, torch.Tensor):
        if positions.ndim != 2 or positions.shape[1] != tokens:
            return None
        host = positions.cpu().expand(batch, -1)
        for row, (first, last, _) in zip(host, rows, strict=True):
            if last > first and bool((row[first:last].diff() != 1).any()):
                return None
    return rows


def check_detached(anatomy: families.Anatomy) -> None:
    """Raise UserError if an artifact is on the model."""
    if any(isinstance(ffn.module.__dict__.get("forward"), SparseFFN) for ffn in anatomy.ffns):
        raise UserError("This model is already attached; detach it first (leave the `with`, or call detach()).")


def attach(
    model: Any,
    artifact: Artifact | str | Path,
    *,
    sparsity: float | None = None,
    block_size: int | None = None,
    min_tokens: int | None = None,
    dense_tail: int | None = None,
    predictor: str = LEARNED,
    compensator: bool = True,
    kernel: str = "auto",
) -> Attachment:
    """Make a loaded `transformers` model read prompts with a sparse FFN.

    sparsity, block_size, min_tokens, dense_tail: override the artifact's settings (`PrefillConfig`). predictor: "learned" or a
    baseline (oracle, static, first-block, low-rank, random). compensator: False leaves the correction out.
    kernel: see `fastfill.kernels`. Decode steps and short calls stay dense and unchanged.

    Raises UserError for a model or an artifact that does not fit, or a model that is attached already.
    """
    if not isinstance(artifact, Artifact):
        artifact = artifacts.load(artifact)
    anatomy = families.dissect(model)
    check_detached(anatomy)
    artifact.check_partner(anatomy)
    changes: dict[str, Any] = {
        "sparsity": sparsity,
        "block_size": block_size,
        "min_tokens": min_tokens,
        "dense_tail": dense_tail,
    }
    config = dataclasses.replace(artifact.prefill, **{k: v for k, v in changes.items() if v is not None})
    if predictor != LEARNED and predictor not in BASELINES:
        raise UserError(f"predictor {predictor!r} is not known; use one of {', '.join([LEARNED, *BASELINES])}.")
    try:
        kernels.choose(kernel, anatomy.ffns[0].gate)
    except ValueError as error:
        raise UserError(str(error)) from error

    def predictor_for(layer: int, part: families.FFN) -> Predictor:
        if predictor == LEARNED:
            return artifact.predictor(layer, part.gate, kernel)
        return BASELINES[predictor](part, layer, artifact.statistics(layer, part.gate), artifact.ranks["predictor"])

    ffns = [
        SparseFFN(
            dense=part.module.forward,
            gate=part.gate,
            up=part.up,
            down_t=part.down.t().contiguous() if kept < anatomy.intermediate else part.down.new_empty(0),
            kept=kept,
            predictor=predictor_for(layer, part),
            compensator=artifact.compensator(layer, kept, part.gate, kernel) if compensator else None,
            kernel=kernel,
        )
        for layer, (part, kept) in enumerate(zip(anatomy.ffns, artifact.kept(config.sparsity), strict=True))
    ]
    attachment = Attachment(model, anatomy, config, ffns)
    attachment._swap()
    return attachment
