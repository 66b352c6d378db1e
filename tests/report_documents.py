"""Result documents as the commands print them, made up but of realistic size, for the tests of the report."""

from __future__ import annotations

import base64
import math
import random
from typing import Any

import numpy as np

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MACHINE = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "gpu": None, "python": "3.11.7", "system": "Linux x86_64"}
MACHINE |= {"fastfill": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
HEAD = {"model": MODEL, "dtype": "bfloat16", "sparsity": 0.5, "block_size": 32, "machine": MACHINE}
RECOVERY = ("longbench", "ruler", "suite")
PICKS_BY = {"learned": 1.48, "oracle": 1.26, "static": 2.08, "low-rank": 3.37, "first-block": 3.87, "random": 34.1}


def bench(kernel: str = "native", gain: float = 0.14, compare: bool = True) -> dict[str, Any]:
    rows = []
    for tokens in (128, 256, 512, 1024, 2048, 4096):
        dense = 0.06 + 0.00075 * tokens + 2.3e-7 * tokens**2
        ffn, sparse = 0.00030 * tokens, dense * (1 - gain * min(1, tokens / 1024) + (0.06 if tokens == 512 else 0))
        parts = {"attention": 0.45 * (dense - ffn), "ffn": ffn, "predictor": 0.0, "compensator": 0.0}
        small = {"attention": parts["attention"], "ffn": 0.5 * ffn, "predictor": 0.08 * ffn, "compensator": 0.04 * ffn}
        read = max(0, tokens - 64) if tokens >= 256 else 0
        row = {"prompt_tokens": tokens, "rounds": 5, "sparse_tokens": read, "dense_tokens": 64}
        row |= {"ttft_all_neurons_s": round(0.95 * dense, 5), "ffn_all_neurons_s": round(0.9 * ffn, 5)}
        row |= {"ttft_dense_s": round(dense, 5), "ttft_sparse_s": round(sparse, 5)}
        row |= {"ttft_dense_quartiles_s": [round(dense * f, 5) for f in (0.97, 1, 1.05)]}
        row |= {"ttft_sparse_quartiles_s": [round(sparse * f, 5) for f in (0.96, 1, 1.03)]}
        row |= {"ffn_dense_s": round(ffn, 5), "ffn_sparse_s": round(0.62 * ffn, 5), "ffn_ratio": 0.62}
        row |= {"speedup": round(dense / sparse, 4) if read else None, "ffn_share": round(ffn / dense, 4)}
        row |= {"ceiling": round(1 / (1 - 0.5 * ffn / dense * read / tokens), 4) if read else None}
        row |= {"flops_dense": 2.7e8 * tokens, "flops_sparse": 2.0e8 * tokens, "ffn_flops_ratio": 0.5787}
        row |= {"split_dense": {**parts, "rest": dense - sum(parts.values())}}
        row |= {"split_sparse": {**small, "rest": sparse - sum(small.values())}}
        rows.append(row | {"peak_dense_mb": 700 + tokens / 8, "peak_sparse_mb": 830 + tokens / 8})
    others: list[dict[str, Any]] = []
    if compare:
        others = [
            {"name": "llama.cpp", "version": "b4000", "weights": "bf16", "prompt_tokens": t, "ttft_s": 0.0009 * t + 2e-7 * t**2}
            for t in (512, 1024, 2048)
        ]
        others.append({"name": "onnxruntime", "version": None, "skipped": "not installed"})
    more = {"engine": "transformers", "repeats": 5, "seed": 0, "growth_dense": 1.21, "growth_sparse": 1.17}
    return {**HEAD, "kernel": kernel, "rows": rows, **more, "compare": others}


def perplexity(predictor: str = "learned", compensator: bool = True) -> dict[str, Any]:
    ratio = PICKS_BY[predictor] * (1 if compensator else 1.15)
    after = 1 + (ratio - 1) * 0.04
    curve: list[dict[str, Any]] = []
    for i in range(8):
        dense, more = 2.94 - 0.05 * i, math.log(ratio) * (1.1 - 0.02 * i)
        point = {"from": 256 * i, "to": 256 * i + 256, "tokens": 2048}
        curve.append({**point, "nll_dense": round(dense, 4), "nll_sparse": round(dense + more, 4)})
    found: dict[str, Any] = {"task": "perplexity", **HEAD, "predictor": predictor, "compensator": compensator, "curve": curve}
    for prefix, dense, value, spread, kl, agree in (
        ("", 15.8586, ratio, 0.03, 0.48436, 0.66),
        ("cont_", 13.842, after, 0.02, 0.04321, 0.8922),
    ):
        found |= {f"{prefix}ppl_dense": dense, f"{prefix}ppl_sparse": round(dense * value, 4), f"{prefix}kl": kl}
        found |= {f"{prefix}ppl_ratio": round(value, 4), f"{prefix}top1_agreement": agree}
        found[f"{prefix}ppl_ratio_interval"] = [round(value * (1 - spread), 4), round(value * (1 + spread), 4)]
    found |= {"no_context_ppl": 25.3212, "context_kept": 0.9923, "documents": 8, "tokens": 15864, "cont_tokens": 2040}
    return {**found, "sparse_tokens": 29696, "dense_tokens": 21504, "calibrated_on": 0}


def pareto() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"method": "dense", "sparsity": 0.0, "ppl_ratio": 1.0, "kl": 0.0, "cont_ppl_ratio": 1.0, "context_kept": 1.0}
        | {"ttft_s": 1.006, "ttft_dense_s": 1.006, "speedup": 1.0, "ffn_flops": 1.0}
    ]
    for sparsity in (0.25, 0.375, 0.5, 0.625, 0.75):
        for method, scale in (("learned", 1.0), ("oracle", 0.55), ("static", 1.9), ("random", 9.0)):
            ratio = 1 + scale * 1.9 * sparsity**2
            timed = method == "learned"
            ttft = round(1.006 * (1 - 0.3 * sparsity), 5)
            row = {"method": method, "sparsity": sparsity, "ppl_ratio": round(ratio, 4), "kl": round(math.log(ratio), 4)}
            row |= {"cont_ppl_ratio": round(1 + (ratio - 1) * 0.03, 4), "context_kept": round(1 - (ratio - 1) * 0.02, 4)}
            row |= {"ttft_s": ttft if timed else None, "ttft_dense_s": 1.006 if timed else None}
            rows.append(row | {"speedup": round(1.006 / ttft, 4) if timed else None, "ffn_flops": round(1.0787 - sparsity, 4)})
    return {"task": "pareto", **HEAD, "prompt_tokens": 1024, "seed": 0, "rows": rows}


