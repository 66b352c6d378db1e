"""The last layer's FFN leaves out sparse tokens whose output nobody reads: `generate` reads one row of logits. They are
NaN, and what is read is the same to the bit."""

import copy
import functools
import types

import pytest
import torch
from conftest import BLOCK, EXACT, FAMILIES, LAYERS, PREFILL, logits, tiny_artifact, tiny_model, token_ids
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from fastfill import attach
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab import picks

TOKENS = 45  # a head of one block, 4 sparse blocks, 5 tokens
SPARSE = 4 * BLOCK
TAIL = PREFILL.with_(dense_tail=BLOCK)  # one block less is sparse


def read(model, ids, **kwargs):
    """Logits, and what all layers keep: keys and values, or states."""
    cache = DynamicCache(config=model.config)
    found = logits(model, ids, past_key_values=cache, use_cache=True, **kwargs)
    kept = [[leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, torch.Tensor)] for layer in cache.layers]
    assert len(kept) == LAYERS and all(len(tensors) >= 2 for tensors in kept)
    return found, [tensor for tensors in kept for tensor in tensors]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mistral", "qwen3")])
def test_nothing_that_is_read_changes(family, kernel):
    model, ids = tiny_model(family), token_ids(2, TOKENS)
    with attach(model, tiny_artifact(model), TAIL, kernel=kernel) as attached:
        for count in (1, 2, BLOCK):
            with attached.watched():
                whole, cache = read(model, ids, logits_to_keep=count)
            last, held = read(model, ids, logits_to_keep=count)
            assert whole.isfinite().all() and torch.equal(last, whole) and all(map(torch.equal, held, cache))
        assert attached.stats.unread_tokens == 3 * 2 * (SPARSE - BLOCK) and attached.stats.sparse_calls == 6


def test_generate_leaves_them_out_and_writes_the_same():
    model, ids = tiny_model(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model)) as attached:
        new = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert attached.stats.unread_tokens == attached.stats.sparse_tokens == SPARSE
        with attached.watched():
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), new)
        assert attached.stats.unread_tokens == SPARSE and attached.stats.sparse_tokens == 2 * SPARSE
        assert TransformersEngine(attached, "tiny").prefill(ids).unread_tokens == SPARSE
    assert "forward" not in vars(model)
    assert model.generate(ids, max_new_tokens=6, do_sample=False).isfinite().all()


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padded_batches(pad):
    model, ids = tiny_model(), token_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 9) if pad == "left" else slice(-9, None)] = 0
    with attach(model, tiny_artifact(model), TAIL) as attached:
        with attached.watched():
            whole = logits(model, ids, attention_mask=mask, logits_to_keep=1)
        assert torch.equal(logits(model, ids, attention_mask=mask, logits_to_keep=1), whole)
        assert attached.stats.unread_tokens == attached.stats.sparse_tokens / 2 > 0


def nothing(*_):
    pass


class Nowhere:
    """Belongs to no module, as methods of built-in types."""

    __module__ = None

    def __call__(self, *_):
        pass


# What is called, and how, so that more may be read.
CALLS = {
    "all logits": {},
    "ids of them": {"logits_to_keep": torch.tensor([3])},
    "labels": {"logits_to_keep": 2, "labels": token_ids(1, 2)},
    "hidden states": {"logits_to_keep": 1, "output_hidden_states": True},
    "more than the tail": {"logits_to_keep": TOKENS - SPARSE + 1},
}
# What stays on the model while it is called; model, its last layer -> a handle.
HOOKS = {
    "the model": lambda model, last: model.register_forward_hook(nothing),
    "the base": lambda model, last: model.model.register_forward_hook(nothing),
    "before the base": lambda model, last: model.model.register_forward_pre_hook(nothing),
    "the last layer": lambda model, last: last.register_forward_hook(nothing),
    "its down": lambda model, last: last.mlp.down_proj.register_forward_hook(nothing),
    "before its down": lambda model, last: last.mlp.down_proj.register_forward_pre_hook(nothing),
    "the norm": lambda model, last: model.model.norm.register_forward_hook(nothing),
    "before the norm": lambda model, last: model.model.norm.register_forward_pre_hook(nothing),
    "of no module": lambda model, last: model.model.norm.register_forward_hook(Nowhere()),
    "everywhere": lambda model, last: torch.nn.modules.module.register_module_forward_hook(nothing),
    "another forward of the norm": lambda model, last: Forward(model.model.norm),
    "another forward of the base": lambda model, last: Forward(model.model),
}


