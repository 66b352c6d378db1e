"""TTFT dense and sparse in alternation; where the time goes, what it costs, and how it grows with the prompt.

A prompt is measured in three modes: dense, by the engine's own FFN; with all neurons, by the sparse kernel that leaves none
out; and sparse. What the second gains on the first is the kernel's, what the third gains on the second is the sparsity's.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from fastfill import context
from fastfill.cost import Cost
from fastfill.engines import Engine
from fastfill.errors import UserError
from fastfill.lab import flops, profile
from fastfill.progress import Stage, stage
from fastfill.upper import first_upper

SPLITS = 5  # at most so many profiled runs of each mode
PATIENCE = 4  # at most so many times the rounds asked for, while the noise is as large as the gain
PAIR = ("dense", "sparse")
KINDS = ("skipped_above", "unread_tokens", "reread_tokens")  # counts of a prefill that its row has where they are not 0
MODES = ("dense", "all_neurons", "sparse")

Tick = Callable[[int], Any]


def within(engine: Engine, mode: str) -> AbstractContextManager[None]:
    """Inside, the engine runs in one of `MODES`."""
    return {"dense": engine.dense, "all_neurons": engine.all_neurons, "sparse": nullcontext}[mode]()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ttft(
    engine: Engine, ids: torch.Tensor, repeats: int, tick: Tick | None = None, modes: Sequence[str] = PAIR
) -> dict[str, Any]:
    """TTFT of ids (1, T) in each mode in turn, one warm-up and `repeats` rounds; medians, seconds. Nothing is clocked inside.

    speedup: of the medians. ratio_quartiles: of dense over sparse, round by round. clear: whether their interquartile range is
    less than the distance of their median from 1; while it is not, rounds go on, up to `PATIENCE` times as many. rounds: those
    that were timed. Where no token was sparse, these three are None: a ratio would be noise.

    tick: called with 1 after each of the prefills that were asked for, with 0 after further ones.
    """
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for rounds in itertools.count():
        for mode in modes:
            with within(engine, mode):
                read = engine.prefill(ids)
            if rounds:  # the first of each is the warm-up
                times[mode].append(read.seconds)
            if tick:
                tick(int(rounds <= repeats))
        sparse_tokens = read.sparse_tokens  # of the last, the sparse one
        ratios = [dense / sparse for dense, sparse in zip(times["dense"], times["sparse"], strict=True)]
        if enough(ratios, repeats) or (rounds >= repeats and not sparse_tokens):
            break
    found = {mode: quartiles(seconds) for mode, seconds in times.items()}
    return {
        "prompt_tokens": ids.shape[1],
        **{f"ttft_{mode}_s": round(middle, 5) for mode, (_, middle, _) in found.items()},
        **{f"ttft_{mode}_quartiles_s": [round(q, 5) for q in three] for mode, three in found.items()},
        "speedup": round(found["dense"][1] / found["sparse"][1], 4) if sparse_tokens else None,
        "ratio_quartiles": [round(q, 4) for q in quartiles(ratios)] if sparse_tokens else None,
        "clear": is_clear(ratios) if sparse_tokens else None,
        "rounds": rounds,
        "sparse_tokens": sparse_tokens,
        "dense_tokens": ids.shape[1] - sparse_tokens,
        **{name: count for name in KINDS if (count := getattr(read, name))},
    }


def enough(ratios: Sequence[float], repeats: int) -> bool:
    """Whether rounds may end: those asked for are done, and their ratios are clear or `PATIENCE` is at its end."""
    return len(ratios) >= repeats and (is_clear(ratios) or len(ratios) >= PATIENCE * repeats)


def is_clear(ratios: Sequence[float]) -> bool:
    """Whether the noise of ratios is less than their effect: interquartile range, and distance of the median from 1."""
    low, middle, high = quartiles(ratios)
    return high - low < abs(middle - 1)


def split(
    engine: Engine,
    ids: torch.Tensor,
    runs: int,
    row: dict[str, Any],
    tick: Tick | None = None,
    modes: Sequence[str] = PAIR,
) -> dict[str, Any]:
    """Where the time of a prefill goes, from `runs` further runs in each mode, with clocks inside. A split is that of the run
    with the median TTFT; its parts add up to the TTFT of that run, which the clocks make a little longer than the headline.

    row: of `ttft`, for the tokens by how they were computed.

    ffn_*_s: time in the FFNs, predictor and compensator included, medians of all these runs.
    ffn_share: the FFN's part of the dense runs, median. ceiling: see `ceiling`; None where no token is sparse.
    """
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
    for _ in range(runs):
        for mode in modes:
            with within(engine, mode):
                found[mode].append(profile.split(engine, ids))
            if tick:
                tick(1)
    median = {mode: sorted(splits, key=_total)[(runs - 1) // 2] for mode, splits in found.items()}
    ffn = {mode: statistics.median(map(_ffn, splits)) for mode, splits in found.items()}
    share = statistics.median(_ffn(parts) / _total(parts) for parts in found["dense"])
    tokens, layers, sparse_tokens = ids.shape[1], len(engine.cost.kept), row["sparse_tokens"]
    above = row.get("skipped_above", 0) / tokens * (1 - first_upper(layers) / layers)
    again = row.get("reread_tokens", 0) / tokens
    most = ceiling(share, _cost_of(engine, row).skipped, sparse_tokens / tokens, above, again)
    return {
        **{f"split_{mode}": {part: round(seconds, 5) for part, seconds in parts.items()} for mode, parts in median.items()},
        **{f"ffn_{mode}_s": round(seconds, 5) for mode, seconds in ffn.items()},
        "ffn_ratio": round(ffn["sparse"] / ffn["dense"], 4),
        "ffn_share": round(share, 4),
        "ceiling": round(most, 4) if sparse_tokens else None,
    }


def ceiling(ffn_share: float, skipped: float, sparse_share: float, above: float = 0.0, again: float = 0.0) -> float:
    """The speed-up if every skipped neuron took its share of the FFN's time with it, and nothing were added.

    ffn_share: of the FFN in the dense TTFT. skipped: share of neurons that a sparse token skips. sparse_share: of the tokens;
    the dense head and tail of a prompt, and what is left of a block, skip nothing. above: share of all layers' tokens that the
    upper layers do not read, which takes its share of everything (attention grows faster, so more may be gained). again: share
    of the tokens that are read again, which adds its share of everything.
    """
    return 1 / (1 - (sparse_share - above) * skipped * ffn_share - above + again)


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _ffn(parts: dict[str, float]) -> float:
    return parts["ffn"] + parts["predictor"] + parts["compensator"]


def _cost_of(engine: Engine, row: dict[str, Any]) -> Cost:
    """Of a row's sparse tokens."""
    return engine.cost.unread if row.get("unread_tokens") else engine.cost


