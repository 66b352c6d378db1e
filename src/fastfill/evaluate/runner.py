"""Examples that are answered twice, by the dense and by the sparse model, and what the sparse one recovers.

Both answers are greedy. The dense one is dense throughout; the sparse one reads the prompt sparsely and then decodes densely.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastfill.attachment import Attachment
from fastfill.engines import transformers as engine
from fastfill.evaluate.resume import Store
from fastfill.progress import stage

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Example:
    """One question. ids: (1, T), the whole prompt. score: answer text -> 0 to 1. cut: the prompt was shortened."""

    dataset: str
    name: str
    ids: torch.Tensor
    max_new_tokens: int
    score: Callable[[str], float]
    answers: Sequence[str]
    cut: bool = False

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.name}"


def identity(examples: Sequence[Example]) -> list[Any]:
    """What makes these examples these: for the digest in `resume.settings`."""
    return [[e.key, e.ids[0].tolist(), e.max_new_tokens, list(e.answers)] for e in examples]


def run(attachment: Attachment, tokenizer: Any, examples: Sequence[Example], store: Store, *, seed: int = 0) -> dict[str, Any]:
    """Answer what the store does not have yet, and summarise all of it; scores in percent."""
    done = sum(example.key in store for example in examples)
    with stage("answers", len(examples), done) as bar:
        for example in examples:
            if example.key not in store:
                store.add(example.key, answer(attachment, tokenizer, example))
                bar.step(note=example.dataset)
    return {**summarize([store.rows[example.key] for example in examples], seed), "resumed": done}


def answer(attachment: Attachment, tokenizer: Any, example: Example) -> dict[str, Any]:
    """Both answers to one example, their scores, and the tokens of the sparse run by how they were computed."""

    def text() -> str:
        new = engine.generate(attachment.model, example.ids, example.max_new_tokens)
        return tokenizer.decode(new, skip_special_tokens=True)

    with attachment.dense():
        dense = text()
    before = attachment.stats.sparse_tokens, attachment.stats.dense_tokens
    sparse = text()
    stats = attachment.stats
    return {
        "dataset": example.dataset,
        "answers": list(example.answers),
        "dense": dense,
        "sparse": sparse,
        "score_dense": example.score(dense),
        "score_sparse": example.score(sparse),
        "prompt_tokens": example.ids.shape[1],
        "cut": example.cut,
        "sparse_tokens": stats.sparse_tokens - before[0],
        "dense_tokens": stats.dense_tokens - before[1],
    }


def summarize(rows: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Means, recovery and its interval per dataset, and over datasets with equal weight."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    pairs = {name: [(row["score_dense"], row["score_sparse"]) for row in group] for name, group in groups.items()}
    table = [{"dataset": name, **_line([pairs[name]], seed), **_counts(group)} for name, group in groups.items()]
    return {
        "datasets": table,
        "average": _line(list(pairs.values()), seed),
        "seed": seed,
        **_counts(rows),
    }


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "examples": len(rows),
        "same_answers": sum(row["dense"] == row["sparse"] for row in rows),
        "cut_prompts": sum(row["cut"] for row in rows),
        **{key: sum(row[key] for row in rows) for key in ("prompt_tokens", "sparse_tokens", "dense_tokens")},
    }


def _line(groups: Sequence[Sequence[tuple[float, float]]], seed: int) -> dict[str, Any]:
    dense, sparse = (statistics.fmean(statistics.fmean(pair[i] for pair in group) for group in groups) for i in (0, 1))
    interval = bootstrap(groups, seed)
    return {
        "dense": round(100 * dense, 2),
        "sparse": round(100 * sparse, 2),
        "recovery": round(sparse / dense, 4) if dense else None,
        "interval": [round(bound, 4) for bound in interval] if interval else None,
    }


def bootstrap(groups: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of mean sparse / mean dense, paired: an example is drawn with both its scores, within its group.

    groups: (dense, sparse) scores. Percentiles of 2000 resamples; a resample whose dense mean is 0 has no ratio and is left
    out. None where more than 1 in 20 are, because what is left would flatter, or where there is only one example.
    """
    if max(len(group) for group in groups) < 2:
        return None
    rng = random.Random(seed)
    ratios = []
    for _ in range(RESAMPLES):
        dense = sparse = 0.0
        for group in groups:
            drawn = rng.choices(group, k=len(group))
            dense += sum(pair[0] for pair in drawn) / len(group)
            sparse += sum(pair[1] for pair in drawn) / len(group)
        if dense:
            ratios.append(sparse / dense)
    if len(ratios) < 0.95 * RESAMPLES:
        return None
    return percentiles(ratios)


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    ordered, tail = sorted(values), (1 - CONFIDENCE) / 2 * (len(values) - 1)
    return ordered[round(tail)], ordered[round(len(ordered) - 1 - tail)]
