"""Scores -> ids. Pure functions."""

from __future__ import annotations

import torch

from fastfill import kernels


def top_k(scores: torch.Tensor, kept: int, kernel: str = "auto") -> torch.Tensor:
    """The `kept` best-scored neurons of each block, in ascending order.

    scores: (N, F). Returns int32 (N, K). Of equal scores the lowest ids are kept; NaN counts as infinity. Ascending order
    makes the kernel's reads walk forward through the weights.
    """
    return kernels.top_k(scores, kept, kernel=kernel)
