"""What the sparse prefill costs in quality, measured in two ways.

Strict: the loss on prompt tokens that were themselves computed sparsely. Continuation, what a user gets: the first part of a
document is prefilled sparsely, the tokens after it are read densely from the cache it left, as decode does.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastfill import calls, kv_cache
from fastfill.attachment import Attachment
from fastfill.errors import UserError
from fastfill.families import Head
from fastfill.lab.resume import Store
from fastfill.lab.runner import RESAMPLES, percentiles
from fastfill.progress import stage

CONTINUATION = 256  # last tokens of a document, unless something else is asked for
CHUNK = 256  # positions whose (T, V) logits are in memory at a time
COUNTS = ("sparse_tokens", "dense_tokens", "reread_tokens")  # of `Stats`; the last only where there are any
BUCKET = 256  # positions that share a point of the curve


class _Sums:
    """Token sums for one of the two: losses of both models, KL, agreement of the most likely token; losses also by position."""

    def __init__(self) -> None:
        self.tokens = 0
        self.nll_dense = self.nll_sparse = self.kl = self.agree = 0.0
        self.buckets: dict[int, list[float]] = {}  # position // BUCKET -> tokens, nll dense, nll sparse

    def add(self, model: Any, dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor, position: int = 0) -> None:
        """dense, sparse: (T, H) last hidden states. targets: (T,) the tokens that follow. position: of the first state."""
        head = Head(model)
        for d, s, t in zip(dense.split(CHUNK), sparse.split(CHUNK), targets.split(CHUNK), strict=True):
            log_d, log_s = F.log_softmax(head(d).float(), -1), F.log_softmax(head(s).float(), -1)
            nll_d, nll_s = F.nll_loss(log_d, t, reduction="none"), F.nll_loss(log_s, t, reduction="none")
            self.nll_dense += float(nll_d.sum())
            self.nll_sparse += float(nll_s.sum())
            self.kl += float((log_d.exp() * (log_d - log_s)).sum())
            self.agree += float((log_d.argmax(-1) == log_s.argmax(-1)).sum())
            self.tokens += len(t)
            first = 0
            while first < len(t):
                bucket = position // BUCKET
                stop = min(len(t), first + (bucket + 1) * BUCKET - position)
                self._count(bucket, [stop - first, float(nll_d[first:stop].sum()), float(nll_s[first:stop].sum())])
                position, first = position + stop - first, stop

    def _count(self, bucket: int, values: list[float]) -> None:
        known = self.buckets.setdefault(bucket, [0, 0.0, 0.0])
        for index, value in enumerate(values):
            known[index] += value

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "buckets": [[bucket, *values] for bucket, values in self.buckets.items()]}

    def merge(self, other: dict[str, Any]) -> None:
        """Add what `to_json` gave."""
        for name in ("tokens", "nll_dense", "nll_sparse", "kl", "agree"):
            setattr(self, name, getattr(self, name) + other[name])
        for bucket, *values in other["buckets"]:
            self._count(bucket, values)

    def result(self, prefix: str) -> dict[str, float]:
        dense, sparse = math.exp(self.nll_dense / self.tokens), math.exp(self.nll_sparse / self.tokens)
        return {
            f"{prefix}ppl_dense": round(dense, 4),
            f"{prefix}ppl_sparse": round(sparse, 4),
            f"{prefix}ppl_ratio": round(sparse / dense, 4),
            f"{prefix}kl": round(self.kl / self.tokens, 5),
            f"{prefix}top1_agreement": round(self.agree / self.tokens, 4),
        }

    def curve(self) -> list[dict[str, Any]]:
        """Mean loss in nats of both models in buckets of positions [from, to)."""
        return [
            {
                "from": bucket * BUCKET,
                "to": (bucket + 1) * BUCKET,
                "tokens": int(tokens),
                "nll_dense": round(dense / tokens, 4),
                "nll_sparse": round(sparse / tokens, 4),
            }
            for bucket, (tokens, dense, sparse) in sorted(self.buckets.items())
        ]


@torch.no_grad()
def evaluate(
    attachment: Attachment,
    documents: Sequence[tuple[str, torch.Tensor]],
    *,
    continuation: int = CONTINUATION,
    store: Store | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexities, KL and agreement of an attached model over documents [(source, ids (T,))], all tokens pooled.

    Strict counts the targets that follow a sparsely computed token; `curve` has its losses by position. `context_kept`: share
    of the context's worth, in nats per token, that the sparse prefill retains: (none - sparse) / (none - dense). ours.
    The intervals are 95 % bootstraps over documents. `sparse_tokens` and `dense_tokens` are those of the sparse runs: the
    whole document once, then all but its continuation, and the continuation. With `reread` it is the prompt of the continuation
    that is read again, and not what is scored strictly. store: takes each document's sums, and has those of an interrupted run.

    Raises UserError if a document is so short that nothing of it would be sparse.
    """
    store = store or Store(None, {})
    keys = [f"{index}/{source}" for index, (source, _) in enumerate(documents)]
    resumed = sum(key in store for key in keys)
    with stage("perplexity", len(keys), resumed) as bar:
        for key, (source, row) in zip(keys, documents, strict=True):
            if key not in store:
                reading = read_dense(attachment, source, row, continuation)
                before = dataclasses.replace(attachment.stats)
                sums = read_sparse(attachment, reading)
                counts = {name: getattr(attachment.stats, name) - getattr(before, name) for name in COUNTS}
                store.add(key, {**sums, **{name: count for name, count in counts.items() if count or name != COUNTS[-1]}})
                bar.step()
    rows = [store.rows[key] for key in keys]
    return {
        **summarize(rows, seed),
        "documents": len(documents),
        "resumed": resumed,
        **{name: sum(row.get(name, 0) for row in rows) for name in COUNTS if any(name in row for row in rows)},
    }