def cost(engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of the whole prefill that a row of `ttft` is of, dense and sparse; see `flops.prefill`. ffn_flops_ratio: of the
    FFNs alone, predictor and compensator counted."""
    tokens, above, again = (row.get(name, 0) for name in ("prompt_tokens", "skipped_above", "reread_tokens"))
    dense = flops.prefill(engine.shape, tokens)
    sparse = flops.prefill(engine.shape, tokens, row["sparse_tokens"], _cost_of(engine, row), above, again)
    return {
        "flops_dense": sum(dense.values()),
        "flops_sparse": sum(sparse.values()),
        "ffn_flops_ratio": round(flops.ffn(sparse) / flops.ffn(dense), 4),
    }


def memory(engine: Engine, ids: torch.Tensor, tick: Tick | None = None) -> dict[str, Any]:
    """Peak memory of one prefill, dense and sparse, above what is held between prefills, MB; see `profile.peak_mb`."""
    row = {}
    for mode in PAIR:
        with within(engine, mode):
            peak = profile.peak_mb(engine, ids)
        row[f"peak_{mode}_mb"] = None if peak is None else round(peak, 1)
        if tick:
            tick(1)
    return row


def measure(engine: Engine, ids: torch.Tensor, repeats: int, tick: Tick | None = None) -> dict[str, Any]:
    """One row: TTFT, then the split, the cost and the memory of ids (1, T). tick: as for `ttft`, `prefills(repeats)` times."""
    row = ttft(engine, ids, repeats, tick, MODES)
    row |= split(engine, ids, min(repeats, SPLITS), row, tick, MODES)
    return row | cost(engine, row) | memory(engine, ids, tick)


def prefills(repeats: int) -> int:
    """How many prefills `measure` makes at least: timed and warm-up, profiled, for the memory."""
    return len(MODES) * (repeats + 1 + min(repeats, SPLITS)) + len(PAIR)


def fitting(lengths: Sequence[int], limit: int | None) -> list[int]:
    """The prompt lengths, cut to the context window, each once."""
    return list(dict.fromkeys(min(length, limit or length) for length in lengths))


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The exponent e of seconds = c * length^e, fitted by least squares on logarithms; None for a single length."""
    if len(set(lengths)) < 2:
        return None
    fit = statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds])
    return round(fit.slope, 3)


def _step(bar: Stage, share: int, note: str, done: int) -> None:
    bar.step(done * share, note)


def bench(engine: Engine, lengths: Sequence[int], repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row per prompt length, on random tokens (the time does not depend on which). Raises UserError if a length is more
    than the model holds."""
    limit = context.positions(engine.shape)
    if limit and max(lengths) > limit:
        raise UserError(f"A prompt of {max(lengths)} tokens is more than the {limit} that the model holds; shorten it.")
    generator = torch.Generator().manual_seed(seed)
    work = [max(1, round(sum(flops.prefill(engine.shape, length).values()) / 1e9)) for length in lengths]
    rows = []
    with stage("TTFT, in GFLOP", sum(work) * prefills(repeats)) as bar:  # a long prompt takes its share of the bar
        for length, share in zip(lengths, work, strict=True):
            ids = torch.randint(0, engine.shape.vocab_size, (1, length), generator=generator)
            step = partial(_step, bar, share, f"{length} tokens")
            rows.append(measure(engine, ids, repeats, step))
    return rows
