"""Scores -> ids. Pure functions."""

from __future__ import annotations

import torch


def top_k(scores: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` best-scored neurons of each block, in ascending order.

    scores: (N, F). Returns int32 (N, K). Ascending order makes the kernel's reads walk forward through the weights.
    """
    if kept == scores.shape[1]:
        return torch.arange(kept, dtype=torch.int32, device=scores.device).expand(scores.shape[0], -1).contiguous()
    ids = torch.topk(scores, kept, dim=1, sorted=False).indices
    return ids.to(torch.int32).sort(dim=1).values
