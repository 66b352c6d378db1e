"""Tokens <-> blocks: which rows of one call are computed sparsely. Pure functions of shapes, lengths and offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from fastfill.config import PrefillConfig
from fastfill.kernels import Bounds


@dataclass(frozen=True)
class Span:
    """The sparse rows of one sequence in a call, a whole number of blocks.

    start, stop: rows in the flattened (batch * T) call. first: row of the sequence's first token, or None if that token
    was in an earlier call.
    """

    start: int
    stop: int
    first: int | None


@dataclass(frozen=True)
class Plan:
    """Which rows of a flattened (batch * T, H) call are sparse; all others are dense.

    T tokens, N blocks, B block size, H hidden size. valid: rows that are tokens and not padding. unread: nobody reads what
    the last layer gives for the sparse rows; it is `blank`. runs: gets an entry from each FFN that has run, True if it computed
    the sparse rows and False if it left them out for that reason: what ran is counted, not what was planned.
    """

    batch: int
    tokens: int
    valid: int
    block_size: int
    spans: tuple[Span, ...]
    unread: bool = False
    blank: float = math.nan
    runs: list[bool] = field(default_factory=list, compare=False, repr=False)

    @property
    def sparse_tokens(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    @property
    def blocks(self) -> int:
        """N: number of sparse blocks in the call."""
        return self.sparse_tokens // self.block_size

    def ends_before(self, rows: int) -> bool:
        """Whether no sparse row is among the last so many of its sequence's T."""
        return all(-span.stop % self.tokens >= rows for span in self.spans)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(batch * T, H) -> (N * B, H): the sparse rows, block after block. A view when there is one span."""
        parts = [x[span.start : span.stop] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, bool], ...]:
        """(start, stop, sparse) of all rows in order: the spans, and the dense ranges between them (padding included)."""
        edges = [0, *(edge for span in self.spans for edge in (span.start, span.stop)), self.batch * self.tokens]
        return tuple((a, b, bool(i % 2)) for i, (a, b) in enumerate(pairwise(edges)) if b > a)

    @cached_property
    def rows(self) -> Bounds:
        """Boundaries of all blocks of the call: B tokens where it is sparse, and each dense range as one block."""
        edges = [0]
        for start, stop, sparse in self.segments:
            edges += range(start + self.block_size, stop + 1, self.block_size) if sparse else [stop]
        return Bounds(edges)

    def with_dense(self, ids: torch.Tensor, neurons: int) -> tuple[torch.Tensor, Bounds]:
        """The (N, K) selection of the sparse blocks -> flat ids of all blocks in `rows`, and their boundaries: the dense
        ranges keep all F = `neurons`. Nothing waits for the device."""
        everything = torch.arange(neurons, dtype=ids.dtype, device=ids.device)
        parts, taken = [], 0
        for start, stop, sparse in self.segments:
            blocks = (stop - start) // self.block_size * sparse
            parts.append(ids[taken : taken + blocks].flatten() if sparse else everything)
            taken += blocks
        if (ids.shape[1], neurons) not in self._bounds:  # layers that keep as many neurons have the same
            self._bounds[ids.shape[1], neurons] = self._id_bounds(ids.shape[1], neurons)
        return torch.cat(parts), self._bounds[ids.shape[1], neurons]

    @cached_property
    def _bounds(self) -> dict[tuple[int, int], Bounds]:
        return {}

    def _id_bounds(self, kept: int, neurons: int) -> Bounds:
        sizes = [0]
        for start, stop, sparse in self.segments:
            sizes += [kept] * ((stop - start) // self.block_size) if sparse else [neurons]
        return Bounds(accumulate(sizes))

    def clear_dense(self, x: torch.Tensor) -> torch.Tensor:
        """(batch * T, H), its dense rows set to zero in place."""
        for start, stop, sparse in self.segments:
            if not sparse:
                x[start:stop] = 0
        return x


def make_plan(
    rows: list[tuple[int, int, int]], tokens: int, config: PrefillConfig, prompts: list[tuple[int, int]] | None = None
) -> Plan | None:
    """Plan one call, or None if all of it is dense.

    rows: per sequence (first, last, position): its tokens are rows [first, last) of its T = `tokens` columns and the first
    of them has this absolute position (tokens already in the cache). Block b covers positions [bB, (b+1)B); it is
    sparse if it lies whole inside the call, behind the dense head and before the last `dense_tail` tokens of the prompt.
    Remainders at either end are dense, and so is a prompt with fewer than `min_tokens` new tokens.

    prompts: per sequence, how many tokens its prompt brings, in this call and others, and the row that it ends at, which may
    lie beyond the call or before it. None: what the sequence has in the call is its prompt.
    """
    spans = []
    for index, (first, last, position) in enumerate(rows):
        brings, stop = prompts[index] if prompts else (last - first, last)
        if brings >= config.min_tokens:
            part = min(last, stop - config.dense_tail) - first
            spans += _span(index * tokens + first, part, position, config.block_size, config.dense_head)
    if not spans:
        return None
    return Plan(len(rows), tokens, sum(last - first for first, last, _ in rows), config.block_size, tuple(spans))


def make_packed_plan(rows: list[tuple[int, int, int]], tokens: int, block_size: int, dense_head: int) -> Plan | None:
    """As `make_plan`, for a call that packs its sequences into one row of T = `tokens` tokens, as serving engines do.

    rows: (first, last, position) of what may be sparse, ascending; every other token is dense.
    """
    spans = [span for first, last, at in rows for span in _span(first, last - first, at, block_size, dense_head)]
    return Plan(1, tokens, tokens, block_size, tuple(spans)) if spans else None


def _span(row: int, tokens: int, position: int, block_size: int, dense_head: int) -> list[Span]:
    """The sparse rows of one sequence, or nothing: so many tokens from `row` on may be sparse, the first has this position."""
    start = -(-max(position, dense_head) // block_size) * block_size
    stop = (position + tokens) // block_size * block_size
    zero = row - position  # the row that position 0 has, or would have
    return [Span(zero + start, zero + stop, zero if position == 0 else None)] if stop > start else []


def rows_from_mask(mask: torch.Tensor, past: int) -> list[tuple[int, int, int]] | None:
    """Rows for `make_plan` from a (batch, past + T) attention mask of ones and zeros.

    None if the tokens of some sequence are not contiguous in the mask: such a call stays dense. A sequence without tokens, of
    which a chunk has the padding only, has none here.
    """
    host = mask.to(device="cpu", dtype=torch.bool)
    width = host.shape[1]
    count = host.sum(1)
    first = host.int().argmax(1)
    last = torch.where(count > 0, width - host.flip(1).int().argmax(1), 0)
    if bool(((last - first) != count).any()):
        return None
    rows = []
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        rows.append((max(begin - past, 0), max(end - past, 0), max(past - begin, 0) if end else 0))
    return rows
