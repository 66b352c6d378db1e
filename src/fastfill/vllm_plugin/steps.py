"""One step of vLLM's: where its requests lie, which of their blocks are sparse, and why one that should be is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastfill import blocks
from fastfill.blocks import Plan
from fastfill.config import PrefillConfig

EMBEDDINGS = 0  # in place of a prompt's length: it was given as embeddings, and its length is not known here
# Why a step that should have been sparse was dense, or a part of it.
NOT_TOLD = "attention metadata without the requests' positions on the host"
AS_EMBEDDINGS = "prompt given as embeddings"
CUT_BLOCK = "chunk that cuts a block"
NEW_WEIGHTS = "weights changed after the start"


@dataclass(frozen=True)
class Batch:
    """Where the R requests of a step lie, all of it on the host.

    starts: (R + 1,), the row of each one's first token, then the end. lengths: (R,), its tokens up to the end of this step.
    longest: most tokens that one has in this step. tokens: of all. R may count rows of padding, which have no tokens.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int
    tokens: int

    @classmethod
    def of(cls, common: Any) -> Batch | None:
        """From vLLM's `CommonAttentionMetadata`. Its bound of the lengths is exact without speculation, which is refused."""
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None:
            return None
        return cls(common.query_start_loc_cpu, lengths, common.max_query_len, common.num_actual_tokens)


def plan(
    batch: Batch | None, prompts: dict[int, int], tokens: int, config: PrefillConfig, whole: bool = True
) -> tuple[Plan | None, set[str]]:
    """Which rows of a step of T = `tokens` are sparse, and the reasons for which others, that should be, are not.

    batch: None if it is not known. prompts: row of the batch -> length of a prompt that is to be read sparsely, or
    EMBEDDINGS. whole: a request reads the logits of its whole prompt, and not only those of its last token. Sparse are blocks
    that lie whole in this step and in a prompt, between head and tail.
    """
    if not prompts:
        return None, set()
    if batch is None:
        return None, {NOT_TOLD} if tokens >= config.block_size else set()
    if batch.longest < 2:  # decoding
        return None, set()
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    rows, reasons, wanted, ends = [], set(), 0, []
    for index, prompt in sorted(prompts.items()):
        if index + 1 >= len(starts):
            continue
        first, last = starts[index], starts[index + 1]
        position = lengths[index] - (last - first)
        if prompt == EMBEDDINGS:
            if last - first > 1 and lengths[index] >= config.min_tokens:
                reasons.add(AS_EMBEDDINGS)
            continue
        # Generated tokens are recomputed after a preemption, densely as before.
        stop = min(last, first + prompt - config.dense_tail - position)
        rows.append((first, max(first, stop), position))
        if lengths[index] >= prompt:  # else the prompt goes on, and what is sampled now is dropped
            ends.append(last - 1)
        wanted += _sparse_part(position, position + last - first, prompt, config)
    found = blocks.make_packed_plan(rows, tokens, config.block_size, config.dense_head)
    if (found.sparse_tokens if found else 0) < wanted:
        reasons.add(CUT_BLOCK)
    if found and not whole and not any(span.start <= end < span.stop for span in found.spans for end in ends):
        found = replace(found, unread=True, blank=0.0)  # logits are made of a chunk's last row all the same
    return found, reasons


def _sparse_part(start: int, stop: int, prompt: int, config: PrefillConfig) -> int:
    """How many of the positions [start, stop) lie in sparse blocks if the prompt is prefilled as a whole."""
    return max(0, min(stop, config.sparse_end(prompt)) - max(start, config.first_sparse))
