"""Which neurons are picked: an example by hand, and the real forward against sets and counts in plain Python."""

import base64
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import INTERMEDIATE, LAYERS, logits, tiny_artifact, tiny_model, token_ids

from fastfill import attach
from fastfill.errors import UserError
from fastfill.lab import picks
from fastfill.lab.baselines import named

DOCUMENT = ("a#0", token_ids(45, seed=1))  # a dense head of 8, four blocks of 8, a tail of 5


def test_by_hand():
    """Four neurons, three blocks: layer 0 picks {0,1}, {1,2}, {1,2}; layer 1 keeps all; layer 2 picks {3}, {0}, {3}."""
    attachment = SimpleNamespace(kept=[2, 4, 1], ffns=[SimpleNamespace(ffn=SimpleNamespace(neurons=4))])
    seen = [[torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1, 2]])], [], [torch.tensor([[3], [0], [3]])]]
    third = 1 / 3
    assert picks.summarize(attachment, seen, mapped=[0, 2]) == {
        "layers": 3,
        "neurons": 4,
        "blocks": 3,
        "kept": [2, 4, 1],
        "share": [[1, round(2 * third, 4), round(third, 4), 0], [1, 1, 1, 1], [round(2 * third, 4), round(third, 4), 0, 0]],
        "overlap": [0.75, 1, 0],  # one of two, then two of two
        "always": [0.25, 1, 0],
        "never": [0.25, 0, 0.5],
        "maps": [  # 1100, 0110, 0110 and 0001, 1000, 0001 in the high half of a byte
            {"layer": 0, "blocks": [base64.b64encode(bytes([b])).decode() for b in (0xC0, 0x60, 0x60)]},
            {"layer": 2, "blocks": [base64.b64encode(bytes([b])).decode() for b in (0x10, 0x80, 0x10)]},
        ],
    }


def plain(model, artifact, **settings):
    """Per layer the list of its blocks' sets, caught by an observer of its own."""
    with attach(model, artifact, **settings) as attachment:
        caught = {}
        for layer, ffn in enumerate(attachment.ffns):
            ffn.taps.append(selected(caught, layer))
        logits(model, DOCUMENT[1][None])
    return [caught[layer] for layer in range(LAYERS)]


def selected(into, layer):
    def tap(step, _ffn, _plan, ids):
        if step == "selected":
            into[layer] = [set(row) for row in ids.tolist()]

    return tap


def check(found, sets):
    assert (found["layers"], found["neurons"], found["blocks"]) == (LAYERS, INTERMEDIATE, 4)
    assert [entry["layer"] for entry in found["maps"]] == [0, 1, 2]
    for layer, blocks in enumerate(sets):
        counts = sorted((sum(j in block for block in blocks) for j in range(INTERMEDIATE)), reverse=True)
        bins = [counts[2 * i : 2 * i + 2] for i in range(32)] + [[c] for c in counts[64:]]  # 96 neurons, 64 bins
        # Rounded to 4 digits.
        assert found["share"][layer] == pytest.approx([sum(b) / len(b) / 4 for b in bins], abs=1e-4)
        shared = [len(a & b) / len(b) for a, b in itertools.pairwise(blocks)]
        assert found["overlap"][layer] == pytest.approx(sum(shared) / 3, abs=1e-4)
        assert found["always"][layer] == pytest.approx(counts.count(4) / INTERMEDIATE, abs=1e-4)
        assert found["never"][layer] == pytest.approx(counts.count(0) / INTERMEDIATE, abs=1e-4)
        for block, text in zip(blocks, found["maps"][layer]["blocks"], strict=True):
            bits = base64.b64decode(text)
            assert len(bits) == INTERMEDIATE // 8
            assert {j for j in range(INTERMEDIATE) if bits[j // 8] >> (7 - j % 8) & 1} == block


@pytest.mark.parametrize("predictor", ["learned", "oracle", "static", "first-block", "low-rank", "random"])
def test_equals_sets_and_counts(model, predictor):
    artifact = tiny_artifact(model)
    sets = plain(model, artifact, predictor=named(predictor))
    with attach(model, artifact, predictor=named(predictor)) as attachment:
        found = picks.evaluate(attachment, DOCUMENT)
        assert all(not ffn.taps for ffn in attachment.ffns)
    check(found, sets)
    assert found["kept"] == [len(blocks[0]) for blocks in sets]
    assert (found["document"], found["tokens"], found["sparse_tokens"], found["dense_tokens"]) == ("a#0", 45, 32, 13)
    if predictor in ("static", "first-block"):
        assert found["overlap"] == [1] * LAYERS
        assert found["always"] == pytest.approx([kept / INTERMEDIATE for kept in found["kept"]], abs=1e-4)


def test_one_block_has_no_overlap(model):
    with attach(model, tiny_artifact(model)) as attachment:
        found = picks.evaluate(attachment, ("short#0", token_ids(16)))
    assert found["blocks"] == 1 and found["overlap"] == [None] * LAYERS
    assert found["always"] == pytest.approx([kept / INTERMEDIATE for kept in found["kept"]], abs=1e-4)


def test_watching_changes_nothing_and_ends_with_an_error_too(model):
    ids = DOCUMENT[1][None]
    with attach(model, tiny_artifact(model)) as attachment:
        before = logits(model, ids)
        with pytest.raises(KeyError), picks.watch(attachment):
            assert torch.equal(before, logits(model, ids))
            raise KeyError
        assert all(not ffn.taps for ffn in attachment.ffns)


@pytest.mark.parametrize("settings, tokens", [({}, 15), ({"sparsity": 0.0}, 64)])
def test_without_a_sparse_block_there_is_nothing_to_say(settings, tokens):
    model = tiny_model()
    with attach(model, tiny_artifact(model), **settings) as attachment, pytest.raises(UserError, match="stay dense"):
        picks.evaluate(attachment, ("short#0", token_ids(tokens)))
