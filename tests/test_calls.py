"""What counts as prompt: every way to generate reads the same tokens sparsely, and what stays dense says why."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import transformers
from conftest import BLOCK, EXACT, FAMILIES, PREFILL, RECURRENT, logits, tiny_artifact, tiny_model, token_ids
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from fastfill import attach, blocks, calls, kv_cache
from fastfill.calls import GenerateHook, generate_input, plain_mask
from fastfill.config import PrefillConfig
from fastfill.errors import UserError

# What transformers 5.0 itself cannot do, or calls otherwise.
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 1)
not_in_old = pytest.mark.skipif(OLD, reason="transformers 5.0 has it otherwise")
OLD_CANNOT = ("prompt lookup", "long drafts", "chunks of blocks", "short chunks", "chunks and a static cache")

TAIL = 12  # dense at the end of a prompt, and no whole number of blocks
NEW = 9
# Of 47 tokens 8 are head; blocks end before 47 - 12 = 35.
SPARSE = 24


def generate(model, ids, **changes):
    settings = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
    mask = changes.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{**settings, **changes})


def repeating(tokens, seed=0):
    """Text in which prompt lookup finds drafts."""
    piece = token_ids(1, 20, seed=seed)
    return piece.repeat(1, tokens // 20 + 1)[:, :tokens]


# --- every way to generate ----------------------------------------------------------------------------------------------

# How they generate; a static cache reads with other matrix products, so its fp64 sums are others and its ids the same.
WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 6},
    "long drafts": {"prompt_lookup_num_tokens": 40, "max_matching_ngram_size": 1},
    "chunks of blocks": {"prefill_chunk_size": 16},
    "short chunks": {"prefill_chunk_size": BLOCK},
    "chunks and a static cache": {"prefill_chunk_size": 16, "cache_implementation": "static"},
    "sampling of one": {"do_sample": True, "top_k": 1},
    "beams, to the first token": {"num_beams": 3, "max_new_tokens": 1},
}


@functools.cache
def plain(family, attention):
    """A model and its artifact; the greedy answer of stock transformers, and of the model with the artifact on it."""
    model = tiny_model(family, dtype=torch.float64, attn_implementation=attention)
    artifact, stock = tiny_artifact(model), generate(model, repeating(47))
    with attach(model, artifact, dense_tail=TAIL) as attachment:
        greedy = generate(model, repeating(47))
        assert attachment.stats.sparse_tokens == SPARSE and not torch.equal(greedy, stock)
    return model, artifact, stock, greedy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate_reads_the_same_tokens_sparsely(family, attention, way):
    if OLD and way in OLD_CANNOT:
        pytest.skip(f"transformers 5.0 fails at {way}, with nothing attached too")
    if family in RECURRENT and "prompt_lookup_num_tokens" in WAYS[way]:
        pytest.skip("transformers takes no drafts where layers keep a state")
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("transformers caps Gemma 2's attention in its eager form alone")
    model, artifact, stock, greedy = plain(family, attention)
    ids, settings = repeating(47), WAYS[way]
    new = settings.get("max_new_tokens", NEW)
    assert torch.equal(generate(model, ids, **settings), stock[:, : 47 + new])  # stock transformers agrees with itself
    with attach(model, artifact, dense_tail=TAIL) as attachment:
        out = generate(model, ids, **settings)
        readings = new if way == "without a cache" else settings.get("num_beams", 1)
        assert attachment.stats.sparse_tokens == readings * SPARSE and attachment.stats.dense_because == {}
    assert torch.equal(out, greedy[:, : 47 + new])


@pytest.mark.parametrize("way", ["greedy", "without a cache", "static cache", "chunks of blocks", "chunks and a static cache"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_gives_what_its_sequences_give_alone(way, attention):
    """The second sequence's padding fills the first chunks."""
    if OLD and way in OLD_CANNOT:
        pytest.skip(f"transformers 5.0 fails at {way}, with nothing attached too")
    model = tiny_model(dtype=torch.float64, attn_implementation=attention)
    ids, mask = token_ids(3, 64), torch.ones(3, 64, dtype=torch.long)
    mask[1, :24], mask[2, :50] = 0, 0
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        alone = [generate(model, row[keep.bool()][None])[0, -NEW:] for row, keep in zip(ids, mask, strict=True)]
        counted = attachment.stats.sparse_tokens
        assert counted == 40 + 16
        together = generate(model, ids, attention_mask=mask, **WAYS[way])
        readings = NEW if way == "without a cache" else 1
        assert attachment.stats.sparse_tokens == counted + readings * counted and attachment.stats.dense_because == {}
    if attention == "sdpa":  # eager attention takes its softmax in fp32, in which padding changes the rounding
        assert all(torch.equal(row[-NEW:], one) for row, one in zip(together, alone, strict=True))


