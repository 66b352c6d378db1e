import dataclasses

import pytest
import torch
from conftest import BLOCK, INTERMEDIATE, LAYERS, logits, tiny_artifact
from test_calibrate import calibrate, change

import fastfill
from fastfill.calibration import limit as limits
from fastfill.calibration.limit import Limit, at_sparsity, highest_sparsity
from fastfill.errors import UserError

LIMITS = [("1%", 0.01, None), (" 0.5 % ", 0.005, None), ("0.02", None, 0.02), (".5", None, 0.5)]


@pytest.mark.parametrize("text, share, kl", LIMITS)
def test_a_limit_is_a_share_or_nats(text, share, kl):
    assert Limit.parse(text) == Limit(share, kl)


@pytest.mark.parametrize("text", ["", "0", "0%", "-1%", "100%", "one", "1e-2", "nan", "1%%", "٣"])
def test_other_limits_are_refused(text):
    with pytest.raises(UserError, match="max_loss must be"):
        Limit.parse(text)


def test_the_highest_that_holds(model, monkeypatch):
    artifact, tokens = tiny_artifact(model), torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(limits, "_loss", lambda _m, _a, _r, sparsity, _p: {"sparsity": sparsity, "kl": sparsity**2})
    for step in range(20):
        limit = Limit(None, (0.05 * step + 0.01) ** 2)
        found = highest_sparsity(model, artifact, tokens, 0.25, limit)
        assert max((row["sparsity"] for row in found if limit.holds(row)), default=0) == pytest.approx(0.05 * step)
        assert len(found) <= 5  # of 19


def test_the_loss_is_that_of_what_follows_a_sparse_prompt(model):
    artifact, tokens = tiny_artifact(model), torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    found = limits._loss(model, artifact, [limits._Reading(model, tokens, 48)], 0.5, 48)
    with fastfill.attach(model, artifact, sparsity=0.5, min_tokens=1) as attached, torch.no_grad():
        cache = model(input_ids=tokens[:, :48], use_cache=True).past_key_values
        with attached.dense():
            sparse = model(input_ids=tokens[:, 48:], past_key_values=cache).logits[0, :-1].log_softmax(-1)
    dense, none = (x.log_softmax(-1) for x in (logits(model, tokens)[0, 48:-1], logits(model, tokens[:, 48:])[0, :-1]))
    nll = [float(-x.gather(1, tokens[0, 49:, None]).mean()) for x in (sparse, dense, none)]
    # Five digits are kept, of fp32 logits near one.
    assert found["kl"] == pytest.approx(float((dense.exp() * (dense - sparse)).sum(-1).mean()), abs=2e-5)
    assert found["nll"] == pytest.approx(nll[0] - nll[1], abs=2e-5)
    lost = (nll[0] - nll[1]) / (nll[2] - nll[1]) if nll[2] > nll[1] else float("inf")
    assert found["context_lost"] == pytest.approx(lost, abs=2e-4)


def test_the_artifact_at_another_sparsity_computes_what_attaching_it_there_would(model):
    artifact = tiny_artifact(model)
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(1))
    with fastfill.attach(model, artifact, sparsity=0.3):
        expected = logits(model, ids)
    moved = at_sparsity(artifact, 0.3)
    assert moved.prefill.sparsity == 0.3 and moved.kept() == artifact.kept(0.3)
    with fastfill.attach(model, moved):
        assert torch.equal(logits(model, ids), expected)
    with fastfill.attach(model, dataclasses.replace(moved, tensors=artifact.tensors)):
        assert not torch.equal(logits(model, ids), expected)  # and the corrections were scaled


def test_calibrate_within_a_limit(model, tokenizer, tmp_path):
    result = calibrate(model, tokenizer, tmp_path / "a", change(max_loss="0.05", steps=2))
    found = result.calibration["max_loss"]
    assert found["limit"] == "0.05" and found["chosen"] == result.prefill.sparsity
    assert all((row["kl"] <= 0.05) == (row["sparsity"] <= found["chosen"]) for row in found["tried"])
    assert result.calibration["sequences"] == 16  # eight of the 24 are set aside
    nothing = calibrate(model, tokenizer, tmp_path / "b", change(max_loss="0.0000001", steps=1))
    assert nothing.prefill.sparsity == 0.0 and nothing.kept() == [INTERMEDIATE] * LAYERS
    with pytest.raises(UserError, match="sets 8 sequences aside"):
        calibrate(model, tokenizer, tmp_path / "c", change(max_loss="1%", sequence_length=24 * BLOCK))