def peers() -> dict[str, Any]:
    methods = (
        ("learned", None, True, 1.48),
        ("learned", None, False, 1.74),
        ("input-threshold", "TEAL-like", False, 1.92),
        ("gate-threshold", "CATS-like", False, 1.66),
        ("first-block", "GRIFFIN-like", True, 4.1),
        ("low-rank", None, False, 3.4),
        ("oracle", None, True, 1.26),
        ("static", None, True, 2.08),
        ("dense", None, False, 1.0),
    )
    same = {"sparsity": 0.4213, "ffn_flops": 0.5787, "cont_kl": 0.04, "context_kept": 0.98, "top1_agreement": 0.66}
    rows: list[dict[str, Any]] = []
    for method, published, compensator, ratio in methods:
        row = {"method": method, "published_as": published, "compensator": compensator, "ppl_ratio": ratio, **same}
        row |= {"kl": round(math.log(ratio), 4), "cont_ppl_ratio": round(1 + (ratio - 1) * 0.04, 4), "note": "what it is"}
        rows.append(row)
    drop = {"method": "layer-drop", "published_as": "POP-like", "ppl_ratio": None, "kl": None, "top1_agreement": None}
    rows.append({**rows[0], **drop, "compensator": False, "cont_ppl_ratio": 1.09})  # no strict reading
    return {"task": "peers", **HEAD, "seed": 0, "rows": rows}


def recovery(task: str = "longbench") -> dict[str, Any]:
    names = (
        ("narrativeqa", "hotpotqa:made", "triviaqa", "passage_retrieval_en", "lcc")
        if task == "longbench"
        else ("niah_single 1024", "niah_multikey 4096", "vt 1024", "cwe 4096")
    )
    datasets: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        row = {"dataset": name, "dense": 20.0 + 5 * i, "sparse": (20.0 + 5 * i) * (0.98 - 0.04 * i), "examples": 20}
        row |= {"recovery": round(0.98 - 0.04 * i, 4), "interval": [round(0.9 - 0.05 * i, 4), round(1.05 - 0.03 * i, 4)]}
        datasets.append(row | {"same_answers": 11})
    datasets[-1] |= {"dense": 0.0, "sparse": 0.0, "recovery": None, "interval": None}
    average = {"dense": 28.0, "sparse": 26.0, "recovery": 0.9286, "interval": [0.87, 0.98]}
    whole = {"examples": 20 * len(names), "same_answers": 55, "cut_prompts": 12}
    head = {"task": task, **HEAD, "predictor": "learned", "compensator": True, "seed": 0}
    return {**head, "datasets": datasets, "average": average, **whole}


