"""The sparse FFN of one layer on its own, part by part, beside the lower bounds of its arithmetic and memory traffic."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastfill import blocks, kernels
from fastfill import config as cfg
from fastfill.cost import Cost
from fastfill.engines import Engine
from fastfill.engines.transformers import inside
from fastfill.ffn import FFN
from fastfill.lab import flops


@dataclass(frozen=True)
class Chip:
    """flops: per second in dense bf16; bytes: per second from and to its memory. source: who says so."""

    flops: float
    bytes: float
    source: str


CHIPS = {
    "H200 peak": Chip(989e12, 4.8e12, "NVIDIA's datasheet for the H200 SXM: dense BF16 without sparsity, HBM3e"),
    "H200 reached": Chip(788e12, 4.3e12, "read on one H200: PyTorch's 8192^3 bf16 product, random data; a copy on the device"),
}


@dataclass(frozen=True)
class Size:
    """H, F, T, B, K and the inner widths of predictor and compensator; bytes of a number."""

    hidden: int
    neurons: int
    tokens: int
    block: int
    kept: int
    predictor: int
    compensator: int
    item: int = 2

    @property
    def blocks(self) -> int:
        return self.tokens // self.block


def work(size: Size) -> dict[str, tuple[int, int]]:
    """(FLOPs, bytes) of each part.

    FLOPs are two for each multiply-add; logits of the predictor are counted once. Bytes: every input read once and every
    output written once; of the weights the rows that some block is expected to choose if all choose at random; h, between
    the two halves of an FFN, written and read.
    """
    h, f, t, k, n, item = size.hidden, size.neurons, size.tokens, size.kept, size.blocks, size.item
    rows = round(f * (1 - (1 - k / f) ** n))
    low_rank = size.predictor * (h + f)
    correction = 2 * h * size.compensator
    return {
        "dense": (6 * t * h * f, item * (3 * h * f + 2 * t * h + 2 * t * f)),
        "sparse": (6 * t * h * k, item * (3 * h * rows + 2 * t * h + 2 * t * k) + 4 * n * k),
        "scores": (2 * t * low_rank, item * (low_rank + f + t * h) + 4 * n * f),
        "top_k": (0, 4 * n * (f + k)),
        "compensator": (2 * t * correction, item * (correction + h + 2 * t * h)),
    }


PARTS = ("scores", "top_k", "compensator", "sparse")


def floors(size: Size, chip: Chip) -> dict[str, float]:
    """The least seconds of each part on a chip, the larger of what its FLOPs and its bytes take; layer: all of the sparse
    parts one after the other."""
    least = {part: max(done / chip.flops, moved / chip.bytes) for part, (done, moved) in work(size).items()}
    return least | {"layer": sum(least[part] for part in PARTS)}


def prefill_floors(shape: Any, tokens: int, prefill: cfg.PrefillConfig, chip: Chip, item: int = 2) -> dict[str, float]:
    """The least seconds of a whole prefill: FLOPs (`flops.prefill`) or loading all weights once, whichever takes longer.
    bare: without predictor and compensator, what their skipped neurons alone would allow."""
    ranks = dict(zip(("predictor", "linear", "silu"), cfg.default_ranks(shape.hidden_size), strict=True))
    kept = [round((1 - prefill.sparsity) * shape.intermediate_size)] * shape.num_hidden_layers
    cost = Cost.learned(shape.hidden_size, shape.intermediate_size, kept, ranks)
    plan = blocks.make_plan([(0, tokens, 0)], tokens, dataclasses.replace(prefill, min_tokens=1))
    sparse_tokens = plan.sparse_tokens if plan else 0
    linears = flops.prefill(shape, 1)
    weights = (linears["projections"] + linears["ffn"] + linears["head"]) // 2
    found = {}
    bare = dataclasses.replace(cost, predictor=0, compensator=0)
    for name, sparse, costs in (("dense", 0, None), ("sparse", sparse_tokens, cost), ("bare", sparse_tokens, bare)):
        done = sum(flops.prefill(shape, tokens, sparse, costs).values())
        found[name] = max(done / chip.flops, weights * item / chip.bytes)
    return found


def measure(
    size: Size,
    dtype: torch.dtype,
    device: str,
    kernel: str = "auto",
    repeats: int = 20,
    seed: int = 0,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Median seconds of dense and of each sparse part on random data, each block with a random selection. only: these parts,
    for tuning, and no more than their seconds.

    On CUDA each is a graph, timed by events, and dense is the faster of plain and compiled. of_gemm: FLOP rate of the
    sparse FFN on what remains, over that of one dense product at the same T. over_floor: measured over `floors` (H200).
    """
    data = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=data, device=device) * max(1, shape[-1]) ** -0.5).to(dtype)

    h, f, t = size.hidden, size.neurons, size.tokens
    x = random(t, h) * h**0.5
    gate, up, down_t = random(f, h), random(f, h), random(f, h)
    ffn = FFN(gate, up, down_t.t().contiguous())
    predictor = random(size.predictor, h), random(f, size.predictor), random(f)
    compensator = random(size.compensator, h), random(h, size.compensator), random(h)
    scores = torch.rand(size.blocks, f, generator=data, device=device)
    ids = kernels.top_k(scores, size.kept, kernel=kernel)
    init, out = torch.zeros_like(x), torch.empty_like(x)

    def dense() -> torch.Tensor:
        return ffn(x)

    def layer() -> torch.Tensor:
        chosen = kernels.top_k(kernels.block_scores(x, *predictor, size.block, kernel=kernel), size.kept, kernel=kernel)
        y = kernels.compensate(x, *compensator, size.compensator // 2, kernel=kernel)
        return kernels.sparse_ffn(x, gate, up, down_t, chosen, init=y, out=y, kernel=kernel)

    calls: dict[str, Callable[[], Any]] = {
        "gemm": lambda: F.linear(x, gate),
        "dense": dense,
        "sparse": lambda: kernels.sparse_ffn(x, gate, up, down_t, ids, init=init, out=out, kernel=kernel),
        "scores": lambda: kernels.block_scores(x, *predictor, size.block, kernel=kernel),
        "top_k": lambda: kernels.top_k(scores, size.kept, kernel=kernel),
        "compensator": lambda: kernels.compensate(x, *compensator, size.compensator // 2, kernel=kernel),
        "layer": layer,
    }
    if x.is_cuda:
        calls["dense_compiled"] = torch.compile(dense, dynamic=False)
    if only:
        calls = {name: calls[name] for name in only}
    with torch.no_grad():
        seconds = _alternate(calls, repeats, x.is_cuda)
    if only:
        return {f"{name}_s": value for name, value in seconds.items()}
    fastest = min(seconds["dense"], seconds.get("dense_compiled", seconds["dense"]))
    rate = 6 * t * h * size.kept / seconds["sparse"]
    least = floors(size, CHIPS["H200 reached"])
    return {
        "H": h, "F": f, "T": t, "B": size.block, "K": size.kept, "sparsity": round(1 - size.kept / f, 4),
        "dtype": str(dtype).removeprefix("torch."), "kernel": kernels.choose(kernel, x), "repeats": repeats,
        **{f"{name}_s": value for name, value in seconds.items()},
        "speedup": fastest / seconds["sparse"],
        "speedup_layer": fastest / seconds["layer"],
        "tflops": rate / 1e12,
        "of_gemm": rate / (2 * t * h * f / seconds["gemm"]),
        "over_floor": {name: seconds[name] / least[name] for name in (*PARTS, "dense", "layer")} if x.is_cuda else None,
    }  # fmt: skip


def _alternate(calls: dict[str, Callable[[], Any]], repeats: int, cuda: bool) -> dict[str, float]:
    clock: Callable[[Callable[[], Any]], float] = _wall
    if cuda:
        from fastfill.lab.cuda import capture, clock

        calls = {name: capture(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            seconds = clock(call)
            if repeat:  # the first warms up
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _wall(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def of_engine(engine: Engine, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row of `measure` for each prompt length at the shape and settings of a bench's model, on its device."""
    first, block = inside(engine, "The FFN op's bench").attachment.ffns[0], engine.config.block_size
    predictor: Any = first.predictor  # the learned one
    rows = []
    for tokens in lengths:
        if tokens < block:
            continue
        size = Size(
            hidden=engine.shape.hidden_size,
            neurons=engine.shape.intermediate_size,
            tokens=tokens // block * block,
            block=block,
            kept=round((1 - engine.config.sparsity) * engine.shape.intermediate_size),
            predictor=len(predictor.w_in),
            compensator=len(first.compensator.w_in) if first.compensator else 0,
            item=first.ffn.gate.element_size(),
        )
        rows.append(measure(size, first.ffn.gate.dtype, str(first.ffn.gate.device), first.kernel.name, repeats))
    return rows
