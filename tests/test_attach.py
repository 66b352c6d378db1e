"""Attach: what must stay identical, where the sparse part begins and ends, and that nothing is left behind."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    BLOCK,
    EXACT,
    FAMILIES,
    INTERMEDIATE,
    KERNELS,
    RECURRENT,
    SINGLE,
    logits,
    tiny_artifact,
    tiny_model,
    token_ids,
)
from transformers import DynamicCache, StaticCache

from fastfill import attach
from fastfill.errors import UserError
from fastfill.lab.baselines import named
from fastfill.sparse_ffn import SparseFFN, current_plan


def far(a, b):
    return float((a - b).abs().max()) > 1e-2


# --- identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparsity_zero_is_dense_bit_for_bit(family, dtype):
    model = tiny_model(family, dtype=dtype)
    ids = token_ids(2, 45)
    dense = logits(model, ids)
    with attach(model, tiny_artifact(model), sparsity=0.0) as attachment:
        assert torch.equal(logits(model, ids), dense)
        assert attachment.kept == [INTERMEDIATE] * 3
        assert attachment.stats.sparse_tokens == 0 and attachment.stats.dense_tokens == 90
    with attach(model, tiny_artifact(model), sparsity=0.5):
        assert far(logits(model, ids), dense)  # and at 0.5 it is not


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_detach_gives_the_same_bits_and_leaves_nothing(family, kernel):
    model = tiny_model(family)
    ids = token_ids(1, 40)
    before, state = logits(model, ids), [dict(m.__dict__) for m in model.modules()]
    with attach(model, tiny_artifact(model), kernel=kernel) as attachment:
        assert far(logits(model, ids), before)
        assert all(isinstance(module.__dict__["forward"], SparseFFN) for module in attachment.modules)
    assert torch.equal(logits(model, ids), before)
    for module, old in zip(model.modules(), state, strict=True):
        assert module.__dict__.keys() == old.keys()
        assert all(not hooks for name, hooks in module.__dict__.items() if "hooks" in name and isinstance(hooks, dict))
    attachment.detach()  # a second time does nothing
    assert torch.equal(logits(model, ids), before)


def test_detach_after_an_exception_inside_the_with(model):
    ids = token_ids(1, 40)
    before = logits(model, ids)
    with pytest.raises(RuntimeError, match="user's own"), attach(model, tiny_artifact(model)):
        logits(model, ids)
        raise RuntimeError("the user's own")
    assert torch.equal(logits(model, ids), before)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast(model, kernel):
    """The dense head of a sparse call is what the dense call has: to the rounding of bf16, which the dense FFN computes in."""
    ids = token_ids(2, 45)
    with attach(model, tiny_artifact(model), kernel=kernel) as attachment, torch.autocast("cpu", dtype=torch.bfloat16):
        out = logits(model, ids)
        assert attachment.stats.sparse_tokens == 64
        with attachment.dense():
            dense = logits(model, ids)
    assert out.dtype == dense.dtype == torch.bfloat16
    # Three layers and the head round some ten times at eps = 2^-8.
    torch.testing.assert_close(out[:, :BLOCK], dense[:, :BLOCK], rtol=0, atol=10 * 2**-8 * float(dense.abs().max()))
    assert far(out.float(), dense.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16(family):
    """No kernel of the CPU's but torch knows it. Against fp32 with the same, rounded weights."""
    model = tiny_model(family, dtype=torch.float16)
    ids, artifact = token_ids(2, 45), tiny_artifact(model)
    with attach(model, artifact, predictor=named("static")) as attachment:
        out = logits(model, ids)
        assert attachment.choices["kernel"] == "torch" and attachment.stats.sparse_tokens == 64
        wide = copy.deepcopy(model).float()
        with attach(wide, artifact, predictor=named("static")):
            expected = logits(wide, ids)
    # Each layer rounds at eps * sqrt(H + F) of values of order one: without the norms' amplification, which is not seen here.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2**-10 * (32 + 96) ** 0.5 * float(expected.abs().max()))
    assert far(expected, logits(wide, ids))


# --- batches and padding ------------------------------------------------------------------------------------------------


def padded(ids, side, width, filler):
    """Ids (T,) -> ids, mask (1, width)."""
    pad = filler[: width - len(ids)]
    zero, one = torch.zeros(len(pad), dtype=torch.long), torch.ones(len(ids), dtype=torch.long)
    parts = ([pad, ids], [zero, one]) if side == "left" else ([ids, pad], [one, zero])
    return torch.cat(parts[0])[None], torch.cat(parts[1])[None]


