"""Tasks over the first tokens of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastfill.config import check_integer
from fastfill.errors import UserError
from fastfill.lab.tasks.base import Task, calibrated_on, option, positions

if TYPE_CHECKING:
    import torch

    from fastfill.data import Document

Texts = list[tuple[str, "torch.Tensor"]]  # (source, ids (T,)), all of one length


@dataclass(frozen=True, kw_only=True)
class DocumentTask(Task):
    tokens: int = option(2048, "first tokens of each document that are used")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("--tokens", self.tokens, 2)

    def read(self) -> Any:
        """A list of documents."""
        from fastfill import data

        super().read()
        return data.load_documents(self.data)

    def texts(self, engine: Any, tokenizer: Any, documents: Sequence[Document]) -> Texts:
        """The first tokens of the documents that are long enough, at most `limit` of them."""
        from fastfill import data

        if self.tokens > positions(engine):
            raise UserError(f"--tokens {self.tokens} is more than the {positions(engine)} that the model holds.")
        return data.first_tokens(tokenizer, documents, self.tokens, self.limit)

    @staticmethod
    def identity(texts: Texts) -> list[list[str]]:
        """What makes texts these: for `store`."""
        from fastfill import data

        return [[source, data.digest(ids)] for source, ids in texts]

    @staticmethod
    def origin(engine: Any, texts: Texts) -> dict[str, Any]:
        """Where the texts come from."""
        sources = [source for source, _ in texts]
        return {"calibrated_on": calibrated_on(sources, engine.artifact), "sources": sources}


@dataclass(frozen=True, kw_only=True)
class ReadingTask(DocumentTask):
    """Each document is scored strictly, and its end as a continuation (`lab.perplexity`)."""

    continuation: int = option(256, "last tokens, teacher-forced densely")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("--continuation", self.continuation, 2)
