"""Fields and formulas. Nothing here asserts how long anything takes."""

import itertools

import pytest
import torch
from conftest import logits, tiny_artifact, tiny_model, token_ids

from fastfill import attach
from fastfill.engines import transformers as engine
from fastfill.evaluate import speed

FIELDS = {"prompt_tokens", "ttft_dense_s", "ttft_sparse_s", "speedup", "ffn_dense_s", "ffn_sparse_s", "ffn_share", "ceiling",
          "ffn_ratio", "sparse_tokens", "dense_tokens", "ttft_dense_quartiles_s", "ttft_sparse_quartiles_s"}  # fmt: skip


def test_rows_have_all_fields_and_count_tokens(model):
    ticks = []
    with attach(model, tiny_artifact(model)) as attachment:
        row = speed.measure(attachment, token_ids(1, 45), 2, lambda: ticks.append(1))
        assert row.keys() == FIELDS and len(ticks) == 2 * 3
        assert (row["prompt_tokens"], row["sparse_tokens"], row["dense_tokens"]) == (45, 32, 13)
        rows = speed.bench(attachment, [20, 33], 1)
        assert [(r["prompt_tokens"], r["sparse_tokens"]) for r in rows] == [(20, 8), (33, 24)]
        assert attachment.stats.sparse_calls == 3 + 2 * 2 and attachment.stats.dense_calls == 3 + 2 * 2


def test_measuring_leaves_no_hooks_and_changes_nothing(model):
    ids = token_ids(1, 45)
    with attach(model, tiny_artifact(model)) as attachment:
        before = logits(model, ids)
        speed.measure(attachment, ids, 1)
        assert torch.equal(logits(model, ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture
def clockwork(monkeypatch):
    """Given times: each dense TTFT 4 s with 3 s in the FFNs, each sparse one 2.5 s with 1.5 s."""
    runs = itertools.cycle([(4.0, 3.0), (2.5, 1.5)])
    state = {}

    def time_to_first_token(_model, _ids):
        total, inside = next(runs)
        state["clock"].total = inside
        return total

    original = speed.ffn_clock

    class Watch:
        def __init__(self, attachment):
            self.context = original(attachment)

        def __enter__(self):
            state["clock"] = self.context.__enter__()
            return state["clock"]

        def __exit__(self, *error):
            return self.context.__exit__(*error)

    monkeypatch.setattr(speed, "ffn_clock", Watch)
    monkeypatch.setattr(engine, "time_to_first_token", time_to_first_token)


@pytest.mark.parametrize("sparsity, ceiling", [(0.5, 1 / (1 - 0.5 * 0.75)), (0.25, 1 / (1 - 0.25 * 0.75)), (0.0, 1.0)])
def test_formulas_on_given_numbers(model, clockwork, sparsity, ceiling):
    with attach(model, tiny_artifact(model), sparsity=sparsity) as attachment:
        row = speed.measure(attachment, token_ids(1, 45), 3)
    assert row["ttft_dense_s"] == 4.0 and row["ttft_sparse_s"] == 2.5 and row["speedup"] == 1.6
    assert row["ffn_dense_s"] == 3.0 and row["ffn_sparse_s"] == 1.5 and row["ffn_ratio"] == 0.5
    assert row["ffn_share"] == 0.75 and row["ceiling"] == pytest.approx(ceiling, abs=1e-4)
    assert row["ttft_dense_quartiles_s"] == [4.0, 4.0, 4.0]


def test_the_first_run_of_each_kind_is_warm_up(model, monkeypatch):
    times = iter([100.0, 200.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(engine, "time_to_first_token", lambda *_: next(times))
    with attach(model, tiny_artifact(model)) as attachment:
        # nothing ran inside the FFNs: a clock that stands still
        monkeypatch.setattr(speed, "ffn_clock", fixed_clock)
        row = speed.measure(attachment, token_ids(1, 45), 3)
    assert (row["ttft_dense_s"], row["ttft_sparse_s"]) == (3.0, 4.0)
    assert row["ttft_dense_quartiles_s"] == [2.0, 3.0, 4.0]


class fixed_clock:
    def __init__(self, _attachment):
        self.total = 0.5

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_the_clock_adds_up_calls_inside_the_ffns(model, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    with attach(model, tiny_artifact(model)) as attachment, speed.ffn_clock(attachment) as clock:
        logits(model, token_ids(1, 45))
    assert clock.total == 3  # three layers, one tick each


def test_quartiles():
    assert speed.quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert speed.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)


def test_the_engine_generates_what_transformers_does(tokenizer):
    model = tiny_model()
    ids = token_ids(1, 30)
    out = engine.generate(model, ids, 4)
    current = ids
    for _ in range(4):  # greedy, by hand
        current = torch.cat([current, logits(model, current)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, current[0, 30:])
    assert engine.encode(tokenizer, "w9 w10", chat=False).tolist() == [[9, 10]]
    assert engine.encode(tokenizer, "w9 w10", chat=True).tolist() == [[5, 9, 10, 6, 7]]
