"""The artifact: a folder with everything learned for one base model. Data, never code: config.json and weights.safetensors."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastfill import card, families, files, hub, partner, schedule, schema
from fastfill import config as cfg
from fastfill import tensors as stored
from fastfill.compensator import Compensator
from fastfill.config import PrefillConfig
from fastfill.cost import Cost
from fastfill.errors import UserError, printable
from fastfill.predictor import LearnedPredictor
from fastfill.schema import BASE_KEYS as BASE_KEYS

DEFAULT_ARTIFACT = "smollm2-135m-instruct"
SHIPPED = {  # name -> folder in artifacts/
    "smollm2-135m": DEFAULT_ARTIFACT,
    "qwen2.5-coder-1.5b": "qwen2.5-coder-1.5b-instruct",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct",
}
CONFIG, WEIGHTS, README = "config.json", "weights.safetensors", "README.md"
SAMPLES = "base."  # before the names of `Artifact.samples` in the file
MAX_SAMPLES = 64 << 20  # bytes of them; 28 layers of Qwen2.5-1.5B have 0.2 MB
log = logging.getLogger(__name__)


@dataclass
class Artifact:
    """What calibration learned.

    base_model: name, model_type, sizes and fingerprint. ranks: inner widths of predictor and compensator.
    layer_importance: L weights for `schedule.allocate`. tensors: see `shapes`. calibration: the record of how it was
    made. quality: what was measured (may be empty). samples: of the base model's weights (`partner.samples`), by which it is
    known again; empty in older artifacts. folder: where it was loaded from. checksums: as they are in the file.
    """

    base_model: dict[str, Any]
    prefill: PrefillConfig
    ranks: dict[str, int]
    layer_importance: list[float]
    tensors: dict[str, torch.Tensor]
    calibration: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    samples: partner.Samples = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)
    checksums: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def layers(self) -> int:
        return self.base_model["layers"]

    def kept(self, sparsity: float | None = None) -> list[int]:
        """Neurons kept per layer at a sparsity (default: the artifact's own)."""
        target = self.prefill.sparsity if sparsity is None else sparsity
        return schedule.allocate(self.layer_importance, target, self.base_model["intermediate_size"])

    def predictor(self, layer: int, like: torch.Tensor) -> LearnedPredictor:
        """A layer's predictor in the dtype and on the device of `like`. Here and below: UserError if a weight overflows."""
        w_in, w_out, bias = (self._weight(layer, f"predictor.{name}", like) for name in ("w_in", "w_out", "bias"))
        return LearnedPredictor(w_in, w_out, bias)

    def compensator(self, layer: int, kept: int, like: torch.Tensor) -> Compensator | None:
        """The correction of a layer that keeps `kept` neurons: as learned, times the share of neurons skipped now over the
        share skipped when it was learned. Ours: at 30 % the one learned at 50 % adds too much (KL 0.296, scaled 0.266)."""
        if not self.ranks["linear"] + self.ranks["silu"]:
            return None
        w_in, w_out, bias = (self._weight(layer, f"compensator.{name}", like) for name in ("w_in", "w_out", "bias"))
        intermediate, learned = self.base_model["intermediate_size"], self.kept()[layer]
        if kept != learned < intermediate:
            scale = (intermediate - kept) / (intermediate - learned)
            w_out, bias = (_finite(w * scale, f"layer {layer}'s compensator, scaled") for w in (w_out, bias))
        return Compensator(w_in, w_out, bias, self.ranks["linear"])

    def statistics(self, layer: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """What baselines need of the calibration text: mean importance (F,) and input RMS (H,)."""
        return {name: self._weight(layer, f"stats.{name}", like) for name in ("importance", "input_rms")}

    def _weight(self, layer: int, name: str, like: torch.Tensor) -> torch.Tensor:
        key = f"layers.{layer}.{name}"
        weight = _finite(stored.wide(self.tensors, key).to(device=like.device, dtype=like.dtype), key)
        return weight.clone() if weight.is_inference() else weight  # as such it could not take part in a backward pass

    def flops(self, sparsity: float | None = None) -> dict[str, float]:
        """Multiply-adds per sparse token as shares of the dense FFN's: kept neurons, predictor, compensator, total."""
        return self.cost(sparsity).shares

    def cost(self, sparsity: float | None = None) -> Cost:
        """Neurons kept at a sparsity (default: the artifact's own), and multiply-adds of what was learned."""
        base = self.base_model
        return Cost.learned(base["hidden_size"], base["intermediate_size"], self.kept(sparsity), self.ranks)

    def bytes(self) -> int:
        """Of what was learned."""
        return sum(t.nbytes for t in self.tensors.values())

    def check_partner(
        self,
        anatomy: families.Anatomy,
        allow_finetuned: bool = False,
        layers: list[list[partner.Sample]] | None = None,
    ) -> list[str]:
        """What to warn of, a sentence each, before this is put on the model. Raises UserError unless the model is the one it
        was learned for, requantised or rounded, or fine-tuned where that is allowed: see `partner`."""
        found = partner.check_model(self.base_model, self.samples, anatomy, allow_finetuned, layers)
        return found + partner.notes(self.base_model, self.samples, anatomy, requantised=bool(found))

    def card(self) -> str:
        """Its README.md."""
        return card.page(self.base_model, self.prefill, self.flops(), self.calibration, self.quality)

    def push_to_hub(
        self,
        repository: str,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a fastfill artifact",
    ) -> str:
        """Upload it to a repository on the hub ('org/name'), which is made if it is not there, as a branch if a `revision` is
        named. Its README.md is the folder's own, or made. Returns the address of the commit. Raises UserError."""
        page = self.card()
        if self.folder is not None and (self.folder / README).is_file():
            with files.reading(self.folder / README, "cannot be read", "restore it, or delete it"):
                page = files.read_bytes(self.folder / README, hub.FILES[README][0]).decode()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "artifact"
            save(self, folder, page)
            return hub.push(folder, repository, revision, private, token, commit_message)

    def summary(self) -> dict[str, Any]:
        """What `fastfill inspect --json` prints."""
        base = self.base_model
        transposed = base["layers"] * base["hidden_size"] * base["intermediate_size"]
        return {
            "base_model": base,
            **cfg.to_dict(self.prefill),
            "kept": self.kept(),
            "layer_sparsity": [round(1 - k / base["intermediate_size"], 4) for k in self.kept()],
            "ranks": self.ranks,
            "flops": {key: round(value, 4) for key, value in self.flops().items()},
            "overhead": round(self.flops()["predictor"] + self.flops()["compensator"], 4),
            "artifact_bytes": self.bytes(),
            "transposed_down_values": transposed,
            "calibration": self.calibration,
            "quality": self.quality,
        }


def shapes(base_model: dict[str, Any], ranks: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape. Matrices may be in eight bits, with their scales beside them (`tensors.narrow`)."""
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
    ffns, outside = partner.fingerprints(anatomy), partner.fingerprints_outside(anatomy)
    return {
        "name": printable(name, schema.LONGEST_NAME) or "unnamed",
        "model_type": anatomy.model_type,
        "hidden_size": anatomy.hidden,
        "intermediate_size": anatomy.intermediate,
        "layers": len(anatomy.ffns),
        "fingerprint": ffns["bf16"],
        "fingerprints": {"fp16": ffns["fp16"], **{f"outside_{name}": value for name, value in outside.items()}},
    }


def _finite(weight: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{name} does not fit into {weight.dtype}: it becomes infinite; load the model in bf16 or fp32.")
    return weight


def save(artifact: Artifact, folder: str | Path, readme: str | None = None) -> None:
    """Write the artifact folder. Raises UserError, and leaves what was there, if it is not one that `load` takes, or cannot be
    written."""
    eight_bits = any(tensor.dtype == torch.int8 for tensor in artifact.tensors.values())
    document = {
        "schema_version": 3 if artifact.samples else 2 if eight_bits else 1,
        "base_model": artifact.base_model,
        "prefill": cfg.to_dict(artifact.prefill),
        "ranks": artifact.ranks,
        "layer_importance": artifact.layer_importance,
        "calibration": schema.plain(artifact.calibration),
        "quality": schema.plain(artifact.quality),
    }
    try:
        text = _text(document)
        found = files.parse_json(text)
        schema.check(found, CONFIG)
        _check_tensors(artifact.tensors, found, WEIGHTS)
        _check_samples(artifact.samples, found, WEIGHTS)
    except (UserError, ValueError, TypeError) as error:  # what JSON cannot hold
        raise UserError(f"{folder} is not written, and what was there is untouched, since {error}") from error
    everything = _everything(artifact)
    document["checksums"] = _checksums(everything, found)
    tensors = {name: tensor.contiguous() for name, tensor in everything.items()}
    contents: dict[str, files.Content] = {CONFIG: _text(document), WEIGHTS: lambda file: save_file(tensors, file)}
    if readme is not None:
        contents[README] = readme
    files.replace_folder(folder, contents)


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _everything(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The tensors of its file."""
    return artifact.tensors | {SAMPLES + name: runs for name, runs in artifact.samples.items()}


def _checksums(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> dict[str, Any]:
    sums = {name: stored.checksum(tensor) for name, tensor in sorted(tensors.items())}
    return {"settings": schema.settings_checksum(document), "tensors": sums}


def digest(artifact: Artifact) -> str:
    """Of its weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(artifact.tensors.items()):
        total.update(name.encode())
        total.update(stored.content(tensor))
    return total.hexdigest()[:16]


def record(artifact: Artifact, folder: str | Path, quality: dict[str, Any]) -> None:
    """Store what was measured in the folder the artifact was loaded from. Its weights are not touched; one without checksums
    gets them.

    Raises UserError if there is another artifact by now, or the folder cannot be written.
    """
    folder = _own(folder)
    held = files.hold(folder, files.WAIT_S)
    document, now = _read_config(folder)
    same = (now.base_model, now.prefill, now.ranks, now.layer_importance, now.calibration, now.checksums) == (
        artifact.base_model,
        artifact.prefill,
        artifact.ranks,
        artifact.layer_importance,
        artifact.calibration,
        artifact.checksums,
    )
    if not same:
        raise UserError(f"{folder} holds another artifact by now than the one that was measured; measure that one.")
    artifact.quality = document["quality"] = schema.plain(quality)
    document.setdefault("checksums", _checksums(_everything(artifact), document))
    schema.check(document, str(folder / CONFIG))
    files.write(folder / CONFIG, _text(document))
    files.write(folder / README, artifact.card())
    del held


def _own(name: str | Path) -> Path:
    """The user's own folder, or UserError: one in the hub's cache must stay what the hub has."""
    folder = folder_of(name)
    if hub.is_cached(folder):
        raise UserError(f"{name} is on the hub, and its copy here must stay as it is; copy it to a folder of yours first.")
    return folder


def add_samples(folder: str | Path, model: Any) -> Artifact:
    """Store samples of its model in an artifact that an older fastfill made, so that it knows the model requantised, too.

    Raises UserError if the model is not exactly the one it was learned for, or the folder cannot be written.
    """
    folder = _own(folder)
    artifact, anatomy = load(folder), families.dissect(model)
    artifact.check_partner(anatomy)
    artifact.samples = partner.samples(anatomy)
    save(artifact, folder)
    return artifact


def folder_of(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder that is meant: itself; by name one that comes with fastfill: 'default' (of the embedded model), or that of
    another model, 'qwen2.5-coder-1.5b', which a source checkout has and a wheel has not; else, where no such folder is, the
    hub's 'org/name' or 'org/name@revision', downloaded (`hub.fetch`). Raises UserError."""
    known = DEFAULT_ARTIFACT if name == "default" else SHIPPED.get(str(name))
    if known is None or (name != "default" and Path(name).exists()):
        if (found_there := hub.split(name)) is not None:
            return hub.fetch(found_there[0], revision or found_there[1], cache_dir)
        if revision is not None:
            raise UserError(f"{name} is a local folder, which has no revision; leave it out, or name a repository (org/name).")
        return Path(name)
    import fastfill

    # Installed beside the code; in a source checkout at its root, also where the package itself is installed.
    places = [Path(place) / "artifacts" / known for place in fastfill.__path__]
    places += [parent / "artifacts" / known for parent in (Path(__file__).parents[2], Path.cwd(), *Path.cwd().parents)]
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None and name != "default":
        raise UserError(
            f"The artifact {name} comes with fastfill's source, not with this installation; name its folder in a clone "
            f"(artifacts/{known}), or make one with `fastfill calibrate`."
        )
    return found or places[0]


def load(folder: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Artifact:
    """Read and check an artifact: a folder, a name that is shipped ('default'), or a repository on the hub ('org/name', of
    which a `revision` may be named). The tensors are copies of what is in the files.

    Raises UserError with one sentence if it is missing, truncated, damaged, of a newer schema, or holds unknown or missing
    keys, values out of range, wrong shapes, NaN or infinite weights, or values that are not those of its checksums.
    """
    folder = folder_of(folder, revision, cache_dir)
    with files.reading(folder, "cannot be read", "name an artifact folder"):
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).exists():
                raise UserError(f"{folder} is not an artifact: {name} is missing; make one with `fastfill calibrate`.")
    document, artifact = _read_config(folder)
    expected = shapes(artifact.base_model, artifact.ranks)
    values = sum(math.prod(shape) for shape in expected.values())
    weights_file = folder / WEIGHTS
    with files.reading(weights_file, "is truncated or damaged", "calibrate again or restore it"):
        # fp64, a long header and samples
        everything = stored.read(weights_file, 8 * values + 1024 * len(expected) + (1 << 20) + MAX_SAMPLES)
    artifact.samples = {name.removeprefix(SAMPLES): everything[name] for name in everything if name.startswith(SAMPLES)}
    artifact.tensors = {name: tensor for name, tensor in everything.items() if not name.startswith(SAMPLES)}
    _check_tensors(artifact.tensors, document, str(weights_file))
    _check_samples(artifact.samples, document, str(weights_file))
    _check_sums(artifact, document, folder)
    return artifact


def _read_config(folder: Path) -> tuple[dict[str, Any], Artifact]:
    """config.json, checked, and the artifact without its tensors."""
    file = folder / CONFIG
    document = files.read_json(file, "calibrate again or restore the file")
    if isinstance(document, dict):
        document |= {key: schema.plain(document[key]) for key in schema.RECORDS if key in document}
    prefill = schema.check(document, str(file))
    base, ranks, weights = (document[key] for key in ("base_model", "ranks", "layer_importance"))
    record, quality = (document[key] for key in schema.RECORDS)
    sums = document.get("checksums", {})
    return document, Artifact(base, prefill, ranks, weights, {}, record, quality, folder=folder, checksums=sums)


def _check_tensors(tensors: dict[str, torch.Tensor], document: dict[str, Any], where: str) -> None:
    """Raise UserError unless names, shapes, types and values are what an artifact of this config.json has."""
    expected = shapes(document["base_model"], document["ranks"])
    eight_bits = {name for name, shape in expected.items() if len(shape) == 2 and _is_int8(tensors.get(name))}
    expected |= {name + stored.SCALE: expected[name][:1] for name in eight_bits}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{where} does not fit its config.json: {printable(odd[0], 60)} ({len(odd)} tensors missing or misshapen)."
        )
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if name in eight_bits:
            continue
        if tensor.dtype not in stored.FLOATS:
            raise UserError(f"{where}: {name} is of the non-float or too narrow type {kind}; calibrate again.")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds NaN or infinite values; calibrate again.")


def _check_samples(samples: partner.Samples, document: dict[str, Any], where: str) -> None:
    """Raise UserError unless there are samples of every FFN where the schema has them, and all are (layers, runs, entries)."""
    expected = partner.run_shapes(document["base_model"]) if document["schema_version"] >= 3 else {}
    inside = {name: tuple(runs.shape) for name, runs in samples.items() if not name.startswith(partner.OUTSIDE)}
    odd = sorted(name for name in expected.keys() | inside.keys() if expected.get(name) != inside.get(name))
    odd += [name for name, runs in samples.items() if name not in odd and (runs.dim() != 3 or runs.dtype not in stored.FLOATS)]
    if odd or (samples and not expected):
        name = printable((odd or sorted(samples))[0], 60)
        raise UserError(f"{where} does not fit its config.json: the samples of the base model's {name}; calibrate again.")
    if not all(bool(torch.isfinite(runs).all()) for runs in samples.values()):
        raise UserError(f"{where}: samples of the base model's weights hold NaN or infinite values; calibrate again.")


def _is_int8(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.int8


def _check_sums(artifact: Artifact, document: dict[str, Any], folder: Path) -> None:
    """Raise UserError unless everything that was learned is as it was saved."""
    saved = artifact.checksums
    if not saved:
        name = printable(str(folder), 200)
        log.warning("%s has no checksums: an older fastfill made it, and damage to it would not be seen.", name)
        return
    found = _checksums(_everything(artifact), document)
    keys = found["tensors"].keys() | saved["tensors"].keys()
    odd = sorted(key for key in keys if found["tensors"].get(key) != saved["tensors"].get(key))
    if odd:
        raise UserError(
            f"{folder / WEIGHTS} is damaged: {printable(odd[0], 60)} is not what was saved ({len(odd)} tensors); restore it."
        )
    if found["settings"] != saved["settings"]:
        raise UserError(
            f"{folder / CONFIG} is not what was saved: {', '.join(schema.SETTINGS)} belong to the weights; "
            "restore it, and give other settings to `attach` or the command."
        )
