"""FFN inputs of a block -> one score per neuron. Every predictor, learned or baseline, is one method: `scores`.

A new predictor subclasses `Predictor`, and gets a name in `BASELINES` if it is to be chosen by word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastfill import kernels
from fastfill.blocks import Plan
from fastfill.families import FFN


class Predictor(ABC):
    """Shapes: T tokens, N blocks, B block size, H hidden size, F intermediate size."""

    @abstractmethod
    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """x: (batch * T, H), the FFN's input in this call. Returns (N, F); larger means kept first."""

    def macs_per_token(self) -> int:
        """Multiply-adds that scoring adds to each sparse token; 0 for the oracle and for those that do not look at it."""
        return 0


class LearnedPredictor(Predictor):
    """p_t = softmax(W_out W_in x_t + b) estimates which share of token t's FFN output each neuron makes; a block's score is
    the sum of p over its tokens. Ours; trained by `calibrate.fit_predictor`.

    w_in: (r, H), w_out: (F, r), bias: (F,). One set of weights serves every block size and grouping.
    """

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, bias: torch.Tensor, kernel: str = "auto"):
        self.w_in, self.w_out, self.bias, self.kernel = w_in, w_out, bias, kernel

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        blocks = plan.split(x)
        return kernels.block_scores(blocks, self.w_in, self.w_out, self.bias, plan.block_size, kernel=self.kernel)

    def shard(self, rank: int, ranks: int) -> LearnedPredictor:
        """For the neurons of one of `ranks` processes that share F evenly; p_t sums to 1 over these neurons then."""
        own = slice(rank * self.bias.shape[0] // ranks, (rank + 1) * self.bias.shape[0] // ranks)
        return LearnedPredictor(self.w_in, self.w_out[own].contiguous(), self.bias[own].contiguous(), self.kernel)

    def macs_per_token(self) -> int:
        return self.w_in.numel() + self.w_out.numel()


def importance(x: torch.Tensor, ffn: FFN) -> torch.Tensor:
    """(T, H) -> (T, F): (h_tj ||w_down_j||)^2, the energy neuron j adds to token t's FFN output. fp32."""
    return energy(F.silu(F.linear(x, ffn.gate)) * F.linear(x, ffn.up), down_norm(ffn))


def energy(h: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`importance` from the activations h (T, F) and the `down_norm` (F,)."""
    return (h.float() * norm).square()


def down_norm(ffn: FFN) -> torch.Tensor:
    """(F,): the length of each neuron's column of down. fp32."""
    return ffn.down.float().norm(dim=0)


class Oracle(Predictor):
    """The true importance summed over the block: what the best predictor of this statistic could choose."""

    def __init__(self, ffn: FFN):
        self.ffn = ffn

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return importance(plan.split(x), self.ffn).view(plan.blocks, plan.block_size, -1).sum(1)


class Static(Predictor):
    """The same neurons for every block: the mean importance over the calibration text, (F,)."""

    def __init__(self, mean: torch.Tensor):
        self.mean = mean

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self.mean.expand(plan.blocks, -1)


class FirstBlock(Predictor):
    """The neurons that the sequence's first block used, for all its blocks (GRIFFIN-like; the published statistic is token-
    normalised, L2 over tokens, and so is this one)."""

    def __init__(self, ffn: FFN):
        self.ffn = ffn

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        rows = []
        for span in plan.spans:
            if span.first is None:
                raise ValueError("the first-block baseline needs the whole prompt in one call, not in chunks")
            head = x[span.first : span.first + plan.block_size]
            h = F.silu(F.linear(head, self.ffn.gate)) * F.linear(head, self.ffn.up)
            score = F.normalize(h.float(), dim=-1).square().sum(0)
            rows.append(score.expand((span.stop - span.start) // plan.block_size, -1))
        return torch.cat(rows)


class LowRank(Predictor):
    """Training-free: gate and up by truncated SVD after scaling inputs to unit mean square, then the oracle's statistic."""

    def __init__(self, ffn: FFN, input_rms: torch.Tensor, rank: int):
        self.factors = [self._factor(weight, input_rms, rank) for weight in (ffn.gate, ffn.up)]
        self.norm = down_norm(ffn)

    @staticmethod
    def _factor(weight: torch.Tensor, input_rms: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = input_rms.float().clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):  # the randomised SVD: the same factors every time
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight.float() * scale, q=min(rank, *weight.shape), niter=4)
        return (u * s).to(weight.dtype), (v.T / scale).to(weight.dtype)

    def macs_per_token(self) -> int:
        return sum(factor.numel() for pair in self.factors for factor in pair)

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        rows = plan.split(x)
        gate, up = (F.linear(F.linear(rows, inner), outer) for outer, inner in self.factors)
        return energy(F.silu(gate) * up, self.norm).view(plan.blocks, plan.block_size, -1).sum(1)


class Random(Predictor):
    """Uniform scores; the same for the same seed and layer, whatever ran before."""

    def __init__(self, intermediate: int, seed: int):
        self.intermediate, self.seed = intermediate, seed

    def scores(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(plan.blocks, self.intermediate, generator=generator).to(x.device)


# name -> maker(ffn, layer, statistics of the calibration text for this layer, rank)
BASELINES: dict[str, Callable[[FFN, int, dict[str, torch.Tensor], int], Predictor]] = {
    "oracle": lambda ffn, layer, stats, rank: Oracle(ffn),
    "static": lambda ffn, layer, stats, rank: Static(stats["importance"]),
    "first-block": lambda ffn, layer, stats, rank: FirstBlock(ffn),
    "low-rank": lambda ffn, layer, stats, rank: LowRank(ffn, stats["input_rms"], rank),
    "random": lambda ffn, layer, stats, rank: Random(ffn.gate.shape[0], seed=layer),
}
