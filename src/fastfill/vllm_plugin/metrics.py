"""Counters for vLLM's /metrics, from the process that computes.

vLLM lets no plugin add metrics to those of its server. But where PROMETHEUS_MULTIPROC_DIR is set before the start, the server
shows what all of its processes count in files of that folder; `fastfill serve` sets it. What is counted is logged, too.
"""

from __future__ import annotations

import os

from fastfill.attachment import Stats

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Counters:
    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        self._sparse = Counter("fastfill:sparse_tokens", "Tokens that were read sparsely.")
        self._dense = Counter("fastfill:dense_tokens", "Tokens that were computed densely, generated ones too.")
        self._predictor = Counter("fastfill:predictor_seconds", "Time in predictors; on CPUs only.")
        self._sparsity = Gauge(
            "fastfill:mean_sparsity",
            "Share of the FFN neurons skipped so far, over all tokens.",
            multiprocess_mode="mostrecent",
        )
        self._seen = (0, 0, 0.0)

    def set(self, stats: Stats, sparsity: float, predictor_seconds: float) -> None:
        """All counts so far. sparsity: of the sparse tokens."""
        now = (stats.sparse_tokens, stats.dense_tokens, predictor_seconds)
        for counter, new, old in zip((self._sparse, self._dense, self._predictor), now, self._seen, strict=True):
            counter.inc(new - old)
        self._seen = now
        self._sparsity.set(sparsity * stats.sparse_share)


def counters() -> Counters | None:
    """None where nobody would see them."""
    return Counters() if os.environ.get(VARIABLE) else None
