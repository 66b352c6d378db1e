import dataclasses
import json
import shutil

import pytest
import torch
from conftest import (
    BLOCK,
    FAMILIES,
    INTERMEDIATE,
    LAYERS,
    PREFILL,
    RECURRENT,
    logits,
    snapshot,
    tiny_artifact,
    tiny_model,
    tiny_text,
    user_error,
)

import fastfill
from fastfill import artifact as artifacts
from fastfill import data, families, kernels
from fastfill.calibration import capture, checkpoint, corpus, distill, fit, importance, limit, passages, run, student
from fastfill.config import CalibrationConfig, PrefillConfig
from fastfill.errors import UserError
from fastfill.lab.baselines import named

CONFIG = CalibrationConfig(
    **{"predictor_rank": 8, "linear_rank": 4, "silu_rank": 4, "fit_tokens": 512, "fit_batch": 128, "schedule_tokens": 128},
    **{"steps": 8, "sequence_length": 64, "compensator_lr": 1.5e-2, "predictor_lr": 3e-3},
    loss_stride=1,  # 40 tokens are few
)
TEXTS = [tiny_text(256, seed=s) for s in range(6)]


def change(**values):
    import dataclasses

    return dataclasses.replace(CONFIG, **values)


def calibrate(model, tokenizer, out, config=CONFIG, **more):
    return fastfill.calibrate(model, tokenizer, TEXTS, out, prefill=more.pop("prefill", PREFILL), config=config, **more)


def same(one, two):
    """Weights, schedule and record (but for the time it took) are equal bit for bit."""
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.tensors[k], two.tensors[k]) for k in one.tensors)
    assert one.layer_importance == two.layer_importance
    records = [{k: v for k, v in a.calibration.items() if k not in ("seconds", "machine")} for a in (one, two)]
    assert records[0] == records[1]


# --- the whole recipe ---------------------------------------------------------------------------------------------------


def test_the_artifact_is_complete_and_the_model_untouched(model, tokenizer, tmp_path):
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    before, keys = logits(model, ids), [m.__dict__.keys() for m in model.modules()]
    out = tmp_path / "deep" / "artifact"
    result = calibrate(model, tokenizer, out, name="mine")
    assert torch.equal(logits(model, ids), before)
    assert [m.__dict__.keys() for m in model.modules()] == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    loaded = artifacts.load(out)
    same(loaded, result)
    assert [p.name for p in out.parent.iterdir()] == ["artifact"]  # no checkpoint is left
    assert sorted(snapshot(out)) == ["README.md", "config.json", "weights.safetensors"]
    assert loaded.base_model["name"] == "mine" and loaded.prefill == PREFILL
    record = loaded.calibration
    assert record["sequences"] == 24 and record["tokens_distilled"] == 8 * 64
    assert record["config"]["steps"] == 8 and len(record["document_rows"]) == 6
    assert all(0 < learned <= oracle <= 1 for learned, oracle in record["importance_held"])
    assert sum(loaded.kept()) == round(0.5 * LAYERS * INTERMEDIATE)
    with fastfill.attach(model, out) as attachment:
        sparse = logits(model, ids)
    assert attachment.stats.sparse_tokens == 248 and not torch.equal(sparse, before)


def test_the_same_inputs_give_the_same_artifact(model, tokenizer, tmp_path):
    torch.manual_seed(1)
    one = calibrate(model, tokenizer, tmp_path / "one")
    torch.manual_seed(2)  # the global generator plays no part
    two = calibrate(model, tokenizer, tmp_path / "two")
    same(one, two)
    other = calibrate(model, tokenizer, tmp_path / "three", change(seed=1))
    assert not torch.equal(one.tensors["layers.0.predictor.w_in"], other.tensors["layers.0.predictor.w_in"])


def test_a_budget_in_minutes_sets_tokens_and_steps(model, tokenizer, tmp_path, monkeypatch):
    """A prefill and a step take a second each on this clock: of two minutes 36 s go to fits, which is 18 sequences, and what is
    left to steps. A killed run keeps what it decided."""
    monkeypatch.setattr(run, "_seconds", lambda work: (work(), 1.0)[1])
    budget = change(minutes=2.0, fit_tokens=10**6)
    one = calibrate(model, tokenizer, tmp_path / "one", budget)
    record = one.calibration
    assert record["config"]["fit_tokens"] == 18 * 64 and record["config"]["minutes"] == 2.0
    assert 100 < record["config"]["steps"] <= 120 and record["tokens_distilled"] == record["config"]["steps"] * 64
    few = calibrate(model, tokenizer, tmp_path / "three", change(minutes=2.0))  # asks for less than it might have
    assert few.calibration["config"]["fit_tokens"] == 512
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_step(patch, 5)
        calibrate(model, tokenizer, tmp_path / "two", budget)
    steps = json.loads((tmp_path / "two.checkpoint" / "steps.json").read_text())["value"]
    monkeypatch.setattr(run, "_seconds", lambda work: 1e9)  # would allow one
    two = calibrate(model, tokenizer, tmp_path / "two", budget, resume=True)
    assert two.calibration["config"]["steps"] == steps and two.calibration["config"]["fit_tokens"] == 18 * 64


