"""weights="int8" on tiny models: what computes in eight bits, what does not, and what follows the weights."""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BLOCK,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    KERNELS,
    LAYERS,
    RECURRENT,
    logits,
    tiny_artifact,
    tiny_model,
    token_ids,
    user_error,
)
from transformers import DynamicCache

from fastfill import attach, kernels
from fastfill.families import dissect
from fastfill.ffn import ACTIVATIONS, FFN
from fastfill.kernels.int8 import rounded
from fastfill.lab.baselines import named
from fastfill.projections import Last

IDS, SHORT = token_ids(2, 45), token_ids(2, 9, seed=1)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
pytestmark = pytest.mark.filterwarnings("ignore:The FFN weights have changed")
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def eight(model, **settings):
    return attach(model, tiny_artifact(model), **{"weights": "int8", **settings})


def relu(family, dtype=torch.float32):
    """With the one activation that all kernels compute to the same bits."""
    return tiny_model(family, dtype=dtype, **{"hidden_activation" if "gemma" in family else "hidden_act": "relu"})


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not kernels.cpu.usable(), reason=kernels.cpu.status())
@both_types
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_bits_of_torch(family, dtype):
    model = relu(family, dtype)
    found = []
    for settings in ({"kernel": "native"}, {"kernel": "torch"}, {"weights": "model"}):
        with eight(model, predictor=named("static"), compensator=False, **settings) as attachment:
            found.append(logits(model, IDS))
            assert attachment.stats.sparse_tokens == 64
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def by_hand(x, weight, bias=None):
    """A Linear of rounded weights and tokens in the type of x."""
    (q, by), (w, scale) = rounded(x.flatten(0, -2)), rounded(weight)
    y = (q.double() * by[:, None].double()) @ (w.double() * scale[:, None].double()).t()
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("family", ["llama", "granite", "phi3", *(name for name in RECURRENT if name in FAMILIES)])
def test_eight_bits_are_those_of_ffn_and_projections(family):
    """With all neurons kept, by Linears of rounded numbers in fp64. fp32 rounds at 6e-8, a few times; another step of one
    number would be 1 / 254 of it."""
    changes = {"num_hidden_layers": 1}
    if family in RECURRENT:  # layers without attention keep their projections
        changes = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    model = tiny_model(family, dtype=torch.float64, **changes)
    hand = copy.deepcopy(model)
    for part in dissect(hand).ffns:
        ffn = part.read()
        part.module.forward = lambda x, ffn=ffn: by_hand(
            ACTIVATIONS[ffn.activation].run(by_hand(x, ffn.gate, ffn.gate_bias)) * by_hand(x, ffn.up, ffn.up_bias),
            ffn.down,
            ffn.down_bias,
        )
    for attention in dissect(hand).attentions:
        for linear in (child for child in attention.children() if type(child) is torch.nn.Linear):
            linear.forward = lambda x, linear=linear: by_hand(x, linear.weight, linear.bias)
    with eight(model, sparsity=0.0):
        torch.testing.assert_close(logits(model, IDS), logits(hand, IDS), rtol=0, atol=2e-6)


def test_an_ffn_in_eight_bits():
    """The same as the op with all neurons, to the bit; its columns' lengths and what its neurons do are those of its values."""
    rng = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((1100, 40), (1100, 40), (40, 1100)))
    biases = [torch.randn(n, generator=rng).bfloat16() for n in (1100, 1100, 40)]
    wide = FFN(gate.bfloat16(), up.bfloat16(), down.bfloat16(), "relu", *biases)
    narrow, x = wide.int8(), torch.randn(2, 7, 40, generator=rng).bfloat16()
    assert narrow.dtype == torch.bfloat16 == narrow(x).dtype and narrow.neurons == 1100
    ids, init = torch.arange(1100)[None], narrow.down_bias.expand(14, 40)
    want = kernels.sparse_ffn(
        x.view(14, 40), narrow.gate, narrow.up, narrow.down.t(), ids, activation="relu", gate_bias=narrow.gate_bias,
        up_bias=narrow.up_bias, init=init, scales=narrow.scales,
    )  # fmt: skip
    assert torch.equal(narrow(x).view(14, 40), want)
    values = FFN(*(w.float() * s[:, None] for w, s in zip((narrow.gate, narrow.up, narrow.down), narrow.scales, strict=True)))
    torch.testing.assert_close(narrow.down_norm(), values.down_norm())
    assert float((narrow.down_norm() / wide.down_norm() - 1).abs().max()) < 0.02
    # Of tokens that are rounded: each entry of 40 to half a step, of order one.
    error = (narrow.importance(x[0]) - wide.importance(x[0])).norm() / wide.importance(x[0]).norm()
    assert 0 < float(error) < 0.05


