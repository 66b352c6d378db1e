"""A calibration that starts from an artifact: distilled further, with its settings, fits and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastfill import artifact as artifacts
from fastfill import data
from fastfill import tensors as stored
from fastfill.artifact import Artifact
from fastfill.calibration.student import Weights
from fastfill.config import CalibrationConfig, PrefillConfig
from fastfill.errors import UserError, listed

# Fields that have no effect here: they belong to the fits and the schedule.
FIXED: tuple[str, ...] = ("predictor_rank", "linear_rank", "silu_rank", "fit_tokens", "fit_epochs", "fit_batch", "fit_lr")
FIXED += ("schedule", "schedule_tokens")
# Text that is set aside for a limit may be what the first run has learned from.
REFUSED = (*FIXED, "max_loss")


def settings(start: Artifact, asked: PrefillConfig | None, config: CalibrationConfig) -> PrefillConfig:
    """The artifact's. Raises UserError if others are asked for, or something that has no effect."""
    if asked is not None and asked != start.prefill:
        raise UserError("A run that starts from an artifact keeps its settings (sparsity, block_size, ...); leave them out.")
    default = CalibrationConfig()
    if idle := [name for name in REFUSED if getattr(config, name) != getattr(default, name)]:
        raise UserError(f"A run that starts from an artifact keeps its fits and its schedule; leave out {listed(idle)}.")
    return start.prefill


def identity(start: Artifact) -> list[Any]:
    """What a checkpoint must share with the artifact that its run started from."""
    return [artifacts.digest(start), start.layer_importance]


def known(start: Artifact, documents: Sequence[data.Document]) -> set[data.Document]:
    """Those of the documents that `start` has learned from, which cannot tell whether a run from there helps: by their text,
    or by their names where the record of an older version has no more."""
    digests, names = (set(start.calibration.get(key) or ()) for key in ("document_digests", "document_rows"))
    names = names if len(digests) < len(names) else set()
    return {document for document in documents if document.digest() in digests or document.source in names}


def weights(start: Artifact) -> list[Weights]:
    """What the artifact has learned, layer by layer, in fp32."""
    found: list[Weights] = [{} for _ in range(start.layers)]
    for name in artifacts.shapes(start.base_model, start.ranks):
        _, layer, key = name.split(".", 2)
        found[int(layer)][key] = stored.wide(start.tensors, name).float()
    return found


def record(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The record of both runs: all text that either has seen, and what it went on from."""
    texts = ("documents", "document_rows", "document_digests")
    had = before.get("config", {})
    config = now["config"] | {name: had[name] for name in FIXED if name in had}
    both = {key: sorted({*(before.get(key) or ()), *now[key]}) for key in texts}
    rest = {key: value for key, value in before.items() if key not in texts}
    return {**now, **both, "config": config, "before": rest}
