"""What each sparsity costs, and what it gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastfill.config import check_integer, check_sparsity
from fastfill.errors import UserError
from fastfill.lab.tasks.base import cell, names, option, positions
from fastfill.lab.tasks.documents import ReadingTask


def numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"--sparsities must be numbers separated by commas, not {text!r}.") from error


@dataclass(frozen=True, kw_only=True)
class Pareto(ReadingTask):
    """Strict and continuation perplexity, and TTFT; a row per sparsity and predictor.

    It takes the artifact off the model, and puts it on again for each row.
    """

    name = "pareto"
    about = "what does each sparsity cost, and what does it gain?"

    sparsities: Sequence[float] = option((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "separated by commas", parse=numbers)
    methods: Sequence[str] = option(("learned", "oracle", "static"), "predictors, separated by commas", parse=names)
    prompt_tokens: int = option(2048, "of the TTFT")
    repeats: int = option(3, "TTFT measurements after one warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("--prompt-tokens", self.prompt_tokens, 2)
        check_integer("--repeats", self.repeats, 1)
        for sparsity in self.sparsities:
            check_sparsity(sparsity)
        from fastfill.lab.baselines import BASELINES, LEARNED

        known = (LEARNED, *BASELINES)
        once = all(values and len({*values}) == len(values) for values in (self.methods, self.sparsities))
        if not once or not {*self.methods} <= {*known}:
            raise UserError(f"--methods and --sparsities name each once; the methods are {', '.join(known)}.")

    def check(self, *, learned: bool = True, **attached: Any) -> None:
        if not learned:
            raise UserError("--task pareto takes its predictors from --methods; leave --predictor out.")
        super().check(learned=learned, **attached)

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        import torch

        from fastfill import machine
        from fastfill.lab import pareto, published

        texts = self.texts(engine, tokenizer, items)
        if self.prompt_tokens >= positions(engine) or not published.Cost.of(engine.attachment, self.prompt_tokens).sparse:
            raise UserError(f"--prompt-tokens {self.prompt_tokens} is too short to be sparse, or more than the model holds.")
        origin = self.origin(engine, texts)
        more = {name: getattr(self, name) for name in ("continuation", "prompt_tokens", "repeats", "seed")}
        # Times of two machines are not one result.
        more |= {"cpu": machine.describe()["cpu"], "threads": torch.get_num_threads()}
        found = pareto.evaluate(
            engine.attachment,
            engine.artifact,
            texts,
            sparsities=self.sparsities,
            methods=self.methods,
            prompt_tokens=self.prompt_tokens,
            repeats=self.repeats,
            compensator=engine.choices["compensator"],
            continuation=self.continuation,
            store=self.store(engine, out, self.identity(texts), **more),
            seed=self.seed,
        )
        return {**found, **origin}

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        from fastfill.tables import table

        table(
            f"{result['model']}, {result['documents']} documents; TTFT of {result['prompt_tokens']} tokens",
            ["method", "sparsity", "FFN", "ppl", "KL", "ppl after", "context", "TTFT s", "speed-up"],
            [
                [
                    line["method"],
                    f"{line['sparsity']:.0%}",
                    f"{line['ffn_flops']:.0%}",
                    f"{line['ppl_ratio']:.2f}x",
                    f"{line['kl']:.3f}",
                    f"{line['cont_ppl_ratio']:.3f}x",
                    cell(line["context_kept"], ".0%"),
                    cell(line["ttft_s"], ".3f"),
                    cell(line["speedup"], ".2f"),
                ]
                for line in result["rows"]
            ],
        )
