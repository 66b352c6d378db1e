"""Quality against sparsity, and time to first token where there is one to claim: one artifact, many sparsities."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from fastfill.artifact import Artifact
from fastfill.attachment import Attachment
from fastfill.engines.transformers import TransformersEngine
from fastfill.lab import perplexity, published, speed
from fastfill.lab.baselines import LEARNED
from fastfill.lab.resume import Store
from fastfill.progress import stage

KEYS = ("ppl_ratio", "kl", "cont_ppl_ratio", "context_kept")


def evaluate(
    attachment: Attachment,
    artifact: Artifact,
    documents: Sequence[tuple[str, torch.Tensor]],
    *,
    sparsities: Sequence[float],
    methods: Sequence[str],
    prompt_tokens: int,
    repeats: int = 3,
    compensator: bool = True,
    continuation: int = 256,
    store: Store | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """One row per method and sparsity: quality as `perplexity.evaluate` has it, `ffn_flops` as in `published.evaluate`, and
    for the learned predictor the TTFT of a prompt of `prompt_tokens` random tokens, median of `repeats`, beside the dense one.

    documents: [(source, ids (T,))], all of one length. attachment: gives model and settings, and is detached.
    """
    store = store or Store(None, {})
    again, texts = published.Attacher(attachment, artifact), published.Documents(documents, continuation)
    cost = published.Cost.of(attachment, len(documents[0][1]))
    vocabulary = attachment.model.config.vocab_size
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(seed))
    choices = [(method, sparsity) for sparsity in sparsities for method in methods]
    keys = {choice: texts.keys("{}@{:g}".format(*choice)) for choice in choices}
    times = {sparsity: f"ttft@{sparsity:g}" for sparsity in sparsities if LEARNED in methods}
    wanted = [key for group in keys.values() for key in group] + list(times.values())
    resumed = sum(key in store for key in wanted)
    rows: list[dict[str, Any]] = []
    with stage("sparsities", len(wanted), resumed) as bar:
        for method, sparsity in choices:
            group, timed = keys[method, sparsity], times[sparsity] if method == LEARNED else None
            missing = [index for index, key in enumerate(group) if key not in store]
            if missing or (timed and timed not in store):
                with again(method, compensator, sparsity) as attached:
                    share = cost.attached(attached)
                    for index in missing:
                        sums = perplexity.read_sparse(attached, texts.reading(index, attached))
                        store.add(group[index], {**sums, "ffn_flops": share})
                        bar.step(note=f"{method} {sparsity:.0%}")
                    if timed:  # comes last: where something is missing, it is missing too
                        row = speed.ttft(TransformersEngine(attached, artifact.base_model["name"]), prompt, repeats)
                        store.add(timed, {key: row[key] for key in ("ttft_sparse_s", "ttft_dense_s", "speedup")})
                        bar.step(note=f"{method} {sparsity:.0%}")
            found = [store.rows[key] for key in group]
            summary = perplexity.summarize(found, seed)
            time = store.rows[timed] if timed else {}
            rows.append(
                {
                    "method": method,
                    "sparsity": sparsity,
                    **{key: summary[key] for key in KEYS},
                    "ttft_s": time.get("ttft_sparse_s"),
                    "ttft_dense_s": time.get("ttft_dense_s"),
                    "speedup": time.get("speedup"),
                    "ffn_flops": round(found[0]["ffn_flops"], 6),
                }
            )
    dense = [store.rows[key]["ttft_dense_s"] for key in times.values()]
    median = round(statistics.median(dense), 5) if dense else None
    base = published.dense_row(summary)
    first = {key: base[key] for key in ("method", "sparsity", *KEYS, "ffn_flops")}
    first |= {"ttft_s": median, "ttft_dense_s": median, "speedup": 1.0 if dense else None}
    return {
        "rows": [first, *rows],
        **{key: summary[key] for key in ("ppl_dense", "cont_ppl_dense", "no_context_ppl", "tokens", "cont_tokens")},
        "prompt_tokens": prompt_tokens,
        "repeats": repeats,
        "documents": len(documents),
        "resumed": resumed,
    }
