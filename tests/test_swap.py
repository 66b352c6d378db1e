"""On and off the model: copies, interrupts, threads, and others who patch the same model."""

import copy
import io
import pickle
import sys
import threading
import types

import pytest
import torch
from conftest import logits, tiny_artifact, token_ids

import fastfill
from fastfill import attach, swap
from fastfill.artifact import Artifact
from fastfill.attachment import MARK
from fastfill.errors import UserError
from fastfill.sparse_ffn import current_plan, in_call

IDS = token_ids(1, 45)


def untouched(model):
    return all("forward" not in vars(module) and MARK not in vars(module) for module in model.modules())


def dumped(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, dumped, saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_copy_of_an_attached_model_is_detached(model, duplicate, checkpointing):
    dense, artifact = logits(model, IDS), tiny_artifact(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.disable_input_require_grads()  # a hook that pickle does not take
        model.train()
    with attach(model, artifact) as attachment:
        sparse = logits(model, IDS)
        model(input_ids=IDS).logits.sum().backward()  # so that there is something to carry plans, if anything is
        counted = attachment.stats.sparse_tokens
        twin = duplicate(duplicate(model))
        assert torch.equal(logits(twin, IDS), dense) and not torch.equal(dense, sparse)
        twin.model.layers[0].mlp.down_proj.weight.data.zero_()  # it has weights of its own
        assert torch.equal(logits(model, IDS), sparse)
        assert attachment.stats.sparse_tokens == counted + 32
        assert not fastfill.detach(twin)
        whole = duplicate(model)
        with attach(whole, artifact):
            assert torch.equal(logits(whole, IDS), sparse)
        assert torch.equal(logits(whole, IDS), dense)
    assert untouched(model) and torch.equal(logits(model, IDS), dense)


def test_a_pickled_model_needs_nothing_of_ours(model, tmp_path, monkeypatch):
    with attach(model, tiny_artifact(model)):
        torch.save(model, tmp_path / "model.pt")
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "fastfill"]:
            patch.setitem(sys.modules, name, None)  # an import of it fails
        with pytest.raises(ImportError):
            import fastfill.swap  # noqa: F401
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        out = logits(loaded, IDS)
    assert torch.equal(out, logits(model, IDS))


def test_a_forward_of_the_users_own_goes_into_copies(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + self.gate_proj.weight.sum(), mlp)
    expected = logits(model, IDS)
    with attach(model, tiny_artifact(model)):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, IDS), expected)
    assert twin.model.layers[0].mlp.forward.__self__ is twin.model.layers[0].mlp


def test_an_attached_model_is_saved_as_it_is(model, tmp_path):
    dense = logits(model, IDS)
    with attach(model, tiny_artifact(model)):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), IDS), dense)


def test_the_signature_is_the_models(model):
    import inspect

    before = inspect.signature(model.model.forward)
    with attach(model, tiny_artifact(model)):
        assert inspect.signature(model.model.forward) == before


class Interruption(BaseException):
    """As KeyboardInterrupt, which torch's hooks are not run for."""


def stop(*_):
    raise Interruption


@pytest.mark.parametrize("where", ["layers.1", "layers.1.mlp", "layers.2.self_attn", "norm", "embed_tokens"])
def test_an_interrupt_inside_a_call_leaves_nothing_behind(model, where):
    with attach(model, tiny_artifact(model)) as attachment:
        sparse, x = logits(model, IDS), torch.randn(1, 45, 32)
        with torch.no_grad():
            alone = model.model.layers[0].mlp(x)
        hook = model.model.get_submodule(where).register_forward_pre_hook(stop)
        with pytest.raises(Interruption):
            logits(model, IDS)
        hook.remove()
        assert current_plan.get() is None and not in_call.get() and not attachment._open
        with torch.no_grad():
            assert torch.equal(model.model.layers[0].mlp(x), alone)
        logits(model, IDS[:, :4])
        assert current_plan.get() is None
        assert torch.equal(logits(model, IDS), sparse)
    assert untouched(model)


