"""Costs by hand; each published method against a plain computation of its own; the table against `perplexity.evaluate`."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BLOCK, EXACT, HIDDEN, INTERMEDIATE, LAYERS, logits, tiny_artifact, tiny_model, token_ids
from transformers import DynamicCache

from fastfill import attach, families
from fastfill.ffn import FFN
from fastfill.lab import perplexity, published
from fastfill.lab.baselines import named
from fastfill.lab.resume import Store

CONTINUATION = 12
DOCUMENTS = [("a#0", token_ids(60, seed=1)), ("a#1", token_ids(60, seed=2))]
CALIBRATION = token_ids(2, 40, seed=9)
SPARSE = slice(BLOCK, 56)  # of 60 tokens: behind the head, whole blocks


def states(module):
    return {name: part.__dict__.get("forward") for name, part in module.named_modules()}


CONFIG = SimpleNamespace(hidden_size=4, intermediate_size=6, num_hidden_layers=2, vocab_size=50)
CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim = 2, 1, 2


def test_worked_costs():
    """Multiply-adds of one layer, 3 tokens: FFN 3 x 4 x 6 x 3 = 216; queries and output 2 x 4 x 4 x 3 = 96, keys and values
    half of that; the tokens see 1, 2 and 3, each pair 4 for the score and 4 for the value: 48. In all 408."""
    cost = published.Cost(CONFIG, tokens=3, sparse=2)
    assert cost.ffn_share(0.5) == pytest.approx((2 * 0.5 + 1) / 3)
    assert cost.per_token(cost.ffn_share(0.37)) == pytest.approx(0.37)
    assert cost.whole_share(0.5) == pytest.approx((108 + 96 + 48 + 48) / 408)
    # One layer of two: the first two tokens save their FFN (144), queries and output (64), scores and values (8 x 3).
    assert cost.dropped(1) == pytest.approx((1 - 144 / 432, 1 - (144 + 64 + 24) / 816))
    assert cost.dropped(0) == (1, 1)
    assert [cost.layers_to_drop(share) for share in (1, 0.9, 0.8, 0.5, 0)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("compensator", [True, False])
@pytest.mark.parametrize("name", published.BLOCKWISE)
def test_blockwise_methods_cost_the_same_to_a_neuron(name, compensator):
    """In layers' FFNs of the prompt; the compensator is computed for its 60 tokens, all else for the 48 sparse ones."""
    model = tiny_model()
    artifact = tiny_artifact(model, ranks=(4, 2, 2))
    dense = 3 * HIDDEN * INTERMEDIATE
    budget = (48 * (0.5 + 4 * (HIDDEN + INTERMEDIATE) / dense) + 12 + 60 * 2 * HIDDEN * 4 / dense) / 60
    with attach(model, artifact) as ours:
        cost = published.Cost.of(ours, 60)
        assert (cost.attached(ours), published.skipped(ours)) == (pytest.approx(budget), 0.5)
    sparsity = cost.matched_sparsity(artifact, name, compensator, budget)
    with attach(model, artifact, predictor=named(name), compensator=compensator, sparsity=sparsity) as attachment:
        share, without = cost.attached(attachment), published.skipped(attachment)
    neuron = 0.5 / (LAYERS * INTERMEDIATE) + 1e-9
    assert share == pytest.approx(budget, abs=neuron)
    price = 48 * {"learned": 4, "low-rank": 8}.get(name, 0) * (HIDDEN + INTERMEDIATE) + 60 * compensator * 2 * HIDDEN * 4
    assert 48 * without == pytest.approx(60 * (1 - budget) + price / dense, abs=48 * neuron)


def test_worked_levels():
    values = torch.tensor([[-3.0, 1.0], [2.0, -4.0]])
    assert [published.level(values, share) for share in (0, 0.25, 0.5, 0.74, 0.75, 1)] == [1, 2, 3, 3, 4, math.inf]
    assert published.level(torch.ones(4), 0.5) == 1  # of equal values none is below


def tiny_ffn():
    generator = torch.Generator().manual_seed(4)
    gate, up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 4), (6, 4), (4, 6)))
    return FFN(gate, up, down)


def silu(z):
    return z / (1 + np.exp(-z))


def test_by_input_is_a_plain_loop():
    ffn, x = tiny_ffn(), torch.randn(3, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out, used = published.by_input(x, ffn, published.Levels(math.inf, 0.5, 0.3))
    expected, macs = np.zeros((3, 4)), 0
    for t in range(3):
        large = [i for i in range(4) if abs(float(x[t, i])) >= 0.5]
        macs += 2 * 6 * len(large)
        for j in range(6):
            gate, up = (sum(float(x[t, i] * w[j, i]) for i in large) for w in (ffn.gate, ffn.up))
            hidden = silu(gate) * up
            if abs(hidden) >= 0.3:
                expected[t] += hidden * ffn.down[:, j].numpy()
                macs += 4
    assert used == macs < 3 * 6 * 12
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-14)  # fp64: some ten eps of sums near one