class Forward:
    """A module's forward, replaced."""

    def __init__(self, module):
        self.module, self.before = module, vars(module).get("forward")
        module.forward = functools.partial(module.forward)

    def remove(self):
        del self.module.forward
        if self.before:
            self.module.forward = self.before


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_may_read_is_computed(name):
    model, ids = tiny_model(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), TAIL) as attached:
        logits(model, ids, **CALLS[name])
        assert attached.stats.sparse_tokens == SPARSE - BLOCK and attached.stats.unread_tokens == 0
        logits(model, ids, logits_to_keep=BLOCK)
        assert attached.stats.unread_tokens == SPARSE - BLOCK  # others have it


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_hook_may_read_is_computed(name):
    model, ids = tiny_model(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), TAIL) as attached:
        hook = HOOKS[name](model, model.model.layers[-1])
        try:
            logits(model, ids, logits_to_keep=1)
        finally:
            hook.remove()
        assert attached.stats.sparse_tokens == SPARSE - BLOCK and attached.stats.unread_tokens == 0
        logits(model, ids, logits_to_keep=1)
        assert attached.stats.unread_tokens == SPARSE - BLOCK


def test_what_others_may_read_is_computed():
    """The base model's callers, who learns, who watches, who has said so in the config."""
    model, ids = tiny_model(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), TAIL) as attached:
        with torch.no_grad():
            assert model.model(input_ids=ids).last_hidden_state.isfinite().all()
        model(input_ids=ids, logits_to_keep=1).logits.sum().backward()
        with picks.watch(attached) as seen:
            logits(model, ids, logits_to_keep=1)
        assert [len(calls) for calls in seen] == [1] * LAYERS
        model.config.output_hidden_states = True
        logits(model, ids, logits_to_keep=1)
        assert attached.stats.sparse_calls == 4 and attached.stats.unread_tokens == 0


def test_a_call_of_the_base_from_inside_another_is_read_whole():
    model, ids, seen = tiny_model(), token_ids(1, TOKENS), []

    def look(*_):
        seen.append(model.model(input_ids=ids).last_hidden_state)

    with attach(model, tiny_artifact(model), TAIL) as attached:
        hook = model.lm_head.register_forward_hook(look)
        logits(model, ids, logits_to_keep=1)
        hook.remove()
        assert seen[0].isfinite().all() and attached.stats.unread_tokens == SPARSE - BLOCK == attached.stats.sparse_tokens / 2


def test_a_model_of_ones_own_is_read_whole():
    """It may read more of the base model than transformers' do."""
    model, ids = tiny_model(), token_ids(1, TOKENS)

    def forward(self, input_ids, logits_to_keep=0):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return types.SimpleNamespace(logits=self.lm_head(hidden[:, -logits_to_keep:]), pooled=hidden.mean(1))

    model.__class__ = type("Pooling", (type(model),), {"forward": forward})
    with attach(model, tiny_artifact(model), TAIL) as attached:
        assert model(input_ids=ids, logits_to_keep=1).pooled.isfinite().all()
        assert attached.stats.sparse_tokens and not attached.stats.unread_tokens


def test_without_a_tail_the_last_row_may_be_sparse():
    """48 tokens are six whole blocks: the last token is in a sparse one, and is read."""
    model = tiny_model()
    with attach(model, tiny_artifact(model), dense_tail=0) as attached:
        assert logits(model, token_ids(1, 48), logits_to_keep=1).isfinite().all() and not attached.stats.unread_tokens
        assert logits(model, token_ids(1, 49), logits_to_keep=1).isfinite().all() and attached.stats.unread_tokens == 40
        batch = logits(model, token_ids(3, 48), logits_to_keep=1)
        assert batch.isfinite().all() and attached.stats.unread_tokens == 40


def test_pieces_of_a_prompt_and_what_lies_behind():
    model, ids = tiny_model(dtype=torch.float64), token_ids(1, 80)
    with attach(model, tiny_artifact(model)) as attached:
        with attached.prompt(64):
            whole = logits(model, ids)[:, -1:]
        cache = DynamicCache()
        with attached.prompt(64):
            for begin, end in ((0, 32), (32, 80)):
                last = logits(model, ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.testing.assert_close(last, whole, **EXACT)
        assert attached.stats.unread_tokens == 64 - 32  # the first piece ends inside the prompt, with a sparse block


def test_upper_layers_that_read_a_part():
    model, ids = tiny_model(dtype=torch.float64), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), TAIL, upper_share=0.5) as attached:
        with attached.prompt(TOKENS):
            with attached.watched():
                whole, _ = read(model, ids, logits_to_keep=1)
            last, _ = read(model, ids, logits_to_keep=1)
        assert torch.equal(last, whole)
        stats = attached.stats
        assert stats.skipped_above and stats.unread_tokens == (stats.sparse_tokens - stats.skipped_above) / 2


def test_in_eight_bits():
    model, ids = tiny_model(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), TAIL, weights="int8") as attached:
        with attached.watched():
            whole = logits(model, ids, logits_to_keep=1)
        assert torch.equal(logits(model, ids, logits_to_keep=1), whole)
        assert attached.stats.unread_tokens == SPARSE - BLOCK


def test_a_copy_is_detached():
    model, ids = tiny_model(), token_ids(1, TOKENS)
    plain = logits(model, ids, logits_to_keep=1)
    with attach(model, tiny_artifact(model)) as attached:
        other = copy.deepcopy(model)
        assert torch.equal(logits(other, ids, logits_to_keep=1), plain) and not attached.stats.sparse_tokens
