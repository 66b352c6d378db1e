"""Finished items of a long evaluation, one JSON line each, so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import fastfill
from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import files
from fastfill.artifact import Artifact
from fastfill.config import PrefillConfig
from fastfill.engines import Engine
from fastfill.errors import UserError, printable, quoted

PREDICTIONS, SETTINGS = "predictions.jsonl", "settings.json"
MAX_BYTES = 1 << 30  # of the rows of a run


class Store:
    """Rows by key. With a folder they are kept in predictions.jsonl, beside settings.json; without one, in memory.

    Raises UserError if the folder holds a run with other settings, is being written by another process, or cannot be written.
    """

    def __init__(self, out: str | Path | None, settings: dict[str, Any]):
        self.rows: dict[str, dict[str, Any]] = {}
        self.file = Path(out) / PREDICTIONS if out is not None else None
        if self.file is None:
            return
        settings = json.loads(json.dumps(settings))  # as it will be read back
        with files.reading(out, "cannot be used", "give another --out"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._held = files.hold(self.file.parent)
            self._settings(self.file.with_name(SETTINGS), settings)
            self._read(self.file)

    def _settings(self, file: Path, settings: dict[str, Any]) -> None:
        if not file.exists():
            if self.file and self.file.exists():
                raise UserError(f"{file.parent} has {PREDICTIONS} without {SETTINGS}; give another --out.")
            files.write(file, json.dumps(settings, indent=2) + "\n")
            return
        found = files.read_json(file, "give another --out", words="is damaged")
        if not isinstance(found, dict):
            raise UserError(f"{file} is damaged; give another --out.")
        found = cfg.filled(PrefillConfig, found, settings)
        odd = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if odd:
            was, now = (quoted(values.get(odd[0])).strip("'") for values in (found, settings))
            what = f"{printable(odd[0], 40)} was {was}, is {now}"
            raise UserError(f"{file.parent} holds a run with other settings ({what}); give another --out.")

    def _read(self, file: Path) -> None:
        if not file.exists():
            return
        whole, stored = 0, files.read_bytes(file, MAX_BYTES)
        for number, line in enumerate(stored.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # the process died while writing it
            with files.reading(f"{file}, line {number}", "is damaged", "remove it or give another --out"):
                row = files.parse_json(line)
                if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                    raise ValueError("it is no row of results")
            self.rows[row["key"]] = row
            whole += len(line)
        if whole < len(stored):
            with file.open("r+b") as handle:
                handle.truncate(whole)

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        row = {"key": key, **row}
        self.rows[key] = row
        if self.file is None:
            return
        try:
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as handle:  # halves of a pair: JSON's escape
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {error.strerror}. Run the same command again to go on.") from error


def settings(task: str, engine: Engine, artifact: Artifact, items: Any, **more: Any) -> dict[str, Any]:
    """What two runs must share to be one: model, artifact, settings in force, and the items themselves (by digest)."""
    return {
        "fastfill": fastfill.__version__,
        "task": task,
        "model": artifact.base_model["fingerprint"],
        "artifact": artifacts.digest(artifact),
        "dtype": f"torch.{engine.dtype}",
        "device": engine.device,
        **cfg.to_dict(engine.config),
        "kept": list(engine.cost.kept),
        **{name: engine.choices[name] for name in ("kernel", "predictor", "compensator", "packed")},
        "attention_by": engine.choices["attention_by"].split(" ")[0],  # why it was chosen is no difference
        **({"engine": engine.engine} if engine.engine != "transformers" else {}),  # runs of before do not name it
        "items": digest(items),
        **more,
    }


def digest(items: Any) -> str:
    """Names anything that JSON can hold."""
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()[:16]
