"""The highest sparsity that keeps a loss within a limit, on text that calibration set aside. Ours."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch

from fastfill import families, kv_cache
from fastfill.artifact import Artifact
from fastfill.attachment import attach
from fastfill.calibration.distill import kl_divergence
from fastfill.errors import UserError
from fastfill.progress import stage

SEQUENCES = 8
"""Set aside: what follows them is 2,048 tokens at the default length."""
STEP = 0.05
"""Sparsities are tried in steps of this size."""


@dataclass(frozen=True)
class Limit:
    """share: of the worth of the context that may be lost, or kl: nats a token; the other is None."""

    share: float | None
    kl: float | None

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`1%`: a share of the context's worth; `0.02`: KL in nats a token. Raises UserError for anything else."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text, re.ASCII)
        value = float(match[1]) if match else 0.0
        if match is None or not value > 0 or (match[2] and value >= 100):
            raise UserError(
                f"max_loss must be a share such as 1% (of the context's worth) or a KL such as 0.02 nats, not {text!r}."
            )
        return cls(value / 100, None) if match[2] else cls(None, value)

    def holds(self, loss: dict[str, float]) -> bool:
        return loss["context_lost"] <= self.share if self.share is not None else loss["kl"] <= (self.kl or 0.0)


def highest_sparsity(
    model: Any, artifact: Artifact, tokens: torch.Tensor, answer: float, limit: Limit
) -> list[dict[str, float]]:
    """What was measured, by rising sparsity; the last row within the limit is the choice, none if there is no such row.

    tokens: (S, T); of each the last `answer` share follows a prompt that was prefilled sparsely, as in service. Bisection,
    which takes the loss to rise with the sparsity.
    """
    part = int(tokens.shape[1] * (1 - (answer or 0.25)))
    readings = [_Reading(model, row[None].to(model.device), part) for row in tokens]
    low, high = 0, round(0.95 / STEP)
    losses: dict[int, dict[str, float]] = {}
    with stage("sparsity within the limit", high.bit_length()) as bar:
        while low < high:
            middle = -(-(low + high) // 2)
            losses[middle] = _loss(model, artifact, readings, round(middle * STEP, 2), part)
            low, high = (middle, high) if limit.holds(losses[middle]) else (low, middle - 1)
            bar.step(note=f"{middle * STEP:.0%}: KL {losses[middle]['kl']:.4f}")
    return [losses[key] for key in sorted(losses)]


def at_sparsity(artifact: Artifact, sparsity: float) -> Artifact:
    """The same artifact with another sparsity of its own, and its corrections scaled to it as attaching would scale them."""
    tensors = dict(artifact.tensors)
    for layer, kept in enumerate(artifact.kept(sparsity)):
        like = tensors[f"layers.{layer}.compensator.w_out"]
        scaled = artifact.compensator(layer, kept, like)
        if scaled is not None and kept < artifact.base_model["intermediate_size"]:
            tensors[f"layers.{layer}.compensator.w_out"] = scaled.w_out
            tensors[f"layers.{layer}.compensator.bias"] = scaled.bias
    return dataclasses.replace(artifact, tensors=tensors, prefill=dataclasses.replace(artifact.prefill, sparsity=sparsity))


class _Reading:
    """A sequence (1, T), computed densely. nll: of the tokens behind `part`, each in nats; none: without the tokens before."""

    @torch.no_grad()
    def __init__(self, model: Any, ids: torch.Tensor, part: int):
        self.ids, self.targets = ids, ids[0, part + 1 :]
        head = families.Head(model)
        self.logits = head(model.base_model(input_ids=ids, use_cache=False)[0][0, part:-1])
        self.nll = _nll(self.logits, self.targets)
        self.none = _nll(head(model.base_model(input_ids=ids[:, part:], use_cache=False)[0][0, :-1]), self.targets)


@torch.no_grad()
def _loss(model: Any, artifact: Artifact, readings: list[_Reading], sparsity: float, part: int) -> dict[str, float]:
    head = families.Head(model)
    kl, lost, worth, tokens = 0.0, 0.0, 0.0, 0
    with attach(model, artifact, sparsity=sparsity, min_tokens=1) as attachment:
        for reading in readings:
            read = model.base_model(input_ids=reading.ids[:, :part], use_cache=True)
            cache = kv_cache.given(model.base_model, kv_cache.left(read))
            with attachment.dense():
                follows = model.base_model(input_ids=reading.ids[:, part:], **cache)[0][0, :-1]
            logits = head(follows)
            kl += float(kl_divergence(reading.logits, logits).sum())
            lost += float((_nll(logits, reading.targets) - reading.nll).sum())
            worth += float((reading.none - reading.nll).sum())
            tokens += len(logits)
        if not attachment.stats.sparse_tokens:
            raise UserError(
                "The sequences set aside for --max-loss are too short to be sparse; give a larger --sequence-length."
            )
    return {
        "sparsity": sparsity,
        "kl": round(kl / tokens, 5),
        "context_lost": round(lost / worth, 5) if worth > 0 else float("inf"),
        "nll": round(lost / tokens, 5),
    }


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def within(model: Any, artifact: Artifact, aside: torch.Tensor, answer: float, max_loss: str) -> Artifact:
    """The artifact at the highest sparsity within the limit, and what was tried; 0, which is dense, if there is none."""
    limit = Limit.parse(max_loss)
    losses = highest_sparsity(model, artifact, aside, answer, limit)
    chosen = max((loss["sparsity"] for loss in losses if limit.holds(loss)), default=0.0)
    record = {**artifact.calibration, "max_loss": {"limit": max_loss, "chosen": chosen, "tried": losses}}
    return dataclasses.replace(at_sparsity(artifact, chosen), calibration=record)
