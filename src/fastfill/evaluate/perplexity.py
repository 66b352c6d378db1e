"""What the sparse prefill costs in quality, in two readings.

Strict: the loss on prompt tokens that were themselves computed sparsely. Continuation, what a user gets: the first part of a
document is prefilled sparsely, the tokens after it are read densely from the cache it left, as decode does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastfill.attachment import Attachment
from fastfill.errors import UserError
from fastfill.progress import stage

CHUNK = 256  # positions whose (T, V) logits are in memory at a time


class _Sums:
    """Token sums for one reading: losses of both models, KL, agreement of the most likely token."""

    def __init__(self) -> None:
        self.tokens = 0
        self.nll_dense = self.nll_sparse = self.kl = self.agree = 0.0

    def add(self, model: Any, dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor) -> None:
        """dense, sparse: (T, H) last hidden states. targets: (T,) the tokens that follow."""
        head = model.get_output_embeddings()
        for d, s, t in zip(dense.split(CHUNK), sparse.split(CHUNK), targets.split(CHUNK), strict=True):
            log_d, log_s = F.log_softmax(head(d).float(), -1), F.log_softmax(head(s).float(), -1)
            self.nll_dense += float(F.nll_loss(log_d, t, reduction="sum"))
            self.nll_sparse += float(F.nll_loss(log_s, t, reduction="sum"))
            self.kl += float((log_d.exp() * (log_d - log_s)).sum())
            self.agree += float((log_d.argmax(-1) == log_s.argmax(-1)).sum())
            self.tokens += len(t)

    def result(self, prefix: str) -> dict[str, float]:
        dense, sparse = math.exp(self.nll_dense / self.tokens), math.exp(self.nll_sparse / self.tokens)
        return {
            f"{prefix}ppl_dense": round(dense, 4),
            f"{prefix}ppl_sparse": round(sparse, 4),
            f"{prefix}ppl_ratio": round(sparse / dense, 4),
            f"{prefix}kl": round(self.kl / self.tokens, 5),
            f"{prefix}top1_agreement": round(self.agree / self.tokens, 4),
        }


@torch.no_grad()
def evaluate(
    attachment: Attachment, documents: Sequence[tuple[str, torch.Tensor]], *, continuation: int = 256
) -> dict[str, Any]:
    """Perplexities, KL and agreement of an attached model over documents [(source, ids (T,))], all tokens of a reading pooled.

    Strict counts the targets that follow a sparsely computed token. `context_kept`: share of what the context is worth, in
    nats per token, that the sparse prefill keeps: (none - sparse) / (none - dense). ours.

    Raises UserError if a document is so short that nothing of it would be sparse.
    """
    model, config = attachment.model, attachment.config
    strict, after, alone = _Sums(), _Sums(), _Sums()
    base = model.base_model
    device = model.device
    before = (attachment.stats.sparse_tokens, attachment.stats.dense_tokens)
    with stage("perplexity", len(documents)) as bar:
        for source, row in documents:
            ids = row[None].to(device)
            tokens = ids.shape[1]
            first = -(-config.dense_head // config.block_size) * config.block_size
            last = tokens // config.block_size * config.block_size
            part = tokens - continuation
            if last <= first or part < max(config.min_tokens, first + config.block_size):
                raise UserError(f"{source} has {tokens} tokens, too few for a sparse part and {continuation} after it.")
            stop = min(last, tokens - 1)
            with attachment.dense():
                dense = base(input_ids=ids, use_cache=False)[0][0]
                read_alone = base(input_ids=ids[:, part:], use_cache=False)[0][0, :-1]
            sparse = base(input_ids=ids, use_cache=False)[0][0]
            strict.add(model, dense[first:stop], sparse[first:stop], ids[0, first + 1 : stop + 1])
            cache = base(input_ids=ids[:, :part], use_cache=True).past_key_values
            with attachment.dense():
                # Each model's own last prompt token predicts the first; it is left out, so all counted tokens are read densely.
                from_sparse = base(input_ids=ids[:, part:], past_key_values=cache, use_cache=True)[0][0, :-1]
            targets = ids[0, part + 1 :]
            after.add(model, dense[part:-1], from_sparse, targets)
            alone.add(model, read_alone, read_alone, targets)
            bar.step(note=f"x{strict.result('')['ppl_ratio']:.3f}")
    worth = alone.nll_dense - after.nll_dense
    continued = after.result("cont_")
    return {
        **strict.result(""),
        **continued,
        "no_context_ppl": alone.result("")["ppl_dense"],
        "context_kept": round((alone.nll_dense - after.nll_sparse) / worth, 4) if worth > 0 else None,
        "documents": len(documents),
        "tokens": strict.tokens,
        "cont_tokens": after.tokens,
        "sparse_tokens": attachment.stats.sparse_tokens - before[0],
        "dense_tokens": attachment.stats.dense_tokens - before[1],
    }
