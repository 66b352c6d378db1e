"""The partner rule: the same, requantised, fine-tuned or another model, told from samples of the weights."""

import copy
import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from conftest import HIDDEN, INTERMEDIATE, LAYERS, logits, one_sentence, tiny_artifact, tiny_model, token_ids
from safetensors.torch import save_file

from fastfill import artifact as artifacts
from fastfill import attach, families, models, partner
from fastfill.errors import UserError
from fastfill.vllm_plugin import settings, weights

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}  # 8 and 16 blocks of 32 a row


def rounded(weight, kind):
    """Rounded to a format's grid, round to nearest: blocks of 32 along the input dimension, or the whole row."""
    rows = weight.float()
    blocks = rows.reshape(-1, 32) if kind in ("Q8_0", "Q4_0", "Q4_1") else rows
    if kind == "Q4_1":
        low = blocks.amin(1, keepdim=True)
        step = (blocks.amax(1, keepdim=True) - low) / 15
        made = ((blocks - low) / step).round() * step + low
    elif kind == "Q4_0":  # the largest magnitude becomes -8, so that on the other side values are cut at 7
        step = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
        made = (blocks / step).round().clamp(-8, 7) * step
    else:
        step = blocks.abs().amax(1, keepdim=True) / 127
        made = (blocks / step).round() * step
    return made.nan_to_num().reshape(weight.shape)  # of zeros


def tuned(weight, size, seed=0):
    """Changed by a merged adapter of rank 4, of this relative size."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(len(weight), 4, generator=generator) @ torch.randn(4, weight.shape[1], generator=generator)
    return weight.float() + change * (size * weight.float().norm() / change.norm())


def changed(model, change, dtype=torch.bfloat16):
    made = copy.deepcopy(model)
    for ffn in families.dissect(made).ffns:
        for weight in (ffn.gate, ffn.up, ffn.down):
            weight.copy_(change(weight))
    return made.to(dtype)


@pytest.fixture(scope="module")
def original():
    return tiny_model(dtype=torch.bfloat16, **SIZES)


def versions(model):
    kinds = ("Q8_0", "Q4_0", "Q4_1", "int8")
    return {"bf16": model, **{kind: changed(model, lambda weight, kind=kind: rounded(weight, kind)) for kind in kinds}}


def judged(learned, loaded):
    return partner.compare(partner.inside(families.dissect(learned)), partner.inside(families.dissect(loaded)))


def test_requantised_in_every_direction(original):
    made = versions(original)
    for learned in made:
        for loaded in made:
            verdict = judged(made[learned], made[loaded])
            assert verdict.kind == (partner.SAME if learned == loaded else partner.ROUNDED), (learned, loaded, verdict)
    # A step s rounds by s / sqrt(12), over Gaussian blocks of 32 whose range is 4.1 sigma, 15 steps: 7.9 %.
    assert judged(original, made["Q4_1"]).distance == pytest.approx(0.079, abs=0.004)


@pytest.mark.parametrize(("size", "seen"), [(1e-3, ("bf16",)), (3e-3, ("bf16", "Q8_0", "int8")), (3e-2, None)])
def test_a_merged_adapter_is_seen_through_a_rounding_that_is_not_far_larger(original, size, seen):
    made = versions(original)
    fine = changed(original, lambda weight: tuned(weight, size))
    for name in seen or made:
        for verdict in (judged(made[name], fine), judged(fine, made[name])):
            assert verdict.kind == partner.FINETUNED, (name, verdict)
            assert verdict.distance >= 0.5 * size  # 512 entries a tensor, of rank 4


def test_another_model_in_any_format(original):
    other = versions(tiny_model(seed=1, dtype=torch.bfloat16, **SIZES))
    for loaded in other.values():
        verdict = judged(original, loaded)
        assert verdict.kind == partner.ANOTHER
        assert verdict.distance == pytest.approx(2**0.5, rel=0.05)  # independent and of like size; 12,288 entries


def test_one_layer_is_enough(original):
    # Of six tensors one is sqrt(2) away: sqrt(2 / 6) in the mean.
    for change, kind in ((lambda w: tuned(w, 0.01), partner.FINETUNED), (lambda w: w.roll(1, 0), partner.ANOTHER)):
        made = copy.deepcopy(original)
        weight = families.dissect(made).ffns[1].down
        weight.copy_(change(weight))
        assert judged(original, made).kind == kind


@pytest.mark.parametrize("block", [16, 32])
def test_the_period_is_the_step(block):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, block, generator=generator)
    for step in (0.03, 0.3, 1.0):
        for offset in (0.0, 0.123):
            found, clear = partner.period(5 * ((values / step).round() * step + offset))
            right = (found / (5 * step) - 1).abs() < 0.05  # what the rule allows for
            assert float(right.float().mean()) > 0.97 and float(clear.median()) > 0.95
    assert float((partner.period(values)[1] > partner.CLEAR[block]).float().mean()) < 0.01


def test_runs_are_whole_blocks_and_in_every_part_of_a_weight():
    places = partner.places((8960, 1536), partner.RUNS)
    assert len(places) == 16 and all(c.start % 32 == 0 and c.stop - c.start == 32 for _, c in places)
    assert {row // 2240 for row, _ in places} == {c.start // 384 for _, c in places} == {0, 1, 2, 3}
    for shape in ((1, 5), (3, 40), (2, 64), (1, 1)):
        for row, columns in partner.places(shape, 16):
            assert 0 <= row < shape[0] and 0 <= columns.start < columns.stop <= shape[1]


def test_samples_are_small():
    """28 layers of H = 1536 and F = 8960, in bf16: the FFNs' 84 matrices, and 12 more tensors a layer."""
    base = {"hidden_size": 1536, "intermediate_size": 8960, "layers": 28}
    inside = sum(2 * torch.Size(shape).numel() for shape in partner.run_shapes(base).values())
    outside = 28 * 9 * partner.RUNS_OUTSIDE * partner.RUN * 2 + 2 * partner.RUNS_ONCE * partner.RUN * 2
    assert inside + outside < 300_000


