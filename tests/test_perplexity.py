"""Both readings against an independent, plain computation: whole logits, fp64 numpy, token by token."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BLOCK, FAMILIES, logits, tiny_artifact, tiny_model, token_ids
from torch import nn
from transformers import DynamicCache

from fastfill import attach
from fastfill.errors import UserError
from fastfill.lab import perplexity
from fastfill.lab.baselines import named

CONTINUATION = 12
DOCUMENTS = [("a#0", token_ids(60, seed=1)), ("a#1", token_ids(64, seed=2)), ("a#2", token_ids(45, seed=3))]


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def one_by_one(model, ids, cache):
    """Dense reading, one token at a time, as decode does."""
    return np.concatenate([log_softmax(logits(model, t.view(1, 1), past_key_values=cache)[0]) for t in ids])


def plain(model, artifact, continuation=CONTINUATION, **settings):
    """Pooled [nll dense, nll sparse, KL, agreement] of each reading, and the NLL without context."""
    block = settings.get("block_size", BLOCK)
    sums = {"strict": np.zeros(4), "cont": np.zeros(4)}
    counts, alone = {"strict": 0, "cont": 0}, 0.0

    def add(name, dense, sparse, targets):
        rows = range(len(targets))
        kl = (np.exp(dense) * (dense - sparse)).sum()
        agree = (dense.argmax(-1) == sparse.argmax(-1)).sum()
        sums[name] += [-dense[rows, targets].sum(), -sparse[rows, targets].sum(), kl, agree]
        counts[name] += len(targets)

    for _, ids in DOCUMENTS:
        n = len(ids)
        dense = log_softmax(logits(model, ids[None])[0])
        with attach(model, artifact, **settings):
            sparse = log_softmax(logits(model, ids[None])[0])
            cache = DynamicCache(config=model.config)
            logits(model, ids[None, : n - continuation], past_key_values=cache)
        after = one_by_one(model, ids[n - continuation :], cache)  # detached: dense from the sparse cache
        bare = one_by_one(model, ids[n - continuation :], DynamicCache(config=model.config))
        # Strict: positions whose own block is whole and behind the head of one block, and that have a next token.
        here = [t for t in range(BLOCK, n // block * block) if t + 1 < n and t // block * block >= BLOCK]
        add("strict", dense[here], sparse[here], ids.numpy()[[t + 1 for t in here]])
        targets = ids.numpy()[n - continuation + 1 :]
        add("cont", dense[n - continuation : -1], after[:-1], targets)
        alone -= bare[range(len(targets)), targets].sum()
    return sums, counts, alone


SETTINGS = [{"block_size": 4}, {"predictor": named("first-block")}, {"compensator": False}]


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((f, {}) for f in FAMILIES), *(("llama", s) for s in SETTINGS)],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_both_readings_equal_a_plain_computation(family, settings):
    model = tiny_model(family, dtype=torch.float64)
    artifact = tiny_artifact(model)
    sums, counts, alone = plain(model, artifact, **settings)
    with attach(model, artifact, **settings) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
    assert (found["documents"], found["tokens"], found["cont_tokens"]) == (3, counts["strict"], counts["cont"])
    for name, prefix in (("strict", ""), ("cont", "cont_")):
        dense, sparse, kl, agree = sums[name] / counts[name]
        # Results are rounded to 4 digits (KL: 5) and summed in fp32 over some hundred tokens.
        assert found[f"{prefix}ppl_dense"] == pytest.approx(math.exp(dense), rel=1e-5, abs=1e-4)
        assert found[f"{prefix}ppl_sparse"] == pytest.approx(math.exp(sparse), rel=1e-5, abs=1e-4)
        assert found[f"{prefix}ppl_ratio"] == pytest.approx(math.exp(sparse - dense), abs=1e-4)
        assert found[f"{prefix}kl"] == pytest.approx(kl, abs=2e-5)
        assert found[f"{prefix}top1_agreement"] == pytest.approx(agree, abs=1e-4)
        assert kl > 0.01  # the sparse reading is another one
    assert found["no_context_ppl"] == pytest.approx(math.exp(alone / counts["cont"]), rel=1e-5, abs=1e-4)
    worth = alone - sums["cont"][0]
    if worth > 0:
        assert found["context_kept"] == pytest.approx((alone - sums["cont"][1]) / worth, rel=1e-4, abs=1e-3)
    else:
        assert found["context_kept"] is None


def test_the_first_token_of_the_continuation_is_read_densely():
    """Counted: continuation - 1 targets a document; none of them depends on a sparse token's own logits."""
    model = tiny_model()
    with attach(model, tiny_artifact(model)) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS[:1], continuation=CONTINUATION)
        # 60 tokens: strict 8..55 sparse; prefix of 48: 8..47 sparse; dense readings are not counted
        assert found["sparse_tokens"] == 48 + 40
        assert found["dense_tokens"] == (60 - 48) + (48 - 40) + 12
    assert found["cont_tokens"] == CONTINUATION - 1 and found["tokens"] == 48


