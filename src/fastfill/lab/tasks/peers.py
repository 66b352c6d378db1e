"""Published methods and our baselines at equal arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastfill.errors import UserError
from fastfill.lab.tasks.base import cell, files_option
from fastfill.lab.tasks.documents import ReadingTask


@dataclass(frozen=True, kw_only=True)
class Peers(ReadingTask):
    """Strict and continuation perplexity of ours, its baselines and published methods that save the same arithmetic.

    It takes the artifact off the model, and puts it on again for each method.
    """

    name = "peers"
    about = "what do published methods lose at equal arithmetic?"

    calibration: Sequence[str] = files_option("text for thresholds (default: the package's demo document)")

    def check(self, *, learned: bool = True, compensator: bool = True, **attached: Any) -> None:
        if not learned or not compensator:
            raise UserError("--task peers compares all predictors, with and without compensator; leave those options out.")
        super().check(learned=learned, compensator=compensator, **attached)

    def read(self) -> Any:
        """(documents to evaluate on, documents for thresholds)"""
        from fastfill import data

        documents = super().read()
        others = data.load_documents(self.calibration) if self.calibration else [data.demo_document()]
        texts = {other.text for other in others}
        for document in documents:
            if document.text in texts:
                raise UserError(f"{document.source} is evaluated on; thresholds must come from other text (--calibration).")
        return documents, others

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        from fastfill import data
        from fastfill.lab import published, resume

        documents, others = items
        texts = self.texts(engine, tokenizer, documents)
        if not published.Cost.of(engine.attachment, self.tokens).sparse or not engine.config.sparsity:
            raise UserError("--task peers needs a sparsity above 0 and documents long enough to be sparse (--tokens).")
        origin = self.origin(engine, texts)
        thresholds = resume.digest([other.text for other in others])
        more = {"continuation": self.continuation, "calibration": thresholds, "seed": self.seed}
        store = self.store(engine, out, self.identity(texts), **more)
        length = min(published.SEQUENCE_LENGTH, self.tokens)
        sequences = data.sequences(tokenizer, others, length, self.seed)[0][: published.SEQUENCES]
        found = published.evaluate(
            engine.attachment, engine.artifact, texts, sequences, continuation=self.continuation, store=store, seed=self.seed
        )
        return {**found, "calibration": [other.source for other in others], **origin}

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        from fastfill.tables import console, table

        table(
            f"at equal FFN arithmetic, {result['documents']} documents of {result['prompt_tokens']} tokens, "
            f"blocks of {result['block_size']}",
            ["method", "comp.", "skipped", "FFN", "ppl", "KL", "ppl after", "KL after", "context"],
            [
                [
                    line["published_as"] or line["method"],
                    "yes" if line["compensator"] else "-",
                    f"{line['sparsity']:.0%}",
                    f"{line['ffn_flops']:.1%}",
                    cell(line["ppl_ratio"], ".2f"),
                    cell(line["kl"], ".3f"),
                    f"{line['cont_ppl_ratio']:.3f}",
                    f"{line['cont_kl']:.3f}",
                    cell(line["context_kept"], ".0%"),
                ]
                for line in result["rows"]
            ],
        )
        console().print(
            "comp.: with our compensators. FFN: share of the dense prefill FFN's\n"
            "multiply-adds. ppl: over dense, on sparse tokens and after them.\n"
            "NAME-like: re-implemented from the description; notes are in the JSON.\n"
            "Thresholds are from "
            f"{', '.join(result['calibration'])}."
        )
