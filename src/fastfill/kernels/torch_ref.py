"""The op in plain torch: gather the selected rows of a block, then multiply.

Readable first: this is what the native kernel is compared with, and what runs where there is no native kernel. It
copies every selected row (3 K H numbers per block), which is why it loses on small blocks and large layers.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}


def sparse_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    ids: Tensor,
    rows: list[int],
    id_offsets: list[int],
    activation: str,
    init: Tensor | None,
    out: Tensor,
) -> None:
    """Write ``init + (act(x @ gate[ids].T) * (x @ up[ids].T)) @ down_t[ids]`` into ``out``, block by block.

    Shapes as in `fastfill.kernels.sparse_ffn`; here ``ids`` is 1-D and ``rows``, ``id_offsets`` are lists of ``N + 1``.
    """
    act = ACTIVATIONS[activation]
    for n in range(len(rows) - 1):
        tokens = slice(rows[n], rows[n + 1])
        kept = ids[id_offsets[n] : id_offsets[n + 1]]
        xb = x[tokens]
        h = act(F.linear(xb, gate[kept])) * F.linear(xb, up[kept])
        y = h @ down_t[kept]
        out[tokens] = y if init is None else y + init[tokens]
