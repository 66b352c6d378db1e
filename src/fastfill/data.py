"""Text for calibration and evaluation: files and Hugging Face datasets -> documents -> token sequences."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastfill.errors import UserError

TXT_DOCUMENT_CHARACTERS = 12_000  # a .txt file is cut into documents of about this length, at line ends


@dataclass(frozen=True)
class Document:
    """A text and where it came from (`file#row`)."""

    text: str
    source: str


def load_documents(sources: Sequence[str]) -> list[Document]:
    """Documents from `.txt` files, `.jsonl` files (a `text` field, or LongBench rows with `context`) or Hugging Face datasets.

    Each source may end in a slice over its documents, as in `news.jsonl[20:100]`: this is how calibration and
    evaluation text are kept apart. Raises UserError on a missing, empty or unreadable source.
    """
    documents: list[Document] = []
    for source in sources:
        name, window = split_slice(source)
        found = _read(name)[window]
        if not found:
            raise UserError(f"{source} holds no text; give a file with at least one document.")
        documents += found
    return documents


def split_slice(source: str) -> tuple[str, slice]:
    """`news.jsonl[20:100]` -> the name and the slice; all of it where there is none."""
    match = re.fullmatch(r"(.+?)\[(-?\d+)?:(-?\d+)?\]", source)
    if not match:
        return source, slice(None)
    return match[1], slice(*(int(bound) if bound else None for bound in match.groups()[1:]))


def demo_document() -> Document:
    """The text that comes with the package."""
    name = "demo_document.txt"
    return Document((resources.files("fastfill") / name).read_text(encoding="utf-8").strip(), name)


def _read(name: str) -> list[Document]:
    path = Path(name)
    if path.suffix in (".txt", ".jsonl") or path.exists():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"The data file {name} cannot be read: {reason}.") from error
        return _from_jsonl(text, path) if path.suffix == ".jsonl" else _from_text(text, path)
    return _from_hub(name)


def _from_text(text: str, path: Path) -> list[Document]:
    documents, part, size = [], [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        size += len(line)
        if size >= TXT_DOCUMENT_CHARACTERS:
            documents.append("".join(part))
            part, size = [], 0
    documents.append("".join(part))
    return [Document(d, f"{path.name}#{i}") for i, d in enumerate(documents) if d.strip()]


def _from_jsonl(text: str, path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error.msg}); each line must be one JSON object.") from error
        content = row_text(row)
        if content is None:
            raise UserError(f"{path}, line {number} has neither a `text` nor a `context` string.")
        if content.strip():
            documents.append(Document(content, f"{path.name}#{number - 1}"))
    return documents


def row_text(row: Any) -> str | None:
    """The text of a row: its `text`, or a LongBench row's `context` followed by its `input`."""
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("context"), str):
        question = row.get("input")
        return row["context"] + (f"\n\n{question}" if isinstance(question, str) and question else "")
    return None


def _from_hub(name: str) -> list[Document]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"There is no file {name}. If it is a Hugging Face dataset, run: pip install 'fastfill[datasets]'  "
            "(otherwise give a .txt or .jsonl file)."
        )
    import datasets

    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"The dataset {name} could not be loaded: {str(error).splitlines()[0]}") from error
    texts = [row_text(row) for row in rows]
    if any(text is None for text in texts):
        raise UserError(f"The dataset {name} has neither a `text` nor a `context` column.")
    return [Document(text, f"{name}#{i}") for i, text in enumerate(texts) if text and text.strip()]


def encode(tokenizer: Any, document: Document) -> list[int]:
    return tokenizer(document.text, verbose=False)["input_ids"]


def sequences(tokenizer: Any, documents: Sequence[Document], length: int, seed: int) -> torch.Tensor:
    """Cut documents into sequences of exactly `length` tokens, shuffled by seed -> (S, length).

    Raises UserError if there is not one whole sequence.
    """
    rows = []
    for document in documents:
        ids = encode(tokenizer, document)
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not rows:
        raise UserError(f"The data is too short: no document has {length} tokens; give longer text or a smaller length.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(rows, dtype=torch.long)[order]


def first_tokens(
    tokenizer: Any, documents: Sequence[Document], tokens: int, limit: int | None
) -> list[tuple[str, torch.Tensor]]:
    """(source, first `tokens` token ids) of every document that long, at most `limit` of them, for evaluation."""
    found: list[tuple[str, torch.Tensor]] = []
    for document in documents:
        ids = encode(tokenizer, document)
        if len(ids) >= tokens:
            found.append((document.source, torch.tensor(ids[:tokens])))
        if limit is not None and len(found) == limit:
            break
    if not found:
        raise UserError(f"The data is too short: no document has {tokens} tokens; give longer documents or a smaller --tokens.")
    return found


def digest(tokens: torch.Tensor) -> str:
    """Names a set of token sequences, so that a checkpoint is only resumed on the same text."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()[:16]
