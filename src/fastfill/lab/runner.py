"""Examples for the dense and the sparse model, and what the sparse one recovers.

Two measures: the score of the generated answer, and how likely the right answer is (`likelihood`). Answers are greedy.
The dense run is dense throughout; the sparse run prefills sparsely and decodes densely.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastfill.engines import Engine
from fastfill.engines.transformers import TransformersEngine, inside
from fastfill.errors import UserError
from fastfill.lab import chance, intervals, likelihood
from fastfill.lab.example import Example, identity
from fastfill.lab.intervals import CONFIDENCE, RESAMPLES, percentiles
from fastfill.lab.pace import Pace, in_turn
from fastfill.lab.resume import Store
from fastfill.progress import stage

__all__ = [
    "CONFIDENCE",
    "RESAMPLES",
    "SCORES",
    "Example",
    "answers",
    "bootstrap",
    "identity",
    "percentiles",
    "run",
    "summarize",
]

ALSO = ("skipped_above", "reread_tokens")  # counts of `Stats` that a row has where they are not 0
SCORES = ("both", "likelihood", "answers")  # what is measured of each example

Row = dict[str, Any]


def run(
    engine: Engine,
    tokenizer: Any,
    examples: Sequence[Example],
    store: Store,
    *,
    seed: int = 0,
    score: str = SCORES[0],
    minutes: float | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """Read what the store does not have yet, set by set in turn, and summarise all of it; scores in percent.

    score: one of SCORES. minutes: stop when the next example would not be done in that time; what is done is summarised, and
    the same call goes on. batch: examples whose answers are written together; their prompts are read one by one.

    Raises UserError for an unknown `score`, or likelihoods of an engine that does not show its hidden states.
    """
    if score not in SCORES:
        raise UserError(f"The score {score!r} is not known; use one of {', '.join(SCORES)}.")
    if score != "answers":
        inside(engine, "The likelihood of an answer")
    todo = [example for example in in_turn(examples) if example.key not in store]
    resumed = len(examples) - len(todo)
    pace = Pace(todo, minutes)
    with stage("answers", len(examples), resumed) as bar:
        for index in range(0, len(todo), batch):
            group = todo[index : index + batch]
            if not pace.fits(group):
                print(
                    f"fastfill: stopped in time, {len(todo) - index} of {len(examples)} examples are left; "
                    "with --out the same command goes on.",
                    file=sys.stderr,
                )
                break
            begin = time.monotonic()
            for example, row in zip(group, answers(engine, tokenizer, group, score), strict=True):
                store.add(example.key, row)
                bar.step(note=example.dataset)
            pace.add(group, time.monotonic() - begin)
            pace.tell(todo[index + batch :])
    done = [example for example in examples if example.key in store]
    rows = [store.rows[example.key] for example in done]
    found = summarize(rows, seed, _levels(done, rows) if score != "likelihood" else {})
    return {**found, "score": score, "planned": len(examples), "batch": batch, "resumed": resumed}


def _levels(examples: Sequence[Example], rows: Sequence[Row]) -> dict[str, list[float]]:
    """Set -> chance level of each of its examples, where that can be told."""
    sets: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        sets.setdefault(example.dataset, []).append(index)
    found = {
        name: chance.levels([rows[i]["dense"] for i in places], [examples[i].score for i in places])
        for name, places in sets.items()
    }
    return {name: levels for name, levels in found.items() if levels is not None}


def answers(engine: Engine, tokenizer: Any, examples: Sequence[Example], score: str = SCORES[0]) -> list[Row]:
    """Both runs of some examples: the likelihood of the right answer (of several forms the one that is most likely after the
    dense prompt), the generated answers, all written together, with their scores, and the tokens of the sparse prompt by how
    they were computed (of an engine that only hands answers out, those of its answer too)."""
    if isinstance(engine, TransformersEngine):
        read = [_read(engine, tokenizer, example, score) for example in examples]
        rows, prompts = [row for row, _ in read], [prompt for _, both in read for prompt in both]
        limits = [example.max_new_tokens for example in examples for _ in range(2)]
        with engine.dense():
            ids: Sequence[Any] = likelihood.write(engine.model, prompts, limits) if score != "likelihood" else []
    else:
        asked = [_ask(engine, example) for example in examples]
        rows, ids = [row for row, _ in asked], [ids for _, both in asked for ids in both]
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in ids]
    for row, example, dense, sparse in zip(rows, examples, texts[::2], texts[1::2], strict=False):
        row |= {"dense": dense, "sparse": sparse}
        row |= {"score_dense": example.score(dense), "score_sparse": example.score(sparse)}
    return rows


def _read(
    engine: TransformersEngine, tokenizer: Any, example: Example, score: str
) -> tuple[Row, tuple[likelihood.Prompt, likelihood.Prompt]]:
    """An example's prompt, prefilled densely and sparsely, and how likely the right answer is behind either."""
    model, golds = engine.model, example.golds if score != "answers" else ()
    with engine.dense():
        dense = likelihood.read(model, example.ids)
        known = [likelihood.states(model, dense, gold) for gold in golds]
    with _counted(engine, example) as row:
        sparse = likelihood.read(model, example.ids)
    if golds:
        best = min(range(len(golds)), key=lambda i: likelihood.nats(model, known[i], golds[i]))
        with engine.dense():
            follows = likelihood.states(model, sparse, golds[best])
        row["gold"] = tokenizer.decode(golds[best])
        row |= likelihood.compare(model, known[best], follows, golds[best])
    return row, (dense, sparse)