@not_in_old
def test_an_assistant_model_moves_nothing():
    model, assistant = tiny_model(dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64)
    assistant.generation_config.num_assistant_tokens = 20
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    ids = token_ids(1, 47)
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        greedy = generate(model, ids)
        assert attachment.stats.sparse_tokens == SPARSE
        assert torch.equal(generate(model, ids, assistant_model=assistant), greedy)
        assert attachment.stats.sparse_tokens == 2 * SPARSE
        with attach(assistant, tiny_artifact(assistant), dense_tail=TAIL) as own:
            assert torch.equal(generate(model, ids, assistant_model=assistant), greedy)
            assert own.stats.sparse_tokens == SPARSE and attachment.stats.sparse_tokens == 3 * SPARSE
        assert torch.equal(generate(model, ids, assistant_early_exit=2), greedy)


@not_in_old
@pytest.mark.parametrize("whole", [True, False], ids=["whole input", "new tokens only"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_the_next_turn_over_the_same_cache(exact_model, whole, chunk):
    """The second turn's end is known too: cut into chunks it has one dense tail."""
    model, ids = exact_model, token_ids(1, 47)
    more = token_ids(1, 60, seed=1)
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        out = []
        for size in (None, chunk):
            cache = DynamicCache(config=model.config)
            first = generate(model, ids, past_key_values=cache)
            turn = torch.cat([first, more], 1)
            before = attachment.stats.sparse_tokens
            new = turn if whole else turn[:, cache.get_seq_length() :]
            mask = torch.ones_like(turn)
            out.append(generate(model, new, attention_mask=mask, past_key_values=cache, prefill_chunk_size=size)[:, -NEW:])
            # 55 columns are cached, 116 in all: blocks from 56 to 104. Chunks begin at 55 and cut blocks at 71, 87, 103.
            assert attachment.stats.sparse_tokens - before == (48 if size is None else 24)
        if chunk is None:
            assert torch.equal(*out)


def test_guidance_reads_its_negative_prompt_apart(exact_model):
    """A text that is not the prompt, read in the middle of `generate`: dense if it is shorter than that, and it says so."""
    model, ids, negative = exact_model, token_ids(1, 47), token_ids(1, 30, seed=3)
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        with pytest.warns(UserWarning, match="another text"):
            generate(model, ids, guidance_scale=1.5, negative_prompt_ids=negative)
        assert attachment.stats.sparse_tokens == SPARSE
        assert attachment.stats.dense_because == {calls.OTHER_TEXT: 1}


# --- what the caller says -----------------------------------------------------------------------------------------------


def in_pieces(model, ids, edges):
    cache, out = DynamicCache(config=model.config), []
    for a, b in zip([0, *edges], [*edges, ids.shape[1]], strict=True):
        out.append(logits(model, ids[:, a:b], past_key_values=cache))
    return torch.cat(out, 1)


@pytest.mark.parametrize("edges", [[24], [8, 16, 24, 32, 40], [42], [32, 46]], ids=str)
def test_pieces_of_a_prompt_with_a_known_end_equal_one(exact_model, edges):
    model, ids = exact_model, token_ids(2, 47)
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        whole = logits(model, ids)
        assert attachment.stats.sparse_tokens == 2 * SPARSE
        with attachment.prompt(end=47):
            torch.testing.assert_close(in_pieces(model, ids, edges), whole, **EXACT)
        assert attachment.stats.sparse_tokens == 4 * SPARSE
        pieces = in_pieces(model, ids, edges)  # without: each piece has a tail of its own
        assert not torch.allclose(pieces, whole, **EXACT)


def test_what_lies_behind_the_end_is_dense(exact_model):
    """Drafts behind a prompt, and a text that is read again and again without a cache."""
    model, ids = exact_model, token_ids(1, 90)
    with attach(model, tiny_artifact(model), dense_tail=TAIL) as attachment:
        first = model(input_ids=ids[:, :47])
        with attachment.dense():
            rest = logits(model, ids[:, 47:], past_key_values=first.past_key_values)
        expected = torch.cat([first.logits, rest], 1)
        before = attachment.stats.sparse_tokens
        with attachment.prompt(end=47):
            for stop in (60, 90, 90):
                torch.testing.assert_close(logits(model, ids[:, :stop]), expected[:, :stop], **EXACT)
        assert attachment.stats.sparse_tokens - before == 3 * SPARSE
        logits(model, ids)
        assert attachment.stats.sparse_tokens - before == 3 * SPARSE + 64  # nothing said: all of it is prompt


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_known_end_and_padding(exact_model, side):
    """The tail of each sequence is at its own end, and min_tokens are its own."""
    model, ids, lengths = exact_model, token_ids(3, 47), (47, 38, 28)
    mask = torch.zeros(3, 47, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(length) if side == "right" else slice(47 - length, 47)] = 1
    with attach(model, tiny_artifact(model), dense_tail=TAIL, min_tokens=30) as attachment:
        alone = [logits(model, row[keep.bool()][None])[0] for row, keep in zip(ids, mask, strict=True)]
        assert attachment.stats.sparse_tokens == 24 + 16  # the third is too short
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with attachment.prompt(end=47):
            out = logits(model, ids, attention_mask=mask, position_ids=positions)
        assert attachment.stats.sparse_tokens == 2 * (24 + 16)
    for row, keep, one in zip(out, mask, alone, strict=True):
        torch.testing.assert_close(row[keep.bool()], one, **EXACT)


def test_the_caller_goes_before_generate(exact_model):
    model, ids = exact_model, token_ids(1, 47)
    with attach(model, tiny_artifact(model)) as attachment:
        with attachment.prompt(end=24):  # the rest is the beginning of the answer
            generate(model, ids)
        assert attachment.stats.sparse_tokens == 16
        with attachment.dense():
            generate(model, ids)
        assert attachment.stats.sparse_tokens == 16
        generate(model, ids)
        assert attachment.stats.sparse_tokens == 16 + 32


@pytest.mark.parametrize("end", [0, -3, 4.0, "47", None, True, [47]], ids=str)
def test_an_end_that_is_no_number_of_tokens_is_refused(model, end):
    with attach(model, tiny_artifact(model)) as attachment, pytest.raises(UserError, match="end must be a whole number"):
        attachment.prompt(end=end)


def test_the_end_of_generates_input():
    ids, embeds, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 5, 3), torch.ones(2, 20)
    assert generate_input(ids) == generate_input(input_ids=ids) == 7
    assert generate_input(inputs_embeds=embeds, input_ids=ids) == 5
    assert generate_input(ids, attention_mask=mask) == 20  # the new part of a conversation
    assert generate_input() == 1
    assert generate_input([[1, 2, 3]]) is None


# --- the hook on generate -----------------------------------------------------------------------------------------------


def test_generate_is_put_back(model):
    with attach(model, tiny_artifact(model)):
        assert isinstance(vars(model)["generate"], GenerateHook)
        assert model.generate.__name__ == "generate" and model.generate.__doc__ == type(model).generate.__doc__
    assert "generate" not in vars(model)
    mine = lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)  # noqa: E731
    model.generate = mine
    with attach(model, tiny_artifact(model)) as attachment:
        generate(model, token_ids(1, 47), use_cache=False, max_new_tokens=2)
        assert attachment.stats.sparse_tokens == 2 * 32
    assert model.generate is mine


