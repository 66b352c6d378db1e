"""Upper layers that read fewer tokens: which ones, that they compute what a mask would, and what the cache holds then."""

import copy
import pickle

import pytest
import torch
from conftest import (
    BLOCK,
    EXACT,
    FAMILIES,
    LAYERS,
    PREFILL,
    RECURRENT,
    logits,
    tiny_artifact,
    tiny_model,
    token_ids,
    user_error,
)
from transformers import DynamicCache

from fastfill import attach, attended, kv_cache, upper
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab.tasks import TASKS

SDPA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite")
HALF = PREFILL.with_(upper_share=0.5, dense_tail=BLOCK)
SKIP = HALF.with_(sparsity=0.0)  # all neurons
TOKENS = 61  # a head of one block, 5 blocks between, a tail of 13 tokens
FIRST = int(upper.FROM * LAYERS)


@pytest.fixture(autouse=True)
def short_question(monkeypatch):
    monkeypatch.setattr(upper, "QUESTION", 12)


def fp64(family="llama", **changes):
    return tiny_model(family, dtype=torch.float64, **changes)


@torch.no_grad()
def read(model, attached, ids, cache=None):
    with attached.prompt(ids.shape[1]):
        return model.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state


@torch.no_grad()
def masked(model, ids, columns, tokens):
    """Last hidden states of ids (1, T) where the upper layers see of the first `tokens` only some columns: all are computed."""
    width = ids.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool).tril()
    hidden = torch.ones(width, dtype=torch.bool)
    hidden[columns] = False
    hidden[tokens:] = False
    mask = (seen & ~hidden | torch.eye(width, dtype=torch.bool))[None, None]
    undo = []
    for layer in model.model.layers[FIRST:]:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: forward(*args, **{**kwargs, "attention_mask": mask})
        undo.append(layer)
    try:
        return model.model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for layer in undo:
            del layer.forward


@pytest.mark.parametrize("tokens", [24, 32, 40])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_without_a_tail_the_last_block_is_among_those_that_go_on(tokens, share):
    """Its last token's logits are read."""
    model = tiny_model()
    with attach(model, tiny_artifact(model), PREFILL.with_(upper_share=share)) as attached, attached.prompt(tokens):
        for seed in range(5):
            assert logits(model, token_ids(1, tokens, seed=seed), logits_to_keep=1).isfinite().all()
        assert attached.stats.skipped_above


def columns_of(hidden):
    return (~hidden[0, :, 0].isnan()).nonzero()[:, 0]


@pytest.mark.parametrize("family", SDPA)
def test_the_upper_layers_compute_what_a_mask_would(family):
    model, ids = fp64(family), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), SKIP, kernel="torch") as attached:
        got = read(model, attached, ids)
        columns = columns_of(got)
        assert attached.stats.skipped_above == 3 * BLOCK and attached.stats.whole_because == {}
    assert len(columns) == TOKENS - 3 * BLOCK  # of five blocks two go on
    torch.testing.assert_close(got[:, columns], masked(model, ids, columns, TOKENS)[:, columns], **EXACT)


@pytest.mark.parametrize("family", SDPA)
def test_the_blocks_are_those_that_the_question_attends_to(family):
    model, ids = fp64(family), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), SKIP, kernel="torch") as attached:
        columns = columns_of(read(model, attached, ids))
    eager = fp64(family, attn_implementation="eager")
    with torch.no_grad():
        seen = eager(input_ids=ids, output_attentions=True).attentions[:FIRST]
    shares = torch.stack([one[0, :, -12:].mean((0, 1)) for one in seen]).mean(0)[BLOCK : 6 * BLOCK].view(5, BLOCK).sum(1)
    best = shares.topk(2).indices.sort().values
    want = [*range(BLOCK), *(BLOCK * (1 + int(b)) + i for b in best for i in range(BLOCK)), *range(6 * BLOCK, TOKENS)]
    assert columns.tolist() == want


@pytest.mark.parametrize("width", [1, 4], ids=["decode", "several"])
@pytest.mark.parametrize("family", SDPA)
def test_what_follows_reads_what_the_cache_holds(family, width):
    model, ids = fp64(family), token_ids(1, TOKENS + 2 * width)
    cache = DynamicCache()
    with attach(model, tiny_artifact(model), SKIP, kernel="torch") as attached:
        columns = columns_of(read(model, attached, ids[:, :TOKENS], cache))
        with torch.no_grad():
            got = [
                model.model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state
                for part in ids[:, TOKENS:].split(width, 1)
            ]
    assert [layer.keys.shape[2] for layer in cache.layers] == [ids.shape[1]] * FIRST + [ids.shape[1] - 3 * BLOCK]
    want = masked(model, ids, columns, TOKENS)[:, TOKENS:]
    torch.testing.assert_close(torch.cat(got, 1), want, **EXACT)


