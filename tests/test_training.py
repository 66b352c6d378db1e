"""An attached model trains: gradients of the sparse forward, with and without gradient checkpointing."""

import pytest
import torch
from conftest import FAMILIES, HIDDEN, PREFILL, logits, tiny_artifact, tiny_model, token_ids, user_error
from torch.utils.checkpoint import checkpoint

from fastfill import attach
from fastfill.attachment import CHECKPOINT
from fastfill.blocks import make_plan
from fastfill.lab.baselines import named
from fastfill.sparse_ffn import current_plan, in_call

pytestmark = pytest.mark.filterwarnings("ignore:The FFN weights have changed")
IDS = token_ids(2, 45)
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])


def loss_of(model, ids=IDS, **inputs):
    return model(**(inputs or {"input_ids": ids}), labels=ids, use_cache=False).loss


def checkpointing(model, reentrant):
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


@pytest.fixture
def exact():
    return tiny_model(dtype=torch.float64).train()


WEIGHTS = {"llama": ("gate_proj", "up_proj", "down_proj", "x"), "phi3": ("gate_up_proj", "x"), "gemma2": ("gate_proj", "x")}


@pytest.mark.parametrize(("family", "wanted"), [(family, name) for family, names in WEIGHTS.items() for name in names])
def test_the_gradient_is_that_of_the_sparse_forward(family, wanted):
    """Of one FFN, against central differences; the static predictor's selection does not depend on what is moved."""
    exact, generator = tiny_model(family, dtype=torch.float64), torch.Generator().manual_seed(3)
    mlp, x = exact.model.layers[1].mlp, torch.randn(2, 45, HIDDEN, dtype=torch.float64, generator=generator)
    moved = x.requires_grad_() if wanted == "x" else getattr(mlp, wanted).weight
    way, weight = (torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in (moved, x))
    plan = make_plan([(0, 45, 0), (4, 45, 0)], 45, PREFILL)
    with attach(exact, tiny_artifact(exact), predictor=named("static")) as attachment:

        def value():
            token = current_plan.set(plan)
            try:
                return (mlp(x) * weight).sum()
            finally:
                current_plan.reset(token)

        value().backward()
        found, values, step = float((moved.grad * way).sum()), [], 1e-5
        for sign in (1, -2):
            with torch.no_grad():
                moved += sign * step * way
                attachment.refresh()  # a call of the model would
                values.append(float(value()))
        with torch.no_grad(), attachment.dense():
            assert abs(float((mlp(x) * weight).sum()) - values[1]) > 1e-2  # it is the sparse one's
    # fp64: the quotient is off by step^2 times a third derivative, and by some eps of the value / step = 1e-9.
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(family):
    """Also where all was frozen when the artifact was attached."""
    model = tiny_model(family).train().requires_grad_(False)
    with attach(model, tiny_artifact(model)) as attachment:
        model.requires_grad_(True)
        loss_of(model).backward()
        assert attachment.stats.sparse_tokens == 64
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in model.parameters())


@REENTRANT
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_changes_no_gradient(exact, reentrant, when):
    """Three calls of other lengths before one backward pass: each layer is computed again under its own call's plan."""
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[0, :11] = 0
    calls = [{"input_ids": IDS}, {"input_ids": token_ids(1, 60), "attention_mask": mask}, {"input_ids": IDS[:, :12]}]

    def gradients(model):
        model.zero_grad()
        sum(model(**call, use_cache=False).logits.square().mean() for call in calls).backward()
        return [weight.grad.clone() for weight in model.parameters()]

    with attach(exact, tiny_artifact(exact)):
        expected = gradients(exact)
    if when == "before":
        checkpointing(exact, reentrant)
    with attach(exact, tiny_artifact(exact)) as attachment:
        checkpointing(exact, reentrant)
        assert len(gradients(exact)) == len(expected)
        assert attachment.stats.sparse_tokens == 64 + 40
        for got, wanted in zip(gradients(exact), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)  # fp64: the same sums, at most in another order
        assert current_plan.get() is None and not in_call.get()


@REENTRANT
def test_a_soft_prompt_learns_through_a_frozen_model(exact, reentrant):
    exact.requires_grad_(False)

    def gradient():
        embeds = exact.get_input_embeddings()(IDS).detach().requires_grad_(True)
        loss_of(exact, inputs_embeds=embeds).backward()
        return embeds.grad

    dense = gradient()
    with attach(exact, tiny_artifact(exact)):
        expected = gradient()
        checkpointing(exact, reentrant)
        torch.testing.assert_close(gradient(), expected, rtol=1e-10, atol=1e-14)
    assert float((dense - expected).norm() / expected.norm()) > 1e-2
    torch.testing.assert_close(gradient(), dense, rtol=1e-10, atol=1e-14)


@REENTRANT
def test_detach_gives_the_checkpointing_function_back(model, reentrant):
    checkpointing(model, reentrant)
    before = [vars(module).get(CHECKPOINT) for module in model.modules()]
    with attach(model, tiny_artifact(model)):
        loss_of(model).backward()
        inside = [vars(module).get(CHECKPOINT) for module in model.model.layers]
        loss_of(model).backward()
        assert inside == [vars(module).get(CHECKPOINT) for module in model.model.layers]  # not one around the other
    assert all(vars(module).get(CHECKPOINT) is old for module, old in zip(model.modules(), before, strict=True))


@REENTRANT
def test_backward_after_detach_is_refused_where_it_would_be_another_function(model, reentrant):
    checkpointing(model, reentrant)
    with attach(model, tiny_artifact(model)):
        loss, short = loss_of(model), loss_of(model, IDS[:, :12])
    with user_error("call backward"):
        loss.backward()
    short.backward()  # this one was dense, and is computed again as it was


@REENTRANT
def test_other_checkpointing_is_refused(model, reentrant):
    """Layers wrapped by hand, as torch's `checkpoint_wrapper` does: nothing says which call is computed again."""
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **kwargs: checkpoint(forward, x, use_reentrant=reentrant, **kwargs)
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())
    if reentrant:  # it takes no keywords
        for layer in model.model.layers:
            wrapped = layer.forward
            plain = wrapped.__defaults__[0]
            layer.forward = lambda x, plain=plain, **kwargs: checkpoint(lambda y: plain(y, **kwargs), x, use_reentrant=True)
    with attach(model, tiny_artifact(model)):
        loss = loss_of(model)
        with user_error("activation checkpointing"):
            loss.backward()
    loss_of(model).backward()


def test_a_call_of_the_model_inside_a_backward_pass_is_a_call(model):
    seen = []
    with attach(model, tiny_artifact(model)):
        expected = [logits(model, ids) for ids in (IDS, IDS[:, :12])]
        with torch.no_grad():
            embeds = model.get_input_embeddings()(IDS)
        embeds.requires_grad_()
        embeds.register_hook(lambda _: seen.extend(model(input_ids=ids).logits.detach() for ids in (IDS, IDS[:, :12])))
        with torch.enable_grad():
            loss_of(model, inputs_embeds=embeds).backward()
    for got, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)  # fp32 with and without gradients: sums in another order
