"""Chance by answers to other examples, and the bootstrap under it."""

import functools

import numpy as np
import pytest

from fastfill.lab import chance, intervals, metrics


def scores(references, metric=metrics.qa_f1):
    return [functools.partial(metric, reference=reference) for reference in references]


def test_levels_by_hand():
    # Four examples, all others' answers: "b" is right for the second and the third.
    answers, references = ["b", "b", "a", "c"], ["a", "b", "b", "d"]
    # First: b, a, c against a: 1/3. Second: a, c, b against b: 1/3. Third: c, b, b: 2/3. Fourth: none.
    assert chance.levels(answers, scores(references, lambda text, reference: float(text == reference))) == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 0]
    )
    assert chance.levels(["a"], scores(["a"])) is None


def test_no_more_than_a_few_others_are_scored():
    seen = []
    chance.levels([str(i) for i in range(40)], [lambda text: seen.append(text) or 0.0] * 40)
    assert len(seen) == 40 * chance.OTHERS and seen[: chance.OTHERS] == ["1", "2", "3", "4", "5"]


def test_a_model_that_always_names_one_class_is_at_chance_and_one_that_knows_is_not():
    references = ["Yes", "No"] * 20
    score = scores(references, functools.partial(metrics.classification, classes=("Yes", "No")))
    for answers, guesses in ((["Yes"] * 40, True), (references, False)):
        levels = chance.levels(answers, score)
        dense = [one(answer) for one, answer in zip(score, answers, strict=True)]
        assert sum(levels) / 40 == pytest.approx(0.5, abs=0.11)  # of the next five, two or three are the same
        assert chance.at_chance(dense, levels) == guesses


def test_nothing_right_is_at_chance():
    assert chance.at_chance([0.0] * 9, [0.0] * 9) and not chance.at_chance([1.0] * 9, [0.0] * 9)
    assert chance.at_chance([1.0] + [0.0] * 8, [0.0] * 9)  # one in nine, and a third of the draws are without it


def test_draws_are_means_of_as_many_examples_with_all_their_values():
    group = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    draws = intervals.resample([group, [[5.0, 50.0]]], seed=1)
    assert draws.shape == (intervals.RESAMPLES, 2, 2)
    assert np.allclose(draws[:, :, 1], 10 * draws[:, :, 0]) and (draws[:, 1, 0] == 5).all()
    assert set(np.round(3 * draws[:, 0, 0])) == {3, 4, 5, 6, 7, 8, 9, 10, 12}  # every sum of three of 1, 2, 4, none other
    # Mean 7/3, standard error sqrt(14/9 / 3) = 0.72; of 2000 draws the mean is within 0.05.
    assert draws[:, 0, 0].mean() == pytest.approx(7 / 3, abs=0.05)
    assert draws[:, 0, 0].std() == pytest.approx((14 / 27) ** 0.5, rel=0.05)
    assert np.array_equal(draws, intervals.resample([group, [[5.0, 50.0]]], seed=1))
    assert not np.array_equal(draws, intervals.resample([group, [[5.0, 50.0]]], seed=2))


def test_the_interval_of_a_known_case():
    """The mean of 100 zeros and ones, half of each: a binomial's 2.5 and 97.5 % points are 40 and 60 of 100."""
    draws = intervals.resample([[[i % 2] for i in range(100)]], seed=0)[:, 0, 0]
    low, high = intervals.interval(draws, [range(100)])
    assert low == pytest.approx(0.40, abs=0.01) and high == pytest.approx(0.60, abs=0.01)
    assert intervals.percentiles(range(2001)) == (50, 1950)


def test_no_interval_where_it_would_flatter():
    values = np.ones(1000)
    values[:51] = np.nan
    assert intervals.interval(values, [range(9)]) is None
    values[:1] = 1
    assert intervals.interval(values, [range(9)]) == (1, 1)
    assert intervals.interval(np.ones(1000), [range(1), range(1)]) is None
