"""Text that others wrote, on its way to a terminal, which it may not control."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

from fastfill.errors import LONGEST, printable

# Control characters but for tab and line feed, marks that turn the direction of writing, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def text_of(text: str) -> str:
    """The text with what a terminal would obey, or could not encode, written out (`\\x1b`)."""
    return _UNPRINTABLE.sub(_written_out, text.replace("\r\n", "\n"))


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name, or of an argument, that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(text: str) -> None:
    """Print to stdout, for people."""
    print(text_of(text))


def complain(sentence: str) -> None:
    """One line on stderr. If that cannot be written either, the exit code has to do."""
    with suppress(OSError, ValueError):
        print(f"fastfill: {printable(sentence, LONGEST)}", file=sys.stderr, flush=True)
