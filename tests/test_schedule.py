import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastfill.schedule import MAX_LAYER_SPARSITY, allocate

importances = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40)
sparsities = st.floats(0, 0.95)
widths = st.integers(20, 16384)


@given(importances, sparsities, widths)
def test_the_sum_is_exact_and_every_layer_in_bounds(importance, sparsity, width):
    kept = allocate(importance, sparsity, width)
    assert len(kept) == len(importance)
    assert sum(kept) == round((1 - sparsity) * len(kept) * width)
    most = math.ceil(max(MAX_LAYER_SPARSITY, sparsity) * width)  # neurons skipped at most, to rounding
    assert all(isinstance(k, int) and width - most <= k <= width for k in kept)


@given(importances, sparsities, widths)
def test_more_important_layers_keep_no_fewer(importance, sparsity, width):
    kept = allocate(importance, sparsity, width)
    pairs = sorted(zip(importance, kept, strict=True))
    # Rounding to whole neurons may turn an exact tie into a difference of one.
    assert all(a[1] <= b[1] + 1 for a, b in itertools.pairwise(pairs))


@given(st.integers(1, 40), sparsities, widths)
def test_equal_layers_share_equally(layers, sparsity, width):
    kept = allocate([3.0] * layers, sparsity, width)
    assert max(kept) - min(kept) <= 1


@given(importances, widths)
def test_sparsity_zero_keeps_everything(importance, width):
    assert allocate(importance, 0.0, width) == [width] * len(importance)


@given(importances, sparsities, widths, st.floats(1e-3, 1e3))
def test_only_ratios_of_importance_matter(importance, sparsity, width, scale):
    kept = allocate(importance, sparsity, width)
    scaled = allocate([w * scale for w in importance], sparsity, width)
    assert all(abs(a - b) <= 1 for a, b in zip(kept, scaled, strict=True))


def test_worked_numbers():
    # s_l = c / sqrt(w_l) with mean 0.3 over weights 1, 4: c (1 + 1/2) / 2 = 0.3, c = 0.4: s = 0.4 and 0.2.
    assert allocate([1.0, 4.0], 0.3, 1000) == [600, 800]
    # Weight 1 would get 0.99, is held at 0.8, and 0.2 is left for the other.
    assert allocate([1.0, 10000.0], 0.5, 1000) == [200, 800]


@pytest.mark.parametrize("importance", [[1.0, 0.0], [1.0, -1.0], [float("nan"), 1.0]])
def test_importance_must_be_positive(importance):
    with pytest.raises(ValueError, match="positive"):
        allocate(importance, 0.5, 100)
