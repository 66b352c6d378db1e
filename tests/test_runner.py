"""Both answers to each example, recovery with its interval, and going on after a kill."""

import dataclasses
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCK, one_sentence, snapshot, tiny_artifact, tiny_model, token_ids, user_error

from fastfill import attach
from fastfill.config import PrefillConfig
from fastfill.engines import transformers as engine
from fastfill.engines.transformers import TransformersEngine
from fastfill.errors import UserError
from fastfill.lab import metrics, resume, runner
from fastfill.lab.baselines import named
from fastfill.lab.resume import Store

NEW = 6


def examples(count=4, tokens=45):
    return [
        runner.Example(
            dataset="even" if i % 2 == 0 else "odd",
            name=str(i),
            ids=token_ids(1, tokens, seed=i),
            max_new_tokens=NEW,
            score=functools.partial(metrics.match_all, references=["w1", "w2", "w3"]),
            answers=("w1", "w2", "w3"),
        )
        for i in range(count)
    ]


@pytest.fixture
def attached(model):
    artifact = tiny_artifact(model)
    with attach(model, artifact) as attachment:
        yield TransformersEngine(attachment, "tiny"), artifact


def settings(attached, made, **more):
    return resume.settings("test", *attached, runner.identity(made), **more)


def test_dense_is_dense_and_sparse_is_a_sparse_prefill_with_dense_decode(attached, tokenizer):
    attachment, _ = attached
    (example,) = examples(1)
    (row,) = runner.answers(attachment, tokenizer, [example])
    plain = tiny_model()
    new = engine.generate(plain, example.ids, NEW)
    assert row["dense"] == tokenizer.decode(new, skip_special_tokens=True)
    # 45 tokens: blocks at 8..39 are sparse, 8 + 5 dense; what is written behind them is not counted.
    assert (row["sparse_tokens"], row["dense_tokens"]) == (4 * BLOCK, BLOCK + 5)
    sparse = engine.generate(attachment.model, example.ids, NEW)
    assert row["sparse"] == tokenizer.decode(sparse, skip_special_tokens=True)
    assert row["score_sparse"] == example.score(row["sparse"]) and row["prompt_tokens"] == 45


def row(dataset, dense, sparse):
    counts = {"prompt_tokens": 10, "sparse_tokens": 8, "dense_tokens": 2}
    answers = {"dense": "a", "sparse": "b", "score_dense": dense, "score_sparse": sparse, "cut": False}
    return {"dataset": dataset, **answers, **counts}


def test_summary_of_worked_numbers():
    rows = [row("x", 1.0, 0.5), row("x", 0.5, 0.25), row("y", 0.25, 0.25), row("z", 0.0, 0.1)]
    result = runner.summarize(rows)
    x, y, z = result["datasets"]
    # x: means 0.75 and 0.375; every resample has the ratio 1/2.
    assert (x["dense"], x["sparse"], x["recovery"], x["interval"]) == (75.0, 37.5, 0.5, [0.5, 0.5])
    # One example has no interval, and a dense score of 0 no ratio.
    assert (y["recovery"], y["interval"]) == (1.0, None) and (z["recovery"], z["interval"]) == (None, None)
    # Datasets weigh the same: (0.75 + 0.25 + 0) / 3 = 1/3 and (0.375 + 0.25 + 0.1) / 3.
    assert result["average"]["dense"] == 33.33 and result["average"]["sparse"] == 24.17
    assert result["average"]["recovery"] == pytest.approx(0.725, abs=1e-4)
    assert (result["examples"], result["sparse_tokens"], result["dense_tokens"]) == (4, 32, 8)


def test_the_interval_is_seeded_paired_and_holds_the_truth():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(200, generator=generator)
    pairs = [(d, 0.9 * d) for d in dense.tolist()]
    low, high = runner.bootstrap([pairs])
    assert low == pytest.approx(0.9) and high == pytest.approx(0.9)  # unpaired, the examples' own spread would show
    noise = torch.rand(200, generator=generator).tolist()
    pairs = [(d, 0.9 * d + 0.2 * (n - 0.5)) for d, n in zip(dense.tolist(), noise, strict=True)]
    low, high = runner.bootstrap([pairs], seed=3)
    assert low < 0.9 < high and (low, high) == runner.bootstrap([pairs], seed=3) != runner.bootstrap([pairs], seed=4)
    # Standard error of the ratio by the delta method: sd(0.2 (n - 1/2)) / sqrt(200) / mean(d) = 0.0577 / 14.1 / 0.5 = 0.0082.
    assert high - low == pytest.approx(2 * 1.96 * 0.0082, rel=0.2)


