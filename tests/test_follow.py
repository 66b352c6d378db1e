"""Weights that change while an artifact is on the model: followed to the bit, or refused in a sentence."""

import copy
import warnings

import pytest
import torch
from conftest import HIDDEN, INTERMEDIATE, LAYERS, logits, one_sentence, tiny_artifact, tiny_model, token_ids, user_error
from torch import nn

from fastfill import attach
from fastfill.errors import UserError
from fastfill.follow import follow
from fastfill.lab.baselines import named

IDS = token_ids(2, 45)
LINEARS = ("gate_proj", "up_proj", "down_proj")
pytestmark = pytest.mark.filterwarnings("ignore:The FFN weights have changed")


def linears(model, name):
    return [getattr(layer.mlp, name) for layer in model.model.layers]


def fresh(model, **settings):
    """What a copy of the model as it is now gives with the artifact's tensors put on anew."""
    twin = copy.deepcopy(model)
    with attach(twin, tiny_artifact(twin), **settings) as attachment:
        out = logits(twin, IDS)
        assert attachment.stats.sparse_tokens == 64
    return out


def load(model, name, assign=False):
    other = tiny_model(seed=1).state_dict()
    model.load_state_dict(
        {key: other[key] if name in key else value for key, value in model.state_dict().items()}, assign=assign
    )


def replace(model, name):
    for linear in linears(model, name):
        linear.weight = nn.Parameter(linear.weight.detach().flip(0))


def assign_data(model, name):
    for linear in linears(model, name):
        linear.weight.data = linear.weight.data.flip(1)


def add_to_data(model, name):
    for linear in linears(model, name):
        linear.weight.data += 0.1 * linear.weight.data.flip(0)


@torch.no_grad()
def one_column(model, name):
    linears(model, name)[1].weight[:, 1] = 0.5


@torch.inference_mode()
def under_inference_mode(model, name):
    for linear in linears(model, name):
        linear.weight.mul_(1.5)


def step(model, name):
    optimizer = torch.optim.SGD([linear.weight for linear in linears(model, name)], lr=1.0)
    for linear in linears(model, name):
        linear.weight.grad = linear.weight.detach().flip(0)
    optimizer.step()


def swap_storage(model, name):
    """Frees the old storage first, so that the new one may come to lie where it was."""
    for linear in linears(model, name):
        new = linear.weight.data.flip(0).tolist()
        linear.weight.data = torch.empty(0)
        linear.weight.data = torch.tensor(new)


def other_layout(model, name):
    """The same numbers, a transposed storage: down may have it."""
    for linear in linears(model, "down_proj"):
        linear.weight.data = linear.weight.data.t().contiguous().t()


CHANGES = {
    "load_state_dict": load,
    "load_state_dict(assign)": lambda model, name: load(model, name, assign=True),
    "another Parameter": replace,
    "weight.data =": assign_data,
    "weight.data +=": add_to_data,
    "one column in place": one_column,
    "in place under inference_mode": under_inference_mode,
    "optimizer step": step,
    "storage freed and made anew": swap_storage,
    "another layout": other_layout,
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_those_that_run(model, change, name):
    with attach(model, tiny_artifact(model)) as attachment:
        before = logits(model, IDS)
        CHANGES[change](model, name)
        assert torch.equal(logits(model, IDS), fresh(model))
        assert torch.equal(logits(model, IDS), before) == (change == "another layout")
        assert attachment.stats.sparse_tokens == 3 * 64
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", LINEARS)
def test_biases_that_come_change_and_go_are_those_that_run(model, name):
    linear = linears(model, name)[1]
    with attach(model, tiny_artifact(model)):
        before = logits(model, IDS)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, generator=torch.Generator().manual_seed(0)))
        with_bias = logits(model, IDS)
        assert torch.equal(with_bias, fresh(model)) and not torch.equal(with_bias, before)
        linear.bias.data *= 2
        twice = logits(model, IDS)
        assert torch.equal(twice, fresh(model)) and not torch.equal(twice, with_bias)
        linear.bias = None
        assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_casts_are_followed_there_and_back(model, dtype):
    artifact = tiny_artifact(model)
    with attach(model, artifact) as attachment, warnings.catch_warnings():
        warnings.simplefilter("error")  # the artifact still knows its model
        logits(model, IDS)
        model.to(dtype)
        assert torch.equal(logits(model, IDS), fresh(model))
        assert attachment.ffns[0].predictor.w_in.dtype == attachment.ffns[0].down_t.dtype == dtype
        model.float()
        assert torch.equal(logits(model, IDS), fresh(model))
        assert torch.equal(attachment.ffns[0].predictor.w_in, artifact.tensors["layers.0.predictor.w_in"])  # not rounded


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_a_layer_that_is_cast_alone_is_followed_alone(model, sparsity):
    """A mixed model, as `keep_in_fp32` makes: each FFN computes in the type of its weights."""
    wide = model.model.layers[1].mlp
    with attach(model, tiny_artifact(model), sparsity=sparsity):
        logits(model, IDS)
        wide.double()
        wide.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        wide.register_forward_hook(lambda _, args, out: out.float())
        assert torch.equal(logits(model, IDS), fresh(model, sparsity=sparsity))


