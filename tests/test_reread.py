"""Tokens that are read again: which ones, what they and the cache are then, and where none is."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCK, EXACT, FAMILIES, PREFILL, RECURRENT, logits, tiny_artifact, tiny_model, token_ids, user_error
from transformers import DynamicCache

from fastfill import attach, attended, kv_cache, reread

SDPA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite")
AGAIN = PREFILL.with_(reread=0.25, dense_tail=BLOCK)
TOKENS = 61  # a head of one block, 5 blocks between, a tail of 13 tokens
SPARSE = 5 * BLOCK
BEHIND = TOKENS - BLOCK  # the head
QUARTER = 13  # of these


def fp64(family="llama", **changes):
    changes |= {"sliding_window": None} if family in ("mistral", "phi3") else {}
    return tiny_model(family, dtype=torch.float64, **changes)


@torch.no_grad()
def read(model, attached, ids, cache=None, end=None, **more):
    with attached.prompt(end or ids.shape[1]):
        return model.model(input_ids=ids, past_key_values=DynamicCache() if cache is None else cache, **more)


def tensors(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", SDPA)
def test_a_prompt_that_is_read_again_whole_is_dense(family):
    """The head is dense from the start."""
    model, ids = fp64(family), token_ids(1, TOKENS)
    with torch.no_grad():
        dense = model.model(input_ids=ids, use_cache=True)
    with attach(model, tiny_artifact(model), AGAIN.with_(reread=1.0), kernel="torch") as attached:
        again = read(model, attached, ids)
        assert attached.stats.reread_tokens == BEHIND and attached.stats.once_because == {}
        assert (attached.stats.sparse_tokens, attached.stats.dense_tokens) == (SPARSE, TOKENS - SPARSE)
        assert attached.stats.sparse_calls == 1 and attached.stats.dense_calls == 0
    torch.testing.assert_close(again.last_hidden_state, dense.last_hidden_state, **EXACT)
    torch.testing.assert_close(tensors(kv_cache.left(again)), tensors(kv_cache.left(dense)), **EXACT)


@pytest.mark.parametrize("family", SDPA)
def test_a_part_is_what_dense_layers_give_on_the_sparse_ones_cache(family):
    """By hand: token by token, each behind a copy of what was before it, with what was read again before in its place."""
    model, ids = fp64(family), token_ids(1, TOKENS)
    artifact = tiny_artifact(model)
    with attach(model, artifact, AGAIN.with_(reread=0.0), kernel="torch") as attached:
        once = read(model, attached, ids)
    with attach(model, artifact, AGAIN, kernel="torch") as attached:
        again = read(model, attached, ids)
        assert attached.stats.reread_tokens == QUARTER
    changed = (again.last_hidden_state != once.last_hidden_state)[0].any(1).nonzero()[:, 0].tolist()
    assert len(changed) == QUARTER and changed[-1] == TOKENS - 1
    held = copy.deepcopy(kv_cache.left(once))
    for column in changed:
        before = copy.deepcopy(held)
        for layer in before.layers:
            layer.keys, layer.values = layer.keys[:, :, :column], layer.values[:, :, :column]
        with torch.no_grad():
            out = model.model(input_ids=ids[:, column : column + 1], **kv_cache.given(model.model, before))
        torch.testing.assert_close(out.last_hidden_state[0, 0], again.last_hidden_state[0, column], **EXACT)
        for mine, theirs in zip(held.layers, before.layers, strict=True):
            mine.keys[:, :, column], mine.values[:, :, column] = theirs.keys[:, :, -1], theirs.values[:, :, -1]
    torch.testing.assert_close(tensors(kv_cache.left(again)), tensors(held), **EXACT)


@pytest.mark.parametrize("family", SDPA)
def test_the_tokens_are_those_that_the_last_one_attends_to(family):
    model, ids, plain = fp64(family), token_ids(1, TOKENS), PREFILL.with_(sparsity=0.9, dense_tail=BLOCK)
    eager = fp64(family, attn_implementation="eager")
    artifact = tiny_artifact(model)
    with attach(eager, artifact, plain, kernel="torch") as attached, torch.no_grad(), attached.prompt(TOKENS):
        seen = eager.model(input_ids=ids, output_attentions=True).attentions
    shares = torch.stack([one[0, :, -1].mean(0) for one in seen]).mean(0)[BLOCK:-1]
    want = [*(shares.topk(QUARTER - 1).indices + BLOCK).sort().values.tolist(), TOKENS - 1]
    with attach(model, artifact, plain, kernel="torch") as attached:
        once = read(model, attached, ids).last_hidden_state
    with attach(model, artifact, plain.with_(reread=0.25), kernel="torch") as attached:
        again = read(model, attached, ids).last_hidden_state
    assert (again != once)[0].any(1).nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("family, rope", [("llama", None), ("llama", "dynamic"), ("phi3", "longrope")])
def test_without_a_tail_the_last_token_is_among_them(family, rope):
    """Its logits are read, and rotations that depend on the longest position are those of the first reading."""
    half = tiny_model().config.head_dim // 2
    scaled = {
        None: {},
        "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * half, "long_factor": [4.0] * half},
    }[rope]
    more = {"original_max_position_embeddings": 63} if rope == "longrope" else {}
    changes = {"max_position_embeddings": 63, "rope_parameters": {**scaled, **more}, **more} if rope else {}
    model, ids = fp64(family, **changes), token_ids(1, 64)
    settings = PREFILL.with_(dense_tail=0)
    artifact = tiny_artifact(model)
    with attach(model, artifact, settings, kernel="torch") as attached:
        once = read(model, attached, ids)
    with attach(model, artifact, settings.with_(reread=0.1), kernel="torch") as attached:
        again = read(model, attached, ids)
        assert attached.stats.reread_tokens == 6
    changed = (again.last_hidden_state != once.last_hidden_state)[0].any(1).nonzero()[:, 0].tolist()
    assert len(changed) == 6 and changed[-1] == 63
    # The first layer's keys depend on the token and its position alone.
    torch.testing.assert_close(kv_cache.left(again).layers[0].keys, kv_cache.left(once).layers[0].keys, **EXACT)


@pytest.mark.parametrize("share, tokens", [(1e-9, 1), (0.05, 3), (0.1, 5), (0.5, 26)])
def test_a_share_is_of_tokens_and_at_least_one(model, share, tokens):
    with attach(model, tiny_artifact(model), AGAIN.with_(reread=share)) as attached:
        read(model, attached, token_ids(1, TOKENS))
        assert attached.stats.reread_tokens == tokens


def test_generation_goes_on_from_it(model):
    ids, cache = token_ids(1, TOKENS), DynamicCache()
    with attach(model, tiny_artifact(model), AGAIN) as attached:
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert attached.stats.reread_tokens == QUARTER
        hidden, new = read(model, attached, ids, cache).last_hidden_state[:, -1:], []
        with torch.no_grad():
            for _ in range(6):
                new.append(int(model.lm_head(hidden).argmax()))
                token = torch.tensor([new[-1:]])
                hidden = model.model(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
    assert out[0, TOKENS:].tolist() == new


def test_what_nobody_reads_is_left_out_of_the_first_reading_alone(model):
    """The states of the tokens that are read again are there."""
    ids = token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), AGAIN, kernel="torch") as attached, attached.prompt(TOKENS):
        with attached.watched():
            whole = logits(model, ids, logits_to_keep=1, use_cache=True)
        assert attached.stats.unread_tokens == 0
        assert torch.equal(logits(model, ids, logits_to_keep=1, use_cache=True), whole)
        assert attached.stats.unread_tokens == SPARSE and attached.stats.reread_tokens == 2 * QUARTER


def test_embeddings_and_positions_of_ones_own():
    model, ids = fp64(), token_ids(1, TOKENS)
    places = torch.arange(7, 7 + TOKENS)[None]
    with torch.no_grad():
        dense = model.model(input_ids=ids, position_ids=places).last_hidden_state
    with attach(model, tiny_artifact(model), AGAIN.with_(reread=1.0), kernel="torch") as attached, torch.no_grad():
        with attached.prompt(TOKENS):
            again = model.model(
                inputs_embeds=model.model.embed_tokens(ids), position_ids=places, attention_mask=torch.ones_like(ids)
            ).last_hidden_state
        assert attached.stats.reread_tokens == BEHIND
    torch.testing.assert_close(again, dense, **EXACT)


def test_eight_bits_are_those_of_the_sparse_prompt():
    """Read again whole it is what eight bits give with all neurons."""
    model, ids = tiny_model(), token_ids(1, TOKENS)
    artifact = tiny_artifact(model)
    settings = AGAIN.with_(weights="int8")
    with attach(model, artifact, settings.with_(reread=0.0, sparsity=0.0), kernel="torch") as attached:
        all_neurons = read(model, attached, ids).last_hidden_state
    with attach(model, artifact, settings.with_(reread=1.0), kernel="torch") as attached:
        again = read(model, attached, ids).last_hidden_state
        assert attached.stats.reread_tokens == BEHIND
    # The same to the bit here; a sum in another order may round an input to the next eighth. In fp32 it would be `apart` off.
    with torch.no_grad():
        apart = (tiny_model().model(input_ids=ids).last_hidden_state - all_neurons).abs().max()
    assert (again - all_neurons).abs().max() < apart / 10


def test_scores_that_overflow_in_fp16_do_not_decide():
    """Nor does a layer without any that is a number."""
    query, key = (torch.randn(1, heads, TOKENS, 8, generator=torch.Generator().manual_seed(0)) * 150 for heads in (4, 2))
    exact = attended.shares(query.double(), key.double(), None, 1.0, 1)
    half = attended.shares(query.half(), key.half(), None, 1.0, 1)
    assert half.isfinite().all() and half.argmax() == exact.argmax()
    watcher = reread.Reread(SimpleNamespace(tokens=TOKENS, spans=[SimpleNamespace(start=BLOCK)]), 2, 3 / BEHIND)
    watcher.watch(0, query, torch.full_like(key, torch.nan), None, 1.0)
    watcher.watch(1, query, key, None, 1.0)
    best = exact[BLOCK:-1].topk(2).indices.sort().values + BLOCK
    assert watcher.choose().tolist() == [*best.tolist(), TOKENS - 1]


@torch.no_grad()
def test_autocast(model):
    ids = token_ids(1, TOKENS)
    exact = model.model(input_ids=ids).last_hidden_state
    with attach(model, tiny_artifact(model), AGAIN.with_(reread=1.0)) as attached, torch.autocast("cpu", torch.bfloat16):
        again = read(model, attached, ids).last_hidden_state
        assert attached.stats.reread_tokens == BEHIND
        with attached.dense():
            dense = read(model, attached, ids).last_hidden_state
    # No further from fp32 than twice what autocast costs a dense call: 0.05 and 0.06 here, read once it is 3.8.
    assert (again - exact).abs().max() < 2 * (dense - exact).abs().max()


class Broken(Exception):
    pass


def test_a_call_that_is_interrupted_counts_nowhere(model):
    ids, calls = token_ids(1, TOKENS), []

    def hook(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Broken

    with attach(model, tiny_artifact(model), AGAIN) as attached:
        handle = model.model.layers[1].register_forward_pre_hook(hook)
        with pytest.raises(Broken):
            read(model, attached, ids)
        handle.remove()
        assert attached.stats == type(attached.stats)() and attended.watcher.get() is None
        read(model, attached, ids)
        assert attached.stats.reread_tokens == QUARTER


def test_a_call_from_inside_leaves_the_outer_one_its_watcher():
    """A base model's call in a layer's hook, as a probe makes it."""
    model, ids = fp64(), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), AGAIN, kernel="torch") as attached:
        want = read(model, attached, ids).last_hidden_state
        inside = []

        def hook(*_):
            if not inside:
                inside.append(1)
                inside.append(model.model(input_ids=ids[:, :20], use_cache=False))

        handle = model.model.layers[1].register_forward_pre_hook(hook)
        again = read(model, attached, ids).last_hidden_state
        handle.remove()
    assert inside and torch.equal(again, want)


CASES = {
    "untold": attended.UNTOLD,
    "draft behind": attended.PIECES,
    "padded": attended.SEVERAL,
    "tuple": reread.TUPLE,
    "cut": reread.CUT,
    "other attention": attended.UNSEEN,
    "several": attended.SEVERAL,
    "pieces": attended.PIECES,
    "gradients": attended.GRADIENT,
    "other cache": attended.CACHE,
    "no cache": reread.NO_CACHE,
    "hidden states": reread.STATES,
}


@pytest.mark.parametrize("case", CASES)
def test_where_all_tokens_are_read_once(model, case):
    artifact, ids = tiny_artifact(model), token_ids(1, TOKENS)
    with attach(model, artifact, AGAIN.with_(reread=0.0)) as attached, torch.no_grad():
        want = model.model(input_ids=ids).last_hidden_state
    with attach(model, artifact, AGAIN) as attached, torch.set_grad_enabled(case == "gradients"):
        if case == "untold":
            out = model.model(input_ids=ids).last_hidden_state
        elif case == "pieces":
            cache = DynamicCache()
            with attached.prompt(TOKENS):
                model.model(input_ids=ids[:, :32], past_key_values=cache)
                out = model.model(input_ids=ids[:, 32:], past_key_values=cache).last_hidden_state
        elif case == "draft behind":
            with attached.prompt(TOKENS - 2):
                out = model.model(input_ids=ids).last_hidden_state
        elif case == "padded":
            mask = torch.ones(1, TOKENS, dtype=torch.long)
            mask[0, -3:] = 0
            with attached.prompt(TOKENS):
                out = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        elif case == "tuple":
            with attached.prompt(TOKENS):
                (out, *_) = model.model(input_ids=ids, return_dict=False)
        elif case == "cut":

            def shorten(*_):
                for layer in cache.layers[:1]:
                    layer.keys, layer.values = layer.keys[:, :, :40], layer.values[:, :, :40]

            cache, handle = DynamicCache(), model.model.layers[-1].register_forward_hook(shorten)
            out = read(model, attached, ids, cache).last_hidden_state
            handle.remove()
        elif case == "other attention":
            model.set_attn_implementation("eager")
            out = read(model, attached, ids).last_hidden_state
        else:
            more = {
                "several": {"input_ids": token_ids(2, TOKENS)},
                "other cache": {"past_key_values": type("Other", (DynamicCache,), {})()},
                "no cache": {"use_cache": False},
                "hidden states": {"output_hidden_states": True},
            }.get(case, {})
            with attached.prompt(TOKENS):
                out = model.model(**{"input_ids": ids, **more}).last_hidden_state
        assert attached.stats.reread_tokens == 0 and set(attached.stats.once_because) == {CASES[case]}
        if case not in ("pieces", "several", "draft behind", "padded"):
            torch.testing.assert_close(out, want)


def test_dense_and_short_calls_are_as_ever(model):
    with attach(model, tiny_artifact(model), AGAIN) as attached:
        with attached.dense():
            read(model, attached, token_ids(1, TOKENS))
        read(model, attached, token_ids(1, 2 * BLOCK))
        assert attached.stats.reread_tokens == 0 and attached.stats.once_because == {}


def test_what_cannot_be_read_again_is_refused():
    for share in (-0.1, 1.5, True, "half", float("nan")):
        with user_error("reread must lie in"):
            PREFILL.with_(reread=share)
    with user_error("give one of the two"):
        PREFILL.with_(reread=0.1, upper_share=0.5)
    model = tiny_model(attn_implementation="eager")
    with user_error("reread reads the attention of sdpa, and this model runs 'eager'"):
        attach(model, tiny_artifact(model), AGAIN)
    model = tiny_model("mistral", sliding_window=24)
    with user_error("reread needs full attention in every layer"):
        attach(model, tiny_artifact(model), AGAIN)
    assert "forward" not in vars(model.model)  # nothing was left
    for family in set(RECURRENT) & set(FAMILIES):
        model = tiny_model(family)
        with user_error("reread needs attention in every layer"):
            attach(model, tiny_artifact(model), AGAIN)
