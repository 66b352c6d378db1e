"""Attention by chunks: that it is causal attention, which calls it computes, and how it is chosen."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import BLOCK, PREFILL, logits, tiny_artifact, tiny_model, token_ids, user_error
from transformers import DynamicCache

from fastfill import attach, attention
from fastfill.engines.transformers import TransformersEngine
from fastfill.engines.transformers import generate as run_generate

SDPA = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "granite")
TOKENS = 61


@pytest.fixture
def calls(monkeypatch):
    """How many tokens `causal` was given, call by call."""
    found, own = [], attention.causal
    monkeypatch.setattr(attention, "causal", lambda q, k, v, scale: found.append(q.shape[2]) or own(q, k, v, scale))
    return found


OWN_GAIN = attention._gain  # before conftest puts a constant there


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 32)


def parts(tokens, heads=6, groups=2, width=16, batch=2, dtype=torch.float64, shift=0.0):
    generator = torch.Generator().manual_seed(tokens)
    made = [torch.randn(batch, n, tokens, width, generator=generator, dtype=torch.float64) for n in (heads, groups, groups)]
    made[1] += shift
    return [part.to(dtype) for part in made]


def torchs(query, key, value, scale):
    wide = [part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value)]
    return F.scaled_dot_product_attention(query, *wide, is_causal=True, scale=scale).transpose(1, 2)


# --- the arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, groups", [(6, 2), (4, 4), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 100])
def test_it_is_causal_attention(tokens, heads, groups):
    q, k, v = parts(tokens, heads, groups)
    # keys are centred in fp32: its rounding is all that differs
    torch.testing.assert_close(attention.causal(q, k, v, 0.3), torchs(q, k, v, 0.3), rtol=0, atol=2e-6)


def test_strides_do_not_matter():
    q, k, v = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts(50))
    torch.testing.assert_close(attention.causal(q, k, v, 0.3), torchs(q, k, v, 0.3), rtol=0, atol=2e-6)


def test_what_all_keys_share_costs_no_accuracy():
    """Keys that share a vector of length 400, as Qwen2.5's do: in bf16 the scores' errors would be as large as the scores."""
    q, k, v = parts(100, dtype=torch.bfloat16, shift=100.0)
    exact = torchs(*(part.double() for part in (q, k, v)), 0.25)

    def error(y):
        return float((y.double() - exact).norm() / exact.norm())

    ours = error(attention.causal(q, k, v, 0.25))
    scores = (q.view(2, 2, 3, 100, 16).flatten(2, 3) @ k.transpose(-1, -2) * 0.25).view(2, 6, 100, 100)
    shares = scores.masked_fill(torch.ones(100, 100, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    plain = error((shares.view(2, 2, 300, 100) @ v).view(2, 6, 100, 16).transpose(1, 2))
    assert ours < 0.02 < 0.1 < plain  # bf16 has steps of 0.4 to 0.8 %
    assert ours < 2 * error(torchs(q, k, v, 0.25))


# --- which calls --------------------------------------------------------------------------------------------------------


def test_large_scores_are_computed_exactly():
    """Two clusters of keys, which no mean takes off: with scores of 100 bf16 would be off by a quarter of a share."""
    q, k, v = parts(200)
    k = k.sign() * 3 + 0.1 * k
    q, k, v = (part.to(torch.bfloat16) for part in (4 * q, k, v))
    exact = torchs(*(part.double() for part in (q, k, v)), 0.5)
    ours, torch_s = (float((way(q, k, v, 0.5).double() - exact).norm() / exact.norm()) for way in (attention.causal, torchs))
    assert ours < 1.5 * torch_s < 0.01


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_key_that_is_not_finite_reaches_no_token_before_it(bad):
    q, k, v = parts(100)
    wanted = attention.causal(q, k, v, 0.3)
    k[0, 1, 70, 3] = bad
    found = attention.causal(q, k, v, 0.3)
    torch.testing.assert_close(found[0, :70], wanted[0, :70], rtol=0, atol=2e-6)
    assert torch.equal(found[1], wanted[1]) and not found[0, 70:, 3:].isfinite().all()


@pytest.mark.parametrize("family", SDPA)
def test_sparse_prompts_are_those_of_the_models_own_attention(family, calls):
    model = tiny_model(family, dtype=torch.float64)
    ids = token_ids(2, TOKENS)
    found = {}
    for way in ("model", "chunks"):
        with attach(model, tiny_artifact(model), attention=way) as attachment:
            found[way] = logits(model, ids)
            assert attachment.stats.sparse_tokens and attachment.choices["attention_by"].startswith(way)
    assert calls == [TOKENS] * model.config.num_hidden_layers
    torch.testing.assert_close(found["chunks"], found["model"], rtol=1e-5, atol=1e-6)


def test_all_other_calls_are_the_models_own(calls):
    model = tiny_model(dtype=torch.float64)
    ids, layers = token_ids(1, TOKENS), model.config.num_hidden_layers
    plain = logits(model, ids)
    with attach(model, tiny_artifact(model), attention="chunks") as attachment:
        with attachment.dense():
            assert torch.equal(logits(model, ids), plain)
        logits(model, ids[:, :9])  # too short to be sparse
        assert calls == []
        run_generate(model, ids, 3)
        assert calls == [TOKENS] * layers  # the prompt alone, not the steps behind it
    assert torch.equal(logits(model, ids), plain) and len(calls) == layers


def test_models_that_share_a_config_do_as_each_was_told(calls):
    one = tiny_model(dtype=torch.float64)
    two = type(one)(one.config).double().eval()
    with attach(one, tiny_artifact(one), attention="chunks"), attach(two, tiny_artifact(two), attention="model") as plain:
        logits(two, token_ids(1, TOKENS))
        assert calls == [] and plain.choices["attention_by"] == "model (asked for)"
        logits(one, token_ids(1, TOKENS))
        assert len(calls) == one.config.num_hidden_layers
    assert one.config._attn_implementation == "sdpa"
    first, second = attach(one, tiny_artifact(one), attention="chunks"), attach(two, tiny_artifact(two), attention="chunks")
    first.detach()
    calls.clear()
    logits(one, token_ids(1, TOKENS))
    assert calls == []
    second.detach()
    assert one.config._attn_implementation == "sdpa"


def test_what_is_recorded_is_what_runs(calls, monkeypatch):
    model = tiny_model(dtype=torch.float64)
    with attach(model, tiny_artifact(model), attention="chunks", sparsity=0.0) as attachment:
        logits(model, token_ids(1, TOKENS))
        assert calls == [] and attachment.choices["attention_by"] == "model (no call is sparse)"
    with attach(model, tiny_artifact(model), attention="chunks") as attachment:
        model.set_attn_implementation("eager")
        logits(model, token_ids(1, TOKENS))
        assert calls == [] and attachment.choices["attention_by"] == "model (its attention was changed while attached)"


@pytest.mark.parametrize(
    "more, taken",
    [
        ({}, True),
        ({"is_causal": False}, False),
        ({"dropout": 0.1}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"softcap": 50.0}, False),
        ({"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool)}, False),
        ({"key": torch.zeros(1, 2, 9, 16)}, False),
        ({"value": torch.zeros(1, 2, 8, 12)}, False),
        ({"query": torch.zeros(1, 6, 8, 16, dtype=torch.float16)}, False),
    ],
    ids=str,
)
def test_it_takes_plain_causal_calls_alone(more, taken):
    given = {"query": torch.zeros(1, 6, 8, 16), "key": torch.zeros(1, 2, 8, 16), "value": torch.zeros(1, 2, 8, 16)}
    given |= {"attention_mask": None, **more}
    first = [given.pop(name) for name in ("query", "key", "value", "attention_mask")]
    assert attention._plain(torch.nn.Module(), *first, given) == taken


@pytest.mark.parametrize("what", ["padding", "a cache", "gradients"])
def test_what_is_more_than_whole_prompts_is_the_models_own(what, calls):
    model = tiny_model(dtype=torch.float64)
    ids = token_ids(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def run():
        if what == "padding":
            return logits(model, ids, attention_mask=mask)
        if what == "a cache":
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(input_ids=ids[:, :BLOCK], past_key_values=cache)
                return model(input_ids=ids[:, BLOCK:], past_key_values=cache).logits
        return model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_()).logits

    found = []
    for way in ("model", "chunks"):
        with attach(model, tiny_artifact(model), attention=way) as attachment:
            found.append(run())
            assert attachment.stats.sparse_tokens
    assert calls == [] and torch.equal(*found)


def test_a_window_is_kept(calls):
    """Mistral's: a prompt longer than its window has a mask, and is the model's own."""
    model = tiny_model("mistral", dtype=torch.float64, sliding_window=24)
    found = []
    for way in ("model", "chunks"):
        with attach(model, tiny_artifact(model), attention=way):
            found.append(logits(model, token_ids(1, TOKENS)))
    assert calls == [] and torch.equal(*found)


def test_upper_layers_attend_by_chunks_to_what_they_read(calls):
    model = tiny_model(dtype=torch.float64)
    settings = PREFILL.with_(upper_share=0.5, dense_tail=BLOCK)
    ids, found = token_ids(1, TOKENS), []
    for way in ("model", "chunks"):
        attachment = attach(model, tiny_artifact(model), settings.with_(attention=way))
        with attachment, attachment.prompt(TOKENS), torch.no_grad():
            found.append(model.model(input_ids=ids).last_hidden_state)
    assert len(calls) == model.config.num_hidden_layers and min(calls) < TOKENS
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_all_neurons_is_measured_with_it(calls):
    model = tiny_model(dtype=torch.bfloat16)
    with attach(model, tiny_artifact(model), attention="chunks") as attachment:
        engine = TransformersEngine(attachment, "tiny")
        with engine.all_neurons():
            engine.prefill(token_ids(1, TOKENS))
        assert len(calls) == model.config.num_hidden_layers
        with engine.dense():
            engine.prefill(token_ids(1, TOKENS))
        assert len(calls) == model.config.num_hidden_layers


def test_detached_copied_and_pickled_it_is_the_models_own():
    model = tiny_model(dtype=torch.float64)
    with attach(model, tiny_artifact(model), attention="chunks"):
        names = {made.config._attn_implementation for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))}
        assert model.config._attn_implementation != "sdpa"
    assert {model.config._attn_implementation} == names == {"sdpa"}


# --- the choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain, way", [(1.05, "model"), (1.2, "chunks")])
def test_auto_takes_it_where_it_gains(monkeypatch, gain, way):
    monkeypatch.setattr(attention, "_gain", lambda config, dtype: gain)
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_model(dtype=dtype)
        with attach(model, tiny_artifact(model)) as attachment:
            assert attachment.choices["attention_by"] == f"{way} (by chunks {gain:.2f}x as fast at 1024 tokens)"
    model = tiny_model(dtype=torch.float64)
    with attach(model, tiny_artifact(model)) as attachment:
        assert attachment.choices["attention_by"] == "model (by chunks is for bf16 and fp32 on the CPU)"
    model = tiny_model(dtype=torch.bfloat16, attn_implementation="eager")
    with attach(model, tiny_artifact(model)) as attachment:
        assert attachment.choices["attention_by"] == "model (it is not sdpa)"
    with user_error("this model runs 'eager'"):
        attach(model, tiny_artifact(model), attention="chunks")
    with user_error("attention must be auto or model or chunks"):
        attach(model, tiny_artifact(model), attention="flash")


def test_the_measurement_is_remembered_and_mistrusted(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "TOKENS", 64)
    asked, config = [], tiny_model().config
    monkeypatch.setattr(attention, "measure", lambda *shape: asked.append(shape) or 2.5)
    assert OWN_GAIN(config, torch.bfloat16) == OWN_GAIN(config, torch.bfloat16) == 2.5
    assert len(asked) == 1 and asked[0][0] == config.num_attention_heads and asked[0][1] == config.num_key_value_heads
    (file,) = (tmp_path / "choices").glob("attention-*.json")
    for text in ("", "{}", '{"gain": -1}', '{"gain": "fast"}', "[1]", '{"gain": NaN}'):
        file.write_text(text)
        assert OWN_GAIN(config, torch.bfloat16) == 2.5 and json.loads(file.read_text()) == {"gain": 2.5}
    assert len(asked) == 7


def test_it_is_measured_on_the_models_heads(monkeypatch):
    monkeypatch.setattr(attention, "TOKENS", 64)
    own = attention.causal
    monkeypatch.setattr(attention, "causal", lambda *parts: list(map(own, *([part] * 40 for part in parts))))
    slow = attention.measure(6, 2, 16, torch.bfloat16)
    monkeypatch.setattr(attention, "causal", lambda *parts: None)
    assert 0 < slow < 1 < attention.measure(6, 2, 16, torch.bfloat16)
