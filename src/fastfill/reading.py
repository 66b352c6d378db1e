"""Text as people have it: UTF-8, with or without a byte order mark, UTF-16 and UTF-32 with one, gzip of each; rows of JSON.

Sizes are bounded before anything is unpacked, decoded or parsed.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastfill.errors import UserError

MOST_BYTES = 1 << 30  # of a file of text
UNPACKED = 100  # times its size: the most that gzip makes of text; a file that unpacks to more is made to fill the memory
_LEAST_UNPACKED = 1 << 24
_MARKS = (  # that of UTF-16 begins that of UTF-32
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_KINDS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json"}
_SURROGATES = re.compile("[\ud800-\udfff]")


def kind(path: str | Path) -> str | None:
    """What a file's name says it holds: "text", "lines" (JSON, one a line) or "json"; None if it says nothing."""
    return _KINDS.get(_plain(path).suffix.lower())


def stem(path: str | Path) -> str:
    """The file's name without `.jsonl`, `.jsonl.gz` and the like."""
    return _plain(path).stem


def _plain(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() == ".gz" else path


def text(path: str | Path, what: str = "", most: int = MOST_BYTES) -> str:
    """The text of a file ('-': standard input), line ends as `\\n`. what: names it in messages; most: bytes.

    Raises UserError for what cannot be read, is too large, or is no text.
    """
    name = f"{what} {path}".strip() if str(path) != "-" else "Standard input"
    try:
        return decode(_bytes(path, most))
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _bytes(path: str | Path, most: int) -> bytes:
    if str(path) != "-":
        with open(path, "rb", opener=_open) as file:
            data = file.read(most + 1)
    elif sys.stdin is None:
        raise UserError("is closed; name a file, or send the text to it.")
    else:  # its bytes: the locale may say another encoding
        data = sys.stdin.buffer.read(most + 1)
    if data.startswith(b"\x1f\x8b"):
        room = min(most, max(UNPACKED * len(data), _LEAST_UNPACKED))
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            data = file.read(room + 1)
        most = room
    if len(data) > most:
        raise UserError(f"holds more than {most / 1e6:,.0f} MB; give a part of it.")
    return data


def _open(path: str, flags: int) -> int:
    """Open without waiting: a named pipe that nobody writes to is empty, one with a writer is read to its end."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if hasattr(os, "O_NONBLOCK"):
        os.set_blocking(descriptor, True)
    return descriptor


def decode(data: bytes) -> str:
    """Bytes as text, line ends as `\\n`. Raises UserError, a sentence without its subject, if they are none."""
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        found = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError("cannot be read: it is not UTF-8 text; save it as UTF-8.") from error
    # Chance makes UTF-16 of other bytes, and plain UTF-8 of UTF-16 without its mark: then a mark stands inside, or zeros do.
    if (encoding != "utf-8" and "\ufeff" in found) or found.count("\0") > len(found) // 8:
        raise UserError("cannot be read: it is not UTF-8 text; save it as UTF-8.")
    return found.replace("\r\n", "\n").replace("\r", "\n")


def whole(found: Any) -> Any:
    """Text, or JSON, in which halves of surrogate pairs, which no tokenizer takes, have become U+FFFD."""
    if isinstance(found, str):
        return _SURROGATES.sub("\ufffd", found)
    if isinstance(found, list):
        return [whole(item) for item in found]
    if isinstance(found, dict):
        return {whole(key): whole(value) for key, value in found.items()}
    return found


def parse(piece: str, where: str, advice: str) -> Any:
    """JSON that others wrote. Raises UserError, beginning with `where` and ending with `advice`."""
    try:
        return whole(json.loads(piece))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); {advice}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not JSON that can be read (nested too deeply); {advice}") from error
    except ValueError as error:  # Python's limit on the digits of an integer
        raise UserError(f"{where} is not JSON that can be read (a number of too many digits); {advice}") from error


def rows(path: str | Path, what: str = "The data file") -> Iterator[tuple[str, int, Any]]:
    """(where, for messages; index, for names; row) of a file of JSON: one a line, or a list of rows, or one row.

    Raises UserError as `text` and `parse` do.
    """
    found = text(path, what)
    if kind(path) == "json" and not _one_a_line(found):
        document = parse(found, str(path), "it must hold a list of rows, or one row.")
        for index, row in enumerate(document if isinstance(document, list) else [document]):
            yield f"{path}, row {index + 1}", index, row
        return
    for index, line in enumerate(found.split("\n")):
        if line.strip("\ufeff \t"):
            where = f"{path}, line {index + 1}"
            yield where, index, parse(line.strip("\ufeff"), where, "each line must be one JSON object.")


def _one_a_line(found: str) -> bool:
    """Whether rows stand one a line, as many have them under the name .json."""
    first, _, rest = found.strip().partition("\n")
    try:
        return bool(rest) and json.loads(first) is not None
    except (ValueError, RecursionError):
        return False
