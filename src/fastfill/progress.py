"""Progress on stderr, with the time left: a bar on a terminal, a line a minute elsewhere (a log of `nohup`, say)."""

from __future__ import annotations

import sys
import time
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
from rich.text import Text

from fastfill.terminal import text_of

LINE_EVERY_S = 60.0


class Stage:
    """Something with an end. `step()` moves it; `note` is shown beside it (a loss, say)."""

    def step(self, done: int = 1, note: str = "") -> None:
        raise NotImplementedError


class _Bar(Stage):
    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task

    def step(self, done: int = 1, note: str = "") -> None:
        self._bar.update(self._task, advance=done, note=note)


class _Lines(Stage):
    """The first line comes after a minute, so that short work says nothing."""

    def __init__(self, title: str, total: int, done: int):
        self._title, self._total, self._first, self._done = title, total, done, done
        self._begin = self._last = time.monotonic()

    def step(self, done: int = 1, note: str = "") -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S or self._done == self._first:
            return
        self._last = now
        gone = now - self._begin
        left = gone / (self._done - self._first) * max(0, self._total - self._done)
        parts = [f"{self._title}: {self._done:,} of {self._total:,}", f"{gone / 60:.0f} min gone", f"{left / 60:.0f} min left"]
        print(", ".join([*parts, note] if note else parts), file=sys.stderr, flush=True)


@contextmanager
def stage(title: str, total: int, done: int = 0) -> Iterator[Stage]:
    """Show progress from `done` to `total` while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(text_of(title), total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Bar(bar, bar.add_task(text_of(title), total=total, completed=done, note=""))


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show that work of unknown length goes on, while the block runs."""
    console = Console(stderr=True)
    with console.status(Text(text_of(title))) if console.is_terminal else nullcontext():
        yield
