"""Eight bits (W8A8) in torch: what csrc/int8.h computes, bit for bit where the activation is; products by the fastest way.

Weights are int8 with a scale per output channel, symmetric, as llm-compressor writes them. Activations are rounded on the way:
a scale per token, and for h, between the halves, one per token and chunk of `H_CHUNK` neurons. A scale is the largest
magnitude over 127; sums are exact integers. `down` keeps its scale per channel of H: one per neuron could not be pulled out of
the sum. Chunks follow the neurons' ids, so a choice of neurons changes no chunk's borders.
"""

import functools
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu

H_CHUNK = 1024  # FASTFILL_H_CHUNK of csrc/fastfill.h
SMALLEST = 2.0**-100  # below it everything is zero
WIDEST = 2**16  # columns of a weight: more could leave 32 bits


class Scales(NamedTuple):
    """Of an FFN's weights. gate, up: (F,), down: (H,). fp32."""

    gate: Tensor
    up: Tensor
    down: Tensor


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K) and fp32 scales (N,): each row over its largest magnitude / 127, to nearest, ties to even.

    A row of zeros has the scale 0; one with NaN or infinity has the scale NaN.
    """
    x = x.float()
    scale, inverse = scales(x)
    return rounded_by(x, inverse), scale


def scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) in fp32 -> the scales (N,) of `rounded`, and what it multiplies by instead of dividing (N,); 0 gives zeros."""
    top = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    small, bad = top < SMALLEST, ~top.isfinite()
    # A tensor, not a number, is divided: torch multiplies 127 with a reciprocal, which rounds twice.
    inverse = torch.where(small | bad, 0, torch.full_like(top, 127) / top)
    return torch.where(bad, torch.nan, torch.where(small, 0, top / 127)), inverse


def rounded_by(x: Tensor, inverse: Tensor) -> Tensor:
    """(N, K) in fp32, each row times its `inverse` (N,), to nearest, ties to even -> int8."""
    return (x * inverse[..., None]).nan_to_num(0, 0, 0).round_().to(torch.int8)


def product(a: Tensor, b: Tensor) -> Tensor:
    """int8 (T, K) and int8 (N, K) on one device -> a b^T (T, N), exact integers, rounded to fp32. Raises ValueError else."""
    if not (a.dtype == b.dtype == torch.int8 and a.device == b.device and a.shape[1:] == b.shape[1:] and a.ndim == 2):
        given = " and ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (a, b))
        raise ValueError(f"a and b must be int8 (T, K) and (N, K) on one device: they are {given}")
    return _fastest()(a, b) if a.device.type == "cpu" and a.shape[1] <= WIDEST else _by_pieces(a, b)


def _by_torch(a: Tensor, b: Tensor) -> Tensor:
    return torch._int_mm(a, b.t()).float()


def _native(a: Tensor, b: Tensor) -> Tensor:
    # AVX2 moves the sign of b to a, and 128 is no byte. What `rounded` gives has no -128.
    return _by_pieces(a, b) if a.numel() and int(a.min()) == -128 else cpu.product(a, b)


def _by_pieces(a: Tensor, b: Tensor) -> Tensor:
    """The same in fp32, whatever autocast says: pieces of 1,024 columns have sums up to 2^24, which fp32 holds."""
    with torch.autocast(a.device.type, enabled=False):
        parts = [x.float() @ w.float().t() for x, w in zip(a.split(1024, 1), b.split(1024, 1), strict=True)]
    if len(parts) <= 2:  # one sum, rounded once
        return functools.reduce(Tensor.add_, parts)
    return functools.reduce(Tensor.add_, parts[1:], parts[0].double()).float()


@functools.cache
def _fastest() -> Callable[[Tensor, Tensor], Tensor]:
    """The fastest exact product on this processor, by one of 128 x 512 x 1024.

    Without VNNI torch's is wrong, because oneDNN adds pairs in 16 bits, where they saturate, or slow, in loops of torch's own.
    1,024 x 1536 x 1536 on a Zen 3 (AVX2), two threads: ours 28 ms, fp32 47 ms; torch's 348 ms for a quarter of the tokens.
    """
    a, b = (torch.full((n, 1024), byte, dtype=torch.int8, device="cpu") for n, byte in ((128, -127), (512, 127)))

    def exact(run: Callable[[Tensor, Tensor], Tensor]) -> bool:
        pairs = ((a, b), (-a, b), (a, -b), (torch.full_like(a, -128), b))
        return all(bool((run(x[:64], w[:256]) == 1024 * x[0, 0].int() * w[0, 0].int()).all()) for x, w in pairs)

    def seconds(run: Callable[[Tensor, Tensor], Tensor]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    can = {_by_torch: exact(_by_torch), _native: cpu.usable(), _by_pieces: True}
    return min((run for run, usable in can.items() if usable), key=seconds)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, K), int8 weight (N, K), scale (N,) -> x (scale weight)^T + bias (T, N), in fp32."""
    return scaled(*rounded(x), weight, scale, bias)


def scaled(q: Tensor, by: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of what is rounded already: int8 (T, K) and its scales (T,)."""
    y = product(q, weight).mul_(by[:, None] * scale)
    return y if bias is None else y.add_(bias.float())


def down(h: Tensor, weight_t: Tensor, scale: Tensor, ids: Tensor | None = None) -> Tensor:
    """h (T, K) of the neurons ids (K,) (None: all), their int8 rows weight_t (K, H), scale (H,) -> (T, H) in fp32."""
    neurons = torch.arange(len(weight_t), device=h.device) if ids is None else ids
    last = int(neurons[-1]) if len(neurons) else -1
    starts = torch.arange(0, last + 1 + H_CHUNK, H_CHUNK, device=h.device, dtype=neurons.dtype)
    cuts: list[int] = torch.searchsorted(neurons, starts).tolist()
    y = h.new_zeros(len(h), weight_t.shape[1], dtype=torch.float32)
    for begin, end in pairwise(cuts):
        if begin < end:
            q, by = rounded(h[:, begin:end])
            y += product(q, weight_t[begin:end].t()).mul_(by[:, None])
    return y.mul_(scale)
