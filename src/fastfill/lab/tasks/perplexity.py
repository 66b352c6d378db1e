"""How much worse text is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastfill.lab.tasks.base import cell, show_counts
from fastfill.lab.tasks.documents import ReadingTask
from fastfill.schema import READINGS


@dataclass(frozen=True, kw_only=True)
class Perplexity(ReadingTask):
    """Perplexities, KL and agreement, strict and continuation, and the loss along the prompt."""

    name = "perplexity"
    about = "how much worse is text predicted, and does the loss grow along the prompt?"

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        from fastfill.lab import perplexity

        texts = self.texts(engine, tokenizer, items)
        origin = self.origin(engine, texts)
        store = self.store(engine, out, self.identity(texts), continuation=self.continuation)
        found = perplexity.evaluate(engine.attachment, texts, continuation=self.continuation, store=store, seed=self.seed)
        return {**found, **origin}

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        """Of what an artifact has recorded, too: fields may be missing."""
        from fastfill.tables import console, table

        lines = [
            [name, *(cell(result.get(f"{prefix}{key}"), ".3f") for key in READINGS)]
            for name, prefix in (("strict", ""), ("continuation", "cont_"))
        ]
        title = f"{result.get('documents', '-')} documents, {cell(result.get('sparsity'), '.0%')} sparsity, "
        title += f"blocks of {result.get('block_size', '-')}, predictor {result.get('predictor', '-')}"
        table(title, ["", "dense ppl", "sparse ppl", "ratio", "KL nats", "top-1"], lines)
        if result.get("context_kept") is not None:
            console().print(
                f"without context the continuation has ppl {cell(result.get('no_context_ppl'), '.2f')}: "
                f"{result['context_kept']:.1%} of the context's worth is retained"
            )
        if len(result.get("curve", ())) > 1:
            table(
                "loss along the prompt (strict), nats",
                ["positions", "dense", "sparse", "difference"],
                [
                    [
                        f"{point['from']} to {point['to'] - 1}",
                        *(f"{value:.3f}" for value in (point["nll_dense"], point["nll_sparse"])),
                        f"{point['nll_sparse'] - point['nll_dense']:+.3f}",
                    ]
                    for point in result["curve"]
                ],
            )
        show_counts(result)
