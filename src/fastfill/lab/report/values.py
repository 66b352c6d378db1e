"""Numbers and words from result files: what is not a usable number becomes NaN, and NaN is shown as `-`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

NAN = float("nan")
LARGEST = 1e30  # beyond it no measurement is meant, and drawing overflows
MISSING = "-"
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure. rows: cells as text, the first of each row names it."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(value: Any) -> float:
    """The value if it is a finite number of sensible size, else NaN (None, text, infinity, a missing key)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NAN
    return float(value) if abs(value) < LARGEST else NAN


def numbers(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [number(row.get(key)) for row in rows]


def speedup(row: dict[str, Any]) -> float:
    """Of a row of `bench`; NaN where all is dense, and the ratio is noise."""
    return NAN if row.get("sparse_tokens") == 0 else number(row.get("speedup"))


def ceiling(row: dict[str, Any]) -> float:
    """Of a row of `bench`; NaN where all is dense. Before rows had `rounds`, they counted dense tokens as if these skipped
    neurons too: put right here."""
    most, tokens, sparse = (number(row.get(key)) for key in ("ceiling", "prompt_tokens", "sparse_tokens"))
    if sparse == 0:
        return NAN
    if "rounds" in row or not (most > 0 and tokens > 0 and sparse > 0):
        return most
    left = 1 - sparse / tokens * (1 - 1 / most)
    return 1 / left if left > 0 else NAN


def pair(value: Any) -> tuple[float, float]:
    """The two ends of an interval; NaN where there is none."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return number(value[0]), number(value[1])
    return NAN, NAN


def known(values: Iterable[float]) -> list[float]:
    """Without NaN."""
    return [value for value in values if not math.isnan(value)]


def text(value: Any, limit: int = 120) -> str:
    """One printable line: characters that XML forbids are left out, long text ends in an ellipsis."""
    line = " ".join(NOT_XML.sub("", str(value)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def short(model: Any) -> str:
    """A model's name without its owner."""
    return text(str(model).rsplit("/", 1)[-1], 60)


def plain(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits, with thousands separated."""
    value = number(value)
    if math.isnan(value):
        return MISSING
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def count(value: Any) -> str:
    value = number(value)
    return MISSING if math.isnan(value) else f"{value:,.0f}"


def percent(value: Any, digits: int = 1) -> str:
    value = number(value)
    return MISSING if math.isnan(value) else f"{value:.{digits}%}"


def times(value: Any) -> str:
    value = number(value)
    return MISSING if math.isnan(value) else f"{value:,.2f}x"


def seconds(value: Any) -> str:
    value = number(value)
    return MISSING if math.isnan(value) else f"{value:,.3f} s" if value < 0.1 else f"{value:,.2f} s"


def mean(values: Iterable[float]) -> float:
    values = known(values)
    return sum(values) / len(values) if values else NAN


NAMES = {
    "kernel": "{} kernel",
    "block_size": "blocks of {}",
    "threads": "{} threads",
    "T": "{} tokens",
}


def differing(documents: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """For each document its values of those keys in which the documents differ, as words."""
    shown = [key for key in keys if len({str(document.get(key)) for document in documents}) > 1]
    return [", ".join(filter(None, (_part(document, key) for key in shown))) for document in documents]


def distinct(documents: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """`differing`, and where that is not enough the file's name, and then a number: no two are the same."""
    names = differing(documents, keys)
    shared = {name for name in names if names.count(name) > 1}
    for index, document in enumerate(documents):
        if names[index] in shared and document.get("file"):
            names[index] = ", ".join(filter(None, (names[index], text(document["file"], 40))))
    return [f"{name} ({names[:i].count(name) + 1})".strip() if names.count(name) > 1 else name for i, name in enumerate(names)]


def _part(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if key == "sparsity":
        return f"{percent(value, 0)} sparsity"
    if key == "compensator":
        return "" if value else "no compensator"
    if key == "model":
        return short(value)
    if key == "sources" and isinstance(value, list) and value:
        files = list(dict.fromkeys(str(source).rsplit("#", 1)[0] for source in value))
        return text(PurePath(files[0]).name, 20) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return NAMES.get(key, "{}").format(text(value, 30)) if value is not None else ""
