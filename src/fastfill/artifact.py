"""The artifact: a folder with everything learned for one base model. Data, never code: config.json and weights.safetensors."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastfill import config as cfg
from fastfill import families, schedule
from fastfill.compensator import Compensator
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.predictor import LearnedPredictor

DEFAULT_ARTIFACT = "smollm2-135m-instruct"
KEYS = {"schema_version", "base_model", "prefill", "ranks", "layer_importance", "calibration", "quality"}
BASE_KEYS = {"name", "model_type", "hidden_size", "intermediate_size", "layers", "fingerprint"}
FINGERPRINTS = frozenset({"fingerprints"})  # of base_model; an artifact without them does not know its model in fp16
RANK_KEYS = {"predictor", "linear", "silu"}


@dataclass
class Artifact:
    """What calibration learned.

    base_model: name, model_type, sizes and fingerprint. ranks: inner widths of predictor and compensator.
    layer_importance: L weights for `schedule.allocate`. tensors: see `shapes`. calibration: the record of how it was
    made. quality: what was measured (may be empty). folder: where it was loaded from.
    """

    base_model: dict[str, Any]
    prefill: PrefillConfig
    ranks: dict[str, int]
    layer_importance: list[float]
    tensors: dict[str, torch.Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)

    @property
    def layers(self) -> int:
        return self.base_model["layers"]

    def kept(self, sparsity: float | None = None) -> list[int]:
        """Neurons kept per layer at a sparsity (default: the artifact's own)."""
        target = self.prefill.sparsity if sparsity is None else sparsity
        return schedule.allocate(self.layer_importance, target, self.base_model["intermediate_size"])

    def predictor(self, layer: int, like: torch.Tensor, kernel: str = "auto") -> LearnedPredictor:
        w_in, w_out, bias = (self._weight(layer, f"predictor.{name}", like) for name in ("w_in", "w_out", "bias"))
        return LearnedPredictor(w_in, w_out, bias, kernel)

    def compensator(self, layer: int, kept: int, like: torch.Tensor, kernel: str = "auto") -> Compensator | None:
        """The correction of a layer that keeps `kept` neurons: as learned, times the share of neurons skipped now over the
        share skipped when it was learned. Ours: at 30 % the one learned at 50 % adds too much (KL 0.296, scaled 0.266)."""
        if not self.ranks["linear"] + self.ranks["silu"]:
            return None
        w_in, w_out, bias = (self._weight(layer, f"compensator.{name}", like) for name in ("w_in", "w_out", "bias"))
        intermediate, learned = self.base_model["intermediate_size"], self.kept()[layer]
        if kept != learned < intermediate:
            scale = (intermediate - kept) / (intermediate - learned)
            w_out, bias = w_out * scale, bias * scale
        return Compensator(w_in, w_out, bias, self.ranks["linear"], kernel)

    def statistics(self, layer: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """What baselines need of the calibration text: mean importance (F,) and input RMS (H,)."""
        return {name: self._weight(layer, f"stats.{name}", like) for name in ("importance", "input_rms")}

    def _weight(self, layer: int, name: str, like: torch.Tensor) -> torch.Tensor:
        weight = self.tensors[f"layers.{layer}.{name}"].to(device=like.device, dtype=like.dtype)
        return weight.clone() if weight.is_inference() else weight  # as such it could not take part in a backward pass

    def flops(self, sparsity: float | None = None) -> dict[str, float]:
        """Multiply-adds per sparse token as shares of the dense FFN's: kept neurons, predictor, compensator, total."""
        hidden, intermediate = self.base_model["hidden_size"], self.base_model["intermediate_size"]
        dense = 3 * hidden * intermediate
        shares = {
            "ffn": sum(self.kept(sparsity)) / (self.layers * intermediate),
            "predictor": self.ranks["predictor"] * (hidden + intermediate) / dense,
            "compensator": 2 * hidden * (self.ranks["linear"] + self.ranks["silu"]) / dense,
        }
        return {**shares, "total": sum(shares.values())}

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def check_partner(self, anatomy: families.Anatomy) -> None:
        """Raise UserError unless the model is the one this artifact was learned for."""
        base = self.base_model
        mine = (base["hidden_size"], base["intermediate_size"], base["layers"])
        theirs = (anatomy.hidden, anatomy.intermediate, len(anatomy.ffns))
        if mine != theirs:
            raise UserError(wrong_partner(base["name"], f"shapes {mine} against {theirs}"))
        if not same_weights(base, families.fingerprints(anatomy)):
            if anatomy.ffns[0].gate.dtype == torch.float16 and "fingerprints" not in base:
                raise UserError("This artifact does not know its model in fp16, for it is too old; load it in bf16 or fp32.")
            raise UserError(wrong_partner(base["name"], "same shapes, other weights"))

    def notes(self, anatomy: families.Anatomy) -> list[str]:
        """What a user should know who puts it on this model: one sentence each, for what differs outside the FFNs."""
        known, found = self.base_model.get("fingerprints", {}), families.fingerprints_outside(anatomy)
        if any(known.get(f"outside_{name}") == value for name, value in found.items()):
            return []
        if anatomy.adapters:
            return [
                f"The model has adapters on {', '.join(anatomy.adapters)}; the artifact was learned without them: measure the "
                "quality, or merge them (with peft: merge_and_unload()) and calibrate the merged model."
            ]
        if known:
            return [
                "The model's FFNs are those that the artifact was learned for, its embeddings, attention or norms are not: "
                "measure the quality, or make an artifact for this model with `fastfill calibrate`."
            ]
        return []  # an older artifact: it cannot be told


def same_weights(base_model: dict[str, Any], found: dict[str, str]) -> bool:
    """Whether FFNs of these `families.fingerprints` are those of an artifact's `base_model`, under any rounding."""
    known = {"bf16": base_model["fingerprint"], **base_model.get("fingerprints", {})}
    return any(known.get(name) == value for name, value in found.items())


def wrong_partner(name: str, why: str) -> str:
    return (
        f"This artifact belongs to another model ({name}; {why}); "
        "load that model, or make an artifact for this one with `fastfill calibrate`."
    )


def shapes(base_model: dict[str, Any], ranks: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    hidden, intermediate = base_model["hidden_size"], base_model["intermediate_size"]
    inner = ranks["linear"] + ranks["silu"]
    one = {
        "predictor.w_in": (ranks["predictor"], hidden),
        "predictor.w_out": (intermediate, ranks["predictor"]),
        "predictor.bias": (intermediate,),
        "compensator.w_in": (inner, hidden),
        "compensator.w_out": (hidden, inner),
        "compensator.bias": (hidden,),
        "stats.importance": (intermediate,),
        "stats.input_rms": (hidden,),
    }
    return {f"layers.{i}.{name}": shape for i in range(base_model["layers"]) for name, shape in one.items()}


def describe_model(anatomy: families.Anatomy, name: str) -> dict[str, Any]:
    """The `base_model` part of config.json."""
    ffns, outside = families.fingerprints(anatomy), families.fingerprints_outside(anatomy)
    return {
        "name": name,
        "model_type": anatomy.model_type,
        "hidden_size": anatomy.hidden,
        "intermediate_size": anatomy.intermediate,
        "layers": len(anatomy.ffns),
        "fingerprint": ffns["bf16"],
        "fingerprints": {"fp16": ffns["fp16"], **{f"outside_{name}": value for name, value in outside.items()}},
    }


def replace_folder(target: Path, files: dict[str, str | dict[str, torch.Tensor]]) -> None:
    """Write a folder beside `target` and swap it in, so that a failure (a full disk) leaves the old one whole.

    files: name -> text, or tensors for a safetensors file. Other files already in `target` are kept.
    """
    target = Path(os.path.abspath(target))
    beside = None
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} could not be written: there is a file of that name; name a folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        beside.chmod(0o755)
        if target.is_dir():
            for old in target.iterdir():
                if old.name not in files:
                    (shutil.copytree if old.is_dir() else shutil.copy2)(old, beside / old.name)
        for name, content in files.items():
            if isinstance(content, str):
                (beside / name).write_text(content)
            else:
                save_file({k: v.contiguous() for k, v in content.items()}, beside / name)
                (beside / name).chmod(0o644)  # safetensors makes it unreadable to other users
        aside = None
        if target.exists():
            aside = beside.with_name(beside.name + "-old")
            target.rename(aside)
        try:
            beside.rename(target)
        except BaseException:  # an interrupt too
            if aside:
                aside.rename(target)
            raise
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{target} could not be written: {reason}. What was there before is untouched.") from error
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)


def save(artifact: Artifact, folder: str | Path, readme: str | None = None) -> None:
    """Write the artifact folder. Raises UserError (and leaves what was there) if it cannot be written."""
    document = {
        "schema_version": cfg.SCHEMA_VERSION,
        "base_model": artifact.base_model,
        "prefill": cfg.to_dict(artifact.prefill),
        "ranks": artifact.ranks,
        "layer_importance": artifact.layer_importance,
        "calibration": artifact.calibration,
        "quality": artifact.quality,
    }
    files: dict[str, Any] = {
        "config.json": json.dumps(document, indent=2) + "\n",
        "weights.safetensors": artifact.tensors,
    }
    if readme is not None:
        files["README.md"] = readme
    replace_folder(Path(folder), files)


def folder_of(name: str | Path) -> Path:
    """The folder that is meant: itself, or for the word 'default' the shipped artifact of the embedded model."""
    if name != "default":
        return Path(name)
    import fastfill

    # Installed beside the code; in a source checkout (PYTHONPATH=src) at its root.
    places = [Path(place) / "artifacts" / DEFAULT_ARTIFACT for place in fastfill.__path__]
    places.append(Path(__file__).parents[2] / "artifacts" / DEFAULT_ARTIFACT)
    return next((place for place in places if place.is_dir()), places[0])


def load(folder: str | Path) -> Artifact:
    """Read and check an artifact folder ('default': the shipped one).

    Raises UserError with one sentence if it is missing, truncated, of a newer schema, or holds unknown keys, wrong shapes,
    NaN or infinite weights.
    """
    folder = folder_of(folder)
    config_file, weights_file = folder / "config.json", folder / "weights.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UserError(f"{folder} is not an artifact: {file.name} is missing; make one with `fastfill calibrate`.")
    try:
        document = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{config_file} cannot be read as JSON ({error}); calibrate again or restore the file.") from error
    artifact = _from_document(document, str(config_file))
    artifact.folder = folder
    try:
        artifact.tensors = load_file(weights_file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{weights_file} is truncated or damaged ({error}); calibrate again or restore it.") from error
    expected = shapes(artifact.base_model, artifact.ranks)
    found = {name: tuple(tensor.shape) for name, tensor in artifact.tensors.items()}
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(f"{weights_file} does not fit its config.json: {odd[0]} ({len(odd)} tensors missing or misshapen).")
    for name, tensor in artifact.tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{weights_file}: {name} holds NaN, infinite or non-float values; calibrate again.")
    return artifact


def _from_document(document: Any, where: str) -> Artifact:
    if not isinstance(document, dict):
        raise UserError(f"{where} must be a JSON object.")
    version = document.get("schema_version")
    if not isinstance(version, int):
        raise UserError(f"{where} has no schema_version; it is not a fastfill artifact.")
    if version > cfg.SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version}, this fastfill reads up to {cfg.SCHEMA_VERSION}; upgrade fastfill."
        )
    _same_keys(document, KEYS, where)
    _same_keys(document["base_model"], BASE_KEYS, f"{where}: base_model", FINGERPRINTS)
    _same_keys(document["ranks"], RANK_KEYS, f"{where}: ranks")
    base, ranks = document["base_model"], document["ranks"]
    for name in ("hidden_size", "intermediate_size", "layers"):
        cfg.check_integer(f"{where}: base_model.{name}", base[name], 1)
    for name in RANK_KEYS:
        cfg.check_integer(f"{where}: ranks.{name}", ranks[name], 1 if name == "predictor" else 0)
    weights = document["layer_importance"]
    good = isinstance(weights, list) and all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in weights)
    if not good or len(weights) != base["layers"]:
        raise UserError(f"{where}: layer_importance must hold {base['layers']} positive numbers.")
    for name in ("calibration", "quality"):
        if not isinstance(document[name], dict):
            raise UserError(f"{where}: {name} must be a JSON object.")
    prefill = cfg.from_dict(PrefillConfig, document["prefill"], f"{where}: prefill")
    return Artifact(base, prefill, ranks, weights, {}, document["calibration"], document["quality"])


