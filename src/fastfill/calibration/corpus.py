"""The sequences of a calibration: those it learns from, and those it sets aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastfill import data
from fastfill.artifact import Artifact
from fastfill.calibration import further, passages
from fastfill.calibration import limit as limits
from fastfill.config import CalibrationConfig
from fastfill.errors import UserError

ASIDE = 4  # sequences that tell whether the distillation helped; at most an eighth of all


@dataclass(frozen=True)
class Corpus:
    """tokens: (S, T) token ids, all of them in every process of a team. aside: how many of the last are kept from learning, to
    tell whether the distillation helped. passages: how many are numbered passages. held_out: (8, T) for `max_loss`, or none."""

    tokens: torch.Tensor
    aside: int
    passages: int
    held_out: torch.Tensor


def read(
    tokenizer: Any, documents: Sequence[data.Document], config: CalibrationConfig, start: Artifact | None = None
) -> Corpus:
    """The text as it runs, and among it, as their share, sequences of numbered passages (`passages`). What is set aside is
    running text that no passage is made of and no start has learned from. Raises UserError where the text is too short."""
    held_out = 0
    if config.max_loss is not None:
        limits.Limit.parse(config.max_loss)
        held_out = limits.SEQUENCES
    plain, owners = data.sequences(tokenizer, documents, config.sequence_length, config.seed)
    known = further.known(start, documents) if start else ()
    new = [i for i, document in enumerate(owners) if document not in known]
    last = new[max(0, len(new) - min(len(plain) - 1, ASIDE + held_out)) :]
    rest, apart = plain[[i for i in range(len(plain)) if i not in last]], plain[last]
    count = round(len(plain) * config.passages / (1 - config.passages))
    if count:
        words = [tokenizer.decode(row, skip_special_tokens=True) for row in rest.tolist()]
        made = passages.sequences(tokenizer, words, config.sequence_length, count, config.answer, config.seed)
        order = torch.randperm(len(rest) + count, generator=torch.Generator().manual_seed(config.seed + 1))
        rest = torch.cat([rest, made])[order]
    tokens = torch.cat([rest, apart])
    learned = len(tokens) - held_out
    if learned < 1:
        raise UserError(f"--max-loss sets {held_out} sequences aside, and there are no more; give more text.")
    return Corpus(tokens[:learned], min(ASIDE, max(0, len(last) - held_out), learned // 8), count, tokens[learned:])
