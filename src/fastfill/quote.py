"""Words of others, fit for a sentence of ours: one line, no control characters, not long."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """A name or value out of a file, quoted."""
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, without its last full stop."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(error)).strip() or type(error).__name__
    return (text if len(text) <= most else text[: most - 3] + "...").rstrip(".")
