"""Adapters: on FFNs refused by name, elsewhere accepted with a note. With peft where it is installed, and with classes of its
shape."""

import copy
import dataclasses
import warnings

import pytest
import torch
from conftest import logits, one_sentence, tiny_artifact, tiny_model, token_ids, user_error
from torch import nn

import fastfill
from fastfill import artifact as artifacts
from fastfill import attach, families
from fastfill.errors import UserError

IDS = token_ids(1, 45)
ATTENTION, FFN = ("q_proj", "v_proj"), ("q_proj", "gate_proj")


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class LoraModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config


class PeftModel(nn.Module):
    def __init__(self, model, names):
        super().__init__()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if name in names:
                    setattr(module, name, Lora(child))
        self.base_model, self.config = LoraModel(model), model.config

    def forward(self, **inputs):
        return self.base_model.model(**inputs)


def with_peft(model, names):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=list(names), r=2, init_lora_weights=False))
    return adapted.eval()


wrapped = pytest.mark.parametrize("wrap", [PeftModel, with_peft], ids=["stand-in", "peft"])


@wrapped
def test_adapters_on_attention_are_accepted_with_a_note(model, wrap):
    artifact = tiny_artifact(model)
    adapted = wrap(model, ATTENTION)
    dense = logits(adapted, IDS)
    with pytest.warns(UserWarning, match=r"adapters on q_proj, v_proj; .*merge_and_unload") as seen:
        attachment = attach(adapted, artifact)
    one_sentence(seen[0].message)
    assert len(seen) == 1
    with attachment:
        assert not torch.equal(logits(adapted, IDS), dense)
        assert attachment.stats.sparse_tokens == 32
        with pytest.raises(UserError, match="already attached"):
            attach(model, artifact)
    assert torch.equal(logits(adapted, IDS), dense)
    attach(model, artifact)  # from inside: the same model
    assert fastfill.detach(adapted)


@wrapped
def test_adapters_on_ffns_are_refused_with_what_to_do(model, wrap):
    artifact = tiny_artifact(model)
    with pytest.raises(
        UserError, match=r"Layer 0: gate_proj carries an adapter .*merge_and_unload.*fastfill calibrate"
    ) as error:
        attach(wrap(model, FFN), artifact)
    one_sentence(error)
    assert not fastfill.detach(model)


@wrapped
@pytest.mark.parametrize("names", [ATTENTION, FFN], ids=["attention", "ffn"])
def test_adapters_that_come_while_attached(model, wrap, names):
    with attach(model, tiny_artifact(model)) as attachment:
        before = logits(model, IDS)
        adapted = wrap(model, names)
        if names is FFN:
            with pytest.raises(UserError, match="gate_proj carries an adapter"):
                logits(adapted, IDS)
        else:
            assert not torch.equal(logits(adapted, IDS), before)
            assert attachment.stats.sparse_tokens == 64


def test_merged_adapters_make_another_model(model):
    artifact = tiny_artifact(model)
    merged = with_peft(model, FFN).merge_and_unload()
    with pytest.raises(UserError, match="belongs to another model"):
        attach(merged, artifact)
    with attach(merged, tiny_artifact(merged)):
        logits(merged, IDS)


def test_merging_while_attached_is_followed(model):
    artifact = tiny_artifact(model)
    adapted = with_peft(model, ATTENTION)
    with pytest.warns(UserWarning, match="adapters on"), attach(adapted, artifact) as attachment:
        unmerged = logits(adapted, IDS)
        adapted.merge_adapter()
        # W + BA is rounded once more, fp32's eps of each weight: far below what the adapter does to the logits, 0.1 and more.
        torch.testing.assert_close(logits(adapted, IDS), unmerged, rtol=0, atol=1e-3)
        assert attachment.stats.sparse_tokens == 64


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning_wraps_the_model_in_another_way(model, kind):
    peft = pytest.importorskip("peft")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    adapted = peft.get_peft_model(model, config(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
    assert families.base_of(adapted) is model.model
    with attach(adapted, tiny_artifact(model)) as attachment, torch.no_grad():
        adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        assert attachment.stats.sparse_tokens > 0
    assert not fastfill.detach(model)


def test_an_artifact_of_the_adapted_model_is_its_own(model):
    """Calibrated with the adapters on: nothing to say."""
    adapted = PeftModel(model, ATTENTION)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach(adapted, tiny_artifact(adapted)).detach()
    assert not told


OUTSIDE = ["embed_tokens", "norm", "layers.2.self_attn.o_proj", "layers.0.input_layernorm"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_other_weights_outside_the_ffns_are_noted(model, name):
    artifact = tiny_artifact(model)
    with torch.no_grad():
        model.model.get_submodule(name).weight.mul_(1.25)
    with pytest.warns(UserWarning, match="embeddings, attention or norms are not those") as seen, attach(model, artifact):
        logits(model, IDS)
    assert len(seen) == 1
    one_sentence(seen[0].message)


def test_a_larger_vocabulary_is_noted(model):
    artifact = tiny_artifact(model)
    model.resize_token_embeddings(140)
    with pytest.warns(UserWarning, match="embeddings"):
        attach(model, artifact).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_is_known_in_every_type(checkpoint, dtype):
    """Weights down to 1e-8, of which fp16 rounds many away. Two roundings of the same number meet in neither: bf16 against fp16
    of an fp32 checkpoint is noted."""
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.logspace(-5, 0, weight.shape[-1]))
    model.to(checkpoint)
    loads = {t: copy.deepcopy(model).to(t) for t in (torch.float32, torch.bfloat16, torch.float16)}
    other = copy.deepcopy(loads[dtype])
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, -1] += 0.25
    for learned, twin in loads.items():
        artifact = tiny_artifact(twin)
        if checkpoint == torch.float32 and {learned, dtype} == {torch.bfloat16, torch.float16}:
            with pytest.warns(UserWarning, match="requantised or rounded"):
                attach(loads[dtype], artifact).detach()
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attach(loads[dtype], artifact).detach()
        with pytest.raises(UserError, match=r"% away from those .*allow_finetuned"):
            attach(other, artifact)


def test_an_artifact_without_the_fingerprints_knows_what_it_knew(model, tmp_path):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e-8  # 0 in fp16
    artifact = dataclasses.replace(tiny_artifact(model.bfloat16()), samples={})
    del artifact.base_model["fingerprints"]
    artifacts.save(artifact, tmp_path / "old")
    old = artifacts.load(tmp_path / "old")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # of which it has no record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, old).detach()
        attach(model.float(), old).detach()
    with user_error("fp16"):
        attach(model.half(), old)