def recall() -> dict[str, Any]:
    layers = []
    for i in range(30):
        kept, held, best = 1243 - 20 * i, 0.9 - 0.006 * i, 0.96 - 0.002 * i
        row = {"layer": i, "kept": kept, "by_chance": round(kept / 1536, 4), "blocks": 480, "held": round(held, 4)}
        row |= {"held_oracle": round(best, 4), "recovery": round(held / best, 4), "recall": round(0.86 - 0.006 * i, 4)}
        layers.append(row)
    means = {"held": 0.82, "held_oracle": 0.93, "recovery": 0.88, "recall": 0.77}
    return {"task": "recall", **HEAD, "predictor": "learned", "compensator": True, "layers": layers, **means, "documents": 8}


def picks(layers: int = 30, neurons: int = 1536, blocks: int = 62) -> dict[str, Any]:
    """A part of each layer's neurons is picked by every block, the rest by turns."""
    kept = [round(neurons * (0.5 + 0.3 * math.cos(layer / 4))) for layer in range(layers)]
    share, overlap, maps = [], [], []
    for layer, k in enumerate(kept):
        rng = np.random.default_rng(layer)
        liking, drift = 1.5 * rng.normal(size=neurons), np.zeros(neurons)
        chosen = np.zeros((blocks, neurons), bool)
        for block in range(blocks):
            drift = 0.7 * drift + 0.7 * rng.normal(size=neurons)
            chosen[block, np.argsort(-(liking + drift))[:k]] = True
        often = np.sort(chosen.mean(0))[::-1]
        share.append([round(float(part.mean()), 4) for part in np.array_split(often, 64)])
        overlap.append(round(float((chosen[1:] & chosen[:-1]).sum(1).mean() / k), 4))
        if layer in (0, layers // 2, layers - 1):
            maps.append({"layer": layer, "blocks": [base64.b64encode(np.packbits(row).tobytes()).decode() for row in chosen]})
    head = {"task": "picks", **HEAD, "document": "demo_document.txt", "layers": layers, "neurons": neurons, "blocks": blocks}
    return {**head, "kept": kept, "share": share, "overlap": overlap, "maps": maps}


def inspect() -> dict[str, Any]:
    kept = [round(1536 * (0.5 + 0.2 * math.cos(layer / 5))) for layer in range(30)]
    base = {"name": MODEL, "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "layers": 30}
    sparsity = [round(1 - k / 1536, 4) for k in kept]
    return {"base_model": base, "sparsity": 0.5, "block_size": 32, "kept": kept, "layer_sparsity": sparsity}


def demo() -> dict[str, Any]:
    answers = {"question": "What was the ship's name?", "answer_dense": "The Marigold.", "answer_sparse": "The Marigold, say."}
    times = {"prompt_tokens": 2446, "ttft_dense_s": 3.20144, "ttft_sparse_s": 2.77562, "speedup": 1.1534, "ceiling": 1.1518}
    perplexities = {"ppl_dense": 26.6987, "ppl_sparse": 40.987, "cont_ppl_dense": 18.8528, "cont_ppl_sparse": 19.9992}
    return {**HEAD, "kernel": "native", **times, **perplexities, **answers}


def kernel() -> list[dict[str, Any]]:
    rng = random.Random(0)
    same = {"T": 1024, "dtype": "bfloat16", "kernel": "native", "isa": "avx512_bf16", "threads": 2, "dense_s": 0.01}
    return [
        {"H": h, "F": f, "B": block, "sparsity": sparsity, **same, "sparse_s": 0.006}
        | {"speedup": round((1 / (1 - sparsity)) * rng.uniform(0.7, 0.95), 4)}
        for h, f in ((576, 1536), (896, 4864))
        for block in (16, 32, 128)
        for sparsity in (0.5, 0.7)
    ]


def one_of_each() -> list[dict[str, Any]]:
    """A small document of every kind."""
    small = bench()
    small["rows"] = small["rows"][2:4]
    tasks = [pareto(), peers(), *map(recovery, RECOVERY), recall(), picks(3, 96, 5)]
    return [small, perplexity(), perplexity("oracle"), *tasks, inspect(), demo(), *kernel()[:2]]


def everything() -> list[dict[str, Any]]:
    """Documents for every figure."""
    readings = [*map(perplexity, PICKS_BY), perplexity("learned", compensator=False)]
    tasks = [pareto(), peers(), *map(recovery, RECOVERY), recall(), picks()]
    return [bench(), bench("torch", -0.05, compare=False), *readings, *tasks, inspect(), demo(), *kernel()]
