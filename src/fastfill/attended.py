"""What the last tokens of a prompt attend to, and of which prompts that is used: for `upper_share` and `reread`."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from fastfill.blocks import Plan

# Why it is not used for a sparse call: the keys of `Stats.whole_because` and `Stats.once_because`.
UNTOLD = "nobody said where the prompt ends"
UNSEEN = "attention that was changed while attached"
SEVERAL = "several sequences, or padding"
PIECES = "a prompt that is not one call"
CACHE = "another cache than a DynamicCache of full attention"
GRADIENT = "gradients are recorded"


class Watcher(Protocol):
    """Is told of the attention of each layer while a prompt's call runs."""

    def watch(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        """query: (1, heads, T, d). key: (1, key heads, T, d). mask: (1, 1, T, T), None if causal."""


# Of the call that is running.
watcher: ContextVar[Watcher | None] = ContextVar("fastfill_watcher", default=None)


def refusal(plan: Plan, cache: Any, rows: Sequence[tuple[int, int, int]], end: int | None) -> str | None:
    """Why what the end of this prompt attends to is not used; None if it is.

    rows: as for `make_plan`. end: columns of the prompt, where somebody said so. cache: that of the call; None for one without.
    """
    if end is None:
        return UNTOLD
    if len(rows) != 1 or rows[0][0] or rows[0][1] != plan.tokens:
        return SEVERAL
    if rows[0][2] or end != plan.tokens:
        return PIECES
    if torch.is_grad_enabled():
        return GRADIENT
    return None if cache is None or is_plain(cache) else CACHE


@torch.no_grad()
def shares(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, last: int) -> Tensor:
    """The attention that goes to each token, (T,): mean over heads and the last queries. Arguments as for `Watcher.watch`.
    In fp32: products of fp16 may be too large for it."""
    tokens = query.shape[2]
    asking = torch.arange(max(0, tokens - last), tokens, device=key.device)
    asks, keys = query[0, :, -len(asking) :].float(), key[0].float()
    logits = asks.reshape(len(keys), -1, asks.shape[-1]) @ keys.transpose(1, 2) * scale
    logits = logits.view(len(asks), -1, tokens)  # (heads, last, T)
    if mask is None:
        logits = logits.masked_fill(torch.arange(tokens, device=key.device) > asking[:, None], -torch.inf)
    else:
        part = mask[0, :, -len(asking) :]
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
    return logits.softmax(-1).mean((0, 1))


def of_tokens(value: Any, columns: Tensor, tokens: int) -> Any:
    """The part of an argument that belongs to some tokens of T: of ids, positions, their embeddings, masks (1, 1, T, T)."""
    if isinstance(value, tuple):
        return tuple(of_tokens(one, columns, tokens) for one in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4:
        return value.index_select(2, columns).index_select(3, columns)
    dim = min(1, value.ndim - 1)
    return value.index_select(dim, columns) if value.ndim and value.shape[dim] == tokens else value


def own_cache(config: Any) -> Any:
    """What a transformers model makes where it is given no cache. config: the base model's."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def is_plain(cache: Any) -> bool:
    """Whether it is transformers' own, holds every token of every layer, and nothing else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) is DynamicLayer for layer in cache.layers)