def mean_kl(model, artifact, ids, **settings):
    dense = logits(model, ids)[:, BLOCK:].log_softmax(-1)
    with fastfill.attach(model, artifact, **settings) as attachment:
        sparse = logits(model, ids)[:, BLOCK:].log_softmax(-1)
    assert attachment.stats.sparse_tokens > 0
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def test_the_loss_falls_and_what_was_learned_helps_on_other_text(model, tokenizer, tmp_path):
    """On text it has not seen: distilled < fitted only, < no compensator; learned < random selection."""
    long = calibrate(model, tokenizer, tmp_path / "long", change(steps=120, compensator_lr=5e-2))
    assert long.calibration["loss_last"] < 0.9 * long.calibration["loss_first"]
    fitted = calibrate(model, tokenizer, tmp_path / "fitted", change(steps=0))
    ids = torch.cat([tokenizer(tiny_text(128, seed=90 + s), return_tensors="pt")["input_ids"] for s in range(4)])
    cost = mean_kl(model, long, ids)
    assert cost < 0.97 * mean_kl(model, fitted, ids)
    assert cost < 0.95 * mean_kl(model, long, ids, compensator=False)
    assert cost < mean_kl(model, long, ids, predictor=named("random"))


def test_a_distillation_that_makes_it_worse_is_left_out_and_said(model, tokenizer, tmp_path, capsys):
    fitted = calibrate(model, tokenizer, tmp_path / "fitted", change(steps=0))
    capsys.readouterr()
    wild = calibrate(model, tokenizer, tmp_path / "wild", change(steps=10, compensator_lr=20.0))
    before, after = wild.calibration["loss_aside"]
    assert after > before and f"({before:.3f} -> {after:.3f} nats) and was left out" in (said := capsys.readouterr().err)
    assert f"is in {tmp_path / 'wild.left-out'}." in said
    assert wild.calibration["config"]["steps"] == wild.calibration["tokens_distilled"] == 0
    assert all(torch.equal(wild.tensors[key], fitted.tensors[key]) for key in fitted.tensors)
    lost = artifacts.load(tmp_path / "wild.left-out")  # hours of work, perhaps
    assert lost.calibration["config"]["steps"] == 10 and lost.calibration["loss_aside"] == [before, after]
    assert not torch.equal(lost.tensors["layers.0.compensator.w_out"], fitted.tensors["layers.0.compensator.w_out"])
    assert {key: t.dtype for key, t in lost.tensors.items()} == {key: t.dtype for key, t in wild.tensors.items()}
    with pytest.raises(UserError, match="this one too; rename it"):  # it would take its own place
        calibrate(model, tokenizer, tmp_path / "wild", FURTHER, start=tmp_path / "wild.left-out")
    (tmp_path / "again.left-out").write_text("somebody's")
    again = calibrate(model, tokenizer, tmp_path / "again", change(steps=10, compensator_lr=20.0))
    assert "What it has learned is lost: " in capsys.readouterr().err
    assert again.calibration["config"]["steps"] == 0 and (tmp_path / "again" / "config.json").exists()
    good = calibrate(model, tokenizer, tmp_path / "good", change(steps=30))
    before, after = good.calibration["loss_aside"]
    assert after < before and good.calibration["config"]["steps"] == 30 and not capsys.readouterr().err
    assert not (tmp_path / "good.left-out").exists()