def test_thresholds_touch_sparse_tokens_only():
    """The whole forward against one in which every FFN module is exchanged by hand."""
    model = tiny_model(dtype=torch.float64)
    ids, tally = token_ids(1, 60, seed=3), published.Tally()
    levels = [published.Levels(0.1 * (i + 1), 0, 0) for i in range(LAYERS)]
    dense = logits(model, ids)
    with attach(model, tiny_artifact(model)) as attachment, published.thresholded(attachment, published.by_gate, levels, tally):
        found = logits(model, ids)
        with attachment.dense():
            assert torch.equal(logits(model, ids), dense)

    def plain(part, own):
        def forward(x):
            gate = torch.nn.functional.silu(x @ part.gate.T)
            thin = gate * (gate.abs() >= own.gate)
            gate = torch.cat([gate[:, :BLOCK], thin[:, SPARSE], gate[:, 56:]], dim=1)
            return (gate * (x @ part.up.T)) @ part.down.T

        return forward

    parts = families.dissect(model).ffns
    for part, own in zip(parts, levels, strict=True):
        part.module.forward = plain(part, own)
    torch.testing.assert_close(found, logits(model, ids), **EXACT)
    assert not torch.allclose(found[:, SPARSE], dense[:, SPARSE], atol=1e-3)
    assert 1 / 3 < tally.used / tally.dense < 1 and tally.dense == 48 * LAYERS * 3 * HIDDEN * INTERMEDIATE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dropped_layers_keep_keys_values_and_the_last_token(family):
    model = tiny_model(family, dtype=torch.float64)
    short = tiny_model(family, dtype=torch.float64, num_hidden_layers=1)
    short.load_state_dict({k: v for k, v in model.state_dict().items() if k in short.state_dict()})
    ids = token_ids(1, 40)
    with attach(model, tiny_artifact(model)) as attachment:
        with torch.no_grad(), published.dropped(attachment, LAYERS - 1):
            hidden = model.base_model(input_ids=ids, use_cache=False)[0]
            cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        assert attachment.stats.sparse_tokens == 0
    inside = []  # what the first layer gives on, before the final norm
    hook = short.model.norm.register_forward_pre_hook(lambda _, args: inside.append(args[0]))
    with torch.no_grad():
        cut = short.base_model(input_ids=ids)[0]
    hook.remove()
    torch.testing.assert_close(hidden[:, :-1], cut[:, :-1], **EXACT)
    for index in (1, 2):  # values: of the layer's own projection of its input, which is what the first layer gave
        layer = model.model.layers[index]
        with torch.no_grad():
            values = layer.self_attn.v_proj(layer.input_layernorm(inside[0]))
        got = cache.layers[index].values.transpose(1, 2).reshape(1, 40, -1)
        upto = slice(0, 39)  # the last token went through the layer before
        torch.testing.assert_close(got[:, upto], values[:, upto], **EXACT)
    # The last token: as if it were decoded by the whole model from the cache of those before it.
    with attach(model, tiny_artifact(model)) as attachment, torch.no_grad():
        before = DynamicCache(config=model.config)
        with published.dropped(attachment, LAYERS - 1):
            model.base_model(input_ids=ids[:, :-1], past_key_values=before, use_cache=True)
        # its own last token went through all layers: put back what a prompt token leaves
        for index in (1, 2):
            before.layers[index].keys[:, :, -1] = cache.layers[index].keys[:, :, -2]
            before.layers[index].values[:, :, -1] = cache.layers[index].values[:, :, -2]
        last = model.base_model(input_ids=ids[:, -1:], past_key_values=before, use_cache=True)[0]
    torch.testing.assert_close(hidden[:, -1:], last, **EXACT)


def table(model, artifact, documents=DOCUMENTS, **more):
    attachment = attach(model, artifact)
    return published.evaluate(attachment, artifact, documents, CALIBRATION, continuation=CONTINUATION, **more)


