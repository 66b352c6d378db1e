"""Progress bars with an ETA on stderr; nothing where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Stage:
    """One bar. `step()` moves it; `note` is shown beside it (a loss, say)."""

    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task

    def step(self, done: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=done, note=note)


@contextmanager
def stage(title: str, total: int, done: int = 0) -> Iterator[Stage]:
    """Show a bar from `done` to `total` while the block runs."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield Stage(bar, bar.add_task(title, total=total, completed=done, note=""))


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show that something goes on whose end cannot be told, while the block runs."""
    console = Console(stderr=True)
    with console.status(title) if console.is_terminal else nullcontext():
        yield
