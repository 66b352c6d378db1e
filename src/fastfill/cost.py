"""What a sparse FFN costs: multiply-adds per token, counted in this one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastfill.sparse_ffn import SparseFFN


@dataclass(frozen=True)
class Cost:
    """hidden, intermediate: H and F. kept: K per layer; a layer that keeps all F neurons is dense. predictor, compensator:
    multiply-adds per token of one layer. The predictor runs on sparse tokens, the compensator on all of a prompt with such."""

    hidden: int
    intermediate: int
    kept: tuple[int, ...]
    predictor: int
    compensator: int

    @classmethod
    def learned(cls, hidden: int, intermediate: int, kept: Sequence[int], ranks: Mapping[str, int]) -> Cost:
        """Of the learned predictor and compensator, from their inner widths (`Artifact.ranks`)."""
        return cls(
            hidden,
            intermediate,
            tuple(kept),
            ranks["predictor"] * (hidden + intermediate),
            2 * hidden * (ranks["linear"] + ranks["silu"]),
        )

    @classmethod
    def attached(cls, ffns: Sequence[SparseFFN]) -> Cost:
        """Of what is on a model, whatever its predictor."""
        first = ffns[0]
        return cls(
            first.ffn.hidden_size,
            first.ffn.neurons,
            tuple(ffn.kept for ffn in ffns),
            first.predictor.macs_per_token(),
            first.compensator.macs_per_token() if first.compensator else 0,
        )

    @property
    def unread(self) -> Cost:
        """Of a prompt whose sparse tokens the last layer's FFN leaves out."""
        return replace(self, kept=(*self.kept[:-1], 0))

    @property
    def skipped(self) -> float:
        """Share of neurons that a sparse token skips, mean over layers."""
        return 1 - sum(self.kept) / (len(self.kept) * self.intermediate)

    @property
    def shares(self) -> dict[str, float]:
        """Per sparse token as shares of the dense FFN's 3 H F: kept neurons, predictor, compensator, total."""
        dense = 3 * self.hidden * self.intermediate
        parts = {
            "ffn": sum(self.kept) / (len(self.kept) * self.intermediate),
            "predictor": self.predictor / dense,
            "compensator": self.compensator / dense,
        }
        return {**parts, "total": sum(parts.values())}