def test_sparse_ffns_compute_their_blocks_of_what_goes_on():
    """Beside FFNs that are told the plan of the tokens that are left."""
    model, ids = fp64(), token_ids(1, TOKENS)
    artifact = tiny_artifact(model)
    plans = []
    with attach(model, artifact, HALF, kernel="torch") as attached:
        for ffn in attached.ffns:
            ffn.taps.append(lambda step, ffn, plan, _value: plans.append(plan) if step == "input" else None)
        columns = columns_of(read(model, attached, ids))
        assert attached.stats.sparse_tokens == 5 * BLOCK and attached.stats.dense_tokens == TOKENS - 5 * BLOCK
    assert [plan.tokens for plan in plans] == [TOKENS] * FIRST + [len(columns)]
    assert [plan.sparse_tokens for plan in plans] == [5 * BLOCK] * FIRST + [2 * BLOCK]


@pytest.mark.parametrize("share, blocks", [(0.01, 1), (0.5, 2), (0.99, 5)])
def test_a_share_is_of_whole_blocks_and_at_least_one(share, blocks):
    model = fp64()
    with attach(model, tiny_artifact(model), SKIP.with_(upper_share=share), kernel="torch") as attached:
        columns = columns_of(read(model, attached, token_ids(1, TOKENS)))
    assert len(columns) == TOKENS - (5 - blocks) * BLOCK


def test_all_of_it_is_what_it_was(model):
    artifact, ids = tiny_artifact(model), token_ids(1, TOKENS)
    with attach(model, artifact, HALF.with_(upper_share=1.0)) as attached:
        whole = read(model, attached, ids)
        assert "forward" not in vars(model.model.layers[-1]) and model.config._attn_implementation == "sdpa"
    with attach(model, artifact, PREFILL.with_(dense_tail=BLOCK)) as attached:
        assert torch.equal(read(model, attached, ids), whole)