def test_rows_are_what_perplexity_measures_at_equal_arithmetic(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model, ranks=(2, 1, 1))
    read, real = [], perplexity.read_dense
    monkeypatch.setattr(perplexity, "read_dense", lambda *a: (read.append(a[1]), real(*a))[1])
    found = table(model, artifact)
    assert read == ["a#0", "a#1"]  # once each, for all methods together
    assert not any(forward for forward in states(model).values())
    rows = {(row["method"], row["compensator"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 1 + 2 * 6 + 3 and found["rows"][0]["method"] == "dense"
    ours = rows["learned", True]
    per_token = 0.5 + 2 * (HIDDEN + INTERMEDIATE) / (3 * HIDDEN * INTERMEDIATE)
    budget = (48 * per_token + 12 + 60 * 4 * HIDDEN / (3 * HIDDEN * INTERMEDIATE)) / 60
    assert ours["ffn_flops"] == pytest.approx(budget, abs=1e-6) and ours["sparsity"] == 0.5
    cost = published.Cost(model.config, 60, 48)
    for name in published.BLOCKWISE:
        for compensator in (True, False):
            assert rows[name, compensator]["ffn_flops"] == pytest.approx(
                ours["ffn_flops"], abs=0.8 / (LAYERS * INTERMEDIATE) + 1e-6
            )
    for name, compensator in (("learned", True), ("oracle", False), ("random", True)):
        row = rows[name, compensator]
        sparsity = 0.5 if name == "learned" else cost.matched_sparsity(artifact, name, compensator, budget)
        with attach(model, artifact, predictor=named(name), compensator=compensator, sparsity=sparsity) as attachment:
            alone = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
        assert {key: row[key] for key in published.QUALITY} == {key: alone[key] for key in published.QUALITY}
        assert row["kl"] > 0.001
    # Thresholds hold on the text they come from and nearly on other text; the counts are of this text.
    gate, threshold, drop = (rows[name, False] for name in (published.CATS, published.TEAL, published.POP))
    assert gate["ffn_flops"] == pytest.approx((48 * (1 / 3 + 2 / 3 * (1 - gate["sparsity"])) + 12) / 60, abs=2e-6)
    assert threshold["ffn_flops"] == pytest.approx((48 * (1 - threshold["sparsity"]) + 12) / 60, abs=2e-6)
    for row in (gate, threshold):
        assert row["ffn_flops"] == pytest.approx(ours["ffn_flops"], abs=0.03)
    assert drop["sparsity"] == pytest.approx(1 / 3, abs=1e-6)  # the nearest number of three layers
    assert drop["ppl_ratio"] is drop["kl"] is None  # its prompt tokens predict nothing
    assert drop["cont_kl"] == 0  # the last layer gives nothing to any cache: leaving it out is free
    assert (drop["ffn_flops"], drop["prefill_flops"]) == pytest.approx(cost.dropped(1), abs=1e-6)
    assert [row["published_as"] for row in (rows["first-block", True], gate, threshold, drop)] == [
        *("GRIFFIN-like", "CATS-like", "TEAL-like", "POP-like")
    ]
    assert len({row["kl"] for row in found["rows"]}) == len(rows)  # each method is another one


def test_a_context_is_entered_for_the_prompt_and_left_for_the_continuation():
    """Both readings of a method given as a context, against a plain computation."""
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)
    source, ids = DOCUMENTS[0]
    with attach(model, artifact) as attachment:
        dense = perplexity.read_dense(attachment, source, ids, CONTINUATION)
        found = perplexity.read_sparse(attachment, dense, lambda: published.dropped(attachment, 2))
        with published.dropped(attachment, 2):
            strict = logits(model, ids[None])[0]
            cache = DynamicCache(config=model.config)
            logits(model, ids[None, :48], past_key_values=cache)
    after = logits(model, ids[None, 48:], past_key_values=cache)[0]  # detached: dense

    def loss(values, targets):
        return float(torch.nn.functional.cross_entropy(values, targets, reduction="sum"))

    # Losses are summed in fp32: some ten terms of one sign, eps each.
    assert found["strict"]["nll_sparse"] == pytest.approx(loss(strict[SPARSE], ids[BLOCK + 1 : 57]), rel=1e-6)
    assert found["after"]["nll_sparse"] == pytest.approx(loss(after[:-1], ids[49:]), rel=1e-6)


def test_a_killed_run_goes_on(tmp_path):
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)

    class Dies(Store):
        left = 25  # in the middle of a method with a tally

        def add(self, key, row):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().add(key, row)

    whole = table(model, artifact)
    with pytest.raises(KeyboardInterrupt):
        table(model, artifact, store=Dies(tmp_path, {"a": 1}))
    assert not any(forward for forward in states(model).values())
    for resumed in (25, 30):
        rest = table(model, artifact, store=Store(tmp_path, {"a": 1}))
        assert rest.pop("resumed") == resumed
        assert rest == {key: value for key, value in whole.items() if key != "resumed"}