def test_nothing_skipped_is_nothing_sparse(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with eight(model, sparsity=0.0) as attachment:
            found = logits(model, IDS)
            assert attachment.stats.sparse_tokens == 0 and attachment.stats.dense_tokens == 90
            assert attachment.stats.dense_because == {}
    assert not torch.equal(found, logits(model, IDS))


def test_what_is_no_sparse_prompt_is_the_model_s_own_unless_told(model):
    own = logits(model, SHORT)

    def steps():
        cache = DynamicCache(config=model.config)
        logits(model, SHORT, past_key_values=cache)
        return logits(model, SHORT[:, :1], past_key_values=cache)

    step = steps()
    with eight(model):
        assert torch.equal(logits(model, SHORT), own) and torch.equal(steps(), step)
        prompt = logits(model, IDS)
    with eight(model, dense_weights="int8") as attachment:
        assert torch.equal(logits(model, IDS), prompt)
        for found, want in ((logits(model, SHORT), own), (steps(), step)):
            assert not torch.equal(found, want)
            torch.testing.assert_close(found, want, rtol=0, atol=0.1 * float(want.abs().max()))
        assert attachment.stats.dense_because == {}
        with attachment.dense():
            assert torch.equal(logits(model, SHORT), own) and torch.equal(steps(), step)
        x = torch.randn(1, 4, HIDDEN)  # of a module alone, outside of the model's calls
        for module, dense in ((attachment.modules[0], attachment.ffns[0].dense), (model.model.layers[0].self_attn.q_proj,) * 2):
            if module is dense:
                dense = lambda x, linear=module: F.linear(x, linear.weight)  # noqa: E731
            assert torch.equal(module(x), dense(x))


@both_types
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_detached_are_the_model_s_own_bits(family, dtype):
    model = tiny_model(family, dtype=dtype)

    def all_logits():
        return [logits(model, IDS), logits(model, IDS[:1], logits_to_keep=1), logits(model, SHORT)]

    before, state = all_logits(), [dict(module.__dict__) for module in model.modules()]
    with eight(model, dense_weights="int8") as attachment:
        with attachment.dense():
            assert all(map(torch.equal, all_logits(), before))
        assert not any(map(torch.equal, all_logits(), before))
    assert all(map(torch.equal, all_logits(), before))
    for module, old in zip(model.modules(), state, strict=True):
        assert module.__dict__.keys() == old.keys()


def test_copies_and_pickles_are_detached(model):
    own = logits(model, IDS)
    with eight(model, dense_weights="int8"):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(twin, IDS), own)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert not logits(twin, IDS).any()
        found = logits(model, IDS)
    with eight(model):
        assert torch.equal(logits(model, IDS), found)


def test_extra_bytes(model):
    with attach(model, tiny_artifact(model)) as attachment:
        wide = attachment.extra_bytes
    ffn = (
        3 * HIDDEN * INTERMEDIATE + 4 * (2 * INTERMEDIATE + HIDDEN) - 4 * HIDDEN * INTERMEDIATE
    )  # in place of a down^T in fp32
    attention = sum(getattr(model.model.layers[0].self_attn, name).weight.numel() for name in ATTENTION)
    rows = sum(len(getattr(model.model.layers[0].self_attn, name).weight) for name in ATTENTION)
    with eight(model) as attachment:
        assert attachment.extra_bytes - wide == LAYERS * (ffn + attention + 4 * rows)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(model, kernel):
    """The types that autocast gives, projections too. What is dense is as far from the model's own as autocast and eight bits
    are, each alone."""

    def read(eight_bits, autocast):
        model_s = contextlib.nullcontext() if eight_bits else attachment.dense()
        with model_s, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            prompt, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
            out = [logits(model, IDS, past_key_values=prompt)[:, :BLOCK], logits(model, SHORT, past_key_values=cache)]
            out.append(logits(model, SHORT[:, :1], past_key_values=cache))
        return out, [types.pop(0) for _ in range(len(types))]

    types = []
    for name in ATTENTION:
        linear(model, name).register_forward_hook(lambda module, given, y: types.append(y.dtype))

    with eight(model, kernel=kernel, dense_weights="int8") as attachment:
        (own, _), (cast, usual), (alone, _), (both, same) = (read(e, a) for e in (False, True) for a in (False, True))
    assert same == usual == [torch.bfloat16] * 3 * len(ATTENTION)
    for want, one, other, found in zip(own, cast, alone, both, strict=True):
        assert 0 < float((found - want).norm()) <= float((one - want).norm() + (other - want).norm())
        assert not torch.equal(found, one)