def test_no_interval_where_many_resamples_have_no_dense_score():
    assert runner.bootstrap([[(0.0, 0.0), (0.0, 0.1), (1.0, 1.0)]]) is None


def test_sets_at_chance_are_apart_and_not_in_the_average():
    rows = [row("x", 1.0, 0.5), row("x", 0.5, 0.5), row("y", 0.25, 0.125), row("z", 0.5, 0.1), row("z", 0.5, 0.1)]
    result = runner.summarize(rows, levels={"x": [0.1, 0.1], "z": [0.5, 0.5]})
    x, y, z = result["datasets"]
    assert (x["chance"], x["at_chance"]) == (10.0, False) and (z["chance"], z["at_chance"]) == (50.0, True)
    assert "at_chance" not in y and z["recovery"] == 0.2
    # x: 0.75 and 0.5; y: 0.25 and 0.125. Ratio of the means 0.3125 / 0.5; mean of the ratios (2/3 + 1/2) / 2.
    average = result["average"]
    assert (average["dense"], average["recovery"], average["sets"]) == (50.0, 0.625, 2)
    assert average["mean_recovery"] == pytest.approx(7 / 12, abs=1e-4)
    low, high = average["mean_recovery_interval"]
    assert (low, high) == (0.5, 0.75)  # x is drawn as 1/2, 2/3 or 1, y is 1/2
    none = runner.summarize(rows[3:], levels={"z": [0.5, 0.5]})["average"]
    assert none["sets"] == 0 and none["recovery"] is none["dense"] is None


def test_chance_is_measured_with_the_answers_of_the_set(attached, tokenizer):
    attachment, _ = attached
    made = [dataclasses.replace(e, score=lambda text: 0.5) for e in examples()]
    result = runner.run(attachment, tokenizer, made, Store(None, {}))
    assert [(line["chance"], line["at_chance"]) for line in result["datasets"]] == [(50.0, True)] * 2
    assert result["average"]["sets"] == 0 and result["score"] == "both"


def with_golds(count=4):
    return [
        dataclasses.replace(e, golds=(token_ids(3, seed=i), token_ids(2, seed=i + 9))) for i, e in enumerate(examples(count))
    ]


@pytest.mark.parametrize("score, texts, likelihoods", [("both", 1, 1), ("likelihood", 0, 1), ("answers", 1, 0)])
def test_what_is_asked_is_measured_and_stored(attached, tokenizer, tmp_path, score, texts, likelihoods):
    attachment, _ = attached
    made = with_golds()
    result = runner.run(attachment, tokenizer, made, Store(tmp_path, settings(attached, made)), score=score)
    rows = [json.loads(line) for line in (tmp_path / resume.PREDICTIONS).read_text().splitlines()]
    assert len(rows) == 4 and result["score"] == score and result["examples"] == result["planned"] == 4
    for one in rows:
        assert ({"dense", "sparse", "score_dense", "score_sparse"} <= one.keys()) == bool(texts)
        assert ({"gold", "gold_tokens", "nll_dense", "nll_sparse", "kl"} <= one.keys()) == bool(likelihoods)
    for line in (result, *result["datasets"]):
        assert ("likelihood" in line) == bool(likelihoods) and ("same_answers" in line) == bool(texts)
    assert ("average" in result) == all("recovery" in line for line in result["datasets"]) == bool(texts)
    again = runner.run(attachment, tokenizer, made, Store(tmp_path, settings(attached, made)), score=score)
    assert again == {**result, "resumed": 4}


def test_sets_are_listed_as_they_came_whatever_is_read_first(attached, tokenizer):
    attachment, _ = attached
    made = [dataclasses.replace(e, max_new_tokens=2 + 4 * (e.dataset == "even")) for e in examples()]
    result = runner.run(attachment, tokenizer, made, Store(None, {}))
    assert [line["dataset"] for line in result["datasets"]] == ["even", "odd"]