def _same_keys(values: Any, keys: set[str], where: str, optional: frozenset[str] = frozenset()) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a JSON object.")
    unknown, missing = sorted(set(values) - keys - optional), sorted(keys - set(values))
    if unknown:
        known = ", ".join(sorted(keys | optional))
        raise UserError(f"{where} has unknown key(s) {', '.join(unknown)}; this version knows {known}.")
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; calibrate again or restore the file.")


def documents(artifact: Artifact) -> str:
    """Where the calibration text came from, sources of many documents first; of more than five, four and a number."""
    rows = Counter(row.split("#")[0] for row in artifact.calibration.get("document_rows", []))
    names = sorted(artifact.calibration.get("documents", []), key=lambda name: -rows[name])
    shown = names if len(names) <= 5 else [*names[:4], f"{len(names) - 4} more"]
    return ", ".join(shown) or "unknown sources"


def readme(artifact: Artifact) -> str:
    """The artifact's own page: what it is for, how it was made, what it scores."""
    base, prefill, record, quality = artifact.base_model, artifact.prefill, artifact.calibration, artifact.quality
    shares = artifact.flops()
    lines = [
        f"# fastfill artifact for {base['name']}",
        "",
        f"Sparse prefill for this model at {prefill.sparsity:.0%} FFN sparsity in blocks of {prefill.block_size} tokens: "
        f"{shares['total']:.1%} of the dense FFN's multiply-adds per sparse token "
        f"(predictor {shares['predictor']:.1%}, compensator {shares['compensator']:.1%}).",
        "",
        "```python",
        "with fastfill.attach(model, ARTIFACT_FOLDER):",
        "    model.generate(...)",
        "```",
        "",
        "## How it was made",
        "",
        f"{record.get('sequences', 0)} sequences of text from {documents(artifact)}; "
        f"{record.get('tokens_distilled', 0)} tokens of end-to-end distillation; {record.get('seconds', 0):.0f} s. "
        "Settings, documents and machine are in `config.json` under `calibration`.",
        "",
        "## What it scores",
        "",
    ]
    if quality:
        lines += ["| measure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in quality.items() if not isinstance(value, (dict, list))]
    else:
        lines.append("Not measured yet: `fastfill evaluate MODEL --artifact DIR --data HELD_OUT --record`.")
    return "\n".join(lines) + "\n"