def test_at_sparsity_zero_nothing_is_lost():
    model = tiny_model(dtype=torch.float64)
    with attach(model, tiny_artifact(model), sparsity=0.0) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
    assert found["ppl_ratio"] == found["cont_ppl_ratio"] == 1
    assert found["ppl_dense"] == found["ppl_sparse"] and found["cont_ppl_dense"] == found["cont_ppl_sparse"]
    assert abs(found["kl"]) == abs(found["cont_kl"]) == 0
    assert found["top1_agreement"] == found["cont_top1_agreement"] == 1
    assert found["context_kept"] in (1, None)


class Table(nn.Module):
    """A model whose head gives back what it gets: hidden states are logits."""

    config = SimpleNamespace()

    def get_output_embeddings(self):
        return nn.Identity()


def test_worked_numbers():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    sparse = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]).log()
    sums = perplexity._Sums()
    sums.add(Table(), dense, sparse, torch.tensor([0, 2]))
    # dense: -ln(1/2 1/4) / 2 = 3/2 ln 2; sparse: -ln(1/4 1/4) / 2 = 2 ln 2. KL: (1/2 ln 2 - 1/4 ln 2) / 2 = ln 2 / 8.
    assert sums.result("x_") == {
        "x_ppl_dense": round(2**1.5, 4),
        "x_ppl_sparse": 4.0,
        "x_ppl_ratio": round(2**0.5, 4),
        "x_kl": round(math.log(2) / 8, 5),
        "x_top1_agreement": 0.5,
    }


@pytest.mark.parametrize("tokens", [15, 16, 27])
def test_a_document_without_a_sparse_part_is_refused(tokens):
    model = tiny_model()
    with (
        attach(model, tiny_artifact(model)) as attachment,
        pytest.raises(UserError, match=rf"short#0 has {tokens} tokens, too few"),
    ):
        perplexity.evaluate(attachment, [("short#0", token_ids(tokens))], continuation=CONTINUATION)


def test_a_continuation_longer_than_min_tokens_is_still_dense():
    """Reading many tokens at once after the prefix must not become a sparse prefill of its own."""
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)
    sums, counts, _ = plain(model, artifact, continuation=24)
    with attach(model, artifact) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS, continuation=24)
    assert found["cont_kl"] == pytest.approx(sums["cont"][2] / counts["cont"], abs=2e-5)


@pytest.mark.parametrize("chunk", [256, 7])
def test_the_curve_is_the_strict_reading_by_position(monkeypatch, chunk):
    monkeypatch.setattr(perplexity, "BUCKET", 16)
    monkeypatch.setattr(perplexity, "CHUNK", chunk)
    model = tiny_model(dtype=torch.float64)
    artifact = tiny_artifact(model)
    expected = {}
    for _, ids in DOCUMENTS:
        dense = log_softmax(logits(model, ids[None])[0])
        with attach(model, artifact):
            sparse = log_softmax(logits(model, ids[None])[0])
        for t in range(BLOCK, min(len(ids) // BLOCK * BLOCK, len(ids) - 1)):
            expected.setdefault(t // 16, []).append((-dense[t, ids[t + 1]], -sparse[t, ids[t + 1]]))
    with attach(model, artifact) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
    assert [point["from"] for point in found["curve"]] == [16 * bucket for bucket in sorted(expected)] == [0, 16, 32, 48]
    for point, (_, losses) in zip(found["curve"], sorted(expected.items()), strict=True):
        assert point["tokens"] == len(losses) and point["to"] == point["from"] + 16
        assert (point["nll_dense"], point["nll_sparse"]) == pytest.approx(np.mean(losses, axis=0), abs=1e-4)
    assert sum(point["tokens"] for point in found["curve"]) == found["tokens"]


def test_intervals_hold_the_ratio_and_one_document_has_none():
    model = tiny_model()
    with attach(model, tiny_artifact(model)) as attachment:
        found = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
        again = perplexity.evaluate(attachment, DOCUMENTS, continuation=CONTINUATION)
        single = perplexity.evaluate(attachment, DOCUMENTS[:1], continuation=CONTINUATION)
    for prefix in ("", "cont_"):
        low, high = found[f"{prefix}ppl_ratio_interval"]
        assert low < found[f"{prefix}ppl_ratio"] < high and single[f"{prefix}ppl_ratio_interval"] is None
    assert found == again