@pytest.mark.parametrize("after", range(5))
def test_an_interrupt_of_attach_leaves_nothing_behind(model, monkeypatch, after):
    put, seen, artifact = swap.Swaps.put, [], tiny_artifact(model)

    def interrupted(self, *args):
        if len(seen) == after:
            raise Interruption
        seen.append(args)
        put(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(swap.Swaps, "put", interrupted)
        with pytest.raises(Interruption):
            attach(model, artifact)
    assert untouched(model)
    with attach(model, artifact) as attachment:
        logits(model, IDS)
        assert attachment.stats.sparse_tokens == 32


def places(model):
    return [model.model.layers[1].mlp, model.model]


@pytest.mark.parametrize("place", [0, 1], ids=["FFN", "base model"])
def test_a_patch_that_came_later_stays_and_ours_lets_through(model, place):
    artifact, dense = tiny_artifact(model), logits(model, IDS)
    owner, calls = places(model)[place], []
    attachment = attach(model, artifact)
    sparse = logits(model, IDS)
    found = owner.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return found(*args, **kwargs)

    owner.forward = theirs
    assert torch.equal(logits(model, IDS), sparse)
    attachment.detach()
    assert owner.forward is theirs
    assert torch.equal(logits(model, IDS), dense) and len(calls) == 2
    with attach(model, artifact, sparsity=0.25):  # around theirs
        other = logits(model, IDS)
    assert owner.forward is theirs and not torch.equal(other, sparse)
    owner.forward = found  # they put back what they found, which is ours
    assert torch.equal(logits(model, IDS), dense)
    with attach(model, artifact) as again:
        assert torch.equal(logits(model, IDS), sparse)
        assert again.stats.sparse_tokens == 32
    with attach(model, artifact, sparsity=0.25):
        assert torch.equal(logits(model, IDS), other)
    assert torch.equal(logits(model, IDS), dense)


def test_layers_that_stay_dense_are_not_made_sparse_by_what_was_left_behind(model):
    artifact, mlp = tiny_artifact(model), model.model.layers[1].mlp
    attachment = attach(model, artifact)
    left = mlp.forward
    attachment.detach()
    with attach(model, artifact) as plain:
        plain.ffns[1].kept = 96
        expected = logits(model, IDS)
    mlp.forward = left
    with attach(model, artifact) as around:
        around.ffns[1].kept = 96
        assert torch.equal(logits(model, IDS), expected)


def test_a_lost_attachment_is_taken_off(model):
    dense, artifact = logits(model, IDS), tiny_artifact(model)
    for name in ("model", "base"):
        attach(model, artifact)
        assert fastfill.detach(model if name == "model" else model.model)
        assert untouched(model) and torch.equal(logits(model, IDS), dense)
        assert not fastfill.detach(model)
    attach(model, artifact)
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()  # what attach would refuse
    assert fastfill.detach(model) and untouched(model)
    assert not fastfill.detach(torch.nn.Linear(2, 2))


def test_of_two_that_attach_at_once_one_is_refused(model, monkeypatch):
    """The second comes when the first has found the model free, and is not done."""
    artifact, check, first = tiny_artifact(model), Artifact.check_partner, []

    def slow(self, *asked):
        if not first:
            first.append(None)
            first.append(attach(model, artifact))
        return check(self, *asked)

    monkeypatch.setattr(Artifact, "check_partner", slow)
    with pytest.raises(UserError, match="already attached"):
        attach(model, artifact)
    assert fastfill.detach(model) and untouched(model)


def in_a_thread(work):
    def run(*_):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()

    return run


@pytest.mark.parametrize("how", [in_a_thread, lambda work: lambda *_: work()], ids=["thread", "hook"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_running_call_ends_as_it_began(model, how, layer):
    dense, artifact, got = logits(model, IDS), tiny_artifact(model), []

    def through(act):
        """The logits of a call during which `act` happens."""
        hook = model.model.layers[layer].register_forward_pre_hook(how(act))
        out = logits(model, IDS)
        hook.remove()
        return out

    assert torch.equal(through(lambda: got.append(attach(model, artifact))), dense)
    sparse = logits(model, IDS)
    assert not torch.equal(sparse, dense)

    def off():
        got[0].detach()
        assert not untouched(model)  # the call is not done
        with pytest.raises(UserError, match="already attached"):
            attach(model, artifact)

    assert torch.equal(through(off), sparse)
    assert untouched(model) and torch.equal(logits(model, IDS), dense)


def test_calls_that_begin_after_detach_are_dense_beside_one_that_began_before(model):
    dense, attachment, seen = logits(model, IDS), attach(model, tiny_artifact(model)), []
    sparse = logits(model, IDS)

    def beside():
        attachment.detach()
        hook.remove()
        seen.append(logits(model, IDS))

    hook = model.model.layers[1].register_forward_pre_hook(in_a_thread(beside))
    assert torch.equal(logits(model, IDS), sparse)
    assert torch.equal(seen[0], dense)
    assert untouched(model)
