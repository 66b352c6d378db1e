"""The last layer's FFN leaves out sparse tokens whose output nobody reads: `generate` reads one row of logits. They are NaN, and
what is read is to the bit what it is with all of them."""

import copy

import pytest
import torch
from conftest import BLOCK, EXACT, LAYERS, PREFILL, logits, tiny_artifact, tiny_model, token_ids
from transformers import DynamicCache

from fastfill import attach
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab import picks

TOKENS = 45  # a head of one block, 4 sparse blocks, 5 tokens
SPARSE = 4 * BLOCK
TAIL = PREFILL.with_(dense_tail=BLOCK)  # one block less is sparse


def read(model, ids, **kwargs):
    """Logits, and the keys and values of all layers."""
    cache = DynamicCache()
    found = logits(model, ids, past_key_values=cache, use_cache=True, **kwargs)
    return found, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text", "olmo2", "granite"])
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


def hooked(module):
    return module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "reader",
    [
        "all logits", "ids of them", "labels", "hidden states", "hidden states by the config", "gradient", "a watcher",
        "a hook on the model", "a hook on the base", "a hook on the last layer", "a hook on its down", "a hook on the norm",
        "a hook everywhere", "a hook before the norm", "more than the tail", "the base model",
    ],
)  # fmt: skip
def test_what_may_be_read_is_computed(reader):
    model, ids = tiny_model(), token_ids(1, TOKENS)
    base, last = model.model, model.model.layers[-1]
    places = {"model": model, "base": base, "last layer": last, "its down": last.mlp.down_proj, "the norm": base.norm}
    kwargs = {
        "all logits": {},
        "ids of them": {"logits_to_keep": torch.tensor([3])},
        "labels": {"logits_to_keep": 2, "labels": ids[:, -2:]},
        "hidden states": {"logits_to_keep": 1, "output_hidden_states": True},
        "more than the tail": {"logits_to_keep": TOKENS - SPARSE + 1},
    }.get(reader, {"logits_to_keep": 1})
    hook = None
    if reader == "a hook before the norm":
        hook = base.norm.register_forward_pre_hook(lambda *_: None)
    elif reader.startswith("a hook on"):
        hook = hooked(next(place for name, place in places.items() if reader.endswith(name)))
    elif reader == "a hook everywhere":
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with attach(model, tiny_artifact(model), TAIL) as attached, torch.set_grad_enabled(reader == "gradient"):
            if reader == "hidden states by the config":
                base.config.output_hidden_states = True
            if reader == "a watcher":
                with picks.watch(attached) as seen:
                    model(input_ids=ids, **kwargs)
                assert [len(calls) for calls in seen] == [1] * LAYERS
            else:
                (base if reader == "the base model" else model)(input_ids=ids, **({} if reader == "the base model" else kwargs))
            assert attached.stats.sparse_tokens == SPARSE - BLOCK and attached.stats.unread_tokens == 0
            if hook:
                hook.remove()
            elif reader not in ("hidden states by the config", "gradient"):
                logits(model, ids, logits_to_keep=BLOCK)
                assert attached.stats.unread_tokens == SPARSE - BLOCK  # the others have it
    finally:
        if hook:
            hook.remove()


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
