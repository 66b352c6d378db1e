import pytest
import torch
from conftest import HIDDEN

from fastfill import kernels
from fastfill.compensator import Compensator

TORCH = kernels.Kernel("torch")


def make(linear, silu, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inner = linear + silu
    w_in = torch.randn(inner, HIDDEN, generator=generator) / HIDDEN**0.5
    w_out = torch.randn(HIDDEN, inner, generator=generator) / max(inner, 1) ** 0.5
    return Compensator(w_in.to(dtype), w_out.to(dtype), torch.randn(HIDDEN, generator=generator).to(dtype), linear)


@pytest.mark.parametrize("linear, silu", [(4, 4), (3, 2), (1, 0)])
def test_shards_of_ranks_add_up(linear, silu):
    """Three ranks; some have nothing left of (1, 0) but the bias, which is rank 0's. fp32: two sums of
    at most 32 terms of order one, in another order."""
    c = make(linear, silu)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    shards = [c.shard(rank, 3) for rank in range(3)]
    assert sum(shard.w_in.shape[0] for shard in shards if shard) == linear + silu
    torch.testing.assert_close(sum(shard(x, TORCH) for shard in shards if shard), c(x, TORCH), rtol=0, atol=1e-5)
