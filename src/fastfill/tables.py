"""Tables for people, 80 columns wide; colours only on a terminal (rich honours NO_COLOR). What others wrote stays text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastfill.terminal import text_of


class Plain(Console):
    """A console for which text is text: no markup, no emoji, nothing that steers the terminal."""

    def __init__(self, **settings: Any):
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(text_of(item) if isinstance(item, str) else item for item in objects), **settings)

    def headed(self, head: str, text: str) -> None:
        """Print head, which is markup of ours, and text, which others wrote."""
        super().print(Text.from_markup(head) + Text(text_of(text)))


def console() -> Plain:
    out = Plain()
    return out if out.is_terminal else Plain(width=80)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    out = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        out.add_column(Text(text_of(column)), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*(Text(text_of(cell)) for cell in row))
    console().print(
        Text(text_of(title), style="bold")
    )  # not the table's own title, which is cut into lines of the table's width
    console().print(out)
