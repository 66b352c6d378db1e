"""TTFT dense and sparse in alternation, the FFN's share of it, and the ceiling that this share allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastfill.attachment import Attachment
from fastfill.engines import transformers as engine
from fastfill.progress import stage


class _Clock:
    """Adds up the time inside the FFN modules."""

    def __init__(self) -> None:
        self.total = 0.0
        self.begin = 0.0


@contextmanager
def ffn_clock(attachment: Attachment) -> Iterator[_Clock]:
    """Time spent in all FFNs (predictor, compensator and joining included) while the block runs. Two hook calls a layer: under
    0.1 % of an FFN at 512 tokens."""
    clock = _Clock()

    def start(*_: Any) -> None:
        engine.synchronize(attachment.model)
        clock.begin = time.perf_counter()

    def stop(*_: Any) -> None:
        engine.synchronize(attachment.model)
        clock.total += time.perf_counter() - clock.begin

    hooks = []
    for ffn in attachment.modules:
        hooks += [ffn.register_forward_pre_hook(start), ffn.register_forward_hook(stop)]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@torch.no_grad()
def measure(attachment: Attachment, ids: torch.Tensor, repeats: int, tick: Any = None) -> dict[str, Any]:
    """One row: TTFT of ids (1, T), dense and sparse in turn, `repeats` times after one warm-up each; medians, seconds.

    ffn_dense_s, ffn_sparse_s: time inside the FFNs, from the same runs. ceiling: 1 / (1 - sparsity * ffn_share), what
    would be left if every skipped neuron took its share of the FFN's time with it and nothing were added.
    """
    model = attachment.model
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    inside: dict[str, list[float]] = {"dense": [], "sparse": []}
    sparse_tokens = dense_tokens = 0
    for repeat in range(repeats + 1):
        for kind in ("dense", "sparse"):
            with ffn_clock(attachment) as clock:
                if kind == "dense":
                    with attachment.dense():
                        seconds = engine.time_to_first_token(model, ids)
                else:
                    before = attachment.stats.sparse_tokens, attachment.stats.dense_tokens
                    seconds = engine.time_to_first_token(model, ids)
                    sparse_tokens = attachment.stats.sparse_tokens - before[0]
                    dense_tokens = attachment.stats.dense_tokens - before[1]
            if repeat:  # the first of each is the warm-up
                times[kind].append(seconds)
                inside[kind].append(clock.total)
            if tick:
                tick()
    dense, sparse = statistics.median(times["dense"]), statistics.median(times["sparse"])
    ffn_dense, ffn_sparse = statistics.median(inside["dense"]), statistics.median(inside["sparse"])
    share = ffn_dense / dense
    skipped = 1 - sum(attachment.kept) / (len(attachment.kept) * attachment.ffns[0].gate.shape[0])
    return {
        "prompt_tokens": ids.shape[1],
        "ttft_dense_s": round(dense, 5),
        "ttft_sparse_s": round(sparse, 5),
        "ttft_dense_quartiles_s": [round(q, 5) for q in quartiles(times["dense"])],
        "ttft_sparse_quartiles_s": [round(q, 5) for q in quartiles(times["sparse"])],
        "speedup": round(dense / sparse, 4),
        "ffn_dense_s": round(ffn_dense, 5),
        "ffn_sparse_s": round(ffn_sparse, 5),
        "ffn_ratio": round(ffn_sparse / ffn_dense, 4),
        "ffn_share": round(share, 4),
        "ceiling": round(1 / (1 - skipped * share), 4),
        "sparse_tokens": sparse_tokens,
        "dense_tokens": dense_tokens,
    }


def bench(attachment: Attachment, lengths: Sequence[int], repeats: int, seed: int = 0) -> list[dict[str, Any]]:
    """A row per prompt length, on random tokens (the time does not depend on which)."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = attachment.model.config.vocab_size
    rows = []
    with stage("prompts", len(lengths) * (repeats + 1) * 2) as bar:
        for length in lengths:
            ids = torch.randint(0, vocabulary, (1, length), generator=generator)
            rows.append(measure(attachment, ids, repeats, bar.step))
    return rows
