"""Text for calibration and evaluation: files and Hugging Face datasets -> documents -> token sequences."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fastfill import reading
from fastfill.errors import UserError

TXT_DOCUMENT_CHARACTERS = 12_000  # a .txt file is cut into documents of about this length, at line ends
PIECE_CHARACTERS = 1 << 20  # tokenized at once: a tokenizer takes 150 bytes of memory for each


@dataclass(frozen=True)
class Document:
    """A text and where it came from (`file#row`). messages: (role, content) of a chat, whose contents are the text."""

    text: str
    source: str
    messages: tuple[tuple[str, str], ...] = ()

    def digest(self) -> str:
        """Names the text, wherever it came from."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_documents(sources: Sequence[str]) -> list[Document]:
    """Documents from files of text or JSON (`reading` says in which forms), or from Hugging Face datasets.

    A row of JSON has a `text`, or `messages` of a chat, or is a LongBench row with `context`. Each source may end in a slice
    over its documents, as in `news.jsonl[20:100]`: this is how calibration and evaluation text are kept apart. Raises
    UserError on a missing, empty or unreadable source.
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
    match = re.fullmatch(r"(.+?)\[(-?\d{1,18})?:(-?\d{1,18})?\]", source, re.DOTALL)
    if not match:
        return source, slice(None)
    return match[1], slice(*(int(bound) if bound else None for bound in match.groups()[1:]))


def demo_document() -> Document:
    """The demo document of the package."""
    name = "demo_document.txt"
    return Document((resources.files("fastfill") / name).read_text(encoding="utf-8").strip(), name)


def _read(name: str) -> list[Document]:
    if reading.kind(name) in ("lines", "json"):
        return [made for where, index, row in reading.rows(name) if (made := _document(row, where, _source(name, index)))]
    if reading.kind(name) == "text" or os.path.exists(name):
        return _from_text(reading.text(name, "The data file"), Path(name))
    return _from_hub(name)


def _source(name: str, index: int) -> str:
    return f"{Path(name).name}#{index}"


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


def _document(row: Any, where: str, source: str) -> Document | None:
    """The document of a row of data; None if its text is blank. Raises UserError if it has none."""
    messages = _messages(row)
    text = "\n\n".join(content for _, content in messages) if messages else row_text(row)
    if text is None:
        raise UserError(f"{where} has neither a `text` nor a `context` string, nor `messages` with role and content.")
    return Document(text, source, messages) if text.strip() else None


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


def _messages(row: Any) -> tuple[tuple[str, str], ...]:
    """(role, content) of a chat row, whose content may come in parts; nothing if the row is none, or holds more than text."""
    found = row.get("messages") if isinstance(row, dict) and not isinstance(row.get("text"), str) else None
    messages = []
    for message in found if isinstance(found, list) else ():
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            return ()
        messages.append((role, content))
    return tuple(messages)


def _from_hub(name: str) -> list[Document]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"There is no file {name}. If it is a Hugging Face dataset, run: pip install 'fastfill[datasets]'  "
            "(otherwise give a .txt or .jsonl file)."
        )
    import datasets

    path, _, split = name.partition(":")
    try:
        rows = [reading.whole(dict(row)) for row in datasets.load_dataset(path, split=split or "train")]
    except Exception as error:  # the hub client raises many kinds
        raise UserError(f"The dataset {name} could not be loaded: {error or type(error).__name__}") from error
    made = [_document(row, f"The dataset {name}, row {index + 1}", f"{name}#{index}") for index, row in enumerate(rows)]
    return [document for document in made if document]


def encode(tokenizer: Any, document: Document, least: int | None = None) -> list[int]:
    """Token ids of a document, all or, for `least`, at least so many from its start. A chat goes through the chat template.

    Text is tokenized in pieces of a million characters, split before white space, to bound memory.
    """
    special, text = True, document.text
    if document.messages and getattr(tokenizer, "chat_template", None):
        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            text, special = tokenizer.apply_chat_template(messages, tokenize=False), False
        except Exception as error:  # what a template raises is up to it
            raise UserError(f"{document.source} does not fit the model's chat template: {error}") from error
    ids: list[int] = []
    for piece in _pieces(text):
        ids += tokenizer(piece, verbose=False, **({} if special else {"add_special_tokens": False}))["input_ids"]
        special = False
        if least is not None and len(ids) >= least:
            break
    return ids


def _pieces(text: str) -> Iterator[str]:
    """The text in parts of at most `PIECE_CHARACTERS`; where there is white space, each but the first begins with it."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = begin + PIECE_CHARACTERS
        cut = max(text.rfind(space, begin + PIECE_CHARACTERS // 2, end) for space in " \n")
        yield text[begin : (end := cut if cut > 0 else end)]
        begin = end
    yield text[begin:]


def sequences(tokenizer: Any, documents: Sequence[Document], length: int, seed: int) -> tuple[torch.Tensor, list[Document]]:
    """Cut documents into sequences of exactly `length` tokens, shuffled by seed -> (S, length), and the document of each.

    Raises UserError if there is no whole sequence.
    """
    rows, owners = [], []
    for document in documents:
        ids = encode(tokenizer, document)
        cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        rows += cut
        owners += [document] * len(cut)
    if not rows:
        raise UserError(f"The data is too short: no document has {length} tokens; give longer text or a smaller length.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(rows, dtype=torch.long)[order], [owners[i] for i in order]


def first_tokens(
    tokenizer: Any, documents: Sequence[Document], tokens: int, limit: int | None
) -> list[tuple[str, torch.Tensor]]:
    """(source, first `tokens` token ids) of every document that long, at most `limit` of them, for evaluation."""
    found: list[tuple[str, torch.Tensor]] = []
    for document in documents:
        ids = encode(tokenizer, document, tokens)
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
