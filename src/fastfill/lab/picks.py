"""Selected neurons by layer and block, on one document: where the sparsity is, seen from inside."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastfill.attachment import Attachment
from fastfill.blocks import Plan
from fastfill.errors import UserError
from fastfill.progress import waiting
from fastfill.sparse_ffn import SparseFFN, tapped

BINS = 64


@contextmanager
def watch(attachment: Attachment) -> Iterator[list[list[torch.Tensor]]]:
    """Per layer, the ids (N, K) of every sparse call while the block runs; the forward is untouched.

    Layers that skip nothing see no blocks.
    """
    seen: list[list[torch.Tensor]] = [[] for _ in attachment.ffns]
    place = {id(ffn): layer for layer, ffn in enumerate(attachment.ffns)}

    def tap(step: str, ffn: SparseFFN, _plan: Plan, ids: torch.Tensor | None) -> None:
        if step == "selected" and ids is not None:
            seen[place[id(ffn)]].append(ids.cpu())

    with attachment.watched(), tapped(attachment.ffns, tap):
        yield seen


def table(calls: Sequence[torch.Tensor], blocks: int, neurons: int) -> np.ndarray:
    """The ids (N, K) that one layer selected -> (N, F) bool. No ids at all: a layer that keeps all its neurons."""
    if not calls:
        return np.ones((blocks, neurons), dtype=bool)
    chosen = torch.zeros(blocks, neurons, dtype=torch.bool).scatter_(1, torch.cat(list(calls)).long(), True)
    return chosen.numpy()


def summarize(
    attachment: Attachment, seen: Sequence[Sequence[torch.Tensor]], mapped: Sequence[int] | None = None
) -> dict[str, Any]:
    """What `watch` saw of one sequence, as numbers.

    share: per layer its neurons, sorted by selection frequency, in 64 bins (fewer if F < 64): the share of blocks that
    select them, the frequent first. overlap: per layer, the mean share of a block's selection that the block before shares;
    None with a single block. always, never: per layer, the share of neurons that every block selects, and that none
    does. maps: for the layers in `mapped` (default: first, middle, last) and each block its set of neurons as base64 of
    ceil(F / 8) bytes, the first neuron in the highest bit (numpy.packbits).

    Raises UserError if no block was sparse.
    """
    blocks = max((sum(len(ids) for ids in calls) for calls in seen), default=0)
    if not blocks:
        raise UserError("All tokens stay dense; give a longer document, a greater --tokens, or more --sparsity.")
    layers, neurons = len(seen), attachment.ffns[0].ffn.neurons
    mapped = sorted({0, layers // 2, layers - 1}) if mapped is None else mapped
    result: dict[str, Any] = {"layers": layers, "neurons": neurons, "blocks": blocks, "kept": list(attachment.kept)}
    lines: dict[str, list[Any]] = {"share": [], "overlap": [], "always": [], "never": []}
    maps = []
    for layer, calls in enumerate(seen):
        chosen = table(calls, blocks, neurons)
        often = np.sort(chosen.mean(0))[::-1]
        both = (chosen[1:] & chosen[:-1]).sum(1) / attachment.kept[layer]
        lines["share"].append([round(float(part.mean()), 4) for part in np.array_split(often, min(BINS, neurons))])
        lines["overlap"].append(round(float(both.mean()), 4) if blocks > 1 else None)
        lines["always"].append(round(float(chosen.all(0).mean()), 4))
        lines["never"].append(round(float((~chosen).all(0).mean()), 4))
        if layer in mapped:
            sets = [base64.b64encode(row.tobytes()).decode() for row in np.packbits(chosen, axis=1)]
            maps.append({"layer": layer, "blocks": sets})
    return {**result, **lines, "maps": maps}


@torch.no_grad()
def evaluate(attachment: Attachment, document: tuple[str, torch.Tensor]) -> dict[str, Any]:
    """Prefill one document (source, ids (T,)), and summarise the selections. Raises UserError if all is dense."""
    source, ids = document
    before = attachment.stats.sparse_tokens, attachment.stats.dense_tokens
    with waiting("prefilling the document"), watch(attachment) as seen:
        attachment.model.base_model(input_ids=ids[None].to(attachment.model.device), use_cache=False)
    return {
        "document": source,
        "tokens": len(ids),
        **summarize(attachment, seen),
        "sparse_tokens": attachment.stats.sparse_tokens - before[0],
        "dense_tokens": attachment.stats.dense_tokens - before[1],
    }
