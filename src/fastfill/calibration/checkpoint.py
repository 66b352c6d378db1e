"""A calibration's unfinished work, beside the artifact it will become. Tensors and JSON only; files are written atomically,
so that killing the process loses at most the current step. Each file has a checksum over what is
in it, its name and the settings: a damaged or foreign one is named and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastfill import config as cfg
from fastfill import files
from fastfill import tensors as stored
from fastfill.config import CalibrationConfig, PrefillConfig
from fastfill.errors import UserError

SETTINGS, SUM = "settings", "checksum"


class Checkpoint:
    """Folder `<out>.checkpoint`. settings: everything the result depends on; a checkpoint of other settings is refused.
    write: False for the other processes of a team, which only load what the first one wrote: it makes its own before them.

    Raises UserError, here and below, if the checkpoint is another's, is damaged, is being written by another process, or if it
    or `out` cannot be written.
    """

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool, write: bool = True):
        self.folder = out.with_name(out.name + ".checkpoint")
        self.write = write
        self._settings = json.loads(json.dumps(settings))
        if not write:
            self._settings = self.json(SETTINGS) or self._settings
            return
        files.check_folder(out)
        begun = self.folder.exists()
        with files.writing(self.folder, "; name another place."):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held: object = files.hold(self.folder)
        if begun and not resume:
            raise UserError(
                f"An unfinished calibration is in {self.folder}; go on with --resume, or delete that folder to start anew."
            )
        found = self.json(SETTINGS)
        if found is None and any(not file.name.startswith(".") for file in self.folder.iterdir()):
            raise UserError(f"{self.folder} has no {SETTINGS}.json and cannot be resumed; delete that folder to start anew.")
        if found is None:
            self.put_json(SETTINGS, self._settings)
            return
        if other := _differing(found, self._settings):
            raise UserError(f"The checkpoint {self.folder} has other settings ({', '.join(other)}); repeat them, or delete it.")
        self._settings = found  # the checksums are over these

    def json(self, name: str) -> Any:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        found = files.read_json(file, self._advice(name), words="is damaged")
        with self._reading(name, file):
            if not isinstance(found, dict) or found[SUM] != self._json_sum(name, found["value"]):
                raise ValueError("its checksum is another")
            return found["value"]

    def put_json(self, name: str, value: Any) -> None:
        value = json.loads(json.dumps(value))
        self._write(f"{name}.json", json.dumps({SUM: self._json_sum(name, value), "value": value}))

    def tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            return None
        with self._reading(name, file):
            found = stored.read(file)
            if not torch.equal(found.pop(SUM), self._tensor_sum(name, found)):
                raise ValueError("its checksum is another")
            return found

    def put_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        contiguous[SUM] = self._tensor_sum(name, contiguous)
        self._write(f"{name}.safetensors", lambda path: save_file(contiguous, path))

    def _write(self, name: str, content: files.Content) -> None:
        if self.write:
            files.write(self.folder / name, content, advice=".")

    def _reading(self, name: str, file: Path) -> Any:
        return files.reading(file, "is damaged", self._advice(name))

    def _advice(self, name: str) -> str:
        if name == SETTINGS:
            return f"delete {self.folder} to start anew"
        return f"delete that file, and --resume does its part again, or delete {self.folder} to start anew"

    def _json_sum(self, name: str, value: Any) -> str:
        settings = None if name == SETTINGS else self._settings
        return hashlib.sha256(json.dumps([name, settings, value], sort_keys=True).encode()).hexdigest()

    def _tensor_sum(self, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The checksum as a tensor (32,) of bytes, to be stored with the others."""
        sums = sorted((key, stored.checksum(tensor)) for key, tensor in tensors.items())
        return torch.frombuffer(bytearray.fromhex(self._json_sum(name, sums)), dtype=torch.uint8)

    def remove(self) -> None:
        if self.write:
            shutil.rmtree(self.folder, ignore_errors=True)


def _differing(found: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that are others than those of the checkpoint, which may be older than a field of a configuration."""
    kinds = (("prefill", PrefillConfig), ("config", CalibrationConfig))
    found = found | {name: cfg.filled(kind, found[name], now[name]) for name, kind in kinds if name in found and name in now}
    return sorted(name for name in now.keys() | found.keys() if now.get(name) != found.get(name))
