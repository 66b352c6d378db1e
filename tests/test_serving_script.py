"""The serving benchmark's arithmetic and bookkeeping; the engines themselves are in tests/test_vllm_*.py."""

import os

import pytest
from conftest import script


@pytest.fixture
def serving():
    before = set(os.environ)
    yield script("serving")
    for name in set(os.environ) - before:  # what the script sets for its engines
        del os.environ[name]


def parts(ffn, total):
    return {"total": total, "ffn": ffn, "predictor": 0.01, "compensator": 0.02}


def test_ceiling_and_what_is_reached_of_it(serving):
    """0.2 of 0.4 s are the FFN's, a half; 960 of 1,024 tokens skip 50 % of it: 1 / (1 - 0.2344) = 1.3061; 1.25 is 95.7 %."""
    times = {"stock": [0.4, 0.5, 0.3], "sparse": [0.32, 0.32, 0.9], "off": [0.5, 0.4, 0.39]}
    split = {"off": [parts(0.2, 0.4), parts(0.36, 0.6), parts(0.1, 0.5)], "sparse": [parts(0.12, 0.4)]}
    row = serving.row(0.5, 1024, 960, times, split)
    assert (row["speedup"], row["off_ratio"], row["ffn_share"]) == (1.25, 1.0, 0.5)
    assert row["ffn_dense_s"] == 0.2
    assert (row["ceiling"], row["ceiling_reached"]) == (1.3061, 0.957)
    assert row["ttft_stock_quartiles_s"] == [0.35, 0.4, 0.45]
    document = {"rows": [row], "model_mb": 269.0, "extra_mb": 171.9}
    lines = serving.table({"smollm2": document}).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].split() == ["smollm2", "1024", "0.400", "0.320", "0.400", "1.25x", "1.31x", "96%"]


@pytest.mark.parametrize("sparse, rounds", [([0.5, 0.52], 2), ([1.0, 2.0], 8), ([1.0, 2.0, *[0.5] * 4], 6)])
def test_rounds_go_on_while_the_noise_is_as_large_as_the_gain(serving, sparse, rounds):
    """Two are asked for, so that eight are the most; stock takes 1 s. The ratios 1, 0.5, 2, 2, 2, 2 are the first whose
    quartiles, 1.25 and 2, are nearer to each other than their median, 2, is to 1."""
    given = iter([9.0, *sparse * 8])
    kinds = ["stock", "sparse"]
    found = serving.Pair(None, None).in_turn(kinds, 2, lambda kind: 1.0 if kind == "stock" else next(given), until_clear=True)
    assert len(found["stock"]) == len(found["sparse"]) == rounds


def test_kinds_take_turns_and_the_first_round_is_not_counted(serving):
    calls = []
    found = serving.Pair(None, None).in_turn(["stock", "sparse", "off"], 2, lambda kind: calls.append(kind) or len(calls))
    assert calls == ["off", "sparse", "stock", "stock", "sparse", "off", "off", "sparse", "stock"]
    assert found == {"stock": [4, 9], "sparse": [5, 8], "off": [6, 7]}
