"""Predictor against oracle on the real forward, against a plain computation layer by layer."""

import pytest
import torch
from conftest import BLOCK, INTERMEDIATE, LAYERS, logits, tiny_artifact, tiny_model, token_ids

from fastfill import attach, families
from fastfill.errors import UserError
from fastfill.lab import recall
from fastfill.lab.baselines import named

DOCUMENTS = [("a#0", token_ids(45, seed=1)), ("a#1", token_ids(64, seed=2))]


def plain(model, artifact, **settings):
    """[blocks, held, best, recall] of every layer: the FFN's inputs and the ids are caught, the rest is sets and sums."""
    sums = torch.zeros(LAYERS, 4, dtype=torch.float64)
    for _, ids in DOCUMENTS:
        inputs, picked = {}, {}
        with attach(model, artifact, **settings) as attachment:
            parts = families.dissect(model).ffns
            for layer, (ffn, part) in enumerate(zip(attachment.ffns, parts, strict=True)):
                part.module.register_forward_pre_hook(lambda _, x, layer=layer, into=inputs: into.update({layer: x[0][0]}))
                ffn.taps.append(selected(picked, layer))
            logits(model, ids[None])
            for layer, part in enumerate(parts):
                part.module._forward_pre_hooks.clear()
                for block, chosen in enumerate(picked[layer].tolist()):
                    start = (block + 1) * BLOCK  # behind the dense head of one block
                    truth = part.importance(inputs[layer][start : start + BLOCK]).sum(0).double()
                    best = truth.argsort(descending=True)[: len(chosen)].tolist()
                    held, most = (truth[ids].sum() / truth.sum() for ids in (chosen, best))
                    sums[layer] += torch.tensor([1, held, most, len(set(chosen) & set(best)) / len(best)])
    return sums


def selected(into, layer):
    return lambda step, _ffn, _plan, ids: into.update({layer: ids}) if step == "selected" else None


@pytest.mark.parametrize("name", ["learned", "static", "random"])
def test_equals_a_plain_computation(model, name):
    artifact, predictor = tiny_artifact(model), named(name)
    expected = plain(model, artifact, predictor=predictor)
    with attach(model, artifact, predictor=predictor) as attachment:
        found = recall.evaluate(attachment, DOCUMENTS)
        assert all(not ffn.taps for ffn in attachment.ffns)
        assert not any(module._forward_pre_hooks for module in attachment.modules)
        for line, (blocks, held, best, common) in zip(found["layers"], expected.tolist(), strict=True):
            assert line["blocks"] == blocks == 4 + 7 and line["kept"] == attachment.kept[line["layer"]]
            # Rounded to 4 digits.
            assert line["held"] == pytest.approx(held / blocks, abs=1e-4)
            assert line["held_oracle"] == pytest.approx(best / blocks, abs=1e-4)
            assert line["recovery"] == pytest.approx(held / best, abs=1e-4)
            assert line["recall"] == pytest.approx(common / blocks, abs=1e-4)
            assert line["by_chance"] == pytest.approx(line["kept"] / INTERMEDIATE, abs=1e-4)
    assert found["held"] < found["held_oracle"] and 0 < found["recall"] < 1
    assert (found["sparse_tokens"], found["dense_tokens"]) == (11 * BLOCK, 45 + 64 - 11 * BLOCK)


def test_the_oracle_agrees_with_itself(model):
    with attach(model, tiny_artifact(model), predictor=named("oracle")) as attachment:
        found = recall.evaluate(attachment, DOCUMENTS)
    assert all(line["recall"] == line["recovery"] == 1 and line["held"] == line["held_oracle"] < 1 for line in found["layers"])


@pytest.mark.parametrize("settings, tokens", [({}, 15), ({"sparsity": 0.0}, 64)])
def test_without_a_sparse_block_there_is_nothing_to_say(settings, tokens):
    model = tiny_model()
    with attach(model, tiny_artifact(model), **settings) as attachment, pytest.raises(UserError, match="all of them dense"):
        recall.evaluate(attachment, [("short#0", token_ids(tokens))])
