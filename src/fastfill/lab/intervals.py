"""Bootstrap over examples, paired: an example is drawn with all its values, within its group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def resample(groups: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> np.ndarray:
    """groups: per group the examples' values (n, k), any n but the same k -> (RESAMPLES, groups, k), the means of each draw of
    n examples with replacement."""
    generator = np.random.default_rng(seed)
    draws = []
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        # How often each example is drawn is all that a mean needs to know.
        counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
        draws.append(counts @ values / len(values))
    return np.stack(draws, axis=1)


def percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    ordered, tail = sorted(float(value) for value in values), (1 - CONFIDENCE) / 2 * (len(values) - 1)
    return ordered[round(tail)], ordered[round(len(ordered) - 1 - tail)]


def interval(values: np.ndarray, groups: Sequence[Sequence[object]]) -> tuple[float, float] | None:
    """The middle 95 % of a statistic's resampled values (R,), of which NaN means that a draw has none: those are left out.

    None where more than 1 in 20 have none, because what is left would flatter, or where no group has two examples.
    """
    known = values[~np.isnan(values)]
    if max(len(group) for group in groups) < 2 or len(known) < CONFIDENCE * len(values):
        return None
    return percentiles(known)


def rounded(bounds: tuple[float, float] | None, digits: int) -> list[float] | None:
    return [round(bound, digits) for bound in bounds] if bounds else None
