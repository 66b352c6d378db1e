"""The one error that users see as a sentence, and the words that may stand in it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 600  # characters of a message: the sentence, and the two paths it may name


class UserError(ValueError):
    """Something the user can mend. The message is one clear sentence that says what to do; the CLI exits with code 2.

    Whatever the message quotes, it is one printable line: control characters are escaped, a long middle is left out.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, LONGEST))


def printable(text: str, most: int) -> str:
    """One line of at most `most` characters that no terminal takes for a command: what is not printable is escaped."""
    text = _cut(text, most)
    return _cut("".join(_escaped(c) for c in text), most).strip()


def _cut(text: str, most: int) -> str:
    """Without its middle, if it is longer."""
    head = (most - 3) * 2 // 3
    return text if len(text) <= most else f"{text[:head]}...{text[head + 3 - most :]}"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character in "\n\r\t" else character.encode("unicode_escape").decode()


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 60, 60, 40
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4096 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()


def quoted(value: Any) -> str:
    """A value as a message quotes it: `repr`, at most some 60 characters of it."""
    return _SHORT.repr(value)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, quoted, and how many more there are."""
    names = list(names)
    return ", ".join(map(quoted, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: BaseException, most: int = 120) -> str:
    """Why, in the words of an error of somebody else: its first line, without a full stop."""
    words = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return printable(str(words).splitlines()[0], most).rstrip(".")
