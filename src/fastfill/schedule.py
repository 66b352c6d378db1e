"""Per-layer sparsity: spend the neuron budget where it matters. The mean over layers equals the target. Ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_LAYER_SPARSITY = 0.8
"""No layer is thinned further, unless the target itself is higher."""


def allocate(importance: Sequence[float], sparsity: float, intermediate: int) -> list[int]:
    """Neurons kept per layer, K_l, with sum(K_l) == round((1 - sparsity) * L * F).

    importance: w_l > 0, cost of thinning layer l. Minimises sum_l w_l s_l^3 under mean(s_l) = sparsity and
    0 <= s_l <= s_max, whose solution is s_l = min(s_max, c / sqrt(w_l)). The cube is measured: strict perplexity of
    SmolLM2-135M at 50 % is 2.11x dense when the cost is taken as quadratic, 1.99x as cubic, 2.36x uniform (docs/log.md).
    """
    layers = len(importance)
    if any(not w > 0 for w in importance):
        raise ValueError("layer importances must be positive and finite")
    limit = max(MAX_LAYER_SPARSITY, sparsity)
    weights = [math.sqrt(w) for w in importance]
    low, high = 0.0, limit * max(weights)
    for _ in range(200):  # bisection on c: the mean grows with it
        middle = (low + high) / 2
        mean = sum(min(limit, middle / w) for w in weights) / layers
        low, high = (middle, high) if mean < sparsity else (low, middle)
    skipped = [min(limit, high / w) * intermediate for w in weights]
    total = layers * intermediate - round((1 - sparsity) * layers * intermediate)
    floors = [int(s) for s in skipped]
    # Largest remainders get the neurons that rounding down left over, so the sum is exact.
    order = sorted(range(layers), key=lambda i: floors[i] - skipped[i])
    left = total - sum(floors)
    for index in order[: max(left, 0)]:
        floors[index] += 1
    for index in order[::-1][: max(-left, 0)]:
        floors[index] -= 1
    return [intermediate - s for s in floors]