def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family, side):
    # Gemma 2's attention is eager: its softmax is in fp32, and where padding sees nothing NaN in fp64.
    model = tiny_model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    close = SINGLE if family in ("gemma2", *RECURRENT) else EXACT
    lengths = (45, 38, 12)  # the last is shorter than min_tokens: dense
    rows = [token_ids(n, seed=n) for n in lengths]
    ids, mask = (
        torch.cat(t) for t in zip(*(padded(r, side, 45, torch.zeros(45, dtype=torch.long)) for r in rows), strict=True)
    )
    with attach(model, tiny_artifact(model)) as attachment:
        alone = [logits(model, r[None])[0] for r in rows]
        counted = (attachment.stats.sparse_tokens, attachment.stats.dense_tokens)
        # Explicit positions, as `generate` passes them: rotary tables are fp32 and would differ at shifted positions.
        out = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        assert counted == (32 + 24, 13 + 14 + 12)
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (2 * counted[0], 2 * counted[1])
    for row, m, expected in zip(out, mask, alone, strict=True):
        torch.testing.assert_close(row[m.bool()], expected, **close)


@pytest.mark.parametrize("predictor", ["learned", "oracle", "first-block"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_garbage_in_the_padding_changes_nothing(exact_model, side, predictor):
    model, ids = exact_model, token_ids(45)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e3
        model.model.embed_tokens.weight[1] = -1e6
    out = []
    with attach(model, tiny_artifact(model), predictor=named(predictor)) as attachment:
        for filler in (torch.zeros(60, dtype=torch.long), torch.ones(60, dtype=torch.long), token_ids(60, seed=9)):
            padded_ids, mask = padded(ids, side, 60, filler)
            out.append(logits(model, padded_ids, attention_mask=mask)[mask.bool()])
        assert attachment.stats.sparse_tokens == 3 * 32
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


# --- cache, chunks, decode ----------------------------------------------------------------------------------------------


def read_in_chunks(model, ids, edges, mask=None):
    cache, out = DynamicCache(config=model.config), []
    for a, b in zip([0, *edges], [*edges, ids.shape[1]], strict=True):
        extra = {} if mask is None else {"attention_mask": mask[:, :b], "position_ids": positions(mask)[:, a:b]}
        out.append(logits(model, ids[:, a:b], past_key_values=cache, **extra))
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_whole_blocks_equal_one_prefill(family):
    model = tiny_model(family, dtype=torch.float64)
    ids = token_ids(2, 75)
    dense = logits(model, ids)
    with attach(model, tiny_artifact(model)) as attachment:
        at_once = logits(model, ids)
        expected = attachment.stats.sparse_tokens
        chunked, _ = read_in_chunks(model, ids, [24, 40, 56])
        assert attachment.stats.sparse_tokens == 2 * expected == 4 * 64
    torch.testing.assert_close(chunked, at_once, **(SINGLE if family in RECURRENT else EXACT))
    assert far(at_once, dense)


def test_chunks_of_whole_blocks_with_left_padding(exact_model):
    """Blocks are counted from the sequence's first token, so the chunks are cut at 5 + 8 k."""
    model, ids = exact_model, token_ids(75)
    padded_ids, mask = padded(ids, "left", 80, torch.zeros(5, dtype=torch.long))
    with attach(model, tiny_artifact(model)) as attachment:
        at_once = logits(model, ids[None])
        chunked, _ = read_in_chunks(model, padded_ids, [5 + 24, 5 + 56], mask)
        assert attachment.stats.sparse_tokens == 2 * 64
    torch.testing.assert_close(chunked[:, 5:], at_once, **EXACT)


def test_chunks_that_are_not_whole_blocks_leave_their_ends_dense(exact_model):
    """Documented: a block is sparse if all of it lies in the call. Tokens 0..19, 20..39, 40..44 (under min_tokens)."""
    model, ids = exact_model, token_ids(1, 45)
    with attach(model, tiny_artifact(model)) as attachment:
        stats, counts = attachment.stats, []
        cache = DynamicCache(config=model.config)
        for a, b in ((0, 20), (20, 40), (40, 45)):
            out = logits(model, ids[:, a:b], past_key_values=cache)
            counts.append((stats.sparse_tokens, stats.dense_tokens))
            assert bool(torch.isfinite(out).all())
        assert counts == [(8, 12), (8 + 16, 12 + 4), (24, 16 + 5)]
        assert (stats.sparse_calls, stats.dense_calls) == (2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_is_dense_bit_for_bit_given_the_same_cache(family):
    model = tiny_model(family)
    ids, next_ids = token_ids(1, 40), token_ids(1, 3, seed=1)
    with attach(model, tiny_artifact(model)) as attachment:
        _, cache = read_in_chunks(model, ids, [])
        twin = copy.deepcopy(cache)
        attached = [logits(model, next_ids[:, i : i + 1], past_key_values=cache) for i in range(3)]
        attached.append(logits(model, token_ids(1, 15, seed=2), past_key_values=cache))  # a short extension
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (32, 8 + 3 + 15)
    detached = [logits(model, next_ids[:, i : i + 1], past_key_values=twin) for i in range(3)]
    detached.append(logits(model, token_ids(1, 15, seed=2), past_key_values=twin))
    assert all(torch.equal(a, d) for a, d in zip(attached, detached, strict=True))


def test_static_cache(exact_model):
    model, ids = exact_model, token_ids(1, 45)
    with attach(model, tiny_artifact(model)) as attachment:
        dynamic, _ = read_in_chunks(model, ids, [])
        dynamic_chunks, _ = read_in_chunks(model, ids, [24])
        for edges, expected in (([], dynamic), ([24], dynamic_chunks)):
            cache, out = StaticCache(config=model.config, max_cache_len=64), []
            for a, b in zip([0, *edges], [*edges, 45], strict=True):
                out.append(logits(model, ids[:, a:b], past_key_values=cache))
            torch.testing.assert_close(torch.cat(out, 1), expected, **EXACT)
        assert attachment.stats.sparse_tokens == 4 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_counts_and_repeats(family):
    model = tiny_model(family)
    ids = token_ids(1, 45)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    before = model.generate(ids, **arguments)
    with attach(model, tiny_artifact(model)) as attachment:
        out = model.generate(ids, **arguments)
        # 45 prompt tokens: 8 head, 32 sparse, 5 tail. The fifth new token is not read any more.
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (32, 8 + 5 + 4)
        assert (attachment.stats.sparse_calls, attachment.stats.dense_calls) == (1, 4)
        assert attachment.stats.sparse_share == 32 / 49
        assert torch.equal(model.generate(ids, **arguments), out)
        assert out.shape == (1, 50) and torch.equal(out[:, :45], ids)
        # The first new token is the one that a plain sparse forward says.
        assert int(out[0, 45]) == int(logits(model, ids)[0, -1].argmax())
    assert torch.equal(model.generate(ids, **arguments), before)


# --- other ways to call -------------------------------------------------------------------------------------------------


def test_other_ways_to_make_the_same_call(model):
    """Embeddings for ids, arguments by position, positions that run on, a mask of ones or of booleans."""
    ids = token_ids(1, 45)
    ones, positions = torch.ones_like(ids), torch.arange(45)[None]
    with torch.no_grad(), attach(model, tiny_artifact(model)) as attachment:
        expected = model.model(input_ids=ids)[0]
        ways = [
            model.model(ids),
            model.model(ids, ones),
            model.model(ids, ones, positions),
            model.model(input_ids=ids, attention_mask=ones.bool()),
            model.model(inputs_embeds=model.model.embed_tokens(ids)),
        ]
        assert attachment.stats.sparse_tokens == 6 * 32
        restart = torch.cat([torch.arange(20), torch.arange(25)])[None]
        with pytest.warns(UserWarning, match="stayed dense"), attachment.prompt(end=45):
            packed = model.model(ids, ones, restart)[0]  # seen by position too
        assert attachment.stats.sparse_tokens == 6 * 32
        with attachment.dense():
            assert torch.equal(packed, model.model(ids, ones, restart)[0])
    assert all(torch.equal(way[0], expected) for way in ways)


def test_a_cache_handed_over_by_position_is_seen(exact_model):
    model, ids = exact_model, token_ids(1, 45)
    with torch.no_grad(), attach(model, tiny_artifact(model)) as attachment:
        cache = DynamicCache(config=model.config)
        model.model(ids[:, :20], None, None, cache)
        model.model(ids[:, 20:40], None, None, cache)
        assert (attachment.stats.sparse_tokens, attachment.stats.dense_tokens) == (8 + 16, 12 + 4)


# --- threads, other models ----------------------------------------------------------------------------------------------


def test_two_threads_give_the_same_as_in_sequence(model):
    prompts = [token_ids(1, n, seed=n) for n in (45, 60, 33, 12, 100, 17)] * 3
    with attach(model, tiny_artifact(model)) as attachment:
        expected = [logits(model, ids) for ids in prompts]
        counted = attachment.stats.sparse_tokens
        with ThreadPoolExecutor(2) as pool:
            out = list(pool.map(lambda ids: logits(model, ids), prompts))
        assert attachment.stats.sparse_tokens == 2 * counted > 0
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_dense_of_one_thread_is_not_dense_of_another(model):
    ids = token_ids(1, 45)
    dense = logits(model, ids)
    with attach(model, tiny_artifact(model)) as attachment, ThreadPoolExecutor(1) as pool:
        sparse = logits(model, ids)
        with attachment.dense():
            assert torch.equal(logits(model, ids), dense)
            assert torch.equal(pool.submit(logits, model, ids).result(), sparse)
            with attachment.dense():
                pass
            assert torch.equal(logits(model, ids), dense)
        assert torch.equal(logits(model, ids), sparse)


def test_a_model_that_runs_inside_another_leaves_its_plan_alone(model):
    """For instance a forward hook that asks a second attached model."""
    other = tiny_model(seed=1)
    ids = token_ids(1, 45)
    with attach(model, tiny_artifact(model)), attach(other, tiny_artifact(other), block_size=4):
        expected, expected_other, seen = logits(model, ids), logits(other, ids), []
        hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(logits(other, ids)))
        assert torch.equal(logits(model, ids), expected)
        hook.remove()
        assert torch.equal(seen[0], expected_other)
        assert current_plan.get() is None


# --- settings and refusals ----------------------------------------------------------------------------------------------


def test_the_compensator_can_be_left_out(model):
    ids = token_ids(1, 45)
    with attach(model, tiny_artifact(model)):
        with_it = logits(model, ids)
    with attach(model, tiny_artifact(model), compensator=False) as attachment:
        assert all(ffn.compensator is None for ffn in attachment.ffns)
        assert far(logits(model, ids), with_it)


def test_extra_bytes_are_the_transposed_down_and_the_artifact(model):
    artifact = tiny_artifact(model)
    statistics = sum(t.numel() * 4 for name, t in artifact.tensors.items() if "stats" in name)
    with attach(model, artifact) as attachment:
        assert attachment.extra_bytes == 3 * 32 * INTERMEDIATE * 4 + artifact.bytes() - statistics


def test_attached_twice_is_refused_and_the_first_stays(model):
    artifact, ids = tiny_artifact(model), token_ids(1, 45)
    with attach(model, artifact):
        sparse = logits(model, ids)
        with pytest.raises(UserError, match="already attached"):
            attach(model, artifact)
        with pytest.raises(UserError, match="already attached"):
            attach(model.model, artifact)
        assert torch.equal(logits(model, ids), sparse)
    with attach(model, artifact):  # and again after detaching
        assert torch.equal(logits(model, ids), sparse)


@pytest.mark.parametrize(
    "other, words",
    [
        ({"seed": 1}, "same shapes, other weights"),
        ({"num_hidden_layers": 2}, r"shapes \(32, 96, 3\) against \(32, 96, 2\)"),
        ({"intermediate_size": 64}, r"shapes \(32, 96, 3\) against \(32, 64, 3\)"),
    ],
    ids=str,
)
def test_another_models_artifact_is_refused(model, other, words):
    stranger = tiny_model(**other)
    before = [dict(m.__dict__) for m in stranger.modules()]
    with pytest.raises(UserError, match=rf"belongs to another model \(tiny; .*{words}.*fastfill calibrate"):
        attach(stranger, tiny_artifact(model))
    assert [dict(m.__dict__).keys() for m in stranger.modules()] == [old.keys() for old in before]


def test_a_kernel_that_cannot_run_the_models_dtype_is_refused(exact_model):
    with pytest.raises(UserError, match="native"):
        attach(exact_model, tiny_artifact(exact_model), kernel="native")