# --- weights that change ------------------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(model, name):
    linear(model, name).weight[1] = 0.5


def other_data(model, name):
    linear(model, name).weight.data = linear(model, name).weight.data.flip(0)


def write_to_data(model, name):
    linear(model, name).weight.data.mul_(1.5)


def replace(model, name):
    linear(model, name).weight = torch.nn.Parameter(linear(model, name).weight.detach().flip(1))


def linear(model, name):
    layer = model.model.layers[1]
    return getattr(layer.self_attn if name in ATTENTION else layer.mlp, name)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj", "q_proj", "o_proj"])
@pytest.mark.parametrize("change", [in_place, other_data, write_to_data, replace])
@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_changes_are_followed(model, sparsity, change, name):
    if (change, name) == (write_to_data, "gate_proj"):
        pytest.skip("the samples are of down, and of the projections")
    with eight(model, sparsity=sparsity, dense_weights="int8"):
        before = logits(model, IDS), logits(model, SHORT)
        change(model, name)
        first, twin = logits(model, SHORT), copy.deepcopy(model)
        found = logits(model, IDS), logits(model, SHORT)
    with eight(twin, sparsity=sparsity, dense_weights="int8"):
        want = logits(twin, IDS), logits(twin, SHORT)
    assert not any(map(torch.equal, found, before)) and all(map(torch.equal, found, want))
    if change is not write_to_data:  # which a prompt finds
        assert torch.equal(first, want[1])


def test_an_input_that_was_written_to_is_rounded_again():
    last, x = Last(), torch.randn(3, 8)
    before = last.rounded(x)
    assert last.rounded(x) is before
    x.mul_(2)
    assert torch.equal(last.rounded(x)[1], 2 * before[1])


# --- gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_weights", ["model", "int8"])
@pytest.mark.parametrize("learns", ["all", "mlp.up_proj.weight", "q_proj.weight", "embed_tokens.weight", "inputs"])
def test_no_gradient_but_logits(model, learns, dense_weights):
    """A call that forgets torch.no_grad() gives its logits. A backward pass through eight bits is refused; where none are, in
    short calls, it is not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns == "all" or name.endswith(learns))
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_(learns == "inputs")
    with eight(model, dense_weights=dense_weights):
        want = logits(model, IDS)
        found = model(inputs_embeds=embedded).logits if learns == "inputs" else model(IDS).logits
        assert torch.equal(found, want)
        with user_error('have no gradient; for training, attach with weights="model"'):
            found.sum().backward()
        short = model(inputs_embeds=embedded[:, :9]).logits if learns == "inputs" else model(SHORT).logits
        if dense_weights == "int8":
            with user_error("have no gradient"):
                short.sum().backward()
        else:
            short.sum().backward()


# --- the head -----------------------------------------------------------------------------------------------------------


@both_types
def test_the_head_s_rows_as_a_matrix(model, dtype):
    """One token cut out of more, none, a matrix already: what the head gives of a copy of its own."""
    model = model.to(dtype)
    head, x = model.lm_head, torch.randn(2, 45, HIDDEN).to(dtype)
    given = (x, x[:, -1:], x[:1, -1:], x[:1, 3:7], x[:, :0], x[:0], x[0], x[0, 0])
    want = [head(one.contiguous()) for one in given]
    with attach(model, tiny_artifact(model)):
        assert "forward" in vars(head)
        for one, expected in zip(given, want, strict=True):
            found = head(one)
            assert found.shape == expected.shape and torch.equal(found, expected)
        assert torch.equal(head(input=x), want[0])
    assert "forward" not in vars(head)
