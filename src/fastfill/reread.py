"""Tokens that are read a second time: `reread`. That a cache of rough keys and values is mended by computing a few of them anew
is known (CacheBlend: arXiv 2405.16444, for prompts joined of cached pieces); ours is which ones, and that the rough reading is
the sparse one.

    first    the prompt, sparsely; in each layer the last token's attention to every token is remembered
    again    the last token and those behind the dense head that got most of it, with all neurons; each attends to all tokens
             before it, and its keys and values take the place of those that the cache holds
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastfill import attended, kv_cache
from fastfill.blocks import Plan
from fastfill.config import PrefillConfig
from fastfill.sparse_ffn import current_plan

# Why a sparse prompt is read once nevertheless, beside what `attended` has: the keys of `Stats.once_because`.
NO_CACHE = "a call without a cache"
TUPLE = "an output that is a tuple (return_dict=False)"
CUT = "a cache that was cut during the call"
STATES = "hidden states or attentions of all layers are asked for"


@dataclass(eq=False)
class Reread:
    """One prompt that is read again. plan: of its sparse reading. layers: of the model. share: of the tokens behind the dense
    head that are read again. tokens: how many were, once they are. why: none was."""

    plan: Plan
    layers: int
    share: float
    seen: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    why: str | None = None

    def watch(self, layer: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> None:
        if query.shape[2] == self.plan.tokens:
            self.seen.append(attended.shares(query, key, mask, scale, 1).nan_to_num())

    def choose(self) -> Tensor:
        """The columns that are read again, in their order."""
        (span,) = self.plan.spans
        got = torch.stack(self.seen).mean(0)[span.start :]
        got[-1] = torch.inf  # its state is what the answer begins with
        return got.topk(max(1, round(self.share * len(got)))).indices.sort().values + span.start

    def refusal(self, output: Any) -> str | None:
        """Why a call that gave this output is not read again; None if it is."""
        if isinstance(output, tuple):
            return TUPLE
        cache = kv_cache.left(output)
        if cache is None:
            return NO_CACHE
        if not attended.is_plain(cache):
            return attended.CACHE
        if any(layer.keys.shape[2] != self.plan.tokens for layer in cache.layers):
            return CUT
        if len(self.seen) != self.layers:
            return attended.UNSEEN
        if any(getattr(output, name, None) is not None for name in ("hidden_states", "attentions")):
            return STATES
        return None

    @torch.no_grad()
    def run(self, forward: Callable[..., Any], arguments: dict[str, Any], output: Any, cache_name: str) -> None:
        """Read again. Afterwards `output` has the new states of these tokens, and its cache their keys and values.

        forward: the base model's. arguments: its call's, by name. output: what it gave. cache_name: the cache's among them.
        """
        self.why = self.refusal(output)
        if self.why:
            return
        columns, tokens = self.choose(), self.plan.tokens
        seen = torch.arange(tokens, device=columns.device) <= columns[:, None]
        part = {name: attended.of_tokens(value, columns, tokens) for name, value in arguments.items()}
        for name in (kv_cache.NAME, kv_cache.OLD_NAME):
            part.pop(name, None)
        part |= {"attention_mask": seen[None, None], cache_name: _in_place(kv_cache.left(output), columns), "use_cache": True}
        if part.get("position_ids") is None:
            part["position_ids"] = columns[None]
        current_plan.set(Plan(1, len(columns), len(columns), self.plan.block_size, ()))  # no sparse block
        states = output.last_hidden_state
        states[:, columns] = forward(**part).last_hidden_state.to(states.dtype)
        self.tokens = len(columns)


def of_call(
    plan: Plan, config: PrefillConfig, layers: int, cache: Any, rows: Sequence[tuple[int, int, int]], end: int | None
) -> Reread | str:
    """What is read again of a call with this plan, or why nothing is. Arguments as for `attended.refusal`."""
    why = attended.refusal(plan, cache, rows, end) or (NO_CACHE if cache is None else None)
    return why or Reread(plan, layers, config.reread)


def _in_place(cache: Any, columns: Tensor) -> Any:
    """A cache that puts what it is given into these columns of another one's layers, and has no more tokens than that."""
    writer = copy.copy(cache)
    writer.__class__ = _writer()
    writer.columns = columns
    return writer


@functools.cache
def _writer() -> type:
    from transformers import DynamicCache

    class InPlace(DynamicCache):
        columns: Tensor

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            layer: Any = self.layers[layer_idx]
            layer.keys[:, :, self.columns] = key_states.to(layer.keys.dtype)  # autocast may have others
            layer.values[:, :, self.columns] = value_states.to(layer.values.dtype)
            return layer.keys, layer.values

    return InPlace
