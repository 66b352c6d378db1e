import numpy as np
import pytest
import torch
from conftest import BLOCK, HIDDEN, INTERMEDIATE, PREFILL, tiny_artifact, tiny_model

from fastfill import families, kernels
from fastfill.blocks import make_plan
from fastfill.lab.baselines import BASELINES, FirstBlock, LowRank, Oracle, Random

TORCH = kernels.Kernel("torch")
PLAN = make_plan([(0, 32, 0), (5, 32, 0)], 32, PREFILL)  # two sequences, the second left-padded


@pytest.fixture
def ffn():
    return families.dissect(tiny_model(dtype=torch.float64)).ffns[0]


@pytest.fixture
def x():
    return torch.randn(64, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def numpy_energy(x, ffn):
    x, gate, up, down = (np.asarray(t) for t in (x, ffn.gate, ffn.up, ffn.down))
    z = x @ gate.T
    h = z / (1 + np.exp(-z)) * (x @ up.T)
    return (h * np.linalg.norm(down, axis=0)) ** 2


def blocks_of(values):
    return np.stack(
        [v.sum(0) for span in PLAN.spans for v in np.split(values[span.start : span.stop], (span.stop - span.start) // BLOCK)]
    )


# Scores are sums of fp32-rounded terms of one sign: relative error a few eps = 1.2e-7.
CLOSE = {"rtol": 2e-6, "atol": 0}


def test_importance_is_the_energy_a_neuron_adds(x, ffn):
    got = ffn.importance(x)
    torch.testing.assert_close(got.double(), torch.from_numpy(numpy_energy(x, ffn)), rtol=2e-6, atol=1e-12)
    # and that is the squared length of what the neuron alone puts into the output
    h = torch.nn.functional.silu(x @ ffn.gate.T) * (x @ ffn.up.T)
    alone = h[7, 11] * ffn.down[:, 11]
    torch.testing.assert_close(got[7, 11].double(), alone.square().sum(), **CLOSE)


def test_first_block_needs_the_first_block(x, ffn):
    with pytest.raises(ValueError, match="whole prompt"):
        FirstBlock(ffn).scores(x, make_plan([(0, 64, 16)], 64, PREFILL), TORCH)


def test_low_rank_loses_something_at_low_rank_but_beats_random(x, ffn):
    oracle = Oracle(ffn).scores(x, PLAN, TORCH)

    def held(scores):
        return float(oracle.gather(1, kernels.top_k(scores, 32).long()).sum() / oracle.topk(32).values.sum())

    low = held(LowRank(ffn, x.square().mean(0).sqrt(), 12).scores(x, PLAN, TORCH))
    assert held(Random(INTERMEDIATE, 0).scores(x, PLAN, TORCH)) < low < 1.0


def test_random_depends_on_seed_only(x):
    state = torch.get_rng_state()
    one = Random(INTERMEDIATE, 1).scores(x, PLAN, TORCH)
    assert torch.equal(one, Random(INTERMEDIATE, 1).scores(x * 2, PLAN, TORCH))
    assert not torch.equal(one, Random(INTERMEDIATE, 2).scores(x, PLAN, TORCH))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["learned", *BASELINES])
def test_scores_of_a_block_depend_on_its_own_sequence_only(name, x, ffn):
    """Garbage in padding and in the other sequence changes nothing (first-block reads its own sequence's start)."""
    artifact = tiny_artifact(tiny_model())
    predictor = artifact.predictor(0, x) if name == "learned" else BASELINES[name](ffn, 0, artifact.statistics(0, x), 8)
    before = predictor.scores(x, PLAN, TORCH)
    garbage = x.clone()
    garbage[:37] = 1e3  # all of sequence 0 and the padding of sequence 1
    after = predictor.scores(garbage, PLAN, TORCH)
    # The same rows in the same places of the same matrix product: no rounding between them.
    assert torch.equal(before[3:], after[3:])
    if name in ("learned", "oracle", "first-block", "low-rank"):
        assert not torch.equal(before[:3], after[:3])


def test_shards_score_their_own_neurons(x):
    """Two ranks: the softmax runs over a rank's half. 96 neurons, so halves of 48."""
    predictor = tiny_artifact(tiny_model()).predictor(1, x)
    logits = x.numpy() @ predictor.w_in.numpy().T @ predictor.w_out.numpy().T + predictor.bias.numpy()
    for rank in range(2):
        part = logits[:, 48 * rank : 48 * (rank + 1)]
        p = np.exp(part - part.max(1, keepdims=True))
        scores = predictor.shard(rank, 2).scores(x, PLAN, TORCH)
        torch.testing.assert_close(scores.double(), torch.from_numpy(blocks_of(p / p.sum(1, keepdims=True))), **CLOSE)
