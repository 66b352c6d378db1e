"""Speed of the sparse FFN kernel against the dense FFN: per shape the machine's GEMM ceiling, then a table.

    python benchmarks/kernel.py [--quick] [--out FILE]

Dense is what torch runs (three F.linear, the activation, the product); "packed" the same with weights packed ahead by
oneDNN; the ceiling is a large GEMM with such weights. In int8, dense is torch's dynamic quantisation (`quantize_dynamic`),
packed oneDNN's int8 Linear with a scale per token (rounded by our kernel, which is faster than torch), the ceiling
the fastest exact product of bytes (torch's or ours); around int8 weights all else is fp32. Every call takes the next layer
of a rotation larger than the caches, so weights come from memory; the ceiling and all variants of a shape are timed in
alternation, and each number is a median.
"of GEMM" is the rate on the FLOPs that remain against the ceiling. One JSON line per row goes to --out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfill import kernels
from fastfill.ffn import FFN
from fastfill.kernels import cpu, int8

SHAPES = ((576, 1536), (896, 4864), (1536, 8960), (2048, 8192), (4096, 14336))
ROTATION_BYTES = 400e6  # of weights, well above any L3 here


@dataclass
class Layer:
    gate: Tensor
    up: Tensor
    down: Tensor
    down_t: Tensor
    packed: list[Tensor]
    eight: FFN | None = None  # int8 weights of the same, and torch's modules of them
    dynamic: list[torch.nn.Module] | None = None


def make_layers_int8(hidden: int, neurons: int, tokens: int) -> list[Layer]:
    layers = []
    for _ in range(max(2, min(64, round(ROTATION_BYTES / (3 * hidden * neurons))))):
        gate, up = (torch.randn(neurons, hidden).mul_(hidden**-0.5) for _ in range(2))
        down = torch.randn(hidden, neurons).mul_(neurons**-0.5)
        eight = FFN(gate, up, down).int8()
        packed = [
            torch.ops.onednn.qlinear_prepack(w.contiguous(), [tokens, w.shape[1]]) for w in (eight.gate, eight.up, eight.down)
        ]
        dynamic = [_dynamic(weight) for weight in (gate, up, down)]
        layers.append(Layer(eight.gate, eight.up, eight.down, eight.down.t(), packed, eight, dynamic))
    return layers


def _dynamic(weight: Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    quantised = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8)
    return quantised[0]


def dense_int8(x: Tensor, w: Layer) -> Tensor:
    assert w.dynamic
    gate, up, down = w.dynamic
    return down(F.silu(gate(x)) * up(x))


def dense_packed_int8(x: Tensor, w: Layer) -> Tensor:
    assert w.eight and w.eight.scales
    gate, up, down = zip(w.packed, w.eight.scales, strict=True)
    q, by = kernels.rounded(x)
    h = F.silu(_qlinear(q, by, *gate)) * _qlinear(q, by, *up)
    return _qlinear(*kernels.rounded(h), *down)


def _qlinear(q: Tensor, by: Tensor, packed: Tensor, scale: Tensor) -> Tensor:  # of signed bytes oneDNN has a slow path
    zero = torch.zeros(len(scale), dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(
        q.view(torch.uint8) ^ 128, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip
    return y.mul_(by[:, None])


def make_layers(hidden: int, neurons: int, dtype: torch.dtype, tokens: int, packed: bool) -> list[Layer]:
    size = 3 * hidden * neurons * dtype.itemsize
    layers = []
    for _ in range(max(2, min(64, round(ROTATION_BYTES / size)))):
        gate, up = (torch.randn(neurons, hidden).mul_(hidden**-0.5).to(dtype) for _ in range(2))
        down = torch.randn(hidden, neurons).mul_(neurons**-0.5).to(dtype)
        weights = [torch.ops.mkldnn._reorder_linear_weight(w, tokens) for w in (gate, up, down) if packed]
        layers.append(Layer(gate, up, down, down.t().contiguous(), weights))
    return layers


def dense(x: Tensor, w: Layer) -> Tensor:
    return F.linear(F.silu(F.linear(x, w.gate)) * F.linear(x, w.up), w.down)


def dense_packed(x: Tensor, w: Layer) -> Tensor:
    gate, up, down = w.packed
    return packed_linear(F.silu(packed_linear(x, gate)) * packed_linear(x, up), down)


def packed_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def random_ids(n: int, neurons: int, sparsity: float) -> Tensor:
    kept = round((1 - sparsity) * neurons)
    return torch.stack([torch.randperm(neurons)[:kept].sort().values for _ in range(n)])


def alternate(calls: list[Callable[[Layer], Tensor]], layers: list[Layer], rounds: int) -> list[float]:
    """Median seconds of each call; every call of the whole run takes the next layer."""
    times: list[list[float]] = [[] for _ in calls]
    at = 0
    for r in range(rounds + 1):
        for call, seen in zip(calls, times, strict=True):
            layer = layers[at % len(layers)]
            at += 1
            start = time.perf_counter()
            call(layer)
            if r:  # the first round warms up
                seen.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def large_gemm(dtype: torch.dtype) -> tuple[Callable[[Layer], Tensor], float]:
    """The ceiling: a large GEMM, weights packed ahead by oneDNN (faster than torch's own call); and its FLOPs."""
    m, n = 1024, 4096
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (rows, n), dtype=torch.int8) for rows in (m, n))
        return lambda _: int8.product(a, b), 2.0 * m * n * n
    x = torch.randn(m, n).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(n, n).to(dtype), m)
    return lambda _: packed_linear(x, packed), 2.0 * m * n * n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer rounds: about half a minute")
    parser.add_argument("--out", type=Path, help="append one JSON line per row to this file")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "int8"), nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--shape", nargs="*", help="such as 576x1536")
    parser.add_argument("--block", type=int, nargs="*", default=[16, 32, 128])
    parser.add_argument("--sparsity", type=float, nargs="*", default=[0.0, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, help="timed rounds per shape")
    parser.add_argument("--kernel", choices=kernels.KERNELS, default=kernels.choose())
    args = parser.parse_args()
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or ()] or (SHAPES[:2] if args.quick else SHAPES)
    tokens = args.tokens
    torch.manual_seed(0)

    print(kernels.describe())
    print(f"T = {tokens}; times in ms; speed-up against dense as torch runs it, and against packed weights\n")
    print(f"{'dtype':8} {'H x F':>10} {'B':>4} {'skip':>5} {'dense':>7} {'packed':>7} {'sparse':>7} "
          f"{'speedup':>7} {'vs pack':>7} {'of GEMM':>7}")  # fmt: skip
    for name in args.dtype:
        dtype = getattr(torch, name)
        gemm, gemm_flops = large_gemm(dtype)
        for hidden, neurons in shapes:
            eight = dtype == torch.int8
            layers = make_layers_int8(hidden, neurons, tokens) if eight else make_layers(hidden, neurons, dtype, tokens, True)
            x = torch.randn(tokens, hidden).to(torch.float32 if eight else dtype)
            cases = [(b, s) for b in args.block for s in args.sparsity if s > 0 or b == max(args.block)]
            ways = (dense_int8, dense_packed_int8) if eight else (dense, dense_packed)
            calls: list[Callable[[Layer], Tensor]] = [*(lambda w, x=x, way=way: way(x, w) for way in ways), gemm]
            for block, sparsity in cases:
                ids = random_ids(tokens // block, neurons, sparsity)
                calls.append(
                    lambda w, x=x, ids=ids: kernels.sparse_ffn(
                        x, w.gate, w.up, w.down_t, ids, scales=w.eight and w.eight.scales, kernel=args.kernel
                    )
                )
            flops = 6 * tokens * hidden * neurons
            estimate = (flops * len(calls) + gemm_flops) / {torch.bfloat16: 5e11, torch.int8: 1e12}.get(dtype, 3e11)
            rounds = args.rounds or max(7, min(60, int((6 if args.quick else 30) / estimate)))
            dense_s, packed_s, gemm_s, *sparse = alternate(calls, layers, rounds)
            ceiling = gemm_flops / gemm_s
            print(f"GEMM ceiling, {name}, {torch.get_num_threads()} threads: {ceiling / 1e9:.0f} GFLOP/s")
            for (block, sparsity), sparse_s in zip(cases, sparse, strict=True):
                kept = round((1 - sparsity) * neurons) / neurons
                rate = flops * kept / sparse_s
                print(f"{name:8} {f'{hidden}x{neurons}':>10} {block:4} {sparsity:5.0%} {dense_s * 1e3:7.2f} "
                      f"{packed_s * 1e3:7.2f} {sparse_s * 1e3:7.2f} {dense_s / sparse_s:6.2f}x "
                      f"{packed_s / sparse_s:6.2f}x {rate / ceiling:7.0%}", flush=True)  # fmt: skip
                row = {
                    "H": hidden, "F": neurons, "B": block, "T": tokens, "sparsity": sparsity, "dtype": name,
                    "kernel": args.kernel, "isa": cpu.isa() if args.kernel == "native" else None,
                    "threads": torch.get_num_threads(), "dense_s": dense_s, "packed_s": packed_s,
                    "sparse_s": sparse_s, "speedup": dense_s / sparse_s, "speedup_packed": packed_s / sparse_s,
                    "gflops": rate / 1e9, "gemm_gflops": ceiling / 1e9, "rounds": rounds,
                    "torch": torch.__version__,
                }  # fmt: skip
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            del layers


if __name__ == "__main__":
    main()
