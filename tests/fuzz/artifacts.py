"""Artifacts with anything done to them, inspected and attached."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import logits, snapshot, tiny_artifact, tiny_model, token_ids
from safetensors.torch import load, save

from fastfill import artifact as artifacts
from fastfill import attach, cli, kernels
from fastfill.errors import UserError
from fuzz import bed, mutate

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
TYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64)
OTHER_MODEL = "belongs to another model"  # what only attaching can find


def world(place: Path) -> bed.World:
    model, ids = tiny_model(), token_ids(1, 64)
    made = tiny_artifact(model)
    made.calibration = {"documents": ["a.txt"], "document_rows": ["a.txt#0"], "sequences": 3, "seconds": 1.5, "loss_last": None}
    readings = {f"{prefix}{name}": 1.5 for prefix in ("", "cont_") for name in artifacts.schema.READINGS}
    made.quality = {**readings, "documents": 2, "predictor": "learned", "sparsity": 0.5, "block_size": 8}
    artifacts.save(made, place / "good", readme="good\n")
    with attach(model, place / "good", kernel=kernels.choose()):
        expected = logits(model, ids)

    def case(rng: random.Random) -> tuple[str, int, bed.Act]:
        folder = place / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "good", folder)
        what = rng.choices((_bytes, _field, _tensor, _file), (4, 5, 3, 1))[0](rng, folder)
        regular = [file for file in folder.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in regular if file.stat().st_size < 1 << 30)
        return what, size, lambda: _use(model, ids, expected, folder)

    return case


def _use(model: Any, ids: torch.Tensor, expected: torch.Tensor, folder: Path) -> tuple[str, str]:
    before = _names(folder)
    shown = inspect(folder)
    words = None
    try:
        with attach(model, folder, kernel=kernels.choose()):
            found = logits(model, ids)
    except UserError as error:
        words = bed.check_sentence(str(error))
    if any("forward" in module.__dict__ for module in model.modules()):
        raise bed.Fault("changed", "the model stayed attached")
    if _names(folder) != before:
        raise bed.Fault("changed", "files of the artifact changed")
    if (words is None) != (shown is None) and OTHER_MODEL not in (words or ""):
        raise bed.Fault("disagree", f"attach: {words}; inspect: {shown}")
    if words is None and not torch.equal(found, expected):
        raise bed.Fault("wrong", f"accepted; logits differ by {float((found - expected).abs().max()):.3g}")
    return ("right", "") if words is None else ("refused", words)


def _names(folder: Path) -> Any:
    """What is in the folder; pipes, links and holes by name only."""
    small = not any(file.is_file() and file.stat().st_size >= 1 << 30 for file in folder.rglob("*"))
    return snapshot(folder) if small else sorted(os.listdir(folder))


def inspect(folder: Path) -> str | None:
    """What `fastfill inspect --json` refuses the folder with, or None if it shows it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["inspect", str(folder), "--json"])
    if code == 2:
        return bed.check_sentence(err.getvalue().removesuffix("\n"), bed.LONGEST + bed.PREFIX)
    *lines, document = out.getvalue().splitlines()
    json.loads(document, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is no JSON")))
    if not all(line.isprintable() for line in lines):
        raise bed.Fault("words", "control characters on the terminal")
    return None


def _bytes(rng: random.Random, folder: Path) -> str:
    file = folder / rng.choice((CONFIG, WEIGHTS, WEIGHTS))
    what, content = mutate.some_bytes(rng, file.read_bytes())
    file.write_bytes(content)
    return f"{file.name}: {what}"


def _field(rng: random.Random, folder: Path) -> str:
    what, text = mutate.some_value(rng, json.loads((folder / CONFIG).read_text()))
    (folder / CONFIG).write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{CONFIG}: {what}"


def _tensor(rng: random.Random, folder: Path) -> str:
    tensors = load((folder / WEIGHTS).read_bytes())
    name = rng.choice(sorted(tensors))
    other = rng.choice(sorted(tensors))
    tensor, kind = (
        tensors[name],
        rng.choice(("type", "all types", "value", "huge", "shape", "drop", "rename", "swap", "add", "same")),
    )
    dtype = rng.choice(TYPES)
    if kind == "type":
        tensors[name] = tensor.to(dtype)
    elif kind == "all types":
        tensors = {key: value.to(dtype) for key, value in tensors.items()}
    elif kind == "value":
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), 0.0, 1e30, -1.0))
    elif kind == "huge":
        tensors[name] = tensor * 1e30
    elif kind == "shape":
        turned = tensor.transpose(0, -1).contiguous()
        tensors[name] = rng.choice((tensor[1:], tensor.reshape(-1), tensor[None], turned, tensor[:0]))
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice(mutate.HOSTILE_TEXT[:5]) + "x"] = tensors.pop(name)
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == "add":
        tensors["code"] = torch.ones(3)
    (folder / WEIGHTS).write_bytes(save(tensors))
    return f"tensor {name}: {kind} {dtype if 'type' in kind else other if kind == 'swap' else ''}"


def _file(rng: random.Random, folder: Path) -> str:
    file = folder / rng.choice((CONFIG, WEIGHTS))
    kind = rng.choice(("missing", "folder", "pipe", "loop", "dangling", "empty", "hole", "larger", "to zero", "spaces"))
    if kind == "hole":
        os.truncate(file, 1 << rng.choice((30, 36, 43)))
    elif kind == "larger":
        os.truncate(file, file.stat().st_size + rng.choice((1, 8, 4096, 100 << 20)))
    elif kind == "spaces":
        file.write_bytes(file.read_bytes() + b" " * (1 << 20))
    else:
        file.unlink()
        make = {
            "folder": file.mkdir,
            "pipe": lambda: os.mkfifo(file),
            "loop": lambda: file.symlink_to(file),
            "dangling": lambda: file.symlink_to(folder / "nothing"),
            "empty": file.touch,
            "to zero": lambda: file.symlink_to("/dev/zero"),
        }
        make.get(kind, lambda: None)()
    return f"{file.name}: {kind}"