def test_an_engine_without_hidden_states_writes_answers_alone(attached, tokenizer):
    attachment, _ = attached
    engine_like = SimpleNamespace(generate=attachment.generate, dense=attachment.dense, stats=attachment.stats)
    made = with_golds(2)
    for score in ("both", "likelihood"):
        with pytest.raises(UserError, match="needs --engine transformers"):
            runner.run(engine_like, tokenizer, made, Store(None, {}), score=score)
    with pytest.raises(UserError, match="use one of both, likelihood, answers"):
        runner.run(attachment, tokenizer, made, Store(None, {}), score="luck")
    result = runner.run(engine_like, tokenizer, made, Store(None, {}), score="answers")
    inside = runner.run(attachment, tokenizer, made, Store(None, {}), score="answers")
    assert result.pop("dense_tokens") == inside.pop("dense_tokens") + 2 * (NEW - 1)  # it counts its answers too
    for line, other in zip(result["datasets"], inside["datasets"], strict=True):
        assert line.pop("dense_tokens") == other.pop("dense_tokens") + NEW - 1
    assert result == inside


def test_a_run_that_stops_in_time_is_fair_and_goes_on(attached, tokenizer, tmp_path, monkeypatch, capsys):
    attachment, _ = attached
    made = with_golds(8)
    whole = runner.run(attachment, tokenizer, made, Store(tmp_path / "whole", settings(attached, made)))
    capsys.readouterr()
    monkeypatch.setattr(runner.Pace, "fits", lambda self, group: group[0].name != "4")  # the fifth in turn
    part = runner.run(attachment, tokenizer, made, Store(tmp_path / "out", settings(attached, made)), minutes=1)
    assert (part["examples"], part["planned"]) == (4, 8) and [line["examples"] for line in part["datasets"]] == [2, 2]
    err = capsys.readouterr().err
    assert "for the other 6 examples" in err and "stopped in time, 4 of 8 examples are left" in err
    assert len(err.splitlines()) == 2
    monkeypatch.undo()
    rest = runner.run(attachment, tokenizer, made, Store(tmp_path / "out", settings(attached, made)), minutes=100)
    assert rest == {**whole, "resumed": 4} and snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_answers_that_are_written_together_are_those_written_one_by_one(exact_model, tokenizer, tmp_path, batch, capsys):
    """Prompts of many lengths, answers that end early or late, and a count that the batch does not divide."""
    made = [
        dataclasses.replace(one, ids=token_ids(1, 30 + 9 * i, seed=i), max_new_tokens=2 + 5 * (i % 3))
        for i, one in enumerate(with_golds(7))
    ]
    with attach(exact_model, tiny_artifact(exact_model)) as attachment:
        attached = TransformersEngine(attachment, "tiny"), attachment.artifact
        for name, size in (("one", 1), ("many", batch)):
            store = Store(tmp_path / name, settings(attached, made))
            result = runner.run(attached[0], tokenizer, made, store, batch=size)
            assert result.pop("batch") == size and bool(result["sparse_tokens"])
    rows = [[json.loads(line) for line in (tmp_path / name / resume.PREDICTIONS).open()] for name in ("one", "many")]
    assert rows[0] == rows[1]
    assert len({len(row["dense"].split()) for row in rows[0]}) > 1 and "7 examples" not in capsys.readouterr().err


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_the_same(attached, tokenizer, tmp_path, monkeypatch):
    attachment, _ = attached
    made = examples()
    whole = runner.run(attachment, tokenizer, made, Store(tmp_path / "whole", settings(attached, made)))
    real, calls = runner.answers, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(runner, "answers", dying)
    with pytest.raises(Killed):
        runner.run(attachment, tokenizer, made, Store(tmp_path / "out", settings(attached, made)))
    with (tmp_path / "out" / resume.PREDICTIONS).open("a") as handle:
        handle.write('{"key": "even/2", "da')  # cut off in the middle of a line
    result = runner.run(attachment, tokenizer, made, Store(tmp_path / "out", settings(attached, made)))
    assert len(calls) == 3 + 2 and result.pop("resumed") == 2 and whole.pop("resumed") == 0
    assert result == whole and snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    lines = (tmp_path / "out" / resume.PREDICTIONS).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [example.key for example in made]
    assert all({"dense", "sparse", "answers"} <= set(json.loads(line)) for line in lines)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda m: {"sparsity": 0.25}, "sparsity was 0.5, is 0.25|kept was"),
        (lambda m: {"predictor": named("static")}, "predictor was LearnedPredictor, is Static"),
        (lambda m: {"compensator": False}, "compensator was True, is False"),
        (lambda m: {"block_size": 4}, "block_size was 8, is 4"),
    ],
)
def test_other_settings_are_refused(model, tmp_path, change, word):
    artifact, made = tiny_artifact(model), examples()
    with attach(model, artifact) as attachment:
        Store(tmp_path, settings((TransformersEngine(attachment, "tiny"), artifact), made))
    with attach(model, artifact, **change(model)) as attachment, pytest.raises(UserError, match=word) as error:
        Store(tmp_path, settings((TransformersEngine(attachment, "tiny"), artifact), made))
    assert "give another --out" in one_sentence(error)


