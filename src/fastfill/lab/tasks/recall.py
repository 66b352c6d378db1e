"""Whether the predictor selects what an oracle would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastfill.lab.tasks.base import show_counts
from fastfill.lab.tasks.documents import DocumentTask


@dataclass(frozen=True, kw_only=True)
class Recall(DocumentTask):
    """Per layer, the importance that the predictor's neurons hold, beside the most that as many could."""

    name = "recall"
    about = "does the predictor select what an oracle would?"

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        from fastfill.lab import recall

        texts = self.texts(engine, tokenizer, items)
        origin = self.origin(engine, texts)
        return {**recall.evaluate(engine.attachment, texts, self.store(engine, out, self.identity(texts))), **origin}

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        from fastfill.tables import table

        keys = ("held", "held_oracle", "recovery", "recall")
        lines = [
            [str(line["layer"]), str(line["kept"]), *(f"{line[key]:.1%}" for key in keys), f"{line['by_chance']:.1%}"]
            for line in result["layers"]
        ]
        lines.append(["mean", "", *(f"{result[key]:.1%}" for key in keys), ""])
        table(
            f"importance held, {result['documents']} documents, {result['sparsity']:.0%} sparsity, "
            f"predictor {result['predictor']}",
            ["layer", "kept", "predictor", "oracle", "recovery", "ids in common", "by chance"],
            lines,
        )
        show_counts(result)
