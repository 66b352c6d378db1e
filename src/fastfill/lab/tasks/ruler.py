"""Information hidden in a long prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastfill.config import check_integer
from fastfill.errors import UserError
from fastfill.lab.tasks.answers import AnswerTask
from fastfill.lab.tasks.base import files_option, option, positions

if TYPE_CHECKING:
    from fastfill.lab.example import Example
    from fastfill.lab.longbench import Row

Length = int | tuple[int, int]


def ranges(text: str) -> list[tuple[int, ...]]:
    """'1024,2048-4096' -> [(1024,), (2048, 4096)]."""
    try:
        return [tuple(int(end) for end in part.split("-")) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--lengths must be numbers separated by commas, or ranges such as 1024-4096, not {text[:60]!r}."
        ) from error


@dataclass(frozen=True, kw_only=True)
class Ruler(AnswerTask):
    """RULER's tasks, made with a seed (`lab.ruler`). A length may be a range, (1024, 4096); `data` has rows for `qa`."""

    name = "ruler"
    about = "is information anywhere in a long prompt still found?"
    needs_data = False

    data: Sequence[str] = files_option("rows for qa, as for longbench")
    limit: int = option(10, "examples of each task and length")
    lengths: Sequence[int | Sequence[int]] = option(
        (1024, 4096), "tokens of prompt and answer; ranges too, as 1024-4096", parse=ranges
    )
    haystack: str | None = option(None, "text to hide things in (default: RULER's noise)", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("--limit", self.limit, 1)
        self.distinct()

    def distinct(self) -> list[Length]:
        """The lengths, each once. Raises UserError for what is none."""
        found: list[Length] = []
        for given in self.lengths:
            ends = [given] if isinstance(given, int) else list(given)
            for end in ends:
                check_integer("each length", end, 1)
            if not 1 <= len(ends) <= 2 or ends[0] > ends[-1]:
                words = "-".join(map(str, ends))[:60]
                raise UserError(f"--lengths: a range goes from its shorter to its longer end, not {words!r}.")
            length: Length = ends[0] if ends[0] == ends[-1] else (ends[0], ends[1])
            found += [length] if length not in found else []
        return found

    def read(self) -> Any:
        """(rows for `qa`, text to hide things in)"""
        from fastfill.lab import longbench

        super().read()
        return (longbench.read(self.data) if self.data else []), self.hay()

    def hay(self) -> str | None:
        from fastfill import reading

        return reading.text(self.haystack) if self.haystack else None

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        rows, haystack = items
        return self.answer(engine, tokenizer, self.examples(engine, tokenizer, self.datasets, rows, haystack), out)

    def examples(
        self, engine: Any, tokenizer: Any, tasks: Sequence[str] | None, rows: Sequence[Row], haystack: str | None
    ) -> list[Example]:
        from fastfill.lab import ruler

        return ruler.examples(
            tokenizer,
            positions(engine),
            tasks=tasks,
            lengths=self.distinct(),
            count=self.limit,
            seed=self.seed,
            rows=[row.fields for row in rows],
            haystack=haystack,
            chat=self.chat,
            max_new_tokens=self.max_new_tokens,
        )
