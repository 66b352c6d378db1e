"""Predictors to compare the learned one with: `attach(model, artifact, predictor=baselines.named("oracle"))`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastfill.blocks import Plan
from fastfill.errors import UserError
from fastfill.ffn import FFN, energy
from fastfill.kernels import Kernel
from fastfill.predictor import Maker, Predictor


class Oracle(Predictor):
    """The true importance summed over the block: what the best predictor of this statistic could choose."""

    def __init__(self, ffn: FFN):
        self.ffn = ffn

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        return self.ffn.importance(plan.split(x)).view(plan.blocks, plan.block_size, -1).sum(1)


class Static(Predictor):
    """The same neurons for every block: the mean importance over the calibration text, (F,)."""

    def __init__(self, mean: torch.Tensor):
        self.mean = mean

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        return self.mean.expand(plan.blocks, -1)


class FirstBlock(Predictor):
    """The neurons that the sequence's first block used, for all its blocks (GRIFFIN-like; the published statistic is token-
    normalised, L2 over tokens, and so is this one)."""

    def __init__(self, ffn: FFN):
        self.ffn = ffn

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        rows = []
        for span in plan.spans:
            if span.first is None:
                raise ValueError("the first-block baseline needs the whole prompt in one call, not in chunks")
            head = x[span.first : span.first + plan.block_size]
            h = self.ffn.hidden(head)
            score = F.normalize(h.float(), dim=-1).square().sum(0)
            rows.append(score.expand((span.stop - span.start) // plan.block_size, -1))
        return torch.cat(rows)


class LowRank(Predictor):
    """Training-free: gate and up by truncated SVD after scaling inputs to unit mean square, then the oracle's statistic."""

    def __init__(self, ffn: FFN, input_rms: torch.Tensor, rank: int):
        self.factors = [self._factor(weight, input_rms, rank) for weight in (ffn.gate, ffn.up)]
        self.biases = ffn.gate_bias, ffn.up_bias
        self.act, self.norm = ffn.act, ffn.down_norm()

    @staticmethod
    def _factor(weight: torch.Tensor, input_rms: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = input_rms.float().clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):  # the randomised SVD: the same factors every time
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight.float() * scale, q=min(rank, *weight.shape), niter=4)
        return (u * s).to(weight.dtype), (v.T / scale).to(weight.dtype)

    def macs_per_token(self) -> int:
        return sum(factor.numel() for pair in self.factors for factor in pair)

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        rows = plan.split(x)
        pairs = zip(self.factors, self.biases, strict=True)
        gate, up = (F.linear(F.linear(rows, inner), outer, bias) for (outer, inner), bias in pairs)
        return energy(self.act.run(gate) * up, self.norm).view(plan.blocks, plan.block_size, -1).sum(1)


class Random(Predictor):
    """Uniform scores; the same for the same seed and layer, whatever ran before."""

    def __init__(self, intermediate: int, seed: int):
        self.intermediate, self.seed = intermediate, seed

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(plan.blocks, self.intermediate, generator=generator).to(x.device)


# Name -> how `attach` makes it.
BASELINES: dict[str, Maker] = {
    "oracle": lambda ffn, layer, stats, rank: Oracle(ffn),
    "static": lambda ffn, layer, stats, rank: Static(stats["importance"]),
    "first-block": lambda ffn, layer, stats, rank: FirstBlock(ffn),
    "low-rank": lambda ffn, layer, stats, rank: LowRank(ffn, stats["input_rms"], rank),
    "random": lambda ffn, layer, stats, rank: Random(ffn.neurons, seed=layer),
}
LEARNED = "learned"


def named(name: str) -> Maker | None:
    """What `attach(predictor=...)` takes for a name: one of `BASELINES`, or 'learned', the artifact's own (None).

    Raises UserError for any other.
    """
    if name != LEARNED and name not in BASELINES:
        raise UserError(f"predictor {name!r} is not known; use one of {', '.join([LEARNED, *BASELINES])}.")
    return BASELINES.get(name)
