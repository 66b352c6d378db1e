"""Rows by sparsity against the same measurements taken one by one; the commands `peers` and `pareto`."""

import json

import pytest
import torch
from conftest import tiny_artifact, tiny_model, tiny_text, token_ids

from fastfill import attach, cli
from fastfill.lab import pareto, peers, perplexity, speed
from fastfill.lab.baselines import named
from fastfill.lab.resume import Store

CONTINUATION = 12
DOCUMENTS = [("a#0", token_ids(60, seed=1)), ("a#1", token_ids(60, seed=2))]


@pytest.fixture
def clock(monkeypatch):
    """A measurement that tells what it was asked: its time is the share of neurons kept."""
    asked = []

    def ttft(runner, ids, repeats):
        kept = 1 - peers.skipped(runner.attachment)
        asked.append((runner.config.sparsity, ids.tolist(), repeats))
        return {"ttft_sparse_s": kept, "ttft_dense_s": 1.0 + runner.config.sparsity, "speedup": 1 / kept, "more": 0}

    monkeypatch.setattr(speed, "ttft", ttft)
    return asked


def run(model, artifact, sparsities=(0.25, 0.75), methods=("learned", "oracle"), **more):
    attachment = attach(model, artifact)
    return pareto.evaluate(
        attachment,
        artifact,
        DOCUMENTS,
        sparsities=sparsities,
        methods=methods,
        prompt_tokens=40,
        repeats=2,
        continuation=CONTINUATION,
        **more,
    )


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
        with attach(model, artifact, sparsity=row["sparsity"], predictor=row["method"]) as attachment:
            alone = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
            share = peers.Cost.of(attachment, 60).attached(attachment)
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


def test_a_killed_run_goes_on_and_takes_more_sparsities(clock, tmp_path):
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)
    whole = run(model, artifact)
    assert run(model, artifact, sparsities=(0.75,), store=Store(tmp_path, {"a": 1}))["resumed"] == 0
    clock.clear()
    rest = run(model, artifact, store=Store(tmp_path, {"a": 1}))
    assert rest.pop("resumed") == 5 and [asked[0] for asked in clock] == [0.25]
    assert rest == {key: value for key, value in whole.items() if key != "resumed"}


def test_the_real_clock():
    model = tiny_model()
    rows = run(model, tiny_artifact(model), sparsities=(0.5,), methods=("learned",))["rows"]
    assert rows[1]["ttft_s"] > 0 and rows[1]["speedup"] == pytest.approx(rows[1]["ttft_dense_s"] / rows[1]["ttft_s"], rel=0.02)


# --- the commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def common(model_folder, artifact_folder, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": tiny_text(160, seed=s)}) for s in range(4)))
    return [
        *("evaluate", model_folder, "--artifact", artifact_folder, "--data", f"{file}[:2]", "--dtype", "fp32", "--json"),
        *("--tokens", 64, "--continuation", 16),
    ]


@pytest.fixture
def peers_command(common, tmp_path):
    """`--calibration` is an option of this task alone."""
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": tiny_text(200, seed=9)}))
    return [*common, "--task", "peers", "--calibration", other]


