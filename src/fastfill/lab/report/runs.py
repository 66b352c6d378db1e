"""Result files -> runs: one JSON document each, of a known kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfill import files
from fastfill.errors import UserError
from fastfill.lab.report.values import text

LISTS: dict[str, dict[str, type]] = {  # kind: fields that hold a list, and of what
    "bench": {"rows": dict},
    "perplexity": {},
    "longbench": {"datasets": dict},
    "ruler": {"datasets": dict},
    "suite": {"datasets": dict},
    "recall": {"layers": dict},
    "peers": {"rows": dict},
    "pareto": {"rows": dict},
    "picks": {"share": list, "maps": dict, "overlap": object, "kept": object},
    "inspect": {"layer_sparsity": object, "kept": object},
    "demo": {},
    "kernel": {},
    "gpu-floors": {},  # these come from benchmarks/gpu.py and have no figure
    "gpu-check": {},
    "gpu-tiles": {},
    "gpu-ffn-op": {},
    "fuzz": {"rows": dict},  # of tests/fuzz
    "serving": {"rows": dict},  # from benchmarks/serving.py; no figure either
    "llama-bench": {},  # lines of llama.cpp's program, beside the results that they are compared with
}
MAX_BYTES = 256 << 20  # of a file of results
STORE = ("predictions.jsonl", "settings.json")  # of a run that can be resumed, no result
MARKS = {  # kinds without a task: fields that tell them
    "inspect": {"layer_sparsity", "base_model"},
    "demo": {"ttft_dense_s", "ttft_sparse_s", "answer_dense"},
    "kernel": {"H", "F", "B", "dense_s", "sparse_s"},
    "bench": {"rows", "repeats"},
    "serving": {"step", "vllm"},
    "llama-bench": {"n_prompt", "avg_ns", "model_type"},
}


@dataclass(frozen=True)
class Run:
    """One document. kind: a key of LISTS. source: the file it came from."""

    kind: str
    source: str
    document: dict[str, Any]


def read(names: Iterable[str | Path]) -> list[Run]:
    """Runs of .json and .jsonl files, folders of them (folders inside too), and artifact folders ('default': the shipped one).

    Raises UserError for what cannot be read, is empty, or is no result of fastfill.
    """
    runs = [run for name in names for file in _files(Path(name), str(name)) for run in _read(file)]
    if not runs:
        raise UserError("There are no results in these files; store what a command prints with --json.")
    return runs


def _files(path: Path, name: str) -> Sequence[Path]:
    if not path.exists():
        from fastfill import artifact

        if name == "default":
            return [artifact.folder_of(name)]
        raise UserError(f"{name} does not exist; name result files (.json, .jsonl), folders of them, or an artifact folder.")
    if not path.is_dir() or _is_artifact(path):
        return [path]
    files = sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl") and file.name not in STORE)
    if not files:
        raise UserError(f"{name} holds no .json or .jsonl file and is no artifact; name a folder of results.")
    return files


def _is_artifact(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "weights.safetensors").is_file()


def _read(file: Path) -> list[Run]:
    if file.is_dir():
        from fastfill import artifact

        return [Run("inspect", file.name, {"file": file.name, **artifact.load(file).summary()})]
    with files.reading(file, "cannot be read", "give files that a command wrote with --json"):
        content = files.read_bytes(file, MAX_BYTES).decode("utf-8-sig")
    pieces = content.split("\n") if file.suffix == ".jsonl" else [content]
    runs = []
    for place, piece in enumerate(pieces, 1):
        if not piece.strip():
            continue
        where = f"{file}, line {place}," if file.suffix == ".jsonl" else str(file)
        with files.reading(where, "is not JSON", "give what a command prints with --json"):
            document = files.parse_json(piece)
        runs.append(Run(_kind(document, where), file.name, {"file": file.stem, **document}))
    return runs


def _kind(document: Any, where: str) -> str:
    """What the document is, with its lists checked."""
    kind = None
    if isinstance(document, dict):
        task = document.get("task")
        kind = task if isinstance(task, str) else next((k for k, marks in MARKS.items() if marks <= document.keys()), None)
    if kind not in LISTS or (kind in MARKS and "task" in document):
        of_task = f" (task {text(document['task'], 30)!r})" if isinstance(document, dict) and "task" in document else ""
        raise UserError(
            f"{where} is no result that a report knows{of_task}; give the --json output of bench, evaluate or inspect."
        )
    for field, inner in LISTS[kind].items():
        value = document.get(field)
        if not isinstance(value, list) or not all(isinstance(item, inner) for item in value):
            raise UserError(
                f"{where} is damaged: {field!r} of a {kind} result does not hold what it should; run the command again."
            )
    return kind
