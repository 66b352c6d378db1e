"""The correction added to the sparse output."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class Compensator:
    """c(x) = W_out [W_lin x ; silu(W_silu x)] + b: a low-rank linear branch and a SiLU branch of the FFN input. Ours.

    w_in: (r_lin + r_silu, H), linear rows first. w_out: (H, r_lin + r_silu). bias: (H,).
    """

    def __init__(self, w_in: torch.Tensor, w_out: torch.Tensor, bias: torch.Tensor, linear_rank: int):
        self.w_in, self.w_out, self.bias, self.linear_rank = w_in, w_out, bias, linear_rank

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, H) -> (T, H)."""
        inner = F.linear(x, self.w_in)
        linear, curved = inner[:, : self.linear_rank], inner[:, self.linear_rank :]
        return F.linear(torch.cat([linear, F.silu(curved)], dim=1), self.w_out, self.bias)

    def macs_per_token(self) -> int:
        return self.w_in.numel() + self.w_out.numel()
