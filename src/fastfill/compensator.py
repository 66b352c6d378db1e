"""The correction added to the sparse output."""

from __future__ import annotations

import torch

from fastfill.kernels import Kernel


class Compensator:
    """c(x) = W_out [W_lin x ; silu(W_silu x)] + b: a low-rank linear branch and a SiLU branch of the FFN input. Ours.

    w_in: (r_lin + r_silu, H), linear rows first. w_out: (H, r_lin + r_silu). bias: (H,).
    """

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, bias: torch.Tensor, linear_rank: int):
        self.w_in, self.w_out, self.bias, self.linear_rank = w_in, w_out, bias, linear_rank

    def __call__(self, x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
        """(T, H) -> (T, H)."""
        return kernel.compensate(x, self.w_in, self.w_out, self.bias, self.linear_rank)

    def shard(self, rank: int, ranks: int) -> Compensator | None:
        """The part of one of `ranks` processes; the parts add up to c. None where nothing is left for this one."""
        linear, silu = self.linear_rank, self.w_in.shape[0] - self.linear_rank
        own = range(rank * linear // ranks, (rank + 1) * linear // ranks)
        rows = [*own, *(linear + i for i in range(rank * silu // ranks, (rank + 1) * silu // ranks))]
        if not rows and rank:
            return None
        bias = self.bias if rank == 0 else torch.zeros_like(self.bias)
        return Compensator(self.w_in[rows], self.w_out[:, rows].contiguous(), bias, len(own))

    def macs_per_token(self) -> int:
        return self.w_in.numel() + self.w_out.numel()
