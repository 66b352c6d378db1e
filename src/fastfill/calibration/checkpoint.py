"""A calibration's unfinished work, beside the artifact it will become. Tensors and JSON only; every file is written whole
or not at all, so that killing the process at any moment loses at most the step it was in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastfill.errors import UserError


class Checkpoint:
    """Folder `<out>.checkpoint`. settings: everything the result depends on; a checkpoint of other settings is refused.
    write: False for the other processes of a team, which only read what the first one wrote."""

    def __init__(self, out: Path, settings: dict[str, Any], resume: bool, write: bool = True):
        self.folder = out.with_name(out.name + ".checkpoint")
        self.write = write
        if not write:
            return
        settings = json.loads(json.dumps(settings))
        if self.folder.exists():
            if not resume:
                raise UserError(
                    f"An unfinished calibration is in {self.folder}; go on with --resume, or delete that folder to start anew."
                )
            found = self.json("settings")
            if found is not None and found != settings:
                other = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
                raise UserError(
                    f"The checkpoint {self.folder} has other settings ({', '.join(other)}); repeat them, or delete it."
                )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} could not be made: {error.strerror}.") from error
        self.put_json("settings", settings)

    def json(self, name: str) -> Any:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def put_json(self, name: str, value: Any) -> None:
        self._write(f"{name}.json", lambda path: path.write_text(json.dumps(value)))

    def tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        file = self.folder / f"{name}.safetensors"
        return load_file(file) if file.is_file() else None

    def put_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        self._write(f"{name}.safetensors", lambda path: save_file(contiguous, path))

    def _write(self, name: str, write: Any) -> None:
        if not self.write:
            return
        beside = self.folder / f".{name}.new"
        try:
            write(beside)
            os.replace(beside, self.folder / name)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"The checkpoint {self.folder / name} could not be written: {reason}.") from error

    def remove(self) -> None:
        if self.write:
            shutil.rmtree(self.folder, ignore_errors=True)
