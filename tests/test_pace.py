"""The plan of a long run: sets in turn, an estimate from the first of each, and an end in time."""

import pytest
import torch

from fastfill.lab.example import Example
from fastfill.lab.pace import Pace, in_turn, span


def example(dataset, name="0", tokens=100, new=32):
    return Example(dataset, name, torch.zeros(1, tokens, dtype=torch.long), new, lambda _: 0.0, ("x",))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_sets_take_turns_and_short_answers_come_first():
    made = [example("long", str(i), new=512) for i in range(2)] + [example("short", str(i), new=32) for i in range(3)]
    assert [e.key for e in in_turn(made)] == ["short/0", "long/0", "short/1", "long/1", "short/2"]
    for stop in range(1, 5):  # a run that stops anywhere has as many of each as there can be, or one more
        count = [sum(e.dataset == name for e in in_turn(made)[:stop]) for name in ("short", "long")]
        assert abs(count[0] - count[1]) <= 1


def test_seconds_grow_with_the_prompt_and_are_the_sets_own():
    pace = Pace([example("a"), example("b")])
    assert pace.seconds(example("a")) == 0
    pace.add([example("a", tokens=100)], 10)
    assert pace.seconds(example("a", tokens=300)) == pytest.approx(30)
    assert pace.seconds(example("b", tokens=200)) == pytest.approx(20)  # by what there is
    pace.add([example("b", tokens=100)], 50)
    assert pace.seconds(example("b", tokens=200)) == pytest.approx(100)
    assert pace.seconds(example("a")) == pytest.approx(10)


def test_it_stops_before_an_example_that_would_end_too_late():
    clock = Clock()
    pace = Pace([example("a")], minutes=1, clock=clock)
    clock.now = 1000
    assert pace.fits([example("a")])  # the first always is started
    clock.now = 0
    pace.add([example("a")], 20)
    for now, fits in ((20, True), (40, True), (40.1, False)):
        clock.now = now
        assert pace.fits([example("a")]) == fits
    assert not Pace([], None, clock)._over([]) and Pace([], None, clock).fits([example("a")])


def test_the_estimate_is_told_once_when_each_set_has_one(capsys):
    todo = [example("a"), example("b"), *(example("a", str(i), tokens=200) for i in range(3)), example("b", "1")]
    pace = Pace(todo, minutes=1, clock=Clock())
    pace.add(todo[:1], 10)
    pace.tell(todo[1:])
    assert capsys.readouterr().err == ""
    pace.add(todo[1:2], 50)
    pace.tell(todo[2:])
    pace.tell(todo[3:])
    # 3 times 200 tokens at 0.1 s, once 100 at 0.5 s: 110 s.
    err = capsys.readouterr().err
    assert err == (
        "fastfill: about 2 min for the other 4 examples, judged by the first of each of 2 sets, --minutes 1 ends it before.\n"
    )


@pytest.mark.parametrize(
    "seconds, words", [(40, "40 s"), (90, "2 min"), (5340, "89 min"), (5400, "1 h 30 min"), (11100, "3 h 05 min")]
)
def test_spans(seconds, words):
    assert span(seconds) == words
