"""One step of vLLM's: where its requests lie, which of their blocks are sparse, and why one that should be is not."""

from __future__ import annotations

from typing import Any

from fastfill import blocks
from fastfill.blocks import Plan
from fastfill.config import PrefillConfig

EMBEDDINGS = 0  # in place of a prompt's length: it was given as embeddings, and its length is not known here
FIELDS = ("query_start_loc", "seq_lens", "max_query_len", "num_actual_tokens")  # what is read of attention metadata
# Why a step that should have been sparse was dense, or a part of it.
NO_METADATA = f"attention metadata without {FIELDS[0]}"
AS_EMBEDDINGS = "prompt given as embeddings"
CUT_BLOCK = "chunk that cuts a block"
NEW_WEIGHTS = "weights changed after the start"


def plan(metadata: Any, prompts: dict[int, int], tokens: int, config: PrefillConfig) -> tuple[Plan | None, set[str]]:
    """Which rows of a step of T = `tokens` are sparse, and the reasons for which others, that should be, are not.

    metadata: of the step's attention, with FIELDS. prompts: row of the batch -> length of a prompt that is to be read
    sparsely, or EMBEDDINGS. Sparse are blocks that lie whole in this step and in a prompt, between head and tail.
    """
    if not prompts:
        return None, set()
    if any(not hasattr(metadata, name) for name in FIELDS):
        return None, {NO_METADATA} if tokens >= config.block_size else set()
    if metadata.max_query_len < 2:  # a number of the host: decoding costs nothing here
        return None, set()
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    rows, reasons, wanted = [], set(), 0
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
        wanted += _sparse_part(position, position + last - first, prompt, config)
    found = blocks.make_packed_plan(rows, tokens, config.block_size, config.dense_head)
    if (found.sparse_tokens if found else 0) < wanted:
        reasons.add(CUT_BLOCK)
    return found, reasons


def _sparse_part(start: int, stop: int, prompt: int, config: PrefillConfig) -> int:
    """How many of the positions [start, stop) lie in sparse blocks if the prompt is prefilled as a whole."""
    return max(0, min(stop, config.sparse_end(prompt)) - max(start, config.first_sparse))