def test_generation_is_counted_and_equals_decoding_by_hand(model):
    ids = token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), HALF) as attached:
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert attached.stats.skipped_above == 3 * BLOCK and attached.stats.sparse_calls == 1
        cache = DynamicCache()
        hidden, new = read(model, attached, ids, cache)[:, -1:], []
        with torch.no_grad():
            for _ in range(6):
                new.append(int(model.lm_head(hidden).argmax()))
                token = torch.tensor([new[-1:]])
                hidden = model.model(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
    assert out[0, TOKENS:].tolist() == new


@pytest.mark.parametrize("window", [None, 24])
@torch.no_grad()
def test_a_cache_that_the_model_makes_itself(window):
    """With windows it is none that layers could leave tokens out of."""
    model, ids = tiny_model("mistral", sliding_window=window), token_ids(1, TOKENS)
    with attach(model, tiny_artifact(model), HALF) as attached:
        with attached.prompt(TOKENS):
            out = model(ids, use_cache=True, logits_to_keep=1)
        found = model(token_ids(1, 1, seed=9), use_cache=True, **{kv_cache.name(model): kv_cache.left(out)}).logits
        assert attached.stats.skipped_above == (3 * BLOCK if window is None else 0)
        assert attached.stats.whole_because == ({} if window is None else {attended.CACHE: 1})
        with attached.prompt(TOKENS):
            model(ids, use_cache=False)  # windows alone are no reason
        assert attached.stats.skipped_above == (6 * BLOCK if window is None else 3 * BLOCK)
    assert bool(found.isfinite().all())


@pytest.mark.skipif(kv_cache.name(tiny_model()) == kv_cache.NAME, reason="here it is the cache's name")
@torch.no_grad()
def test_a_word_that_means_nothing_is_no_cache(model):
    ids, stray = token_ids(1, TOKENS), DynamicCache()
    with attach(model, tiny_artifact(model), HALF) as attached:
        with attached.prompt(TOKENS):
            out = model(ids, use_cache=True, logits_to_keep=1, cache=stray)
        assert attached.stats.skipped_above == 3 * BLOCK and not hasattr(stray, upper.MARK)
        assert model(token_ids(1, 5), past_key_values=out.past_key_values).logits.isfinite().all()


def test_a_draft_that_was_refused_is_cut_off_all_layers():
    """`crop` counts in each layer's own tokens."""
    model, ids = fp64(), token_ids(1, TOKENS + 5)
    cache, again = DynamicCache(), DynamicCache(config=model.config)
    with attach(model, tiny_artifact(model), HALF, kernel="torch") as attached, torch.no_grad():
        for one in (cache, again):
            read(model, attached, ids[:, :TOKENS], one)
        model.model(input_ids=token_ids(1, 4, seed=9), past_key_values=cache, use_cache=True)
        crop(cache, TOKENS)
        got, want = (
            model.model(input_ids=ids[:, TOKENS:], past_key_values=one, use_cache=True).last_hidden_state
            for one in (cache, again)
        )
    assert torch.equal(got, want)


def crop(cache, tokens):
    """As both of transformers' conventions do, the layers' own lengths included."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[..., :tokens, :], layer.values[..., :tokens, :]


@pytest.mark.parametrize("left", [TOKENS - 6, 2 * BLOCK, 0], ids=["in the tail", "inside", "nothing"])
def test_another_text_in_place_of_the_prompts_end(left):
    """A second question on the cache of the first, in several calls: all layers read all of it."""
    model, ids, other = fp64(), token_ids(1, TOKENS), token_ids(1, 40, seed=5)
    cache = DynamicCache()
    with attach(model, tiny_artifact(model), SKIP, kernel="torch") as attached, torch.no_grad():
        columns = columns_of(read(model, attached, ids, cache))
        held = int((columns < left).sum())
        for index, layer in enumerate(cache.layers):
            size = held if index >= FIRST else left
            layer.keys, layer.values = layer.keys[..., :size, :], layer.values[..., :size, :]
        got = [
            model.model(input_ids=part, past_key_values=cache, use_cache=True).last_hidden_state for part in other.split(8, 1)
        ]
    whole = torch.cat([ids[:, :left], other], 1)
    want = masked(model, whole, columns[columns < left], left)[:, left:]
    torch.testing.assert_close(torch.cat(got, 1), want, **EXACT)


def test_a_cache_cut_inside_the_prompt_is_refused():
    model, ids = fp64(), token_ids(1, TOKENS)
    cache = DynamicCache()
    with attach(model, tiny_artifact(model), HALF, kernel="torch") as attached, torch.no_grad():
        read(model, attached, ids, cache)
        for layer in cache.layers:  # 40 tokens off each layer's end
            layer.keys, layer.values = layer.keys[..., :-40, :], layer.values[..., :-40, :]
        with user_error("This cache was cut inside a prompt"):
            model.model(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    "case", ["untold", "several", "padded", "pieces", "gradients", "draft behind", "other cache", "other attention"]
)
def test_where_all_tokens_go_on(model, case):
    artifact, ids = tiny_artifact(model), token_ids(1, TOKENS)
    with attach(model, artifact, HALF) as attached, torch.set_grad_enabled(case == "gradients"):
        if case == "untold":
            out = model.model(input_ids=ids).last_hidden_state
        elif case == "several":
            with attached.prompt(TOKENS):
                out = model.model(input_ids=token_ids(2, TOKENS)).last_hidden_state
        elif case == "padded":
            with attached.prompt(TOKENS):
                mask = torch.ones(1, TOKENS, dtype=torch.long)
                mask[0, :3] = 0
                out = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        elif case == "pieces":
            cache = DynamicCache()
            with attached.prompt(TOKENS):
                model.model(input_ids=ids[:, :30], past_key_values=cache)
                out = model.model(input_ids=ids[:, 30:], past_key_values=cache).last_hidden_state
        elif case == "draft behind":
            with attached.prompt(TOKENS - 9):
                out = model.model(input_ids=ids).last_hidden_state
        elif case == "other cache":
            with attached.prompt(TOKENS):
                out = model.model(input_ids=ids, past_key_values=OtherCache()).last_hidden_state
        else:
            if case == "other attention":
                model.set_attn_implementation("eager")
            with attached.prompt(TOKENS):
                out = model.model(input_ids=ids).last_hidden_state
        want = {
            "other attention": attended.UNSEEN,
            "untold": attended.UNTOLD,
            "several": attended.SEVERAL,
            "padded": attended.SEVERAL,
            "gradients": attended.GRADIENT,
            "other cache": attended.CACHE,
        }.get(case, attended.PIECES)
        assert not out.isnan().any() and attached.stats.skipped_above == 0 and attached.stats.sparse_tokens
        assert set(attached.stats.whole_because) == {want}


class OtherCache(DynamicCache):
    pass


def test_copies_pickles_and_detached_models_have_their_own_layers(model):
    ids = token_ids(1, TOKENS)
    before = logits(model, ids)
    with attach(model, tiny_artifact(model), HALF):
        assert model.config._attn_implementation == "fastfill_sdpa"
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.config._attn_implementation) is str and other.config._attn_implementation == "sdpa"
            assert torch.equal(logits(other, ids), before)
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits(model, ids), before)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_bad_shares_and_attention_that_cannot_be_watched_are_refused():
    for share in (0.0, -0.1, 1.5, True, "half", float("nan")):
        with user_error("upper_share must be more than 0 and at most 1"):
            PREFILL.with_(upper_share=share)
    model = tiny_model(attn_implementation="eager")
    with user_error("upper_share reads the attention of sdpa, and this model runs 'eager'"):
        attach(model, tiny_artifact(model), HALF)
    assert "forward" not in vars(model.model)  # nothing was left
    for family in set(RECURRENT) & set(FAMILIES):
        model = tiny_model(family)
        with user_error("upper_share needs attention in every layer"):
            attach(model, tiny_artifact(model), HALF)
        assert "forward" not in vars(model.model)


def test_tasks_that_score_every_token_refuse_it(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three")
    with attach(model, tiny_artifact(model), HALF) as attached:
        engine = TransformersEngine(attached, "tiny", None)
        with user_error("--task perplexity looks at all tokens of a prompt"):
            TASKS["perplexity"](data=[str(text)]).run(engine, None, [])
