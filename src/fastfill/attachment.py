"""Put an artifact on a loaded model: swap the forward of each FFN instance, and put it back bit-identical afterwards."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import families, kernels
from fastfill.artifact import Artifact
from fastfill.calls import Calls, GenerateHook, Prompt, Stats
from fastfill.config import PrefillConfig, check_integer
from fastfill.errors import UserError
from fastfill.predictor import BASELINES, Predictor
from fastfill.sparse_ffn import SparseFFN

__all__ = ["LEARNED", "Attachment", "Stats", "attach", "check_detached"]

LEARNED = "learned"


class Attachment:
    """A model with an artifact on it. Use it in a `with` statement, or call `detach()` yourself.

    config: the settings in force. kept: neurons kept per layer. stats: sparse and dense tokens so far.
    extra_bytes: memory that attaching added (transposed down weights, predictors, compensators).
    """

    def __init__(self, model: Any, anatomy: families.Anatomy, config: PrefillConfig, ffns: list[SparseFFN]):
        self.model, self.config = model, config
        self.kept = [ffn.kept for ffn in ffns]
        self.ffns = ffns
        self._anatomy = anatomy
        thins = any(ffn.kept < anatomy.intermediate for ffn in ffns)  # False at sparsity 0: all of it is dense
        self._calls = Calls(config, list(inspect.signature(anatomy.base.forward).parameters), thins)
        self.stats = self._calls.stats
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
        if hasattr(self.model, "generate"):
            self._hooks.append(GenerateHook(self.model, self._calls))

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

    def dense(self) -> AbstractContextManager[None]:
        """Inside, this thread's calls are dense, whatever their length."""
        return self._calls.saying(dense=True)

    def prompt(self, end: int) -> AbstractContextManager[None]:
        """Inside, this thread reads one prompt, and its first `end` columns are it: read it in as many pieces as you like, one
        behind the other through a cache, or again and again without; what lies behind it is dense.

        end: tokens, those in the cache and left padding included: what `attention_mask.shape[1]` is at the prompt's end.
        `model.generate` says this by itself. The rule in full: `fastfill.calls`. Raises UserError for what is no such number.
        """
        check_integer("end", end, 1)
        return self._calls.saying(prompt=Prompt(end, given=True))

    def _before(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.before(args, kwargs)

    def _after(self, _module: Any, _args: tuple[Any, ...], output: Any) -> None:
        self._calls.after(output is not None)


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