def test_a_run_older_than_a_setting_goes_on_where_that_has_its_default(tmp_path):
    default = PrefillConfig().dense_tail
    Store(tmp_path, {"task": "ruler"}).add("a", {})
    assert "a" in Store(tmp_path, {"task": "ruler", "dense_tail": default})
    with pytest.raises(UserError, match=f"dense_tail was {default}, is {default + 1}"):
        Store(tmp_path, {"task": "ruler", "dense_tail": default + 1})


def test_other_examples_another_artifact_and_another_task_are_refused(attached, model, tmp_path):
    (attachment, artifact), made = attached, examples()
    Store(tmp_path, settings(attached, made))
    for other, words in (
        (settings(attached, examples(5)), "items was"),
        (resume.settings("test", attachment, tiny_artifact(model, seed=1), runner.identity(made)), "artifact was"),
        (resume.settings("other", attachment, artifact, runner.identity(made)), "task was"),
        (settings(attached, made, continuation=5), "continuation was None, is 5"),
    ):
        with pytest.raises(UserError, match=words):
            Store(tmp_path, other)


def test_a_folder_that_is_no_run_is_refused(attached, tmp_path):
    made = examples()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as error:
        Store(tmp_path / "file", settings(attached, made))
    one_sentence(error)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / resume.PREDICTIONS).write_text("{}\n")
    with pytest.raises(UserError, match=r"without settings.json"):
        Store(tmp_path / "foreign", settings(attached, made))
    for text in ("{", "[1]"):
        (tmp_path / "foreign" / resume.SETTINGS).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            Store(tmp_path / "foreign", settings(attached, made))


@pytest.mark.parametrize(
    "line", ["[" * 5000, '{"key": 1}', "[1]", '{"x": 1}', '{"key": "a", "n": 1' + "0" * 5000 + "}", "\0" * 40, "\x80"]
)
def test_a_row_that_is_none_is_named(attached, tmp_path, line):
    made = examples()
    Store(tmp_path, settings(attached, made)).add("a", {"x": 1})
    with (tmp_path / resume.PREDICTIONS).open("ab") as handle:
        handle.write(line.encode("latin-1") + b"\n")
    before = (tmp_path / resume.PREDICTIONS).read_bytes()
    with user_error(r"predictions\.jsonl, line 2 is damaged.*give another --out"):
        Store(tmp_path, settings(attached, made))
    assert (tmp_path / resume.PREDICTIONS).read_bytes() == before


def test_half_of_a_pair_is_kept(attached, tmp_path):
    """What a model says may end within a character."""
    made = examples()
    Store(tmp_path, settings(attached, made)).add("a", {"text": "\ud83d 你好 \udc80"})
    assert Store(tmp_path, settings(attached, made)).rows["a"]["text"] == "\ud83d 你好 \udc80"
    assert "你好" in (tmp_path / resume.PREDICTIONS).read_text(encoding="utf-8")


def test_two_runs_do_not_write_to_one_folder(attached, tmp_path):
    store = Store(tmp_path, settings(attached, examples()))
    code = "import sys; from fastfill.lab.resume import Store; Store(sys.argv[1], {})"
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    refused = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
    assert "another process is writing there" in refused.stderr and store.rows == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.json"]
