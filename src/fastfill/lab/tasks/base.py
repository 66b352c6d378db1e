"""What a task is: options, checked when they are given; data, read before a model is there; a measurement; its tables."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastfill.config import MAX_SEED, check_integer, to_dict
from fastfill.errors import UserError, quoted

if TYPE_CHECKING:
    from fastfill.lab.resume import Store


def option(default: Any, help: str, **more: Any) -> Any:
    """A field that is an option of the command too: `--max-new-tokens` for `max_new_tokens`, `--no-chat` for `chat` = True.

    help: what it is; the command adds the default. more: `metavar`, `choices` and `nargs` as argparse has them; `parse`, text
    of the command -> value, for lists that it takes as one word.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


def files_option(help: str) -> Any:
    """An option that takes files, one or more."""
    return option((), help, nargs="+", metavar="FILE")


def names(text: str) -> list[str]:
    """'a, b' -> ['a', 'b']."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement that owns its options. Its fields are options, of `fastfill evaluate --task NAME` too.

    A task has `name`, `about` (the question it answers) and `measure`; `show` prints a result. any_engine: False if it looks
    inside the model. every_token: False if it reads nothing but what follows a prompt. needs_data: False if it makes its own
    where none is named.
    Raises UserError for options that do not fit, when they are given.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    any_engine: ClassVar[bool] = False
    every_token: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    data: Sequence[str] = files_option("text, as for calibrate")
    limit: int | None = option(None, "at most this many documents, or examples of each dataset")
    seed: int = option(0, "of the examples and the intervals")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and field.metadata.keys() & {"nargs", "parse"}:
                raise UserError(f"{field.name} must be a list, not the text {quoted(value)}.")
        if self.limit is not None:
            check_integer("--limit", self.limit, 1)
        check_integer("--seed", self.seed, 0, MAX_SEED)

    def check(
        self, *, engine: str = "transformers", learned: bool = True, compensator: bool = True, out: str | Path | None = None
    ) -> None:
        """Raise UserError unless the task can measure an artifact that is on a model so, and keep what is done in `out`."""
        from fastfill import files
        from fastfill.lab.resume import PREDICTIONS

        if engine != "transformers" and not self.any_engine:
            raise UserError(f"--task {self.name} looks inside the model; it needs --engine transformers.")
        if out is not None:
            files.check_file(Path(out) / PREDICTIONS)

    def read(self) -> Any:
        """The items that `data` names, read and checked: what can be told before a model is there."""
        if self.needs_data and not self.data:
            raise UserError(f"--task {self.name} needs --data FILE.")

    def run(self, engine: Any, tokenizer: Any, items: Any = None, *, out: str | Path | None = None) -> dict[str, Any]:
        """Measure, dense beside sparse. Returns what `fastfill evaluate --json` prints.

        engine: what `fastfill.attach` gave, or an `Engine`. items: in the place of what `read` gives. out: a folder that
        keeps what is done; the same call resumes from there.
        Raises UserError for items that do not fit the model.
        """
        from fastfill import machine
        from fastfill.engines.transformers import engine_of

        engine = engine_of(engine, tokenizer)
        name, choices, ranks = engine.engine, engine.choices, engine.artifact.ranks
        predictor, whole = _predictor(choices["predictor"]), choices["compensator"] or not ranks["linear"] + ranks["silu"]
        self.check(engine=name, learned=predictor == "learned", compensator=whole, out=out)
        if self.every_token and engine.config.upper_share < 1:
            raise UserError(
                f"--task {self.name} looks at all tokens of a prompt, and with upper_share={engine.config.upper_share:g} the "
                "upper layers do not have them all; use --task longbench, ruler or suite."
            )
        found = self.measure(engine, tokenizer, self.read() if items is None else items, out)
        return {
            "task": self.name,
            "engine": name,
            "model": engine.name,
            "dtype": engine.dtype,
            "predictor": predictor,
            "compensator": choices["compensator"],
            **to_dict(engine.config),
            **{name: choices[name] for name in ("kernel", "kernel_reason", "expected_gain", "packed", "attention_by")},
            **found,
            "machine": machine.describe(),
        }

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: str | Path | None) -> dict[str, Any]:
        """The task's own part of the result."""
        raise NotImplementedError

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        """The result as tables, 80 columns wide."""
        raise NotImplementedError

    def store(self, engine: Any, out: str | Path | None, items: Any, **more: Any) -> Store:
        """Keeps finished items in `out`. items, more: what two runs must share to be one, beside model and artifact."""
        from fastfill.lab import resume

        return resume.Store(out, resume.settings(self.name, engine, engine.artifact, items, **more))


def _predictor(class_name: str) -> str:
    """As the command names it: LearnedPredictor -> learned, FirstBlock -> first-block."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", class_name).lower().removesuffix("-predictor")


def positions(engine: Any) -> int:
    """Tokens that the model holds."""
    from fastfill import context

    return context.positions(engine.shape) or context.UNLIMITED


def calibrated_on(sources: Collection[str], artifact: Any) -> int:
    """How many of the sources the artifact was calibrated on; a warning if there are any."""
    shared = len({*sources} & {*artifact.calibration.get("document_rows", [])})
    if shared:
        print(f"fastfill: warning: {shared} of these documents were calibrated on; this is not held-out.", file=sys.stderr)
    return shared


# --- for tables ---------------------------------------------------------------------------------------------------------


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show_counts(result: dict[str, Any]) -> None:
    """How the prompts' tokens were computed."""
    from fastfill.tables import console

    counts = (result.get(f"{kind}_tokens", "-") for kind in ("sparse", "dense"))
    kinds = {"skipped_above": "not read by the upper layers", "reread_tokens": "read again"}
    more = "".join(f", {result[name]} {words}" for name, words in kinds.items() if name in result)
    console().print("{} tokens prefilled sparsely, {} densely".format(*counts) + more)
