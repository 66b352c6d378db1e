"""TTFT dense and sparse in alternation; where the time goes, what it costs, and how it grows with the prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastfill import context
from fastfill.engines import Runner
from fastfill.errors import UserError
from fastfill.lab import flops
from fastfill.progress import stage

SPLITS = 5  # at most so many profiled runs of each kind
KINDS = (("dense", False), ("sparse", True))

Tick = Callable[[], Any]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ttft(runner: Runner, ids: torch.Tensor, repeats: int, tick: Tick | None = None) -> dict[str, Any]:
    """TTFT of ids (1, T), dense and sparse in turn, `repeats` times after one warm-up each; medians, seconds.

    Nothing is clocked inside these runs.
    """
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    sparse_tokens = 0
    for repeat in range(repeats + 1):
        for kind, sparse in KINDS:
            read = runner.prefill(ids, sparse)
            if repeat:  # the first of each is the warm-up
                times[kind].append(read.seconds)
            sparse_tokens = read.sparse_tokens  # the sparse run's, which is the last
            if tick:
                tick()
    (low, dense, high), (sparse_low, fast, sparse_high) = quartiles(times["dense"]), quartiles(times["sparse"])
    return {
        "prompt_tokens": ids.shape[1],
        "ttft_dense_s": round(dense, 5),
        "ttft_sparse_s": round(fast, 5),
        "ttft_dense_quartiles_s": [round(q, 5) for q in (low, dense, high)],
        "ttft_sparse_quartiles_s": [round(q, 5) for q in (sparse_low, fast, sparse_high)],
        "speedup": round(dense / fast, 4),
        "sparse_tokens": sparse_tokens,
        "dense_tokens": ids.shape[1] - sparse_tokens,
    }


def split(runner: Runner, ids: torch.Tensor, runs: int, tick: Tick | None = None) -> dict[str, Any]:
    """Where the time of a prefill goes, from `runs` further runs of each kind, with clocks inside. A split is that of the run
    with the median TTFT; its parts add up to the TTFT of that run, which the clocks make a little longer than the headline.

    ffn_dense_s, ffn_sparse_s: time in the FFNs, predictor and compensator included, medians of all these runs.
    ffn_share: the FFN's part of the dense runs, median.
    ceiling: 1 / (1 - sparsity * ffn_share), what would be left if every skipped neuron took its share of the FFN's time
    with it and nothing were added.
    """
    found: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
    for _ in range(runs):
        for kind, sparse in KINDS:
            found[kind].append(runner.split(ids, sparse))
            if tick:
                tick()
    dense, thin = (sorted(found[kind], key=_total)[(runs - 1) // 2] for kind, _ in KINDS)
    ffn_dense, ffn_sparse = (statistics.median(map(_ffn, found[kind])) for kind, _ in KINDS)
    share = statistics.median(_ffn(parts) / _total(parts) for parts in found["dense"])
    skipped = 1 - sum(runner.kept) / (len(runner.kept) * runner.shape.intermediate_size)
    return {
        "split_dense": {part: round(seconds, 5) for part, seconds in dense.items()},
        "split_sparse": {part: round(seconds, 5) for part, seconds in thin.items()},
        "ffn_dense_s": round(ffn_dense, 5),
        "ffn_sparse_s": round(ffn_sparse, 5),
        "ffn_ratio": round(ffn_sparse / ffn_dense, 4),
        "ffn_share": round(share, 4),
        "ceiling": round(1 / (1 - skipped * share), 4),
    }


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _ffn(parts: dict[str, float]) -> float:
    return parts["ffn"] + parts["predictor"] + parts["compensator"]


def cost(runner: Runner, tokens: int, sparse_tokens: int) -> dict[str, Any]:
    """FLOPs of the whole prefill, dense and as it was read sparsely; see `flops.prefill`. ffn_flops_ratio: of the FFNs alone,
    predictor and compensator counted."""
    dense = flops.prefill(runner.shape, tokens)
    sparse = flops.prefill(runner.shape, tokens, sparse_tokens, runner.kept, runner.overhead)
    return {
        "flops_dense": sum(dense.values()),
        "flops_sparse": sum(sparse.values()),
        "ffn_flops_ratio": round(flops.ffn(sparse) / flops.ffn(dense), 4),
    }


def memory(runner: Runner, ids: torch.Tensor, tick: Tick | None = None) -> dict[str, Any]:
    """Peak memory of one prefill of each kind above what is held between prefills, MB; see `Runner.peak_mb`."""
    row = {}
    for kind, sparse in KINDS:
        peak = runner.peak_mb(ids, sparse)
        row[f"peak_{kind}_mb"] = None if peak is None else round(peak, 1)
        if tick:
            tick()
    return row


def measure(runner: Runner, ids: torch.Tensor, repeats: int, tick: Tick | None = None) -> dict[str, Any]:
    """One row: TTFT, then the split, the cost and the memory of ids (1, T). tick: called after each of `prefills(repeats)`."""
    row = ttft(runner, ids, repeats, tick)
    row |= split(runner, ids, min(repeats, SPLITS), tick)
    return row | cost(runner, ids.shape[1], row["sparse_tokens"]) | memory(runner, ids, tick)


def prefills(repeats: int) -> int:
    """How many prompts `measure` reads: timed and warm-up, profiled, for the memory."""
    return 2 * (repeats + 1 + min(repeats, SPLITS) + 1)


def fitting(lengths: Sequence[int], limit: int | None) -> list[int]:
    """The prompt lengths, cut to what the model holds, each once."""
    return list(dict.fromkeys(min(length, limit or length) for length in lengths))


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The exponent e of seconds = c * length^e, fitted by least squares on logarithms; None for a single length."""
    if len(set(lengths)) < 2:
        return None
    fit = statistics.linear_regression([math.log(n) for n in lengths], [math.log(s) for s in seconds])
    return round(fit.slope, 3)


def bench(runner: Runner, lengths: Sequence[int], repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row per prompt length, on random tokens (the time does not depend on which). Raises UserError if a length is more
    than the model holds."""
    limit = context.positions(runner.shape)
    if limit and max(lengths) > limit:
        raise UserError(f"A prompt of {max(lengths)} tokens is more than the {limit} that the model holds; shorten it.")
    generator = torch.Generator().manual_seed(seed)
    work = [max(1, round(sum(flops.prefill(runner.shape, length).values()) / 1e9)) for length in lengths]
    rows = []
    with stage("time to first token, GFLOP", sum(work) * prefills(repeats)) as bar:  # a long prompt takes its share of the bar
        for length, share in zip(lengths, work, strict=True):
            ids = torch.randint(0, runner.shape.vocab_size, (1, length), generator=generator)
            rows.append(measure(runner, ids, repeats, partial(bar.step, share, f"{length} tokens")))
    return rows
