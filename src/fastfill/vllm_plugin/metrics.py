"""Counters for vLLM's /metrics, from the process that computes.

vLLM lets no plugin add metrics to those of its server. But where PROMETHEUS_MULTIPROC_DIR is set before the start, the server
shows what all of its processes count in files of that folder; `fastfill serve` sets it. What is counted is logged, too.
"""

from __future__ import annotations

import functools
import os

from fastfill.attachment import Stats

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Counters:
    """What one engine counts, added to what this process shows."""

    def __init__(self) -> None:
        self._sparse, self._dense, self._predictor, self._because, self._sparsity = _shown()
        self._seen = (0, 0, 0.0)
        self._reasons: dict[str, int] = {}

    def set(self, stats: Stats, sparsity: float, predictor_seconds: float) -> None:
        """All counts so far. sparsity: of the sparse tokens."""
        now = (stats.sparse_tokens, stats.dense_tokens, predictor_seconds)
        for counter, new, old in zip((self._sparse, self._dense, self._predictor), now, self._seen, strict=True):
            counter.inc(new - old)
        for reason, count in stats.dense_because.items():
            self._because.labels(reason).inc(count - self._reasons.get(reason, 0))
        self._seen, self._reasons = now, dict(stats.dense_because)
        self._sparsity.set(sparsity * stats.sparse_share)


@functools.cache  # a process can have several engines, and prometheus_client refuses a name that it knows
def _shown() -> tuple:
    from prometheus_client import Counter, Gauge

    return (
        Counter("fastfill:sparse_tokens", "Tokens prefilled sparsely."),
        Counter("fastfill:dense_tokens", "Tokens that were computed densely, generated ones too."),
        Counter("fastfill:predictor_seconds", "Time in predictors; on CPUs only."),
        Counter("fastfill:dense_steps", "Steps that should have been sparse and were not, or only in part.", ["reason"]),
        Gauge(
            "fastfill:mean_sparsity",
            "Share of the FFN neurons skipped so far, over all tokens.",
            multiprocess_mode="mostrecent",
        ),
    )


def counters() -> Counters | None:
    """None where nobody would see them. The folder is made if it is not there: prometheus_client only fails."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    os.makedirs(folder, exist_ok=True)
    return Counters()
