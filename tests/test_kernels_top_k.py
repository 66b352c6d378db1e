import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastfill import kernels


def numpy_top_k(scores, kept):
    """Independent: full sort, best first, then ids in order."""
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :kept], axis=1)


@given(st.integers(1, 5), st.integers(1, 64), st.data(), st.integers(0, 2**31))
def test_kept_ids_equal_an_independent_top_k(blocks, neurons, data, seed):
    kept = data.draw(st.integers(0, neurons))
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.permutation(neurons) for _ in range(blocks)]).astype(np.float32) - neurons / 2  # no ties
    ids = kernels.top_k(torch.from_numpy(scores), kept)
    assert ids.dtype == torch.int32 and ids.is_contiguous() and ids.shape == (blocks, kept)
    np.testing.assert_array_equal(ids.numpy(), numpy_top_k(scores, kept))


@given(st.integers(1, 40), st.data(), st.integers(0, 2**31))
def test_with_ties_the_kept_scores_are_still_the_best(neurons, data, seed):
    kept = data.draw(st.integers(1, neurons))
    scores = np.random.default_rng(seed).integers(0, 3, (2, neurons)).astype(np.float32)
    ids = kernels.top_k(torch.from_numpy(scores), kept).numpy()
    assert all(len(set(row)) == kept and sorted(row) == list(row) for row in ids.tolist())
    best = -np.sort(-scores, axis=1)[:, :kept]
    np.testing.assert_array_equal(-np.sort(-np.take_along_axis(scores, ids, 1), axis=1), best)


def test_the_check_fails_on_a_wrong_id():
    scores = np.random.default_rng(0).permutation(20)[None].astype(np.float32)
    ids = numpy_top_k(scores, 8)
    worst = int(np.argmin(scores))
    assert worst not in ids
    mutant = np.sort(np.concatenate([ids[:, 1:], [[worst]]], axis=1))
    assert not np.array_equal(mutant, kernels.top_k(torch.from_numpy(scores), 8).numpy())


def test_every_block_selects_for_itself():
    scores = torch.eye(4)
    np.testing.assert_array_equal(kernels.top_k(scores, 1).numpy(), [[0], [1], [2], [3]])
