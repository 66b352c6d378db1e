import copy
import math

import pytest
import torch
import transformers
from conftest import FAMILIES, HIDDEN, INTERMEDIATE, LAYERS, logits, tiny_model, token_ids
from torch import nn

from fastfill import families, partner
from fastfill.errors import UserError


@pytest.mark.parametrize("family", FAMILIES)
def test_dissect_finds_the_parts(family):
    model = tiny_model(family)
    anatomy = families.dissect(model)
    assert (anatomy.hidden, anatomy.intermediate, len(anatomy.layers)) == (HIDDEN, INTERMEDIATE, LAYERS)
    assert (anatomy.model_type, anatomy.base) == (family, model.base_model)
    attentions = [layer.self_attn for layer in model.model.layers if hasattr(layer, "self_attn")]
    assert anatomy.attentions == attentions and len(attentions) in (1, LAYERS)
    for layer, ffn, mixer in zip(model.model.layers, anatomy.ffns, anatomy.mixers, strict=True):
        assert ffn.module is layer.mlp and mixer in (getattr(layer, name, None) for name in ("self_attn", "linear_attn"))
        gate, up = halves(layer.mlp)
        for now in (ffn, ffn.now()):
            assert now.gate.data_ptr() == gate.data_ptr() and torch.equal(now.gate, gate)
            assert now.up.data_ptr() == up.data_ptr() and torch.equal(now.up, up)
            assert now.down.data_ptr() == layer.mlp.down_proj.weight.data_ptr()


def halves(mlp):
    """gate and up, fused or not."""
    return mlp.gate_up_proj.weight.chunk(2) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj.weight, mlp.up_proj.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ffn_is_the_documented_formula(family):
    ffn = families.dissect(tiny_model(family, dtype=torch.float64)).ffns[1]
    x = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b, c, d = (0.0 if bias is None else bias for bias in (ffn.gate_bias, ffn.up_bias, ffn.down_bias))
    assert isinstance(b, float) == (family != "granite")
    z = x @ ffn.gate.T + b
    gelu = z / 2 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
    bent = gelu if family.startswith("gemma") else z / (1 + (-z).exp())
    y = (bent * (x @ ffn.up.T + c)) @ ffn.down.T + d
    # fp64: a few hundred additions of order one; 1e-13 is 450 eps.
    torch.testing.assert_close(ffn.module(x), y, rtol=0, atol=1e-13 * float(y.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_models_own_logits(family):
    """To the last bit, scales and caps included; those of `conftest.SPECIAL` move the logits by more than a half."""
    model, ids = tiny_model(family), token_ids(2, 40)
    anatomy = families.dissect(model)
    with torch.no_grad():
        found = anatomy.head(anatomy.base(input_ids=ids)[0])
    assert torch.equal(found, logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_are_all_that_normalise(family):
    """By their names; the classes are called RMSNorm in all of these."""
    model = tiny_model(family)
    assert families.dissect(model).norms == [part for part in model.modules() if "RMSNorm" in type(part).__name__]


def test_unknown_family_is_refused_with_the_list():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(UserError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
        families.dissect(model)
    with pytest.raises(UserError, match="not supported"):
        families.dissect(nn.Linear(2, 2))


def test_a_transformers_that_computes_a_family_wrongly_is_refused(monkeypatch):
    model = tiny_model("qwen2")
    for found, right in (("5.7.0", False), ("4.99.0", False), ("5.8.0", True), ("5.10.1", True), ("6.0.0.dev0", True)):
        monkeypatch.setattr(families.importlib.metadata, "version", lambda _, found=found: found)
        monkeypatch.setitem(families.FAMILIES, "qwen2", families.Family(since=(5, 8)))
        if right:
            families.dissect(model)
        else:
            with pytest.raises(UserError, match=r"'qwen2' need transformers 5\.8"):
                families.dissect(model)


def test_other_activation_is_refused():
    with pytest.raises(UserError, match=r"'tanh'.*supported are: silu"):
        families.dissect(tiny_model(hidden_act="tanh"))


def test_layers_of_unequal_width_are_refused(model):
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(HIDDEN, 64, bias=False), nn.Linear(HIDDEN, 64, bias=False)
    mlp.down_proj = nn.Linear(64, HIDDEN, bias=False)
    with pytest.raises(UserError, match="differ in width"):
        families.dissect(model)


def fingerprint(model):
    return partner.fingerprints(families.dissect(model))["bf16"]


def test_fingerprint_depends_on_weights_and_shapes(model):
    again = copy.deepcopy(model)
    assert fingerprint(model) == fingerprint(again)
    others = [tiny_model(seed=1), tiny_model(num_hidden_layers=2), tiny_model(intermediate_size=64)]
    assert len({fingerprint(model), *map(fingerprint, others)}) == 4
    again.model.layers[2].mlp.down_proj.weight.data[0, 0] += 1
    assert fingerprint(again) != fingerprint(model)
