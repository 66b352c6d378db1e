"""How long a run of many examples will take, told by its first ones, and when to stop so as to end in time."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from fastfill.lab.example import Example


def in_turn(examples: Iterable[Example]) -> list[Example]:
    """One example of each set after the other, sets with short answers first, so that a run that is stopped is still fair."""
    sets: dict[str, list[Example]] = {}
    for example in examples:
        sets.setdefault(example.dataset, []).append(example)
    by_length = sorted(sets.values(), key=lambda group: group[0].max_new_tokens)
    return [example for turn in itertools.zip_longest(*by_length) for example in turn if example is not None]


def span(seconds: float) -> str:
    """'40 s', '12 min', '3 h 05 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Pace:
    """Seconds per prompt token of each set so far. minutes: what the run may take from now on, or None."""

    def __init__(self, todo: Sequence[Example], minutes: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.sets = {example.dataset for example in todo}
        self.minutes, self.clock, self.begin = minutes, clock, clock()
        self._spent: dict[str, list[float]] = {}  # set -> seconds, prompt tokens
        self._told = False

    def seconds(self, example: Example) -> float:
        """What an example will take, by those of its set, or by all while there are none; 0 before the first."""
        known = [self._spent[example.dataset]] if example.dataset in self._spent else list(self._spent.values())
        spent, tokens = (sum(pair[i] for pair in known) for i in (0, 1))
        return example.ids.shape[1] * spent / tokens if tokens else 0.0

    def fits(self, group: Sequence[Example]) -> bool:
        """Whether these examples will be done in time. The first always are started."""
        if self.minutes is None or not self._spent:
            return True
        return self.clock() - self.begin + sum(map(self.seconds, group)) <= 60 * self.minutes

    def add(self, group: Sequence[Example], seconds: float) -> None:
        """What some examples took together; the time is shared out by the length of their prompts."""
        whole = sum(example.ids.shape[1] for example in group)
        for example in group:
            tokens = example.ids.shape[1]
            spent = self._spent.setdefault(example.dataset, [0.0, 0.0])
            spent[0] += seconds * tokens / whole
            spent[1] += tokens

    def tell(self, left: Sequence[Example]) -> None:
        """Print the estimate once, as soon as one example of each set is done."""
        if self._told or self._spent.keys() != self.sets or not left:
            return
        self._told = True
        end = f", --minutes {self.minutes:g} ends it before" if self._over(left) else ""
        print(
            f"fastfill: about {span(sum(map(self.seconds, left)))} for the other {len(left)} examples, judged by the first of "
            f"each of {len(self.sets)} sets{end}.",
            file=sys.stderr,
        )

    def _over(self, left: Sequence[Example]) -> bool:
        whole = self.clock() - self.begin + sum(map(self.seconds, left))
        return self.minutes is not None and whole > 60 * self.minutes