def test_the_baselines_follow_too(model):
    with attach(model, tiny_artifact(model), predictor=named("low-rank"), kernel="torch"):
        logits(model, IDS)
        CHANGES["weight.data ="](model, "gate_proj")
        assert torch.equal(logits(model, IDS), fresh(model, predictor=named("low-rank"), kernel="torch"))


def test_refresh_sees_what_leaves_no_trace(model):
    """A few entries written through `weight.data`: the one change that the comparison of a sample can miss."""
    with attach(model, tiny_artifact(model)) as attachment:
        logits(model, IDS)
        for linear in linears(model, "down_proj"):
            linear.weight.data[:, 1] = 0.5  # the sample's entries lie in columns 0, 3, 6, ...
        attachment.refresh()
        assert torch.equal(logits(model, IDS), fresh(model))


def test_nothing_is_made_anew_where_nothing_changed(model):
    linears(model, "down_proj")[0].weight.data[0, 0] = float("nan")  # which differs from itself
    with attach(model, tiny_artifact(model)) as attachment:
        copies = [ffn.down_t for ffn in attachment.ffns]
        logits(model, IDS)
        assert not follow(attachment._followers)
        assert all(ffn.down_t is down_t for ffn, down_t in zip(attachment.ffns, copies, strict=True))
        linears(model, "down_proj")[1].weight.data += 1
        assert follow(attachment._followers)


def test_another_models_weights_are_followed_with_one_warning(model):
    with attach(model, tiny_artifact(model)), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        logits(model, IDS)
        assert not seen
        for seed in (1, 2):
            model.load_state_dict(tiny_model(seed=seed).state_dict())
            logits(model, IDS)
    (warning,) = seen
    assert "have changed since the artifact was attached" in one_sentence(warning.message)


def test_the_memory_of_the_artifact_counts_where_its_type_is_another(model):
    artifact = tiny_artifact(model)
    artifact.tensors = {name: tensor.bfloat16() for name, tensor in artifact.tensors.items()}
    learned = sum(tensor.numel() for name, tensor in artifact.tensors.items() if "stats" not in name)
    with attach(model, artifact) as attachment:
        assert attachment.extra_bytes == LAYERS * HIDDEN * INTERMEDIATE * 4 + learned * (4 + 2)


def test_attached_under_inference_mode_it_works_outside(model):
    with torch.inference_mode():
        attachment = attach(model, tiny_artifact(model))
        expected = logits(model, IDS).clone()
    with attachment:
        assert torch.equal(logits(model, IDS), expected)
        model(input_ids=IDS).logits.square().mean().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        model.bfloat16()
        with torch.inference_mode():
            logits(model, IDS)  # made anew in here
        model(input_ids=IDS).logits.square().mean().backward()


