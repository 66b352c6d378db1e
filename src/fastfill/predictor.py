"""FFN inputs of a block -> one score per neuron. Every predictor, learned or baseline, is one method: `scores`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from fastfill.blocks import Plan
from fastfill.ffn import FFN
from fastfill.kernels import Kernel


class Predictor(ABC):
    """Shapes: T tokens, N blocks, B block size, H hidden size, F intermediate size."""

    @abstractmethod
    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        """x: (batch * T, H), the FFN's input in this call. Returns (N, F); larger means kept first."""

    def macs_per_token(self) -> int:
        """Multiply-adds that scoring adds to each sparse token; 0 for the oracle and for those that ignore it."""
        return 0


class LearnedPredictor(Predictor):
    """p_t = softmax(W_out W_in x_t + b) estimates which share of token t's FFN output each neuron makes; a block's score is
    the sum of p over its tokens. Ours; trained by `calibrate.fit_predictor`.

    w_in: (r, H), w_out: (F, r), bias: (F,). One set of weights serves every block size and grouping.
    """

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, bias: torch.Tensor):
        self.w_in, self.w_out, self.bias = w_in, w_out, bias

    def scores(self, x: torch.Tensor, plan: Plan, kernel: Kernel) -> torch.Tensor:
        return kernel.block_scores(plan.split(x), self.w_in, self.w_out, self.bias, plan.block_size)

    def shard(self, rank: int, ranks: int) -> LearnedPredictor:
        """For the neurons of one of `ranks` processes that share F evenly; p_t sums to 1 over these neurons then."""
        own = slice(rank * self.bias.shape[0] // ranks, (rank + 1) * self.bias.shape[0] // ranks)
        return LearnedPredictor(self.w_in, self.w_out[own].contiguous(), self.bias[own].contiguous())

    def macs_per_token(self) -> int:
        return self.w_in.numel() + self.w_out.numel()


# (FFN, layer, statistics of the calibration text for this layer, rank) -> a predictor in place of the learned one.
Maker = Callable[[FFN, int, dict[str, torch.Tensor], int], Predictor]
