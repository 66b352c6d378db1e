"""Chance level of a set: at or below it, a recovery means nothing.

Chance is measured, for all sets in one way: what the dense model's answers score as answers to *other* examples of their set.
For classes that is guessing at the model's own frequencies, for retrieval one in the number of paragraphs, for summaries and
code what any two have in common, for hidden numbers 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from fastfill.lab import intervals

OTHERS = 5  # answers of other examples that an example is scored with


def levels(answers: Sequence[str], scores: Sequence[Callable[[str], float]]) -> list[float] | None:
    """For each example of a set the mean score of the answers that the next few gave (cyclically); None for one example.

    answers: dense ones. scores: of each example, answer -> 0 to 1.
    """
    count = len(answers)
    if count < 2:
        return None
    shifts = range(1, min(count - 1, OTHERS) + 1)
    return [statistics.fmean(score(answers[(i + shift) % count]) for shift in shifts) for i, score in enumerate(scores)]


def at_chance(dense: Sequence[float], levels: Sequence[float], seed: int = 0) -> bool:
    """Whether the examples do not show that the dense model is better than chance: the 95 % interval of its advantage, a
    bootstrap over examples, reaches 0."""
    advantage = [[score - level] for score, level in zip(dense, levels, strict=True)]
    low, _ = intervals.percentiles(intervals.resample([advantage], seed)[:, 0, 0])
    return low <= 1e-9  # equal scores may differ in the last bit
