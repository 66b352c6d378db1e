"""The correction added to the sparse output."""

from __future__ import annotations

import torch

from fastfill import kernels


class Compensator:
    """c(x) = W_out [W_lin x ; silu(W_silu x)] + b: a low-rank linear branch and a SiLU branch of the FFN input. Ours.

    w_in: (r_lin + r_silu, H), linear rows first. w_out: (H, r_lin + r_silu). bias: (H,).
    """

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, bias: torch.Tensor, linear_rank: int, kernel: str = "auto"):
        self.w_in, self.w_out, self.bias, self.linear_rank, self.kernel = w_in, w_out, bias, linear_rank, kernel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, H)."""
        return kernels.compensate(x, self.w_in, self.w_out, self.bias, self.linear_rank, kernel=self.kernel)

    def macs_per_token(self) -> int:
        return self.w_in.numel() + self.w_out.numel()
