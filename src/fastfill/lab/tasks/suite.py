"""Rows and hidden information together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastfill.lab.tasks.base import Task, option
from fastfill.lab.tasks.longbench import LongBench
from fastfill.lab.tasks.ruler import Ruler


@dataclass(frozen=True, kw_only=True)
class Suite(LongBench, Ruler):
    """Rows in LongBench's format, and RULER's needles and variables beside them: one run, one table, one mean."""

    name = "suite"
    about = "both at once: what is retained over all tasks that the model can do?"
    needs_data = True

    limit: int = option(100, "examples of each set")

    def read(self) -> Any:
        """(rows, names of what RULER makes, text to hide it in)"""
        from fastfill.lab import longbench, ruler

        Task.read(self)
        made = [name for name in ruler.TASKS if name != "qa"]  # its questions are in the rows
        hidden = [name for name in self.datasets or (*ruler.NEEDLES, "vt") if name in made]
        others = [name for name in self.datasets or () if name not in made]
        rows = longbench.read(self.data, others, self.limit) if others or not self.datasets else []
        return rows, hidden, self.hay()

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        rows, hidden, haystack = items
        others = self.examples(engine, tokenizer, hidden, [], haystack) if hidden else []
        return self.answer_rows(engine, tokenizer, rows, others, out)