def _ask(engine: Engine, example: Example) -> tuple[Row, tuple[Any, Any]]:
    """The dense and the sparse answer of an engine that hands out nothing else."""
    with engine.dense():
        dense = engine.generate(example.ids, example.max_new_tokens)
    with _counted(engine, example) as row:
        sparse = engine.generate(example.ids, example.max_new_tokens)
    return row, (dense, sparse)


@contextmanager
def _counted(engine: Engine, example: Example) -> Iterator[Row]:
    """The row of an example; at the end of the block with what the engine computed in it."""
    row: Row = {"dataset": example.dataset, "answers": list(example.answers)}
    row |= {"prompt_tokens": example.ids.shape[1], "cut": example.cut}
    stats = engine.stats
    before = dataclasses.replace(stats)
    yield row
    stats = engine.stats
    for name in ("sparse_tokens", "dense_tokens", *ALSO):
        count = getattr(stats, name) - getattr(before, name)
        if count or name not in ALSO:
            row[name] = count


# --- what all of it says ------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Row], seed: int = 0, levels: dict[str, list[float]] | None = None) -> dict[str, Any]:
    """Per set: mean scores, recovery and its interval, chance, the likelihood of the right answer; then over sets, which weigh
    the same.

    levels: chance level of each example of a set, in the order of its rows. `average` is over the sets on which the dense model
    is better than chance, or for which chance is not known. Rows without scores, or without likelihoods, have neither.
    """
    levels = levels or {}
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    pairs = {name: _pairs(group) for name, group in groups.items()}
    table = []
    for name, group in groups.items():
        line = {"dataset": name, **(_line([pairs[name]], seed) if pairs[name] else {}), **_counts(group)}
        if name in levels:
            line["chance"] = round(100 * statistics.fmean(levels[name]), 2)
            line["at_chance"] = chance.at_chance([dense for dense, _ in pairs[name]], levels[name], seed)
        table.append({**line, **_likelihood([group], seed)})
    able = [pairs[line["dataset"]] for line in table if not line.get("at_chance")]
    scored = bool(rows) and "score_dense" in rows[0]
    return {
        "datasets": table,
        **({"average": _average(able, seed)} if scored else {}),
        **_likelihood(list(groups.values()), seed),
        "seed": seed,
        **_counts(rows),
    }


def _pairs(group: Sequence[Row]) -> list[tuple[float, float]]:
    return [(row["score_dense"], row["score_sparse"]) for row in group if "score_dense" in row]


def _likelihood(groups: Sequence[Sequence[Row]], seed: int) -> dict[str, Any]:
    found = likelihood.summarize([[row for row in group if "gold_tokens" in row] for group in groups], seed)
    return {"likelihood": found} if found else {}


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "examples": len(rows),
        **({"same_answers": sum(row["dense"] == row["sparse"] for row in rows)} if rows and "dense" in rows[0] else {}),
        "cut_prompts": sum(row["cut"] for row in rows),
        **{key: sum(row[key] for row in rows) for key in ("prompt_tokens", "sparse_tokens", "dense_tokens")},
        **{name: count for name in ALSO if (count := sum(row.get(name, 0) for row in rows))},
    }


def _line(groups: Sequence[Sequence[tuple[float, float]]], seed: int) -> dict[str, Any]:
    """Mean scores, and their ratio."""
    dense, sparse = (statistics.fmean(statistics.fmean(pair[i] for pair in group) for group in groups) for i in (0, 1))
    return {
        "dense": round(100 * dense, 2),
        "sparse": round(100 * sparse, 2),
        "recovery": round(sparse / dense, 4) if dense else None,
        "interval": intervals.rounded(bootstrap(groups, seed), 4),
    }


def _average(groups: Sequence[Sequence[tuple[float, float]]], seed: int) -> dict[str, Any]:
    """`_line` over sets, how many they are, and the mean of their recoveries with its own interval."""
    if not groups:
        return {"dense": None, "sparse": None, "recovery": None, "interval": None, "sets": 0}
    means = np.array([np.mean(group, axis=0) for group in groups])
    each: Row = {"mean_recovery": None, "mean_recovery_interval": None}
    if means[:, 0].all():
        draws = intervals.resample(groups, seed)
        dense = np.where(draws[:, :, 0] > 0, draws[:, :, 0], np.nan)
        bounds = intervals.interval((draws[:, :, 1] / dense).mean(axis=1), groups)
        each = {
            "mean_recovery": round(float((means[:, 1] / means[:, 0]).mean()), 4),
            "mean_recovery_interval": intervals.rounded(bounds, 4),
        }
    return {**_line(groups, seed), "sets": len(groups), **each}


def bootstrap(groups: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of mean sparse / mean dense, paired: an example is drawn with both its scores, within its group.

    groups: (dense, sparse) scores. Percentiles of 2000 resamples; a resample whose dense mean is 0 has no ratio and is left
    out. None where more than 1 in 20 are, or where there is only one example.
    """
    dense, sparse = intervals.resample(groups, seed).mean(axis=1).T
    return intervals.interval(sparse / np.where(dense > 0, dense, np.nan), groups)