def call(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured


def test_peers_by_the_command(capsys, peers_command, tmp_path):
    for resumed in (0, 30):
        code, captured = call(capsys, *peers_command, "--out", tmp_path / "run")
        found = json.loads(captured.out.splitlines()[-1])
        assert code == 0 and found["task"] == "peers" and found["resumed"] == resumed
    assert found["calibration"] == ["other.jsonl#0"] and found["calibration_tokens"] == 3 * 64
    assert found["sources"] == ["text.jsonl#0", "text.jsonl#1"] and found["prompt_tokens"] == 64
    assert {"model", "dtype", "sparsity", "block_size", "machine"} <= found.keys()
    wanted = {"method", "published_as", "sparsity", "ffn_flops", "compensator", "ppl_ratio", "kl", "top1_agreement"}
    wanted |= {"cont_ppl_ratio", "cont_kl", "context_kept"}
    assert all(wanted <= row.keys() for row in found["rows"]) and len(found["rows"]) == 16
    assert all(name in captured.out for name in ("GRIFFIN-like", "CATS-like", "TEAL-like", "POP-like", "learned"))
    assert max(len(line) for line in captured.out.splitlines()[:-1]) <= 80
    code, captured = call(capsys, *peers_command, "--out", tmp_path / "run", "--seed", 1)
    assert code == 2 and "other settings (seed was 0, is 1)" in captured.err


def test_pareto_by_the_command(capsys, common):
    code, captured = call(
        capsys, *common, "--task", "pareto", "--sparsities", "0.2,0.6", "--methods", "learned,static", "--prompt-tokens", 64
    )
    found = json.loads(captured.out.splitlines()[-1])
    assert code == 0 and (found["task"], found["prompt_tokens"], found["repeats"]) == ("pareto", 64, 3)
    assert [row["method"] for row in found["rows"]] == ["dense", "learned", "static", "learned", "static"]
    wanted = "method sparsity ppl_ratio kl cont_ppl_ratio context_kept ttft_s ttft_dense_s speedup ffn_flops"
    assert all(set(wanted.split()) == row.keys() for row in found["rows"])
    assert max(len(line) for line in captured.out.splitlines()[:-1]) <= 80


@pytest.mark.parametrize(
    "more, words",
    [
        (["--task", "peers", "--predictor", "oracle"], "compares all predictors"),
        (["--task", "peers", "--no-compensator"], "compares all predictors"),
        (["--task", "peers", "--calibration", "missing.txt"], "cannot be read"),
        (["--task", "peers", "--sparsity", "0"], "a sparsity above 0"),
        (["--task", "pareto", "--sparsities", "much"], "--sparsities must be numbers"),
        (["--task", "pareto", "--sparsities", "0.99"], "sparsity must lie in"),
        (["--task", "pareto", "--sparsities", "0.5,0.5"], "each once"),
        (["--task", "pareto", "--methods", "psychic"], "the methods are learned, oracle"),
        (["--task", "pareto", "--methods", ","], "the methods are"),
        (["--task", "pareto", "--predictor", "oracle"], "--methods"),
        (["--task", "pareto", "--prompt-tokens", "10"], "too short to be sparse"),
        (["--task", "pareto", "--prompt-tokens", "512"], "more than the model holds"),
        (["--task", "pareto", "--repeats", "0"], "--repeats"),
        (["--task", "pareto", "--calibration", "other.jsonl"], "--calibration is an option of --task peers; leave it out"),
        (["--tokens", "513"], "more than the 512 that the model holds"),
        (["--record", "--sparsity", "0.3"], "--record stores what the artifact scores as it is"),
        (["--record", "--dense-tail", "8"], "--record stores what the artifact scores as it is"),
        (["--record", "--predictor", "static"], "--record stores what the artifact scores as it is"),
        (["--record", "--no-compensator"], "--record stores what the artifact scores as it is"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(capsys, common, more, words):
    code, captured = call(capsys, *common, *more)
    assert code == 2 and len(captured.err.splitlines()) == 1 and words in captured.err, captured.err


def test_thresholds_from_the_evaluated_text_are_refused(capsys, peers_command):
    code, captured = call(capsys, *peers_command[:-1], peers_command[5])
    assert code == 2 and "text.jsonl#0 is evaluated on; thresholds must come from other text" in captured.err


def test_the_demo_document_is_the_default_calibration(capsys, common):
    """The tiny tokenizer knows none of its words, so it makes enough tokens of one kind: here only the name matters."""
    code, captured = call(capsys, *common, "--task", "peers", "--limit", 1)
    assert code == 0 and json.loads(captured.out.splitlines()[-1])["calibration"] == ["demo_document.txt"]