def test_a_model_and_an_artifact_made_under_inference_mode(model):
    with torch.inference_mode():
        twin = tiny_model()
        attachment = attach(twin, tiny_artifact(twin))
    with attach(model, tiny_artifact(twin)):
        expected = logits(model, IDS)
        model(input_ids=IDS).logits.square().mean().backward()  # the artifact's tensors can be computed with
    with attachment:
        assert torch.equal(logits(twin, IDS), expected)
        with torch.inference_mode():
            for linear in linears(twin, "down_proj"):
                linear.weight.mul_(2)
            assert torch.equal(logits(twin, IDS), fresh(twin))


class Adapter(nn.Module):
    """The shape of peft's layers."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.a, self.b = base, nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class Packed(nn.Linear):
    """The shape of a quantiser's."""


def put(name, make):
    def change(model):
        mlp = model.model.layers[1].mlp
        setattr(mlp, name, make(getattr(mlp, name)))

    return change


def write(name, make):
    def change(model):
        linear = getattr(model.model.layers[1].mlp, name)
        linear.weight = nn.Parameter(make(linear.weight.data), requires_grad=False)

    return change


def other_ffn(model):
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)


REFUSED = {
    "adapter": (put("up_proj", Adapter), "Layer 1: up_proj carries an adapter .*merge_and_unload"),
    "quantised": (put("gate_proj", lambda old: Packed(HIDDEN, INTERMEDIATE, bias=False)), "Layer 1: gate_proj is Packed"),
    "one byte": (
        write("down_proj", lambda old: old.to(torch.float8_e4m3fn)),
        "Layer 1: down_proj is Linear, not a plain floating-point",
    ),
    "integers": (
        write("down_proj", lambda old: old.to(torch.int32)),
        "Layer 1: down_proj is Linear, not a plain floating-point",
    ),
    "another FFN": (other_ffn, "Layer 1: mlp was replaced"),
    "offloaded": (write("down_proj", lambda old: old.to("meta")), "meta"),
    "another width": (write("gate_proj", lambda old: old[:-1]), r"Layer 1: gate_proj has the shape \(95, 32\), not \(96, 32\)"),
    "emptied": (write("down_proj", lambda old: old.new_empty(0)), "Layer 1: down_proj has the shape"),
    "two types": (write("down_proj", lambda old: old.bfloat16()), "Layer 1: down_proj is torch.bfloat16"),
    "columns for rows": (write("up_proj", lambda old: old.t().contiguous().t()), "Layer 1: the rows of up_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_at_the_call(model, name):
    change, words = REFUSED[name]
    before = logits(model, IDS)
    if name in ("quantised", "one byte", "offloaded"):  # of what is refused when an artifact is put on
        twin = copy.deepcopy(model)
        change(twin)
        with pytest.raises(UserError, match=words):
            attach(twin, tiny_artifact(model))
        assert not any("forward" in vars(module) for module in twin.modules())
    weights = copy.deepcopy(model.state_dict())
    with attach(model, tiny_artifact(model)) as attachment:
        sparse = logits(model, IDS)
        mlp, parts = model.model.layers[1].mlp, dict(model.model.layers[1].mlp._modules)
        change(model)
        for act in (lambda: logits(model, IDS), attachment.refresh):
            with user_error(words):
                act()
        if name == "adapter":
            logits(model, IDS[:, :8])  # a short call is the model's own business
        model.model.layers[1].mlp = mlp  # put back, it goes on
        mlp._modules.update(parts)
        for role in LINEARS:
            getattr(mlp, role).weight = nn.Parameter(weights[f"model.layers.1.mlp.{role}.weight"])
        assert torch.equal(logits(model, IDS), sparse)
    assert torch.equal(logits(model, IDS), before)


def test_a_kernel_that_does_not_know_the_new_type_is_named(model):
    from fastfill import kernels

    if not kernels.cpu.usable():
        pytest.skip(kernels.cpu.status())
    with attach(model, tiny_artifact(model), kernel="native"):
        logits(model, IDS)
        model.half()
        with pytest.raises(UserError, match=r"native.*torch.float16"):
            logits(model, IDS)