def test_what_a_user_is_told(original, tmp_path):
    artifacts.save(tiny_artifact(original, name="org/base"), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            attach(copy.deepcopy(original).to(dtype), tmp_path / "a").detach()
    with pytest.warns(UserWarning, match=r"org/base.*requantised or rounded \(\d\.\d\d% apart\)") as told:
        attach(versions(original)["Q4_0"], tmp_path / "a").detach()
    assert len(told) == 1
    one_sentence(told[0].message)
    fine = changed(original, lambda weight: tuned(weight, 0.03))
    with pytest.raises(UserError, match=r"[23]\.\d\d% away .*org/base.*allow_finetuned=True \(--allow-finetuned\)") as error:
        attach(fine, tmp_path / "a")
    one_sentence(error)
    with pytest.warns(UserWarning, match="fine-tuned kind") as told:
        attach(fine, tmp_path / "a", allow_finetuned=True).detach()
    one_sentence(told[0].message)
    with pytest.raises(UserError, match="belongs to another model"):
        attach(tiny_model(seed=1, **SIZES), tmp_path / "a", allow_finetuned=True)


def test_requantised_embeddings_and_attention_are_no_other_ones(original):
    made = copy.deepcopy(original)
    with torch.no_grad():
        for name, weight in made.model.named_parameters():
            if weight.dim() == 2 and "mlp" not in name:
                weight.copy_(rounded(weight, "Q8_0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(made, tiny_artifact(original)).detach()
    with torch.no_grad():
        made.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="embeddings, attention or norms are not those"):
        attach(made, tiny_artifact(original)).detach()


def test_changes_are_those_since_it_was_attached(original):
    """Fine-tuned and allowed: nothing to say at a call, until the weights change again."""
    fine, ids = changed(original, lambda weight: tuned(weight, 0.03)), token_ids(1, 45)
    with pytest.warns(UserWarning, match="fine-tuned"):
        attachment = attach(fine, tiny_artifact(original), allow_finetuned=True)
    with attachment:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(fine, ids)
            attachment.refresh()
        families.dissect(fine).ffns[0].down.mul_(1.1)
        with pytest.warns(UserWarning, match="have changed since"):
            logits(fine, ids)


# --- in the folder --------------------------------------------------------------------------------------------------------


def test_samples_come_back_and_older_artifacts_have_none(model, tmp_path):
    artifact = tiny_artifact(model)
    artifacts.save(artifact, tmp_path / "new")
    artifacts.save(dataclasses.replace(artifact, samples={}), tmp_path / "old")
    back = artifacts.load(tmp_path / "new")
    assert back.samples.keys() == artifact.samples.keys() and back.tensors.keys() == artifact.tensors.keys()
    assert all(torch.equal(back.samples[name], artifact.samples[name]) for name in back.samples)
    assert back.samples["down"].shape == (LAYERS, min(16, HIDDEN * INTERMEDIATE // 32), 32)
    old = artifacts.load(tmp_path / "old")
    assert not old.samples and json.loads((tmp_path / "old" / "config.json").read_text())["schema_version"] == 1
    attach(model, old).detach()
    with pytest.raises(UserError, match="belongs to another model"):
        attach(changed(model, lambda weight: tuned(weight, 0.01)), old)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop("up"), "base model's up"),
        (lambda s: s.update(down=s["down"][:, 1:]), "base model's down"),
        (lambda s: s.update({"outside.norm.weight": torch.ones(3)}), "outside.norm.weight"),
        (lambda s: s.update(code=torch.ones(1, 1, 1)), "base model's code"),
        (lambda s: s.update(gate=s["gate"].int()), "base model's gate"),
        (lambda s: s["gate"].view(-1).__setitem__(3, float("nan")), "NaN"),
    ],
)
def test_samples_that_are_not_what_they_must_be_are_refused(model, tmp_path, spoil, words):
    artifact = tiny_artifact(model)
    artifacts.save(artifact, tmp_path / "a")
    spoil(artifact.samples)
    with pytest.raises(UserError, match=f"is not written.*{words}"):
        artifacts.save(artifact, tmp_path / "b")
    samples = {artifacts.SAMPLES + name: runs.contiguous() for name, runs in artifact.samples.items()}
    everything = artifact.tensors | samples
    save_file(everything, tmp_path / "a" / "weights.safetensors")
    with pytest.raises(UserError, match=words) as error:
        artifacts.load(tmp_path / "a")
    one_sentence(error)


def test_samples_are_added_to_an_older_artifact(model, tmp_path):
    artifacts.save(dataclasses.replace(tiny_artifact(model), samples={}), tmp_path / "a", readme="mine\n")
    before = artifacts.load(tmp_path / "a")
    with pytest.raises(UserError, match="belongs to another model"):
        artifacts.add_samples(tmp_path / "a", tiny_model(seed=1))
    artifacts.add_samples(tmp_path / "a", model)
    after = artifacts.load(tmp_path / "a")
    assert after.samples and dataclasses.replace(after, samples={}, tensors={}) == dataclasses.replace(before, tensors={})
    assert (tmp_path / "a" / "README.md").read_text() == "mine\n"


# --- vLLM -----------------------------------------------------------------------------------------------------------------


def test_vllm_judges_checkpoints_by_the_same_rule(original, tmp_path, caplog):
    artifact = tiny_artifact(original)
    fine = changed(original, lambda weight: tuned(weight, 0.03))
    for model, words in ((original, None), (versions(original)["Q4_0"], "requantised"), (fine, "fine-tuned")):
        model.save_pretrained(tmp_path)
        passed = weights.Checkpoint(model.state_dict().items())
        assert len(list(passed)) == len(model.state_dict())
        caplog.clear()
        if model is fine:
            for look in (passed.check, lambda a: settings.check_checkpoint(a, tmp_path)):
                with pytest.raises(UserError, match=r"% away"):
                    look(artifact)
        settings.check_checkpoint(artifact, tmp_path, allow_finetuned=True)
        assert not caplog.records
        passed.check(artifact, allow_finetuned=True)
        assert [words in record.message for record in caplog.records] == ([True] if words else [])


def test_the_scales_of_eight_bits_say_what_rounding_explains(original):
    """Weights of 4 bits in rows with an outlier, rounded to int8 per row: the coarser grid shows through, and the step is up to
    a third of it, so without the scales this reads as fine-tuned. What was fine-tuned before still does."""

    def coarse(weight):
        made = rounded(weight, "Q4_0")
        made[:, 5] *= 12
        return made

    def judged(change):
        layers = []
        for ffn in families.dissect(base).ffns:
            layer = []
            for weight in map(change, (ffn.gate, ffn.up, ffn.down)):
                scale = weight.float().abs().amax(1, keepdim=True) / 127
                layer.append(partner.widened(partner.sample((weight / scale).round().to(torch.int8)), scale.bfloat16()))
            layers.append(layer)
        known = partner.inside(families.dissect(base))
        return partner.compare(known, partner.runs_of(layers)), partner.judge({}, known, layers)

    base = changed(original, coarse)
    without, verdict = judged(lambda weight: weight.float())
    assert without.kind == partner.FINETUNED and verdict.kind == partner.ROUNDED
    assert judged(lambda weight: tuned(weight, 0.1))[1].kind == partner.FINETUNED
    assert judged(lambda weight: weight.roll(1, 0).float())[1].kind == partner.ANOTHER


# --- real weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_embedded_model_in_other_formats():
    """Its Q4_1, unpacked, against Q8_0, Q4_0 and int8 of it, as the package gguf makes them; adapters; other layers."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType as Kind

    model = models.load("default", "bf16").model
    anatomy = families.dissect(model)
    ffns = [[ffn.gate.float(), ffn.up.float(), ffn.down.float()] for ffn in anatomy.ffns[::6]]

    def runs(change):
        layers = [[partner.sample(change(weight).bfloat16()) for weight in ffn] for ffn in ffns]
        return partner.runs_of(layers)

    def packed(weight, kind):
        return torch.from_numpy(quants.dequantize(quants.quantize(np.ascontiguousarray(weight), kind), kind))

    known = runs(lambda weight: weight)
    for kind in (Kind.Q8_0, Kind.Q4_0):
        made = runs(lambda w, kind=kind: packed(w.numpy(), kind))
        assert partner.compare(known, made).kind == partner.compare(made, known).kind == partner.ROUNDED, kind.name
    assert partner.compare(known, runs(lambda w: rounded(w, "int8"))).kind == partner.ROUNDED
    made = copy.deepcopy(model)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.dim() == 2:
                weight.copy_(rounded(weight, "int8"))
    with pytest.warns(UserWarning, match="requantised or rounded") as told:  # once
        attach(made, artifacts.load("default"), sparsity=0.0).detach()
    assert len(told) == 1
    assert partner.compare(known, runs(lambda w: tuned(w, 0.03))).kind == partner.FINETUNED
    assert partner.compare(known, runs(lambda w: w.roll(1, 0))).kind == partner.ANOTHER


def test_attaching_samples_each_matrix_once(monkeypatch):
    model, sample, taken = tiny_model(), partner.sample, []
    artifact = tiny_artifact(model)
    monkeypatch.setattr(partner, "sample", lambda weight: taken.append(weight.data_ptr()) or sample(weight))
    attach(model, artifact).detach()
    assert len(taken) == len(set(taken)) == 3 * len(model.model.layers)
