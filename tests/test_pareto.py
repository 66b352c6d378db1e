"""Rows by sparsity against the same measurements taken one by one."""

import pytest
import torch
from conftest import tiny_artifact, tiny_model, token_ids

from fastfill import attach
from fastfill.lab import pareto, perplexity, published, speed
from fastfill.lab.baselines import named

CONTINUATION = 12
DOCUMENTS = [("a#0", token_ids(60, seed=1)), ("a#1", token_ids(60, seed=2))]


@pytest.fixture
def clock(monkeypatch):
    """A measurement that tells what it was asked: its time is the share of neurons kept."""
    asked = []

    def ttft(runner, ids, repeats):
        kept = 1 - published.skipped(runner.attachment)
        asked.append((runner.config.sparsity, ids.tolist(), repeats))
        return {"ttft_sparse_s": kept, "ttft_dense_s": 1.0 + runner.config.sparsity, "speedup": 1 / kept, "more": 0}

    monkeypatch.setattr(speed, "ttft", ttft)
    return asked


def run(model, artifact, sparsities=(0.25, 0.75), methods=("learned", "oracle"), **more):
    settings = {"sparsities": sparsities, "methods": methods, "prompt_tokens": 40, "repeats": 2, "continuation": CONTINUATION}
    return pareto.evaluate(attach(model, artifact), artifact, DOCUMENTS, **settings, **more)


def test_rows_are_what_is_measured_one_by_one(clock, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)
    read, real = [], perplexity.read_dense
    monkeypatch.setattr(perplexity, "read_dense", lambda *a: (read.append(a[1]), real(*a))[1])
    found = run(model, artifact)
    assert read == ["a#0", "a#1"]
    dense, *rows = found["rows"]
    assert [(row["method"], row["sparsity"]) for row in rows] == [
        *(("learned", 0.25), ("oracle", 0.25), ("learned", 0.75), ("oracle", 0.75))
    ]
    for row in rows:
        with attach(model, artifact, sparsity=row["sparsity"], predictor=named(row["method"])) as attachment:
            alone = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
            share = published.Cost.of(attachment, 60).attached(attachment)
        assert {key: row[key] for key in pareto.KEYS} == {key: alone[key] for key in pareto.KEYS}
        assert row["ffn_flops"] == pytest.approx(share, abs=1e-6)
    learned, oracle = rows[2:]
    assert (learned["ttft_s"], learned["ttft_dense_s"], learned["speedup"]) == (pytest.approx(0.25), 1.75, pytest.approx(4))
    assert (oracle["ttft_s"], oracle["ttft_dense_s"], oracle["speedup"]) == (None, None, None)
    assert dense["method"] == "dense" and dense["ppl_ratio"] == dense["ffn_flops"] == dense["speedup"] == 1
    assert dense["ttft_s"] == pytest.approx((1.25 + 1.75) / 2)
    assert [asked[0] for asked in clock] == [0.25, 0.75] and clock[0][1:] == clock[1][1:] and clock[0][2] == 2
    assert len(clock[0][1][0]) == 40


def test_without_the_learned_predictor_nothing_is_timed(clock):
    model = tiny_model()
    rows = run(model, tiny_artifact(model), methods=("static",), compensator=False)["rows"]
    assert not clock and all(row["ttft_s"] is None and row["speedup"] is None for row in rows)
    with attach(model, tiny_artifact(model), sparsity=0.25, predictor=named("static"), compensator=False) as attachment:
        assert rows[1]["kl"] == perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)["kl"]