@pytest.mark.parametrize("schedule", ["sensitivity", "token-mixing", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_schedules_and_families(family, schedule, tokenizer, tmp_path):
    model = tiny_model(family)
    implementation = model.config._attn_implementation
    if family in RECURRENT and schedule == "token-mixing":
        with pytest.raises(UserError, match="needs attention in every layer"):
            calibrate(model, tokenizer, tmp_path / "a", change(schedule=schedule, steps=1))
        return
    result = calibrate(model, tokenizer, tmp_path / "a", change(schedule=schedule, steps=1))
    assert model.config._attn_implementation == implementation
    weights = result.layer_importance
    assert len(weights) == LAYERS and all(w > 0 for w in weights)
    assert (len(set(weights)) == 1) == (schedule == "uniform")
    assert sum(result.kept()) == round(0.5 * LAYERS * INTERMEDIATE)


@pytest.mark.parametrize("sparsity", [0.0, 1e-4])
def test_nothing_to_skip_is_no_error(model, tokenizer, tmp_path, sparsity):
    prefill = PrefillConfig(sparsity, BLOCK, BLOCK, 2 * BLOCK)
    result = calibrate(model, tokenizer, tmp_path / "a", prefill=prefill)
    assert result.kept() == [INTERMEDIATE] * LAYERS
    assert all(bool(torch.isfinite(t).all()) for t in result.tensors.values())
    artifacts.load(tmp_path / "a")


@pytest.mark.parametrize("ranks", [(4, 0), (0, 4), (0, 0)])
def test_parts_of_the_compensator_can_be_left_out(model, tokenizer, tmp_path, ranks):
    result = calibrate(model, tokenizer, tmp_path / "a", change(linear_rank=ranks[0], silu_rank=ranks[1], steps=3))
    loaded = artifacts.load(tmp_path / "a")
    same(result, loaded)
    assert (loaded.compensator(0, 1, torch.zeros(1)) is None) == (ranks == (0, 0))


def test_a_head_that_is_no_multiple_of_the_block(model, tokenizer, tmp_path):
    prefill = PrefillConfig(0.5, 24, 30, 48)  # the first whole block behind the head is 48..71
    with pytest.raises(UserError, match="sequence_length must be a whole number of at least 72"):
        calibrate(model, tokenizer, tmp_path / "a", prefill=prefill)
    calibrate(model, tokenizer, tmp_path / "a", change(sequence_length=72, steps=1), prefill=prefill)


# --- killed and resumed -------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def kill_step(patch, number):
    step = distill.Distiller.step

    def patched(self, ids):
        if self.step_done == number:
            raise Killed
        return step(self, ids)

    patch.setattr(distill.Distiller, "step", patched)


def kill_call(patch, owner, name, number, after=False):
    function, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(name)
        if len(calls) == number and not after:
            raise Killed
        result = function(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return result

    patch.setattr(owner, name, patched)


KILLS = {
    "in the first layer's fit": lambda patch: kill_call(patch, fit, "fit_predictor", 1),
    "between layers": lambda patch: kill_call(patch, fit, "fit_predictor", 2),
    "after a layer's checkpoint": lambda patch: kill_call(patch, checkpoint.Checkpoint, "put_tensors", 2, after=True),
    "after the last layer": lambda patch: kill_call(patch, run, "sensitivity", 1),
    "before the first step": lambda patch: kill_step(patch, 0),
    "in the middle of distillation": lambda patch: kill_step(patch, 5),
    "before the artifact is written": lambda patch: kill_call(patch, artifacts, "save", 1),
}


@pytest.mark.parametrize("save_every", [0.0, 3600.0], ids=["checkpoint each step", "checkpoint rarely"])
@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_equals_uninterrupted(model, tokenizer, tmp_path, monkeypatch, name, save_every):
    monkeypatch.setattr(run, "SAVE_EVERY_S", save_every)
    whole = calibrate(model, tokenizer, tmp_path / "whole")
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        KILLS[name](patch)
        with pytest.raises(Killed):
            calibrate(model, tokenizer, out)
    assert not out.exists() and (tmp_path / "killed.checkpoint").is_dir()
    assert not any("forward" in m.__dict__ for m in model.modules())
    done = []
    step = distill.Distiller.step
    monkeypatch.setattr(distill.Distiller, "step", lambda self, ids: done.append(self.step_done) or step(self, ids))
    resumed = calibrate(model, tokenizer, out, resume=True)
    same(whole, resumed)
    same(artifacts.load(tmp_path / "whole"), artifacts.load(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]
    if name == "in the middle of distillation":  # nothing is done twice
        assert done == (list(range(5, 8)) if save_every == 0 else list(range(8)))


# --- from an artifact that is there -------------------------------------------------------------------------------------

FURTHER = CalibrationConfig(steps=8, sequence_length=64, compensator_lr=1.5e-2, predictor_lr=3e-3, loss_stride=1)


def learned(model, tokenizer, folder, **changes):
    calibrate(model, tokenizer, folder, change(predictor_rank=6, **changes))
    return artifacts.load(folder)


def test_an_artifact_is_distilled_further(model, tokenizer, tmp_path):
    first = learned(model, tokenizer, tmp_path / "first")
    texts = [data.Document(tiny_text(200, seed=70 + i), f"new#{i}") for i in range(4)]
    more = fastfill.calibrate(model, tokenizer, texts, tmp_path / "more", config=FURTHER, start=tmp_path / "first")
    assert more.layer_importance == first.layer_importance and more.prefill == first.prefill and more.ranks == first.ranks
    assert not torch.equal(more.tensors["layers.0.compensator.w_out"], first.tensors["layers.0.compensator.w_out"])
    assert torch.equal(more.tensors["layers.0.stats.importance"], first.tensors["layers.0.stats.importance"])
    assert more.calibration["loss_aside"][1] < more.calibration["loss_aside"][0]
    before = {k: v for k, v in first.calibration.items() if not k.startswith("document")}
    assert more.calibration["before"] == before and more.calibration["config"]["predictor_rank"] == 6
    both = [*first.calibration["document_rows"], *(text.source for text in texts)]
    assert more.calibration["document_rows"] == sorted(both)


def test_what_a_start_has_learned_from_is_not_set_aside(model, tokenizer, tmp_path, capsys):
    """By text that is learned already, anything that follows looks worse than it is. A text is known by any name."""
    first = learned(model, tokenizer, tmp_path / "first", steps=1)
    old = [data.Document(text, f"renamed#{i}") for i, text in enumerate(TEXTS)]
    new = [data.Document(tiny_text(400, seed=50 + i), f"text#{i}") for i in range(2)]  # names of the first run's
    other = change(seed=5)  # an order in which old text would come last
    rows = {tuple(row) for row in data.sequences(tokenizer, new, 64, 0)[0].tolist()}
    plain, _ = data.sequences(tokenizer, [*old, *new], 64, 5)
    found = corpus.read(tokenizer, [*old, *new], other, first)
    assert found.aside == corpus.ASIDE and all(tuple(row) in rows for row in found.tokens[-corpus.ASIDE :].tolist())
    assert not all(tuple(row) in rows for row in plain[-corpus.ASIDE :].tolist())  # the seed is one that shows it
    assert sorted(found.tokens.tolist()) == sorted(plain.tolist())
    assert corpus.read(tokenizer, [*old, data.Document(tiny_text(70, seed=60), "one#0")], other, first).aside == 1
    # What an older version has made, which recorded names only.
    record = {key: value for key, value in first.calibration.items() if key != "document_digests"}
    by_name = dataclasses.replace(first, calibration=record)
    assert corpus.read(tokenizer, new, other, by_name).aside == 0 < corpus.read(tokenizer, old, other, by_name).aside
    capsys.readouterr()
    config = dataclasses.replace(FURTHER, seed=5)
    none = fastfill.calibrate(model, tokenizer, old, tmp_path / "none", config=config, start=first)
    assert none.calibration["loss_aside"] == [] and none.calibration["config"]["steps"] == 8
    assert "nothing tells whether more steps help" in capsys.readouterr().err
    more = fastfill.calibrate(model, tokenizer, new, tmp_path / "more", config=config, start=none)
    assert corpus.read(tokenizer, [*old, *new], other, more).aside == 0  # both runs' text, whatever came of them


def test_no_steps_from_an_artifact_change_nothing(model, tokenizer, tmp_path):
    first = learned(model, tokenizer, tmp_path / "first", steps=2)
    none = dataclasses.replace(FURTHER, steps=0)
    again = calibrate(model, tokenizer, tmp_path / "again", none, start=first)
    for name in first.tensors:
        assert torch.allclose(again.tensors[name].float(), first.tensors[name].float(), rtol=1e-6, atol=0), name


def test_killed_and_resumed_from_an_artifact(model, tokenizer, tmp_path, monkeypatch):
    first, other = (learned(model, tokenizer, tmp_path / name, steps=1, seed=n) for n, name in enumerate(("first", "other")))
    whole = calibrate(model, tokenizer, tmp_path / "whole", FURTHER, start=first)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0)
    with monkeypatch.context() as patch:
        KILLS["in the middle of distillation"](patch)
        with pytest.raises(Killed):
            calibrate(model, tokenizer, tmp_path / "killed", FURTHER, start=first)
    for start in (other, None):
        with pytest.raises(UserError, match="other settings"):
            calibrate(model, tokenizer, tmp_path / "killed", FURTHER, resume=True, start=start)
    same(whole, calibrate(model, tokenizer, tmp_path / "killed", FURTHER, resume=True, start=first))


def test_what_does_not_go_with_a_start_is_refused(model, tokenizer, tmp_path):
    first = learned(model, tokenizer, tmp_path / "first", steps=1)
    with pytest.raises(UserError, match="keeps its settings"):
        calibrate(model, tokenizer, tmp_path / "a", FURTHER, prefill=PrefillConfig(0.25, BLOCK, BLOCK, 16), start=first)
    for name, value in (("silu_rank", 2), ("fit_tokens", 64), ("schedule", "uniform"), ("max_loss", "1%")):
        with pytest.raises(UserError, match=f"leave out '{name}'"):
            calibrate(model, tokenizer, tmp_path / "a", dataclasses.replace(FURTHER, **{name: value}), start=first)
    with pytest.raises(UserError, match="other weights"):
        calibrate(tiny_model(seed=1), tokenizer, tmp_path / "a", FURTHER, start=first)
    assert not (tmp_path / "a").exists()


# --- numbered passages --------------------------------------------------------------------------------------------------


def test_passages_are_a_share_of_the_sequences(tokenizer, monkeypatch):
    asked = []

    def made(tokenizer, texts, length, count, answer, seed):
        asked.append((texts, length, count, answer))
        return torch.full((count, length), 7)

    monkeypatch.setattr(passages, "sequences", made)
    documents = [data.Document(text, "text") for text in TEXTS]
    none = corpus.read(tokenizer, documents, CONFIG)
    plain = none.tokens
    for most in (None, "1%"):
        aside = corpus.ASIDE + (most is not None) * limit.SEQUENCES
        found = corpus.read(tokenizer, documents, change(passages=0.25, max_loss=most))
        mixed, count = torch.cat([found.tokens, found.held_out]), found.passages
        texts, *rest = asked[-1]
        assert none.passages == 0 and count == round(len(plain) / 3) and rest == [64, count, CONFIG.answer]
        sevens = (mixed == 7).all(1)
        assert int(sevens.sum()) == count and sevens[: len(mixed) // 2].any() and not sevens[: len(plain) // 2].all()
        assert torch.equal(mixed[-aside:], plain[-aside:])  # set aside: as without passages, and of no passage
        assert texts == [tokenizer.decode(row) for row in plain[:-aside].tolist()]
        assert torch.equal(mixed[~sevens].sort(0)[0], plain.sort(0)[0])


def test_passages_are_recorded(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "WORDS", (4, 8))
    made = calibrate(model, tokenizer, tmp_path / "a", change(passages=0.5, steps=2))
    assert made.calibration["passages"] == made.calibration["sequences"] / 2


@pytest.fixture
def killed(model, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        KILLS["before the first step"](patch)
        with pytest.raises(Killed):
            calibrate(model, tokenizer, tmp_path / "a")
    return tmp_path / "a.checkpoint"


@pytest.mark.parametrize("what", ["config", "prefill", "base_model", "text", "dtype"])
def test_resuming_with_other_settings_is_refused(model, tokenizer, tmp_path, killed, what):
    before, out = snapshot(killed), tmp_path / "a"
    words = rf"other settings \({what}"
    with pytest.raises(UserError, match=words if what != "dtype" else "dtype"):
        if what == "config":
            calibrate(model, tokenizer, out, change(steps=9), resume=True)
        elif what == "prefill":
            calibrate(model, tokenizer, out, prefill=PrefillConfig(0.25, BLOCK, BLOCK, 16), resume=True)
        elif what == "base_model":
            calibrate(tiny_model(seed=1), tokenizer, out, resume=True)
        elif what == "dtype":
            calibrate(tiny_model(dtype=torch.bfloat16), tokenizer, out, resume=True)
        else:
            fastfill.calibrate(model, tokenizer, TEXTS[:-1], out, prefill=PREFILL, config=CONFIG, resume=True)
    assert snapshot(killed) == before


def test_a_finished_calibration_is_replaced_only_by_a_whole_one(model, tokenizer, tmp_path, monkeypatch):
    calibrate(model, tokenizer, tmp_path / "a")
    before = snapshot(tmp_path / "a")
    with monkeypatch.context() as patch:
        KILLS["in the middle of distillation"](patch)
        with pytest.raises(Killed):
            calibrate(model, tokenizer, tmp_path / "a", change(seed=1))
    assert snapshot(tmp_path / "a") == before
    calibrate(model, tokenizer, tmp_path / "a", change(seed=1), resume=True)
    assert snapshot(tmp_path / "a") != before


def test_a_full_disk_while_saving_a_checkpoint(model, tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match="could not be written: No space left on device"):
            calibrate(model, tokenizer, tmp_path / "a")
    assert sorted(snapshot(tmp_path)) == ["a.checkpoint/settings.json"]
    calibrate(model, tokenizer, tmp_path / "a", resume=True)


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_data_too_short(model, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no document has 64 tokens"):
        fastfill.calibrate(model, tokenizer, [tiny_text(63)], tmp_path / "a", prefill=PREFILL, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_an_attached_model_is_refused(model, tokenizer, tmp_path):
    with fastfill.attach(model, tiny_artifact(model)), pytest.raises(UserError, match="attached"):
        calibrate(model, tokenizer, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_one_is_in_is_refused(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "/"):
        with user_error("folder you are in"):
            calibrate(model, tokenizer, place)
    assert not list(tmp_path.iterdir())


# --- the pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_inputs_are_what_the_whole_model_gives(family):
    model = tiny_model(family)
    anatomy = families.dissect(model)
    tokens = torch.randint(3, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = [[] for _ in anatomy.ffns]
    hooks = [
        ffn.module.register_forward_pre_hook(lambda _m, args, rows=rows: rows.append(args[0]))
        for ffn, rows in zip(anatomy.ffns, expected, strict=True)
    ]
    for row in tokens:
        logits(model, row[None])
    for hook in hooks:
        hook.remove()
    hidden, calls = capture.embed(anatomy, tokens)
    for layer, inputs, activations in capture.stream_ffns(anatomy, hidden, calls, slice(8, 40)):
        x, ffn = torch.cat(expected[layer]), anatomy.ffns[layer]
        assert torch.equal(inputs, x[:, 8:40])  # the same operations on the same shapes
        # fp32, values near one: 32 terms of eps each
        torch.testing.assert_close(activations, ffn.hidden(x)[:, 8:40], rtol=0, atol=1e-5)
    assert layer == LAYERS - 1
    with capture.known(anatomy, LAYERS, hidden[:1]):
        last = anatomy.base(input_ids=tokens[:1], use_cache=False)[0]
    assert torch.equal(last, anatomy.base(input_ids=tokens[:1], use_cache=False)[0])


def test_statistics(model):
    ffn = families.dissect(model).ffns[0]
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    stats = fit.statistics(x, activations(x, ffn), ffn)
    energy = ((torch.nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)) * ffn.down.norm(dim=0)).square()
    # fp32 sums of 32, 96 and 50 terms: the root of their number in eps. What cancels is small beside shares of 0.01.
    torch.testing.assert_close(stats["importance"], (energy / energy.sum(1, keepdim=True)).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(stats["input_rms"], x.square().mean(0).sqrt(), rtol=1e-6, atol=0)


def activations(x, ffn):
    return torch.nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)


def fitted(model, config=CONFIG, tokens=1024):
    ffn = families.dissect(model).ffns[0]
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    h = activations(x, ffn)
    mean = fit.statistics(x, h, ffn)["importance"]
    return ffn, x, fit.fit_predictor(x, h, ffn, mean, 16, config, 0, lambda: None), mean


def test_the_fitted_predictor_holds_more_than_the_mean(model):
    ffn, x, weights, mean = fitted(model, change(fit_epochs=4))
    constant = {"w_in": weights["w_in"], "w_out": torch.zeros_like(weights["w_out"]), "bias": mean.log()}
    learned, oracle = fit.captured_share(x, activations(x, ffn), ffn, weights, 48, BLOCK)
    static, same_oracle = fit.captured_share(x, activations(x, ffn), ffn, constant, 48, BLOCK)
    assert oracle == same_oracle and static < learned < oracle < 1
    everything, _ = fit.captured_share(x, activations(x, ffn), ffn, weights, INTERMEDIATE, BLOCK)
    assert everything == pytest.approx(1.0, abs=1e-5)  # fp32 sums of 96 and 1,024 shares


def test_the_closed_form_is_the_least_squares_solution(model):
    """At full rank it is ridge regression on what the skipped neurons would have added, solved here once more."""
    ffn, x, weights, _ = fitted(model)
    h = activations(x, ffn)
    found = fit.fit_compensator(x, h, ffn, weights, 48, BLOCK, 32, 4, 0)
    ids = kernels.top_k(fit.block_sums(fit.logits(x, weights), BLOCK), 48).long().repeat_interleave(BLOCK, 0)
    missing = (h.scatter(1, ids, 0.0) @ ffn.down.T).double()
    inputs = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    gram = inputs.T @ inputs
    gram[range(32), range(32)] += 1e-3 * (gram.diagonal()[:-1].mean())
    solution = torch.linalg.solve(gram, inputs.T @ missing)
    product = found["w_out"].double() @ found["w_in"].double()  # the SiLU branch starts with zeros
    # fp32 sums over 1024 tokens: eps * sqrt(1024) = 4e-6 relative to the largest, with a margin of ten for the solve.
    limit = 4e-5 * float(solution.abs().max())
    torch.testing.assert_close(product, solution[:-1].T, rtol=0, atol=limit)
    torch.testing.assert_close(found["bias"].double(), solution[-1], rtol=0, atol=limit)
    ranks = [float((missing - (x @ (c["w_out"] @ c["w_in"]).T + c["bias"])).square().mean()) for c in
             (fit.fit_compensator(x, h, ffn, weights, 48, BLOCK, r, 0, 0) for r in (1, 4, 16, 32))]  # fmt: skip
    assert ranks == sorted(ranks, reverse=True) and ranks[0] < float(missing.square().mean())


def test_kl_divergence_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    teacher, student_ = (torch.randn(300, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    student_.requires_grad_()
    log_t, log_s = teacher.log_softmax(-1), student_.log_softmax(-1)
    plain = (log_t.exp() * (log_t - log_s)).sum(-1)
    weights = torch.rand(300, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((plain * weights).sum(), student_)
    found = distill.kl_divergence(teacher, student_)
    (gradient,) = torch.autograd.grad((found * weights).sum(), student_)
    # It works in fp32: eps * 11 terms of order ten.
    torch.testing.assert_close(found.double(), plain.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6)
    assert torch.equal(distill.kl_divergence(teacher, teacher), torch.zeros(300))
    # By hand: KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3
    two = distill.kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    assert float(two) == pytest.approx(0.14384, abs=1e-5)


def test_token_mixing_by_hand(model):
    """Against attention weights asked from the model itself."""
    anatomy = families.dissect(model)
    tokens = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    found = importance.token_mixing(model, anatomy, tokens)
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(input_ids=tokens, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        total = 0.0
        for t in range(1, 12):
            total += float((1 - weights[:, :, t, t] - weights[:, :, t, 0]).mean())
        # the package averages over all positions but the first
        assert found[layer] == pytest.approx(
            total / 11, rel=1e-4
        )  # fp32 weights near one, of which little is left: ten eps / 0.1


def make_students(anatomy, artifact, kept, answer=0.0):
    shape = (artifact.ranks["linear"], PREFILL.block_size, PREFILL.first_sparse, answer)
    weights = [
        {k.removeprefix(f"layers.{i}."): v for k, v in artifact.tensors.items() if k.startswith(f"layers.{i}.")}
        for i in range(LAYERS)
    ]
    return [student.StudentFFN(*parts, *shape) for parts in zip(anatomy.ffns, weights, kept, strict=True)]


def test_sensitivity_is_the_cost_of_each_layer_alone(model, tokenizer):
    artifact = tiny_artifact(model)
    anatomy = families.dissect(model)
    tokens = data.sequences(tokenizer, [data.Document(t, "t") for t in TEXTS[:1]], 64, 0)[0][:2]
    students = make_students(anatomy, artifact, [48] * LAYERS)
    found = importance.sensitivity(model, anatomy, students, tokens)
    assert [s.kept for s in students] == [48] * LAYERS
    for layer in range(LAYERS):
        with fastfill.attach(model, artifact) as attachment:
            for index, ffn in enumerate(attachment.ffns):
                ffn.kept = 48 if index == layer else INTERMEDIATE
                ffn.down_t = anatomy.ffns[index].down.t().contiguous()
            sparse = torch.cat([logits(model, row[None])[:, BLOCK:] for row in tokens]).log_softmax(-1)
        dense = torch.cat([logits(model, row[None])[:, BLOCK:] for row in tokens]).log_softmax(-1)
        # A KL near 0.1 of fp32 logarithms near ten, 1e-6 each: 1e-5 of it for each of a hundred words.
        assert found[layer] == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), rel=1e-3)


def a_trainer(model, artifact, answer, weight):
    anatomy = families.dissect(model)
    students = make_students(anatomy, artifact, artifact.kept(), answer)
    config = change(answer=answer, answer_weight=weight, loss_stride=1)
    nothing = torch.empty(0, 0, dtype=torch.long)
    teacher = distill.Teacher(model, anatomy, nothing, nothing)
    return distill.Distiller(model, anatomy, students, config, PREFILL.dense_head, teacher)


def test_the_predictor_learns_the_shares_of_the_student_itself(model, tokenizer):
    """Its gradient is that of the cross-entropy on the inputs and activations of the sparse run, layer by layer."""
    trainer = a_trainer(model, tiny_artifact(model), 0.25, 3.0)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :64]
    rows, seen = slice(PREFILL.first_sparse, 48), []
    masked = student._MaskedFFN.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student._MaskedFFN, "apply", lambda x, *more: seen.append(x.detach().clone()) or masked(x, *more))
        trainer._backward(ids, 1)
    assert len(seen) == LAYERS
    for layer, x in enumerate(seen):
        ffn, weights = trainer.anatomy.ffns[layer], trainer.weights[layer]
        copies = [weights[name].detach().double().requires_grad_() for name in distill.PREDICTOR]
        w_in, w_out, bias = copies
        h = ffn.hidden(x[rows]).double()
        target = (h * ffn.down.double().norm(dim=0)).square()
        target /= target.sum(-1, keepdim=True)
        predicted = (x[rows].double() @ w_in.T @ w_out.T + bias).log_softmax(-1)
        expected = torch.autograd.grad(-(target * predicted).sum(-1).mean(), copies)
        for name, gradient in zip(distill.PREDICTOR, expected, strict=True):
            # fp32 against fp64: sums over 40 tokens and 96 neurons, eps sqrt(3840) = 7e-6 of the largest.
            margin = 1e-5 * float(gradient.abs().max())
            torch.testing.assert_close(weights[name].grad.double(), gradient, rtol=0, atol=margin)
        weights["predictor.w_out"].grad = None
    assert trainer.judge(ids) > 0 and all(layer["predictor.w_out"].grad is None for layer in trainer.weights)


@pytest.mark.parametrize("answer, weight", [(0.25, 3.0), (0.3, 0.5), (0.0, 3.0)])
def test_the_loss_is_that_of_a_sparse_prompt_and_a_dense_answer(model, tokenizer, answer, weight):
    """Against the attached model: the prompt prefilled sparsely into a cache, the answer read from it."""
    artifact = tiny_artifact(model)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :64]
    prompt = int(64 * (1 - answer)) // BLOCK * BLOCK
    dense = logits(model, ids)[0].log_softmax(-1)
    with fastfill.attach(model, artifact) as attachment, torch.no_grad():
        read = model(input_ids=ids[:, :prompt], use_cache=True)
        assert attachment.stats.sparse_tokens == prompt - PREFILL.dense_head
        parts = [read.logits[0]]
        if answer:
            with attachment.dense():
                parts.append(model(input_ids=ids[:, prompt:], past_key_values=read.past_key_values).logits[0])
    sparse = torch.cat(parts).log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    expected = kl[PREFILL.dense_head : prompt].mean() + (weight * kl[prompt:].mean() if answer else 0)
    # fp32, sums in another order: logarithms of size ten carry ten eps, 1e-6, beside a loss near one; ten times that as margin.
    assert a_trainer(model, artifact, answer, weight).step(ids) == pytest.approx(float(expected), rel=1e-5)


def test_every_nth_token_of_the_prompt_and_all_of_the_answer_are_scored(model):
    trainer = a_trainer(model, tiny_artifact(model), 0.25, 3.0)
    trainer.config = change(loss_stride=4)
    seen = []
    for turn in range(4):
        prompt, answer = trainer._scored(64, turn)
        assert answer.tolist() == list(range(48, 64)) and prompt.diff().eq(4).all()
        seen += prompt.tolist()
    assert sorted(seen) == list(range(BLOCK, 48))  # four steps see each once


def test_a_teacher_that_knows_the_text_says_the_same(model):
    anatomy = families.dissect(model)
    tokens = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls = capture.embed(anatomy, tokens[:1])
    for _ in capture.stream_ffns(anatomy, hidden, calls):
        pass
    knows = distill.Teacher(model, anatomy, tokens[:1], hidden)
    for row in tokens:
        assert torch.equal(knows.hidden(row[None]), anatomy.base(input_ids=row[None], use_cache=False)[0][0].detach())
    hidden.zero_()  # and the first row was not computed again
    assert float(knows.hidden(tokens[:1]).abs().max()) == 0


def test_a_loss_that_is_not_finite_ends_it_and_keeps_what_was_there(model, tokenizer, tmp_path):
    out = tmp_path / "a"
    calibrate(model, tokenizer, out)
    before = snapshot(out)
    for network in ("compensator", "predictor"):
        with pytest.raises(UserError, match="diverged at step"):
            calibrate(model, tokenizer, out, change(steps=40, **{f"{network}_lr": 1e30}))
        shutil.rmtree(f"{out}.checkpoint")
    assert snapshot(out) == before
