"""Which neurons are selected, seen from inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastfill.errors import UserError
from fastfill.lab.tasks.base import files_option, positions, show_counts
from fastfill.lab.tasks.documents import DocumentTask

ONE = "--task picks takes one document, the first; leave --limit and --out out."


@dataclass(frozen=True, kw_only=True)
class Picks(DocumentTask):
    """The neurons that the blocks of one document select, by layer: the first that `data` names, or the demo's."""

    name = "picks"
    about = "which neurons are selected, and how does that change from block to block?"
    needs_data = False

    data: Sequence[str] = files_option("text, as for calibrate (default: the demo's)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            raise UserError(ONE)

    def check(self, *, out: Any = None, **attached: Any) -> None:
        super().check(**attached)
        if out is not None:
            raise UserError(ONE)

    def read(self) -> Any:
        from fastfill import data

        return super().read() if self.data else [data.demo_document()]

    def measure(self, engine: Any, tokenizer: Any, items: Any, out: Any) -> dict[str, Any]:
        import torch

        from fastfill import data
        from fastfill.lab import picks

        document = items[0]
        ids = data.encode(tokenizer, document, self.tokens)[: min(self.tokens, positions(engine))]
        return picks.evaluate(engine.attachment, (document.source, torch.tensor(ids)))

    @staticmethod
    def show(result: dict[str, Any]) -> None:
        from fastfill.tables import table

        lines = []
        for layer, kept in enumerate(result["kept"]):
            chance = kept / result["neurons"]
            shares = [result["overlap"][layer], chance, result["always"][layer], result["never"][layer]]
            lines.append([str(layer), str(kept), *("-" if share is None else f"{share:.1%}" for share in shares)])
        title = f"{result['document']}: {result['blocks']} blocks, {result['neurons']} neurons a layer, "
        table(
            title + f"predictor {result['predictor']}",
            ["layer", "kept", "as the block before", "by chance", "selected by all", "by none"],
            lines,
        )
        show_counts(result)
