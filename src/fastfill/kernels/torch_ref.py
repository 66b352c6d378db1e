"""The ops in plain torch.

Readable first: this is what the native kernels are compared with, and what runs where there are none.

The sparse FFN gathers the selected rows of a block, then multiplies: it copies 3 K H numbers per block, which is why it
loses on small blocks and large layers.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int8
from .int8 import Scales

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


def problem(x: Tensor) -> str | None:
    """Why the ops cannot run on tensors like x: nothing speaks against any."""
    return None


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: Sequence[int],
    id_offsets: Sequence[int],
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    init: Tensor | None,
    out: Tensor,
    scales: Scales | None = None,
) -> None:
    """Write ``init + (act(x @ gate[ids].T + gate_bias[ids]) * (x @ up[ids].T + up_bias[ids])) @ down_t[ids]`` into ``out``,
    block by block.

    Shapes as in `fastfill.kernels.sparse_ffn`; here ``ids`` is 1-D and ``rows``, ``id_offsets`` are lists of ``N + 1``.
    """
    act = ACTIVATIONS[activation]
    for n in range(len(rows) - 1):
        tokens = slice(rows[n], rows[n + 1])
        kept = ids[id_offsets[n] : id_offsets[n + 1]]
        xb = x[tokens]
        gate_k, up_k, down_k, b, c = gate, up, down_t, gate_bias, up_bias
        if len(kept) < len(gate):
            # index_select copies whole rows: 13.5 ms where gate[kept] takes 25 (576 x 1536, 31 blocks of 64, half).
            gate_k, up_k, down_k = (weight.index_select(0, kept) for weight in (gate, up, down_t))
            b, c = (None if bias is None else bias.index_select(0, kept) for bias in (gate_bias, up_bias))
        if scales:
            gate_s, up_s = (scale[kept] for scale in scales[:2])
            h = act(int8.linear(xb, gate_k, gate_s, b)) * int8.linear(xb, up_k, up_s, c)
            y = int8.down(h, down_k, scales.down, kept)
        else:
            y = (act(F.linear(xb, gate_k, b)) * F.linear(xb, up_k, c)) @ down_k
        out[tokens] = y if init is None else y + init[tokens]


def block_scores(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, block_size: int) -> Tensor:
    """``softmax(w_out (w_in x_t) + bias)`` summed over the tokens of each block: (T, H) -> (N, F) in fp32."""
    inner = F.linear(x, w_in)
    scores = []
    # Some blocks at a time: one (T, F) array would be fresh memory on every call (2.9 -> 2.5 ms at T = 1984).
    for part in inner.split(max(1, 256 // block_size) * block_size):
        p = F.linear(part, w_out, bias).softmax(-1)
        scores.append(p.view(len(part) // block_size, block_size, len(w_out)).sum(1, dtype=torch.float32))
    return torch.cat(scores)


def top_k(scores: Tensor, kept: int) -> Tensor:
    """Ids of the largest scores of each row, rising; of equal scores the lowest ids first, NaN as infinity."""
    n, neurons = scores.shape
    if kept in (0, neurons):
        return torch.arange(kept, dtype=torch.int32, device=scores.device).repeat(n, 1)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    limit = scores.topk(kept, dim=1, sorted=False).values.amin(1, keepdim=True)
    keep, ties = scores > limit, scores == limit
    keep |= ties & (ties.cumsum(1, dtype=torch.int32) <= kept - keep.sum(1, keepdim=True))
    return keep.nonzero()[:, 1].view(n, kept).to(torch.int32)


def compensate(x: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor, linear_rank: int) -> Tensor:
    """``w_out a + bias`` with ``a = w_in x``, SiLU on its entries from ``linear_rank`` on: (T, H) -> (T, H')."""
    inner = F.linear(x, w_in)
    return F.linear(torch.cat([inner[:, :linear_rank], F.silu(inner[:, linear_rank:])], dim=1), w_out, bias)
