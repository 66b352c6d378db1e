"""How well the predictor selects: its neurons against the best choice that hindsight allows, per layer, on the real forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fastfill import families
from fastfill.attachment import Attachment
from fastfill.blocks import Plan
from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.lab.baselines import Oracle
from fastfill.lab.resume import Store
from fastfill.progress import stage
from fastfill.sparse_ffn import SparseFFN, tapped


class _Layer:
    """Sums over blocks of one layer: share of importance held by the choice and by the oracle's, and share of ids in common."""

    def __init__(self, kept: int, part: FFN):
        self.kept, self.oracle = kept, Oracle(part)
        self.truth = torch.empty(0)
        self.blocks = 0
        self.held = self.best = self.recall = 0.0

    def tap(self, step: str, ffn: SparseFFN, plan: Plan, value: torch.Tensor | None) -> None:
        if value is None:
            return
        if step == "input":
            self.truth = self.oracle.scores(value, plan, ffn.kernel)  # (N, F), the true importance
        elif step == "selected":
            self.add(value, ffn.kernel.top_k(self.truth, self.kept))

    def add(self, ids: torch.Tensor, best: torch.Tensor) -> None:
        """ids: (N, K), the neurons that the forward used. best: those that it should have."""
        best, ids = best.long(), ids.long()
        whole = self.truth.sum(1).clamp_min(torch.finfo(self.truth.dtype).tiny)
        chosen = torch.zeros_like(self.truth, dtype=torch.bool).scatter_(1, ids, True)
        self.held += float((self.truth.gather(1, ids).sum(1) / whole).sum())
        self.best += float((self.truth.gather(1, best).sum(1) / whole).sum())
        self.recall += float(chosen.gather(1, best).sum()) / self.kept
        self.blocks += len(ids)


@contextmanager
def watch(attachment: Attachment) -> Iterator[list[_Layer]]:
    """Per layer the selected neurons while the block runs; the forward is untouched. Layers that skip nothing see no blocks."""
    parts = families.dissect(attachment.model).ffns
    layers = [_Layer(ffn.kept, part) for ffn, part in zip(attachment.ffns, parts, strict=True)]
    with ExitStack() as stack:
        for ffn, layer in zip(attachment.ffns, layers, strict=True):
            stack.enter_context(tapped([ffn], layer.tap))
        yield layers


@torch.no_grad()
def evaluate(
    attachment: Attachment, documents: Sequence[tuple[str, torch.Tensor]], store: Store | None = None
) -> dict[str, Any]:
    """Per layer, means over blocks: `held`, the share of the FFN output's importance (`FFN.importance`) that the
    selected neurons hold; `held_oracle`, the most that K neurons can; `recovery`, held over held_oracle; `recall`, the share
    of the oracle's ids that were selected (K / F by chance). documents: [(source, ids (T,))]. ours.

    The inputs are those of the sparse model, so errors of earlier layers are in them, as they are in use.

    Raises UserError if a document has no sparse block.
    """
    store = store or Store(None, {})
    keys = [f"{index}/{source}" for index, (source, _) in enumerate(documents)]
    resumed = sum(key in store for key in keys)
    with stage("recall", len(keys), resumed) as bar:
        for key, (source, ids) in zip(keys, documents, strict=True):
            if key in store:
                continue
            before = attachment.stats.sparse_tokens, attachment.stats.dense_tokens
            with watch(attachment) as layers:
                attachment.model.base_model(input_ids=ids[None].to(attachment.model.device), use_cache=False)
            sparse = attachment.stats.sparse_tokens - before[0]
            if not sparse:
                raise UserError(
                    f"{source} has {len(ids)} tokens, all of them dense; give longer documents or a greater --tokens."
                )
            sums = [[layer.blocks, layer.held, layer.best, layer.recall] for layer in layers]
            dense = attachment.stats.dense_tokens - before[1]
            store.add(key, {"layers": sums, "sparse_tokens": sparse, "dense_tokens": dense})
            bar.step()
    rows = [store.rows[key] for key in keys]
    intermediate = attachment.ffns[0].ffn.neurons
    table = []
    for index, ffn in enumerate(attachment.ffns):
        blocks, held, best, recall = (sum(values) for values in zip(*(row["layers"][index] for row in rows), strict=True))
        line = {"layer": index, "kept": ffn.kept, "by_chance": round(ffn.kept / intermediate, 4), "blocks": blocks}
        if not blocks:  # a layer that skips nothing
            blocks = held = best = recall = 1
        shares = {"held": held / blocks, "held_oracle": best / blocks, "recovery": held / best, "recall": recall / blocks}
        table.append({**line, **{key: round(value, 4) for key, value in shares.items()}})
    means = {
        key: round(sum(line[key] for line in table) / len(table), 4) for key in ("held", "held_oracle", "recovery", "recall")
    }
    return {
        "layers": table,
        **means,
        "documents": len(documents),
        "resumed": resumed,
        **{key: sum(row[key] for row in rows) for key in ("sparse_tokens", "dense_tokens")},
    }