def test_a_generate_put_on_top_stays_when_we_go(model):
    attachment = attach(model, tiny_artifact(model))
    ours = model.generate
    later = lambda *args, **kwargs: ours(*args, **kwargs)  # noqa: E731
    model.generate = later
    attachment.detach()
    assert model.generate is later and generate(model, token_ids(1, 20)).shape == (1, 20 + NEW)


def test_a_copy_of_the_hook_is_the_copys_own_method(model):
    """Of a model whose other hooks are off, as a copy may have them."""
    model.generate = hook = GenerateHook(model.generate, calls.Calls(PREFILL, [], 3, True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not isinstance(twin.generate, GenerateHook) and twin.generate.__self__ is twin
        ids = token_ids(1, 20)
        assert torch.equal(generate(twin, ids), generate(model, ids))
    assert model.generate is hook


def test_the_base_model_alone_has_no_generate(model):
    with attach(model.model, tiny_artifact(model)) as attachment:
        generate(model, token_ids(1, 47))
        assert attachment.stats.sparse_tokens == 32


# --- dense, and it says why ---------------------------------------------------------------------------------------------


def odd_calls(model, ids):
    """Reason -> calls that are long enough and stay dense for it."""
    restart = torch.cat([torch.arange(20), torch.arange(25)])[None]
    bounds = torch.tensor([0, 20, 45], dtype=torch.int32)
    causal = torch.full((45, 45), float("-inf"), dtype=model.dtype).triu(1)[None, None]
    holes = torch.ones_like(ids)
    holes[0, 20] = 0
    tree = torch.ones(1, 1, 45, 64, dtype=torch.bool).tril()
    tree[..., 40, 30:40] = False
    fixed = StaticCache(config=model.config, max_cache_len=64)
    return {
        calls.POSITIONS: [{"position_ids": restart}, {"position_ids": torch.arange(45)[None] * 2}],
        calls.PACKED: [{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}],
        calls.READY_MASK: [{"attention_mask": causal}],
        calls.HOLES: [{"attention_mask": holes}],
        calls.STATIC_CACHE: [{"attention_mask": tree, **kv_cache.given(model.model, fixed)}],
    }


@pytest.mark.parametrize("reason", odd_calls(tiny_model(), torch.zeros(1, 45, dtype=torch.long)))
def test_a_call_that_stays_dense_says_why_once_and_is_counted(model, reason):
    ids = token_ids(1, 45)
    with torch.no_grad(), attach(model, tiny_artifact(model)) as attachment:
        expected = 0
        with pytest.warns(UserWarning, match=f"stayed dense: {reason}") as seen:
            for arguments in [*odd_calls(model, ids)[reason], *odd_calls(model, ids)[reason]]:
                model.model(ids, **arguments)
                expected += 1
        assert attachment.stats.dense_because == {reason: expected} and len(seen) == 1
        assert attachment.stats.sparse_tokens == 0 and "dense_because" in str(attachment.stats)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.model(ids)
            with attachment.dense():
                model.model(ids, **odd_calls(model, ids)[reason][0])  # asked for
            model.model(ids[:, :15])  # too short
        assert attachment.stats.dense_because == {reason: expected}


def test_at_sparsity_zero_nothing_is_odd(model):
    ids = token_ids(1, 45)
    with torch.no_grad(), attach(model, tiny_artifact(model), sparsity=0.0) as attachment, warnings.catch_warnings():
        warnings.simplefilter("error")
        model.model(ids, **odd_calls(model, ids)[calls.PACKED][0])
        assert attachment.stats.dense_because == {}


def test_an_odd_piece_of_a_known_prompt_is_counted_whatever_its_size(exact_model):
    model, ids = exact_model, token_ids(1, 47)
    mask = torch.ones(1, 47, dtype=torch.long)
    mask[0, 3] = 0
    with attach(model, tiny_artifact(model)) as attachment, pytest.warns(UserWarning, match="holes"):
        cache = DynamicCache(config=model.config)
        with attachment.prompt(end=40):
            logits(model, ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
            logits(model, ids[:, 10:40], attention_mask=mask[:, :40], past_key_values=cache)
            logits(model, ids[:, 40:47], attention_mask=mask, past_key_values=cache)  # behind the end
        assert attachment.stats.dense_because == {calls.HOLES: 2}


def test_a_plan_that_no_ffn_ran_is_not_counted_as_sparse(model):
    """Somebody splits the tokens between the model and its FFNs."""
    ids = token_ids(2, 45)
    with attach(model, tiny_artifact(model)) as attachment:
        for module in attachment.modules:
            inner = module.forward
            module.forward = lambda x, inner=inner: torch.cat([inner(half) for half in x.split(1)])
        with pytest.warns(UserWarning, match="other shapes"):
            logits(model, ids)
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (0, 90)
        assert attachment.stats.dense_because == {calls.NOT_RUN: 1}


def test_a_call_that_raises_counts_nowhere(model):
    ids = token_ids(1, 45)

    def fail(*_):
        raise RuntimeError("stop")

    with attach(model, tiny_artifact(model)) as attachment:
        hook = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, ids)
        hook.remove()
        for wrong in (ids[0], None):
            with pytest.raises((ValueError, IndexError, RuntimeError)):
                logits(model, wrong)
        assert attachment.stats == calls.Stats()
        logits(model, ids)
        assert attachment.stats == calls.Stats(32, 13, 1, 0)


def test_a_cache_that_says_no_length(model):
    class Odd(DynamicCache):
        get_seq_length = None

    assert calls.cached(Odd()) is None and calls.cached(None) == 0
    assert calls.cached(DynamicCache()) == 0


def test_the_cache_is_found_under_both_of_its_names(model):
    new, old = DynamicCache(), DynamicCache()
    assert kv_cache.find({"past_key_values": old}) is old and kv_cache.find({"past_key_values": old, "cache": None}) is None
    assert kv_cache.find({"past_key_values": old, "cache": new}) is kv_cache.find({"cache": new}) is new
    assert kv_cache.find({"past_key_values": old, "cache": new}, ["past_key_values"]) is old  # transformers before 5.24
    assert kv_cache.find({}) is None
    with torch.no_grad():
        out = model(token_ids(1, 4), use_cache=True)
    assert kv_cache.left(out) is out[kv_cache.name(model)] and kv_cache.left(out).get_seq_length() == 4


def test_a_model_whose_cache_has_an_unknown_name_is_refused(model):
    class Renamed(type(model.model)):
        def forward(self, input_ids=None, attention_mask=None, keys_and_values=None, **kwargs):
            return super().forward(input_ids, attention_mask)

    model.model.__class__ = Renamed
    with pytest.raises(UserError, match="its KV cache under a name that fastfill does not know"):
        attach(model, tiny_artifact(model))


# --- ready masks --------------------------------------------------------------------------------------------------------


@not_in_old
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("past", [0, 10])
def test_a_ready_mask_is_read_back(attention, dtype, past):
    model = tiny_model(attn_implementation=attention).to(dtype)
    cache = StaticCache(config=model.config, max_cache_len=40)
    if past:
        with torch.no_grad():
            model(input_ids=token_ids(3, past), past_key_values=cache)
    wanted = torch.ones(3, past + 20, dtype=torch.bool)
    wanted[1, :7], wanted[2, : past + 4] = False, False
    wanted[0, past + 17 :] = False  # right padding
    empty = torch.empty(3, 20, 0, dtype=dtype)
    ready = create_masks_for_generate(
        config=model.config, inputs_embeds=empty, attention_mask=wanted.long(), past_key_values=cache, position_ids=None
    )
    assert ready.shape == (3, 1, 20, 40)
    assert torch.equal(plain_mask(ready, 3, past, 20), wanted)
    assert torch.equal(plain_mask({"sliding_attention": None, "full_attention": ready}, 3, past, 20), wanted)
    for query, key in ((8, past + 12), (12, past + 11), (19, past + 25)):  # one key more, one fewer, one beyond
        other = ready.clone()
        flipped = ~other[1, 0, query, key] if other.dtype == torch.bool else (other[1, 0, query, key] == 0) * -1e30
        other[1, 0, query, key] = flipped
        assert plain_mask(other, 3, past, 20) is None
    if ready.is_floating_point():
        other = ready.clone()
        other[0, 0, 12, past + 3] = -0.5  # a bias is not a mask
        assert plain_mask(other, 3, past, 20) is None
    assert plain_mask(ready.int(), 3, past, 20) is None or ready.dtype == torch.bool
    assert plain_mask(ready[:2], 3, past, 20) is None and plain_mask(ready[:, :, :19], 3, past, 20) is None


def test_a_sliding_window_in_a_static_cache_stays_dense_and_says_so():
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=16)
    ids = token_ids(1, 47)
    with attach(model, tiny_artifact(model)) as attachment:
        with pytest.warns(UserWarning, match="static cache"):
            generate(model, ids, cache_implementation="static")
        assert attachment.stats.dense_because == {calls.STATIC_CACHE: 1}
        generate(model, ids)  # a dynamic cache says where the tokens are
        assert attachment.stats.sparse_tokens == 32


# --- the plan -----------------------------------------------------------------------------------------------------------


def test_plans_of_prompts_by_hand():
    rule = PrefillConfig(block_size=8, dense_head=8, min_tokens=16, dense_tail=4)

    def spans(rows, tokens, prompts):
        plan = blocks.make_plan(rows, tokens, rule, prompts)
        return [(span.start, span.stop) for span in plan.spans] if plan else []

    assert spans([(0, 40, 0)], 40, None) == [(8, 32)]
    assert spans([(0, 40, 0)], 40, [(28, 28)]) == [(8, 24)]  # drafts behind row 28
    assert spans([(0, 40, 0)], 40, [(60, 60)]) == [(8, 40)]  # the prompt goes on
    assert spans([(0, 40, 0)], 40, [(42, 42)]) == [(8, 32)]  # its tail begins in this call
    assert spans([(0, 8, 16)], 8, [(40, 24)]) == [(0, 8)]  # a piece shorter than min_tokens
    assert spans([(0, 8, 40)], 8, [(40, 0)]) == []  # behind the end
    assert spans([(0, 40, 0)], 40, [(15, 40)]) == []  # what it brings is too short