def summarize(rows: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The results of documents whose sums `read_sparse` gave, pooled."""
    strict, after, alone = _Sums(), _Sums(), _Sums()
    for row in rows:
        for sums, name in ((strict, "strict"), (after, "after"), (alone, "alone")):
            sums.merge(row[name])
    worth = alone.nll_dense - after.nll_dense
    return {
        **strict.result(""),
        **after.result("cont_"),
        "ppl_ratio_interval": _interval(rows, "strict", seed),
        "cont_ppl_ratio_interval": _interval(rows, "after", seed),
        "no_context_ppl": alone.result("")["ppl_dense"],
        "context_kept": round((alone.nll_dense - after.nll_sparse) / worth, 4) if worth > 0 else None,
        "curve": strict.curve(),
        "tokens": strict.tokens,
        "cont_tokens": after.tokens,
    }


@dataclass(frozen=True)
class Reading:
    """A document (1, T), computed densely: what any number of sparse runs are compared with.

    [first, stop): the positions scored strictly; the continuation begins at `part`. hidden: (T, H) last hidden states.
    alone: sums of the continuation without context.
    """

    ids: torch.Tensor
    first: int
    stop: int
    part: int
    hidden: torch.Tensor
    alone: dict[str, Any]


@torch.no_grad()
def read_dense(attachment: Attachment, source: str, row: torch.Tensor, continuation: int) -> Reading:
    """Read a document (T,) densely. Raises UserError if nothing of it would be sparse."""
    model, config = attachment.model, attachment.config
    ids = row[None].to(model.device)
    tokens = ids.shape[1]
    part = tokens - continuation
    if part < config.shortest_prompt:
        raise UserError(f"{source} has {tokens} tokens, too few for a sparse part and {continuation} after it.")
    with attachment.dense():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][0]
        bare = model.base_model(input_ids=ids[:, part:], use_cache=False)[0][0, :-1]
    alone = _Sums()
    alone.add(model, bare, bare, ids[0, part + 1 :])
    return Reading(ids, config.first_sparse, min(config.sparse_end(tokens), tokens - 1), part, hidden, alone.to_json())


@torch.no_grad()
def read_sparse(
    attachment: Attachment, dense: Reading, sparse: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Any]:
    """The sums of one document, as JSON: its prompt tokens are computed sparsely, the continuation densely.

    sparse: entered around every sparse prefill; it may make the model sparse in another way than the attachment does.
    """
    model, ids = attachment.model, dense.ids
    strict, after = _Sums(), _Sums()
    with sparse():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][0]
        with calls.prompt(model, dense.part):
            read = model.base_model(input_ids=ids[:, : dense.part], use_cache=True)
        cache = kv_cache.given(model.base_model, kv_cache.left(read))
    with attachment.dense():
        # Each model's own last prompt token predicts the first, which is left out: all scored tokens are dense.
        follows = model.base_model(input_ids=ids[:, dense.part :], **cache)[0][0, :-1]
    counted = slice(dense.first, dense.stop)
    strict.add(model, dense.hidden[counted], hidden[counted], ids[0, dense.first + 1 : dense.stop + 1], dense.first)
    after.add(model, dense.hidden[dense.part : -1], follows, ids[0, dense.part + 1 :], dense.part)
    return {"strict": strict.to_json(), "after": after.to_json(), "alone": dense.alone}


def _interval(rows: Sequence[dict[str, Any]], name: str, seed: int) -> list[float] | None:
    """95 % interval of the perplexity ratio, documents drawn with replacement; None for one document."""
    if len(rows) < 2:
        return None
    sums = [(row[name]["nll_sparse"] - row[name]["nll_dense"], row[name]["tokens"]) for row in rows]
    rng = random.Random(seed)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(sums, k=len(sums))
        ratios.append(math.exp(sum(loss for loss, _ in drawn) / sum(tokens for _, tokens in drawn)))
    return [round(bound, 4) for bound in percentiles(ratios)]
