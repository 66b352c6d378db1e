"""Upper layers that read only the blocks a prompt's question looks at: `upper_share`. That a prompt's last tokens rank its
tokens, and that upper layers lose little without the others, is known (GemFilter, FastKV, CLAA: arXiv 2602.16054); ours is
that it is by whole blocks, beside the sparse FFN.

    layers below 2/3        all tokens; the last ones' attention to each block is remembered, `WATCHED` layers of it
    layers from there on    the dense head, the `upper_share` of the blocks that got most of it, the dense tail
    the others              have no hidden state (NaN) and no keys and values there; decode attends to those that are left

What a cache holds then was chosen for this question. It says so itself (`MARK`), so that later calls find their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastfill import attended, kv_cache
from fastfill.blocks import Plan, make_plan
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.sparse_ffn import current_plan

FROM = 2 / 3  # of the layers
WATCHED = 6  # layers below whose attention is averaged
QUESTION = 64  # last tokens of a prompt whose attention counts, as many as the dense tail has by default
MARK = "fastfill_upper"  # attribute of a cache whose upper layers hold fewer tokens


@dataclass(frozen=True)
class Kept:
    """What the upper layers of a cache hold: of the first T = `tokens` these columns (T',), and all behind."""

    tokens: int
    columns: torch.Tensor


@dataclass(eq=False)
class Upper:
    """One prompt on its way through the layers. plan: of all T tokens. first, last: the upper layers. columns: (T',) of the
    tokens that they read, once they are known."""

    plan: Plan
    config: PrefillConfig
    first: int
    last: int
    seen: list[torch.Tensor] = field(default_factory=list)
    columns: torch.Tensor | None = None
    why: str | None = None  # they read all nevertheless

    @property
    def skipped(self) -> int:
        """Tokens that the upper layers did not read."""
        return 0 if self.columns is None else self.plan.tokens - len(self.columns)

    def watch(self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        if self.first - WATCHED <= layer < self.first and query.shape[2] == self.plan.tokens:
            self.seen.append(attended.shares(query, key, mask, scale, QUESTION))

    def choose(self, device: torch.device) -> Plan | None:
        """Choose the tokens that go on. Gives their plan."""
        if not self.seen:
            self.why, self.columns = attended.UNSEEN, torch.arange(self.plan.tokens, device=device)
            return self.plan
        (span,), size = self.plan.spans, self.plan.block_size
        blocks = (span.stop - span.start) // size
        shares = torch.stack(self.seen).mean(0)[span.start : span.stop].view(blocks, size).sum(1)
        if span.stop == self.plan.tokens:
            shares[-1] = torch.inf  # without a dense tail the last token, whose logits are read, is in the last block
        count = max(1, round(self.config.upper_share * blocks))
        best = shares.nan_to_num(posinf=torch.inf).topk(count).indices.sort().values
        inside = span.start + size * best[:, None] + torch.arange(size, device=best.device)
        ends = [torch.arange(*ends, device=best.device) for ends in ((0, span.start), (span.stop, self.plan.tokens))]
        self.columns = torch.cat([ends[0], inside.flatten(), ends[1]])
        plan = make_plan([(0, len(self.columns), 0)], len(self.columns), self.config)
        return plan and replace(plan, unread=self.plan.unread, blank=self.plan.blank, runs=self.plan.runs)


def first_upper(layers: int) -> int:
    """The first of the upper layers."""
    return int(FROM * layers)


def of_call(
    plan: Plan, config: PrefillConfig, layers: int, cache: Any, rows: Sequence[tuple[int, int, int]], end: int | None
) -> Upper | str:
    """What is left out of a call with this plan, or why nothing is. Arguments as for `attended.refusal`."""
    why = attended.refusal(plan, cache, rows, end)
    return why or Upper(plan, config, first_upper(layers), layers - 1)


def run_layer(index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One upper layer: of a prompt, on the tokens that go on; behind such a prompt, with the mask of what its cache holds."""
    upper, cache = attended.watcher.get(), kv_cache.of_layer(kwargs)
    if not isinstance(upper, Upper):
        kept = getattr(cache, MARK, None)
        return forward(*args, **(_behind(index, args[0].shape[1], cache, kept, kwargs) if kept else kwargs))
    hidden, *others = args
    if index == upper.first:
        current_plan.set(upper.choose(hidden.device))
    columns, tokens = upper.columns, upper.plan.tokens
    assert columns is not None
    if index == upper.first:
        hidden = hidden[:, columns]
    others = [attended.of_tokens(value, columns, tokens) for value in others]
    output = forward(hidden, *others, **{name: attended.of_tokens(value, columns, tokens) for name, value in kwargs.items()})
    if index < upper.last:
        return output
    if cache is not None:
        setattr(cache, MARK, Kept(tokens, columns))
    states, *more = output if isinstance(output, tuple) else (output,)  # transformers 5.0's Granite gives a tuple
    whole = states.new_full((1, tokens, states.shape[2]), torch.nan)  # what was not read has no state, and says so
    whole[:, columns] = states
    return (whole, *more) if isinstance(output, tuple) else whole


def _behind(index: int, width: int, cache: Any, kept: Kept, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments in a later call of `width` tokens. What was cut off the lower layers' end is cut here, too: `crop`
    counts in each layer's own tokens. Where the prompt was cut, other text takes its place, which all layers read."""
    past, held, layer = cache.get_seq_length() - width, cache.get_seq_length(index), cache.layers[index]
    if past < kept.tokens:
        kept = Kept(past, kept.columns[kept.columns < past])
        setattr(cache, MARK, kept)
    count = len(kept.columns) + past - kept.tokens
    if held < count:
        raise UserError(
            "This cache was cut inside a prompt of which upper_share left tokens out, and its layers do not fit together any "
            "more; read the prompt again."
        )
    if held > count:
        layer.keys, layer.values = layer.keys[..., :count, :], layer.values[..., :count, :]
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return kwargs
    seen = torch.cat([kept.columns, torch.arange(kept.tokens, past + width, device=mask.device)])
    return {**kwargs, "attention_mask": mask.index_select(3, seen)}
