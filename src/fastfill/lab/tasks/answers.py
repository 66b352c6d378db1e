"""Tasks with reference answers: scores, likelihoods and recovery (`lab.runner`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastfill.config import check_integer, is_number
from fastfill.errors import UserError, quoted
from fastfill.lab.tasks.base import Task, names, option, show_counts

if TYPE_CHECKING:
    from fastfill.lab.example import Example

SCORES = ("both", "likelihood", "answers")


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Task):
    any_engine = True
    every_token = False

    datasets: Sequence[str] | None = option(None, "sets to take, separated by commas", parse=names, metavar="NAMES")
    max_new_tokens: int | None = option(None, "shorten the answers (no longer comparable)")
    score: str | None = option(
        None,
        "of the right answer its likelihood, of the written answer its score (default: both; with vllm: answers)",
        choices=SCORES,
    )
    batch: int = option(1, "examples whose answers are written together: faster, and rounded a little differently")
    minutes: float | None = option(None, "stop in time; --out keeps what is done")
    chat: bool = option(True, "never use the chat template (base models)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None:
            check_integer("--max-new-tokens", self.max_new_tokens, 1)
        check_integer("--batch", self.batch, 1)
        if self.minutes is not None and (not is_number(self.minutes) or not 0 < self.minutes < math.inf):
            shown = f"{self.minutes:g}" if isinstance(self.minutes, (int, float)) else quoted(self.minutes)
            raise UserError(f"--minutes must be more than 0, not {shown}.")
        if self.score not in (None, *SCORES):
            raise UserError(f"The score {quoted(self.score)} is not known; use one of {', '.join(SCORES)}.")

    def check(self, *, engine: str = "transformers", **attached: Any) -> None:
        if engine != "transformers" and self.score not in (None, "answers"):
            raise UserError(f"--score {self.score} looks inside the model; it needs --engine transformers.")
        if engine != "transformers" and self.batch > 1:
            raise UserError("--batch needs --engine transformers; leave it out.")
        super().check(engine=engine, **attached)

    def answer(self, engine: Any, tokenizer: Any, examples: Sequence[Example], out: Any, **more: Any) -> dict[str, Any]:
        """What is recovered of the examples. more: for `store`."""
        from fastfill.lab import runner
        from fastfill.lab.example import identity

        score = self.score or ("both" if engine.engine == "transformers" else "answers")
        store = self.store(engine, out, identity(examples), score=score, **more)
        found = runner.run(
            engine, tokenizer, examples, store, seed=self.seed, score=score, minutes=self.minutes, batch=self.batch
        )
        if engine.config.sparsity and not found["sparse_tokens"]:
            least = engine.config.shortest_prompt
            print(f"fastfill: warning: all prompts stayed dense, as those under {least} tokens do.", file=sys.stderr)
        return {**found, "max_prompt_tokens": None, "max_new_tokens": self.max_new_tokens, "chat": self.chat}

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        """Scores, sets at chance apart, likelihoods."""
        from fastfill.tables import console, table

        lines = result["datasets"]
        lost = [line for line in lines if line.get("at_chance")]
        if "average" in result:
            _show_scores(result, [line for line in lines if not line.get("at_chance")])
        if lost:
            table(
                "\nat chance, and not in the average",
                ["dataset", "n", "dense", "sparse", "chance"],
                [
                    [line["dataset"], str(line["examples"]), *(f"{line[key]:.2f}" for key in ("dense", "sparse", "chance"))]
                    for line in lost
                ],
            )
        if "likelihood" in result:
            _show_likelihoods(result)
        if result["examples"] < result["planned"]:
            console().print(f"{result['examples']} of {result['planned']} examples are done")


def _show_scores(result: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    from fastfill.tables import console, table

    def cells(name: str, line: dict[str, Any], examples: int) -> list[str]:
        recovery = "-" if line["recovery"] is None else f"{line['recovery']:.1%}"
        interval = f"{line['interval'][0]:.1%} to {line['interval'][1]:.1%}" if line["interval"] else "-"
        return [name, str(examples), f"{line['dense']:.2f}", f"{line['sparse']:.2f}", recovery, interval]

    shown, average = [cells(line["dataset"], line, line["examples"]) for line in lines], result["average"]
    if len(shown) > 1:
        shown.append(cells("average", average, result["examples"]))
    title = f"{result['task']}, {result['sparsity']:.0%} sparsity, blocks of {result['block_size']}, "
    columns = ["dataset", "n", "dense", "sparse", "recovery", "95 % interval"]
    table(title + f"predictor {result['predictor']}", columns, shown)
    console().print(
        f"{result['same_answers']} of {result['examples']} answers are the same; {result['cut_prompts']} prompts were cut"
    )
    show_counts(result)
    if average.get("mean_recovery") is not None and average["sets"] > 1:
        bounds = average["mean_recovery_interval"]
        console().print(
            f"mean of the {average['sets']} recoveries: {average['mean_recovery']:.1%}"
            + (f" ({bounds[0]:.1%} to {bounds[1]:.1%})" if bounds else "")
        )


def _show_likelihoods(result: dict[str, Any]) -> None:
    """The right answer's nats per token after the dense and the sparse prefill."""
    from fastfill.tables import console, table

    lines = [(line["dataset"], line["likelihood"]) for line in result["datasets"] if "likelihood" in line]
    if len(lines) > 1:
        lines.append(("average", result["likelihood"]))
    table(
        "\nthe right answer, nats per token",
        ["dataset", "n", "dense", "loss", "95 % interval", "KL", "first"],
        [
            [
                name,
                str(line["examples"]),
                f"{line['dense']:.3f}",
                f"{line['loss']:+.3f}",
                "{:+.3f} to {:+.3f}".format(*line["interval"]) if line["interval"] else "-",
                f"{line['kl']:.3f}",
                f"{line['first_token_agreement']:.0%}",
            ]
            for name, line in lines
        ],
    )
    console().print("loss: sparse - dense; first: the same most likely first token")
