"""config.json of an artifact: every field with its type and range, checked once, when it is read and before it is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from fastfill import config as cfg
from fastfill.config import PrefillConfig, check_integer, check_keys, is_number
from fastfill.errors import UserError, printable, quoted

KEYS = {"schema_version", "base_model", "prefill", "ranks", "layer_importance", "calibration", "quality"}
BASE_KEYS = {"name", "model_type", "hidden_size", "intermediate_size", "layers", "fingerprint"}
FINGERPRINTS = frozenset({"fingerprints"})  # of base_model; an artifact without them does not know its model in fp16
RANK_KEYS = {"predictor", "linear", "silu"}
RECORDS = ("calibration", "quality")
SETTINGS = ("prefill", "ranks", "layer_importance")  # of the keys above: what decides which neurons are kept, and how
LONGEST_NAME = 200
MAX_WIDTH = 2**24  # of a model: hidden size, intermediate size
MAX_LAYERS = 10_000

Check = Callable[[str, Any], None]


def check(document: Any, where: str) -> PrefillConfig:
    """Raise UserError unless all of config.json is as it must be; where: how messages name it. Returns its `prefill`."""
    if not isinstance(document, dict):
        raise UserError(f"{where} must be a JSON object.")
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UserError(f"{where} has no schema_version; it is not a fastfill artifact.")
    if version > cfg.SCHEMA_VERSION:
        raise UserError(
            f"{where} has schema version {version}, this fastfill reads up to {cfg.SCHEMA_VERSION}; upgrade fastfill."
        )
    check_keys(document, KEYS, where, optional=frozenset({"checksums"}))
    base, ranks, weights = document["base_model"], document["ranks"], document["layer_importance"]
    _check_base(base, f"{where}: base_model")
    prefill = cfg.from_dict(PrefillConfig, document["prefill"], f"{where}: prefill")
    check_keys(ranks, RANK_KEYS, f"{where}: ranks")
    for name in sorted(RANK_KEYS):
        most = min(base["hidden_size"], base["intermediate_size"]) if name == "predictor" else base["hidden_size"]
        check_integer(f"{where}: ranks.{name}", ranks[name], 1 if name == "predictor" else 0, most)
    good = isinstance(weights, list) and all(is_number(w) and 0 < w < 1e30 for w in weights)
    if not good or len(weights) != base["layers"]:
        raise UserError(f"{where}: layer_importance must hold {base['layers']} positive numbers.")
    for name, known in zip(RECORDS, (CALIBRATION, QUALITY), strict=True):
        if not isinstance(document[name], dict):
            raise UserError(f"{where}: {name} must be a JSON object.")
        _check_fields(document[name], known, f"{where}: {name}")
    if "checksums" in document:
        _check_sums(document["checksums"], f"{where}: checksums")
    return prefill


def _check_base(base: Any, where: str) -> None:
    check_keys(base, BASE_KEYS, where, optional=FINGERPRINTS)
    for name, most in (("hidden_size", MAX_WIDTH), ("intermediate_size", MAX_WIDTH), ("layers", MAX_LAYERS)):
        check_integer(f"{where}.{name}", base[name], 1, most)
    for name in ("name", "model_type", "fingerprint"):
        word(f"{where}.{name}", base[name])
    words(f"{where}.fingerprints", base.get("fingerprints", {}))


def _check_sums(sums: Any, where: str) -> None:
    check_keys(sums, {"settings", "tensors"}, where)
    word(f"{where}.settings", sums["settings"])
    words(f"{where}.tensors", sums["tensors"])


def _check_fields(values: dict[str, Any], known: dict[str, Check], where: str) -> None:
    for name in known.keys() & values.keys():
        known[name](f"{where}.{name}", values[name])


# --- kinds of fields ------------------------------------------------------------------------------------------------------


def word(name: str, value: Any) -> None:
    if not isinstance(value, str) or printable(value, LONGEST_NAME) != value:
        raise UserError(f"{name} must be one line of printable text, at most {LONGEST_NAME} characters, not {quoted(value)}.")


def number(name: str, value: Any) -> None:
    if not is_number(value):
        raise UserError(f"{name} must be a number, not {quoted(value)}.")


def number_or_none(name: str, value: Any) -> None:
    if value is not None:
        number(name, value)


def count(name: str, value: Any) -> None:
    check_integer(name, value, 0, 2**53)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {quoted(value)}.")


def texts(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{name} must be a list of texts, not {quoted(value)}.")


def mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{name} must be a JSON object, not {quoted(value)}.")


def words(name: str, value: Any) -> None:
    """A JSON object of words."""
    mapping(name, value)
    for inner in value.values():
        word(f"{name}[]", inner)


def numbers(name: str, value: Any) -> None:
    """A list of numbers, or of such lists."""
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list of numbers, not {quoted(value)}.")
    for inner in value:
        (numbers if isinstance(inner, list) else number)(name, inner)


def curve(name: str, value: Any) -> None:
    """Loss along the prompt, as `perplexity.evaluate` has it."""
    if not isinstance(value, list):
        raise UserError(f"{name} must be a list, not {quoted(value)}.")
    for point in value:
        mapping(f"{name}[]", point)
        for part, kind in (("from", count), ("to", count), ("nll_dense", number), ("nll_sparse", number)):
            kind(f"{name}[].{part}", point.get(part))


# What is read again: shown, or put into the page. Other fields may come with it, as they are.
CALIBRATION: dict[str, Check] = {
    "config": mapping,
    "documents": texts,
    "document_rows": texts,
    "document_digests": texts,
    "sequences": count,
    "tokens_distilled": count,
    "text": word,
    "seconds": number,
    "loss_first": number_or_none,
    "loss_last": number_or_none,
    "loss_aside": numbers,
    "importance_held": numbers,
    "processes": count,
    "machine": mapping,
}
READINGS = ("ppl_dense", "ppl_sparse", "ppl_ratio", "kl", "top1_agreement")
QUALITY: dict[str, Check] = {
    **{f"{prefix}{name}": number_or_none for prefix in ("", "cont_") for name in READINGS},
    "no_context_ppl": number_or_none,
    "context_kept": number_or_none,
    "sparsity": number,
    **dict.fromkeys(("block_size", "documents", "sparse_tokens", "dense_tokens"), count),
    "predictor": word,
    "compensator": flag,
    "curve": curve,
    "sources": texts,
}


# --- for writing ----------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The value as JSON has it: a number that is not finite becomes null, since JSON has none."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings_checksum(document: dict[str, Any]) -> str:
    """Of what is learned and is not in the tensors; overrides are for `attach`, not for the file."""
    text = json.dumps({key: document[key] for key in SETTINGS}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
