"""Everything that is to be measured on a GPU, with one command (benchmarks/gpu.md).

    python benchmarks/gpu.py [--parts check,op,ttft] [--shape NAME ...] [--out FILE]
    python benchmarks/gpu.py --floors

check: correctness at real sizes, runs equal bit for bit, graph replay equal to eager, memory over 1,000 prefills, and
compute-sanitizer where it is installed. op: the FFN of one layer, all tiles tried first. ttft: `fastfill bench` of whole
models. One JSON line per row goes to --out. --floors computes, without a GPU, the least times that an H200 allows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastfill import config as cfg
from fastfill import machine
from fastfill.config import PrefillConfig
from fastfill.lab import ffn_op, stand_in
from fastfill.lab.ffn_op import CHIPS, Size

HERE = Path(__file__).parent
LENGTHS = (1024, 2048, 4096, 8192, 16384)
CASES = [(tokens, block, 0.5) for tokens in (1024, 4096, 16384) for block in (128, 64, 32)]
CASES += [(4096, 128, sparsity) for sparsity in (0.3, 0.7)]
MAIN = "Llama-3.1-8B"
PREFILL = PrefillConfig(sparsity=0.5, block_size=128)
SANITIZED = "test_matches_fp64 or test_scores_match_fp64 or test_top_k"
# (T, B) -> op over dense at 50 %; T -> whole prefill over dense; at the shape of Llama-3.1-8B
OP_TARGETS = {(4096, 128): 1.7, (4096, 64): 1.5, (1024, 128): 1.5}
TTFT_TARGETS = {2048: 1.45, 4096: 1.45, 16384: 1.35}


def size_of(name: str, tokens: int, block: int, sparsity: float) -> Size:
    shape = stand_in.SHAPES[name]
    predictor, linear, silu = cfg.default_ranks(shape["hidden_size"])
    neurons = shape["intermediate_size"]
    return Size(
        shape["hidden_size"], neurons, tokens, block, round((1 - sparsity) * neurons), predictor, linear + silu
    )  # fmt: skip


def floors(names: list[str]) -> dict[str, Any]:
    """The least times of every row, on an H200; none of it measured."""
    ops, ttfts = [], []
    for name in names:
        shape = stand_in.config(name)
        for tokens, block, sparsity in CASES:
            size = size_of(name, tokens, block, sparsity)
            row: dict[str, Any] = {"shape": name, "H": size.hidden, "F": size.neurons, "T": tokens, "B": block, "K": size.kept}
            row |= {"sparsity": sparsity, "work": {part: list(pair) for part, pair in ffn_op.work(size).items()}}
            for chip, rates in CHIPS.items():
                least = ffn_op.floors(size, rates)
                row[chip] = {part: round(seconds, 9) for part, seconds in least.items()}
                row[chip] |= {"speedup": round(least["dense"] / least["sparse"], 3),
                              "speedup_layer": round(least["dense"] / least["layer"], 3)}  # fmt: skip
            ops.append(row)
        for tokens in LENGTHS:
            row = {"shape": name, "T": tokens, "B": 128, "sparsity": 0.5}
            for chip, rates in CHIPS.items():
                least = ffn_op.prefill_floors(shape, tokens, PREFILL, rates)
                row[chip] = {kind: round(seconds, 6) for kind, seconds in least.items()}
                row[chip] |= {"speedup": round(least["dense"] / least["sparse"], 3),
                              "ceiling": round(least["dense"] / least["bare"], 3)}  # fmt: skip
            ttfts.append(row)
    return {
        "task": "gpu-floors",
        "statement": "Nothing here was measured: these are the least times that FLOPs and bytes allow.",
        "model": ", ".join(names),
        "dtype": "bfloat16",
        "sparsity": 0.5,
        "block_size": 128,
        "chips": {name: vars(chip) for name, chip in CHIPS.items()},
        "ffn_op": ops,
        "ttft": ttfts,
        "machine": machine.describe(),
    }


def show_floors(found: dict[str, Any]) -> None:
    print(found["statement"])
    for name, chip in CHIPS.items():
        print(f"{name}: {chip.flops / 1e12:.0f} TFLOP/s, {chip.bytes / 1e12:.1f} TB/s ({chip.source})")
    reached = "H200 reached"
    print(f"\nFFN op, floors at the rates reached, ms\n{'shape':13} {'T':>6} {'B':>4} {'skip':>5} {'dense':>8} {'sparse':>8} "
          f"{'layer':>8} {'op':>6} {'layer':>6}")  # fmt: skip
    for row in found["ffn_op"]:
        least = row[reached]
        times = " ".join(f"{least[part] * 1e3:8.3f}" for part in ("dense", "sparse", "layer"))
        case = f"{row['shape']:13} {row['T']:6} {row['B']:4} {row['sparsity']:5.0%}"
        print(f"{case} {times} {least['speedup']:5.2f}x {least['speedup_layer']:5.2f}x")
    print(f"\nwhole prefill, ms\n{'shape':13} {'T':>6} {'dense':>9} {'sparse':>9} {'speed-up':>8} {'ceiling':>8}")
    for row in found["ttft"]:
        least = row[reached]
        print(f"{row['shape']:13} {row['T']:6} {least['dense'] * 1e3:9.2f} {least['sparse'] * 1e3:9.2f} "
              f"{least['speedup']:7.2f}x {least['ceiling']:7.2f}x")  # fmt: skip


def check(add: Any) -> None:
    tests = [sys.executable, "-m", "pytest", "-q", str(HERE.parent / "tests" / "test_kernels_gpu.py")]
    code = subprocess.run([*tests, "-p", "no:cacheprovider"], cwd=HERE.parent).returncode
    add({"task": "gpu-check", "what": "tests/test_kernels_gpu.py on the GPU", "ok": code == 0})
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        row: dict[str, Any] = {"task": "gpu-check", "what": f"compute-sanitizer {tool}"}
        if sanitizer is None:
            add(row | {"skipped": "compute-sanitizer is not on the PATH"})
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *tests, "-k", SANITIZED]
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else the allocator hides what is out of bounds
        code = subprocess.run(command, cwd=HERE.parent, env=env).returncode
        add(row | {"ok": code == 0})


def tune(size: Size, repeats: int) -> dict[str, Any]:
    """Try all tiles for a block of this size, use the best from now on: first of one half, then of the other."""
    from fastfill.kernels import gpu

    arch = gpu.arch_of(torch.device("cuda"))
    ups, downs = gpu.candidates(arch, torch.bfloat16, size.block)
    times = {}

    def seconds(tiles: tuple[Any, Any]) -> float:
        if tiles not in times:
            gpu.use(arch, torch.bfloat16, size.block, tiles)
            times[tiles] = ffn_op.measure(size, torch.bfloat16, "cuda", "triton", repeats, only=("sparse",))["sparse_s"]
        return times[tiles]

    up = min(ups, key=lambda tile: seconds((tile, downs[0])))
    best = min(((up, tile) for tile in downs), key=seconds)
    gpu.use(arch, torch.bfloat16, size.block, best)
    return {"task": "gpu-tiles", "B": size.block, "best": [str(tile) for tile in best], "default": best == (ups[0], downs[0]),
            "seconds": {f"{a} / {b}": found for (a, b), found in times.items()}}  # fmt: skip


def op(names: list[str], repeats: int, add: Any) -> None:
    for block in (128, 64, 32):
        add(tune(size_of(MAIN, 4096, block, 0.5), repeats))
    print(
        f"{'shape':13} {'T':>6} {'B':>4} {'skip':>5} {'dense':>8} {'sparse':>8} {'op':>6} {'layer':>6} {'GEMM':>5} {'floor':>6}"
    )
    for name in names:
        for tokens, block, sparsity in CASES:
            row = ffn_op.measure(size_of(name, tokens, block, sparsity), torch.bfloat16, "cuda", "triton", repeats)
            target = OP_TARGETS.get((tokens, block)) if (name, sparsity) == (MAIN, 0.5) else None
            dense = min(row["dense_s"], row.get("dense_compiled_s", row["dense_s"]))
            case = f"{name:13} {tokens:6} {block:4} {sparsity:5.0%} {dense * 1e3:8.3f} {row['sparse_s'] * 1e3:8.3f}"
            ratios = (
                f"{row['speedup']:5.2f}x {row['speedup_layer']:5.2f}x {row['of_gemm']:5.0%} {row['over_floor']['sparse']:5.2f}x"
            )
            print(case, ratios, f" target {target}x" if target else "", flush=True)
            add({"task": "gpu-ffn-op", "shape": name, "target": target, **row})


def ttft(names: list[str], repeats: int, add: Any) -> None:
    """`fastfill bench` in a process for each model, so that each finds the memory free."""
    for name in names:
        limit = ",".join(map(str, LENGTHS))
        command = [sys.executable, "-m", "fastfill.cli", "bench", "--shape", name, "--device", "cuda", "--dtype", "bf16"]
        command += ["--block-size", "128", "--prompt-lengths", limit, "--repeats", str(repeats), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout)
        if done.returncode:
            add({"task": "gpu-check", "what": f"bench --shape {name}", "ok": False})
            continue
        result = json.loads(done.stdout.splitlines()[-1])
        if name == MAIN:
            for row in result["rows"]:
                row["target"] = TTFT_TARGETS.get(row["prompt_tokens"])
        least = {}
        for tokens in LENGTHS:
            least[tokens] = ffn_op.prefill_floors(stand_in.config(name), tokens, PREFILL, CHIPS["H200 reached"])
        for row in result["rows"]:
            found = least.get(row["prompt_tokens"])
            row["over_floor"] = found and {kind: row[f"ttft_{kind}_s"] / found[kind] for kind in ("dense", "sparse")}
        add({"shape": name, **result})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floors", action="store_true", help="the least times on an H200; needs no GPU")
    parser.add_argument("--parts", default="check,op,ttft")
    parser.add_argument("--shape", nargs="*", default=list(stand_in.SHAPES), choices=list(stand_in.SHAPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.jsonl, or gpu-floors.json")
    args = parser.parse_args()
    if args.floors:
        found = floors(args.shape)
        show_floors(found)
        out = args.out or HERE / "results" / "gpu-floors.json"
        out.write_text(json.dumps(found) + "\n")
        return
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here; --floors computes the least times without one.")
    out = args.out or HERE / "results" / "gpu.jsonl"

    def add(row: dict[str, Any]) -> None:
        row.setdefault("machine", machine.describe())
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    parts = args.parts.split(",")
    if "check" in parts:
        check(add)
    if "op" in parts:
        op(args.shape, args.repeats, add)
    if "ttft" in parts:
        ttft(args.shape, args.repeats, add)


if __name__ == "__main__":
    main()
