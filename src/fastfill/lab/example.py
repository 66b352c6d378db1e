"""A question with its prompt, its right answers, and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One question. ids: (1, T), the whole prompt. score: answer text -> 0 to 1. cut: the prompt was shortened.

    answers: what the score compares with. golds: ids (n,) of each form of the right answer as it would be written, for its
    likelihood; none where that is not asked.
    """

    dataset: str
    name: str
    ids: torch.Tensor
    max_new_tokens: int
    score: Callable[[str], float]
    answers: Sequence[str]
    cut: bool = False
    golds: Sequence[torch.Tensor] = ()

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.name}"


def identity(examples: Sequence[Example]) -> list[Any]:
    """What makes examples these: for the digest in `resume.settings`."""
    return [
        [e.key, e.ids[0].tolist(), e.max_new_tokens, list(e.answers), [gold.tolist() for gold in e.golds]] for e in examples
    ]
