"""Answers to LongBench's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastfill.config import check_integer
from fastfill.lab.tasks.answers import AnswerTask
from fastfill.lab.tasks.base import calibrated_on, files_option, option, positions

if TYPE_CHECKING:
    from fastfill.lab.example import Example
    from fastfill.lab.longbench import Row


@dataclass(frozen=True, kw_only=True)
class LongBench(AnswerTask):
    """Rows in the format of LongBench or MiniLongBench, with LongBench's rules (`lab.longbench`).

    `run` also takes the rows themselves: a file's JSON objects.
    """

    name = "longbench"
    about = "are the answers to long prompts as good?"

    data: Sequence[str] = files_option(".jsonl files of rows in LongBench's format, or their folder")
    max_prompt_tokens: int | None = option(None, "cut prompts (default: to what the model holds)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompt_tokens is not None:
            check_integer("--max-prompt-tokens", self.max_prompt_tokens, 1)

    def read(self) -> Any:
        from fastfill.lab import longbench

        super().read()
        return longbench.read(self.data, self.datasets, self.limit)

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        from fastfill.lab import longbench

        rows = [
            row if isinstance(row, longbench.Row) else longbench.check(row, f"Row {i}", f"rows#{i}")
            for i, row in enumerate(items)
        ]
        return self.answer_rows(engine, tokenizer, rows, [], out)

    def answer_rows(
        self, engine: Any, tokenizer: Any, rows: Sequence[Row], others: Sequence[Example], out: Any
    ) -> dict[str, Any]:
        """What is recovered of rows, and of other examples behind them."""
        from fastfill.lab import longbench

        shared = calibrated_on([row.source for row in rows], engine.artifact)
        made = longbench.examples(
            tokenizer,
            rows,
            positions(engine),
            max_prompt_tokens=self.max_prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
        )
        found = self.answer(engine, tokenizer, [*made, *others], out, **longbench.chinese(rows))
        found["max_prompt_tokens"] = self.max_prompt_tokens
        return {**longbench.named_metrics(found, rows), "calibrated_on": shared}
