"""Write the numbers of README.md and docs/results.md from benchmarks/results, between <!-- results:NAME --> and its end.

    python benchmarks/report_tables.py [--check]

NAME is claim, speed, quality-short, real, avx2, amx, reread, reread-amx, bench, split, quality, tasks, vllm, vllm-avx2 or
vllm-amx. Read are results/bench-*.json (each the JSON document of `fastfill bench --json`), results/quality.jsonl and
seeds.jsonl (one line per `fastfill evaluate --json`), the long tasks in results/ruler-1024.json and in results/eval (by
eval.py), and results/vllm.jsonl, avx2/vllm.jsonl and amx/vllm.jsonl (one line per step of serving.py). The real models have a
folder each in results, by recipes/qwen2.5-coder.sh, and in results/avx2 and results/amx, by recipes/machine.sh; claim is of
the first that was measured. Where a result is missing a {{placeholder}} stays. --check changes nothing and exits 1 if a page
is not what the results say.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from fastfill.lab.report.values import ceiling
from fastfill.machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")

SHOWN_TOKENS = (1024,)  # prompt lengths of README's table, beside those on which nothing is gained
CLAIM_TOKENS = 1024  # the prompt length of the first screen, if it was measured
PREDICTORS = ("learned", "oracle", "low-rank", "static", "first-block", "random")
KERNELS = ("native", "torch")
ELSEWHERE = (  # folder of results, as README says it, heading of docs/results.md
    ("amx", "with AMX", "qwen25-coder-with-amx"),
    ("avx2", "without AVX-512", "qwen25-coder-without-avx-512"),
)
REAL = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")  # folders in results, the one of the first screen first
NAMES = {f"qwen2.5-coder-{size.lower()}-instruct-q4_k_m.gguf": f"Qwen2.5-Coder-{size}-Instruct" for size in ("0.5B", "1.5B")}
ANSWERED = {  # what the rows of a task are, of how many sets
    "suite": "made rows of {} sets in the manner of LongBench and RULER",
    "longbench": "rows of MiniLongBench ({} of LongBench's 21 sets)",
}
TASKS = {
    "ruler-1024.json": "RULER-style, 1,024 tokens",
    "eval/ruler.json": "RULER-style, 1,024 and 4,096 tokens",
    "eval/longbench-made.json": "LongBench-style, made",
    "eval/multi_news.json": "LongBench's multi_news",
}

Row = dict[str, Any]


def load_bench(folder: Path) -> list[Row]:
    """The bench results, the native kernel's first, those in eight bits behind those of the model's own, packed last."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("bench-*.json"))]

    def order(result: Row) -> tuple[int, bool, bool]:
        kernel = KERNELS.index(result["kernel"]) if result["kernel"] in KERNELS else len(KERNELS)
        return kernel, _eight(result), _packed(result)

    return sorted(found, key=order)


def _eight(result: Row) -> bool:
    return result.get("weights") == "int8"  # older results have only the model's own


def _packed(result: Row) -> bool:
    return bool(result.get("packed"))


def load_quality(folder: Path) -> list[Row]:
    """The quality rows; of two with the same settings the later one counts.

    Raises ValueError for a row measured on documents that were calibrated on: the README says held-out.
    """
    file = folder / "quality.jsonl"
    latest: dict[tuple[Any, ...], Row] = {}
    for row in load_lines(file):
        if row["calibrated_on"]:
            raise ValueError(f"{file.name}: {row['predictor']}: {row['calibrated_on']} of the documents were calibrated on")
        latest[(*_setting(row), row["predictor"], row["compensator"])] = row
    return list(latest.values())


def _setting(row: Row) -> tuple[Any, ...]:
    """What rows of one quality table have in common."""
    settings = ("dense_head", "dense_tail", "min_tokens", "kernel")  # older rows have none of them, nor weights
    same = (*(row[key] for key in ("model", "dtype", "sparsity", "block_size", "tokens")), *map(row.get, settings))
    return (*same, row.get("weights", "model"), tuple(row["sources"]))


def _documents(row: Row) -> str:
    kind = "Python modules" if all(".py#" in source for source in row["sources"]) else "documents"
    return f"{row['documents']} held-out {kind}"


def claim(bench: list[Row], quality: list[Row], llama: list[Row]) -> str:
    """The first screen: one speed, one quality, and their conditions. llama: lines of llama-bench."""
    learned = next((row for row in quality if row["predictor"] == "learned" and row["compensator"]), None)
    speed = next((b for b in bench if learned is None or b["model"] == learned["model"]), None)
    parts = []
    if speed is None:
        parts.append("{{claim: speed, from benchmarks/results/bench-*.json}}")
    else:
        row = min(speed["rows"], key=lambda r: abs(r["prompt_tokens"] - CLAIM_TOKENS))
        machine = speed["machine"]
        parts.append(
            f"{_short(speed['model'])}, a prompt of {row['prompt_tokens']:,} tokens, {speed['sparsity']:.0%} of the FFN "
            f"neurons skipped: TTFT {row['ttft_dense_s']:.2f} s → {row['ttft_sparse_s']:.2f} s, "
            f"**{row['speedup']:.2f}x**, {_of_which(speed, row)} ({_where(machine)}, {speed['dtype']}, "
            f"transformers {machine['transformers']}, {speed['kernel']} kernel)."
        )
        eight = (result for result in bench if _eight(result) and not _packed(result))
        parts += [_claim_eight(result, llama) for result in eight if result["model"] == speed["model"]]
    if learned is None:
        parts.append("{{claim: quality, from benchmarks/results/quality.jsonl}}")
    else:
        kept = learned.get("context_kept")
        parts.append(
            f"Price, on {learned['documents']} held-out documents: text that follows a sparse prefill has perplexity "
            f"{learned['cont_ppl_sparse']:.2f} instead of {learned['cont_ppl_dense']:.2f} (**{learned['cont_ppl_ratio']:.2f}x**"
            + _interval(learned.get("cont_ppl_ratio_interval"), ", 95 % interval {:.2f} to {:.2f}")
            + (f"; {kept:.0%} of the context's worth is retained" if kept is not None else "")
            + f"), and the sparse prompt tokens themselves {learned['ppl_sparse']:.2f} instead of {learned['ppl_dense']:.2f} "
            f"(**{learned['ppl_ratio']:.2f}x**" + _interval(learned.get("ppl_ratio_interval"), ", {:.2f} to {:.2f}") + ")."
        )
    return "\n".join(parts)


def _of_which(bench: Row, row: Row) -> str:
    """What skipping has of a gain: measured beside all neurons, or, in results that have not that, what it has at most."""
    if not by_chunks(bench):
        return (
            f"where skipping, at the FFN's share of the dense time ({row['ffn_share']:.0%}), allows at most "
            f"{ceiling(row):.2f}x{_more(row)}"
        )
    return f"of which skipping is {_skipping(row)}, the rest our kernel and attention"


def by_chunks(bench: Row) -> bool:
    """Whether sparse prompts' attention was not the model's own."""
    return bench.get("attention_by", "").startswith("chunks")


def _skipping(row: Row) -> str:
    """TTFT with all neurons, computed as sparse prompts are, over the sparse one."""
    return f"{row['ttft_all_neurons_s'] / row['ttft_sparse_s']:.2f}x"


def _claim_eight(result: Row, llama: list[Row]) -> str:
    row = min(result["rows"], key=lambda r: abs(r["prompt_tokens"] - CLAIM_TOKENS))
    rivals = [
        f"{other['name'].replace(', ', ' in ')} takes {other['ttft_s']:.2f} s"
        for other in result.get("compare", ())
        if other.get("prompt_tokens") == row["prompt_tokens"] and not (llama and other["name"] == "llama-bench")
    ]
    if known := [line for line in llama if line["n_prompt"] == row["prompt_tokens"]]:
        best = min(known, key=lambda line: line["avg_ns"])
        rivals.append(f"llama.cpp takes {best['avg_ns'] / 1e9:.2f} s at best ({_format(best)})")
    return (
        "In eight bits (`--weights int8`, [quality](docs/quantised.md#quality)): "
        f"{row['ttft_dense_s']:.2f} s → {row['ttft_sparse_s']:.2f} s, "
        f"**{row['speedup']:.2f}x**, of which skipping is {_skipping(row)}"
        + (f". Beside it {', '.join(rivals)}." if rivals else ".")
    )


def _measured(folder: Path) -> list[tuple[list[Row], list[Row]]]:
    """(bench results, quality rows) of each model that has both, the real ones first."""
    found = [(load_bench(place), load_quality(place)) for place in (*(folder / name for name in REAL), folder)]
    return [(bench, quality) for bench, quality in found if bench and quality]


def speed_summary(folder: Path) -> str:
    """README's table of speed: a row per model, weights and prompt length, by the kernel that is chosen."""
    models = [result for bench, _ in _measured(folder) for result in bench if result is bench[0] or _eight(result)]
    if not models:
        return "{{speed: from benchmarks/results}}"
    lines = [
        f"{models[0]['sparsity']:.0%} sparsity; {_where(models[0]['machine'])}, {models[0]['dtype']}. "
        "All neurons: our kernel and attention, nothing skipped.",
        "",
        "| model | prompt tokens | dense TTFT | all neurons | sparse TTFT | speed-up | of it skipping |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in models:
        for row in result["rows"]:
            if row["prompt_tokens"] in SHOWN_TOKENS or (row["sparse_tokens"] and row["speedup"] < 1):
                lines.append(f"| {' | '.join(_speed_cells(result, row))} |")
    elsewhere = []
    for machine, where, anchor in ELSEWHERE:
        found = [result for result in load_bench(folder / machine / REAL[0]) if not _packed(result)]
        gains = [
            _gain(row) + " in int8" * _eight(result)
            for result in found
            for row in result["rows"]
            if row["prompt_tokens"] == CLAIM_TOKENS
        ]
        if gains:
            dense = {"float32": "fp32", "bfloat16": "bf16"}.get(found[0]["dtype"], found[0]["dtype"])
            elsewhere.append(f"{where} {', '.join(gains)} over dense in {dense} ([more](docs/results.md#{anchor}))")
    if elsewhere:
        lines += ["", f"The first gains {'; '.join(elsewhere)}."]
    return "\n".join(lines)


def _speed_cells(result: Row, row: Row) -> tuple[str, ...]:
    return (
        _short(result["model"]) + (", packed" if _packed(result) else ", int8" * _eight(result)),
        f"{row['prompt_tokens']:,}",
        f"{row['ttft_dense_s']:.2f} s",
        f"{row['ttft_all_neurons_s']:.2f} s" if "ttft_all_neurons_s" in row else "",
        f"{row['ttft_sparse_s']:.2f} s",
        _gain(row),
        _skipping(row) if row["sparse_tokens"] and "ttft_all_neurons_s" in row else "",
    )


def machine_table(folder: Path) -> str:
    """The real models on another processor, beside the best of llama.cpp's formats there."""
    measured = {name: (load_bench(folder / name), load_lines(folder / name / "llama-bench.jsonl")) for name in REAL}
    results = [result for bench, _ in measured.values() for result in bench]
    if not results:
        return f"{{{{{folder.name}: from benchmarks/results/{folder.name}}}}}"
    first = results[0]
    ours = "| model | prompt tokens | dense TTFT | all neurons | sparse TTFT | speed-up | of it skipping |"
    lines = [
        f"{first['sparsity']:.0%} sparsity; {_where(first['machine'])}, {first['dtype']}, torch {first['machine']['torch']}, "
        f"transformers {first['machine']['transformers']}; medians of {first['repeats']}.",
        "",
        f"{ours} llama.cpp at best | over ours |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for bench, llama in measured.values():
        for result in bench:
            for row in result["rows"]:
                rivals = [(one["avg_ns"] / 1e9, _format(one)) for one in llama if one["n_prompt"] == row["prompt_tokens"]]
                seconds, form = min(rivals, default=(0.0, ""))
                theirs = (f"{seconds:.2f} s, {form}", f"{seconds / row['ttft_sparse_s']:.2f}x") if rivals else ("", "")
                lines.append(f"| {' | '.join((*_speed_cells(result, row), *theirs))} |")
    return "\n".join(lines)


def quality_summary(folder: Path) -> str:
    """README's table of quality: the learned selection of each model on held-out documents."""
    rows = [
        next(row for row in quality if row["predictor"] == "learned" and row["compensator"]) for _, quality in _measured(folder)
    ]
    if not rows:
        return "{{quality-short: from benchmarks/results}}"
    lines = ["| model | sparsity | continuation ppl | KL | context kept | strict ppl | KL |", "|---|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        after = f"{row['cont_ppl_ratio']:.3f}x" + _interval(row.get("cont_ppl_ratio_interval"), " ({:.2f} to {:.2f})")
        strict = f"{row['ppl_ratio']:.2f}x" + _interval(row.get("ppl_ratio_interval"))
        kept = row.get("context_kept")
        cells = (
            _short(row["model"]),
            f"{row['sparsity']:.0%}",
            after,
            f"{row['cont_kl']:.3f}",
            "" if kept is None else f"{kept:.0%}",
            strict,
            f"{row['kl']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for result in (result for name in REAL for result in load_lines(folder / name / "suite.json")):
        mean, worst = result["average"], min(result["datasets"], key=lambda line: line["recovery"] or 1)
        lines += [
            "",
            f"Answers of {_short(result['model'])} to {result['examples']:,} made rows of {len(result['datasets'])} sets: "
            f"{mean['mean_recovery']:.1%} of the dense score"
            + _interval(mean["mean_recovery_interval"], " ({:.1%} to {:.1%})")
            + f", least on {worst['dataset'].split(':')[0]}: {worst['recovery']:.1%}.",
        ]
    answers = [result for name in REAL for result in load_lines(folder / name / "longbench.json")]
    if answers:
        rows, most = answers[0]["likelihood"]["examples"], answers[0]["max_prompt_tokens"]
        losses = [
            f"{_short(result['model'])} {result['likelihood']['loss']:.3f}"
            + _interval(result["likelihood"]["interval"], " ({:.3f} to {:.3f})")
            for result in answers
        ]
        lines += [
            "",
            f"Nats per token lost in the right answer to {rows} rows of MiniLongBench, cut to {most:,} tokens: "
            f"{', '.join(losses)}.",
        ]
    return "\n".join(lines)


def real_tables(folder: Path) -> str:
    """Speed and quality of the real models that were measured."""
    parts = []
    for name in REAL:
        bench, quality = load_bench(folder / name), load_quality(folder / name)
        parts += [bench_tables(bench)] if bench else []
        parts += [quality_tables(quality)] if quality else []
        levels = load_lines(folder / name / "levels.jsonl")
        parts += [levels_table(bench, quality, levels)] if bench and quality and levels else []
        above = load_lines(folder / name / "upper.jsonl")
        parts += [upper_table(above, [*bench, *(row for row in levels if "rows" in row)])] if above else []
        served = [step for step in load_lines(folder / "vllm.jsonl") if step.get("model") == name]
        rivals = rivals_table(bench, load_lines(folder / name / "llama-bench.jsonl"), served)
        parts += [rivals] if rivals else []
        for file in ("suite.json", "longbench.json"):
            found = load_lines(folder / name / file)
            parts += [answers_table(result) if "average" in result else likelihood_table(result) for result in found]
    return "\n\n".join(parts) or "{{real: from benchmarks/results/qwen2.5-coder-*}}"


def levels_table(bench: list[Row], quality: list[Row], more: list[Row]) -> str:
    """What each sparsity gains by prompt length, and what it costs: a row per sparsity. more: of `bench` and of `evaluate`."""
    speed = [bench[0], *(row for row in more if "rows" in row)]
    first = next(row for row in quality if row["predictor"] == "learned" and row["compensator"])
    loss = [first, *(row for row in more if "ppl_ratio" in row)]
    gains = {(r["sparsity"], row["prompt_tokens"]): row for r in speed for row in r["rows"]}
    losses = {row["sparsity"]: row for row in loss}
    lengths = sorted({tokens for _, tokens in gains})
    lines = [
        f"{_short(bench[0]['model'])} by sparsity: speed-up of TTFT (ceiling) by prompt tokens, and the loss on "
        f"{_documents(first)}.",
        "",
        f"| sparsity | {' | '.join(f'{n:,}' for n in lengths)} | strict ppl | KL | continuation ppl | KL |",
        "|--:|" + "--:|" * (len(lengths) + 4),
    ]
    for sparsity in sorted({key[0] for key in gains} | losses.keys()):
        found = [gains.get((sparsity, tokens)) for tokens in lengths]
        row = losses.get(sparsity)
        cells = (
            f"{sparsity:.0%}",
            *(f"{one['speedup']:.2f}x ({_ceiling(one)})" if one else "" for one in found),
            *((f"{row['ppl_ratio']:.2f}x", f"{row['kl']:.3f}") if row else ("", "")),
            *((f"{row['cont_ppl_ratio']:.3f}x", f"{row['cont_kl']:.3f}") if row else ("", "")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def upper_table(lines: list[Row], others: list[Row]) -> str:
    """What `upper_share` gains beside the same sparsity alone, by weights and prompt length; what it costs in the right answer.
    lines: of `bench`, and of a task with likelihoods, with it and without. others: bench results without it."""
    speed, loss = [line for line in lines if "rows" in line], [line for line in lines if "likelihood" in line]
    alone = {
        (_eight(result), result["sparsity"], row["prompt_tokens"]): row["ttft_sparse_s"]
        for result in reversed(others)
        for row in result["rows"]
    }
    first = speed[0]
    table = [
        f"{_short(first['model'])}, {first['sparsity']:.0%} sparsity, upper layers that read {first['upper_share']:.0%} of the "
        f"blocks (`--upper-share {first['upper_share']:g}`); {_where(first['machine'])}, medians of {first['repeats']}. "
        "Sparse: all blocks, a run of its own (tables above).",
        "",
        "| weights | prompt tokens | dense TTFT | sparse | sparse, upper | over dense | over sparse |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in speed:
        for row in result["rows"]:
            other = alone.get((_eight(result), result["sparsity"], row["prompt_tokens"]))
            cells = (
                "int8" if _eight(result) else result["dtype"],
                f"{row['prompt_tokens']:,}",
                f"{row['ttft_dense_s']:.2f} s",
                f"{other:.2f} s" if other else "",
                f"{row['ttft_sparse_s']:.2f} s",
                _gain(row),
                f"{other / row['ttft_sparse_s']:.2f}x" if other else "",
            )
            table.append(f"| {' | '.join(cells)} |")
    if len(loss) == 2:
        loss.sort(key=lambda line: line["upper_share"])
        table += ["", *_answers_beside(loss, "What it costs", "all blocks above")]
    return "\n".join(table)


def _answers_beside(both: list[Row], what: str, other: str) -> list[str]:
    """The right answers' loss in two results on the same rows, set by set. other: what the second one is."""
    sets = [
        [line, *(other for other in both[1]["datasets"] if other["dataset"] == line["dataset"])] for line in both[0]["datasets"]
    ]
    table = [
        f"{what}: the right answer to {both[0]['examples']} made rows of {len(sets)} sets, up to "
        f"{both[0]['max_prompt_tokens']:,} tokens; nats per token over the dense prefill's, and KL. Sets weigh the same.",
        "",
        f"| | rows | loss | KL | loss, {other} | KL |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, *pair in [("**all sets**", *both), *((pair[0]["dataset"], *pair) for pair in sets)]:
        found = [one["likelihood"] for one in pair]
        cells = [cell for one in found for cell in (_loss(one), f"{one['kl']:.3f}")]
        table.append(f"| {name} | {pair[0]['examples']} | {' | '.join(cells)} |")
    return table


def reread_tables(folder: Path, machine: str) -> str:
    """What `reread` costs in time and gains in quality, beside the same sparsity with every token read once. machine: the
    folder in results."""
    lines = {name: load_lines(folder / machine / name / "reread.jsonl") for name in REAL}
    speed = [(name, result) for name, found in lines.items() for result in found if "rows" in result]
    if not speed:
        return f"{{{{reread: from benchmarks/results/{machine}/qwen2.5-coder-*/reread.jsonl}}}}"
    first = speed[0][1]
    table = [
        f"`--reread {first['reread']:g}`, {first['sparsity']:.0%} sparsity; {_where(first['machine'])}, {first['dtype']}; "
        f"medians of {first['repeats']}. Sparse: every token read once, a run of its own (table above).",
        "",
        "| model | prompt tokens | read again | dense TTFT | sparse | with tokens read again | over dense | ceiling |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, result in speed:
        alone = {
            row["prompt_tokens"]: row["ttft_sparse_s"]
            for other in load_bench(folder / machine / name)
            for row in other["rows"]
            if not _eight(other) and not _packed(other)
        }
        for row in result["rows"]:
            cells = (
                _short(result["model"]),
                f"{row['prompt_tokens']:,}",
                f"{row['reread_tokens']:,}",
                f"{row['ttft_dense_s']:.2f} s",
                f"{alone[row['prompt_tokens']]:.2f} s" if row["prompt_tokens"] in alone else "",
                f"{row['ttft_sparse_s']:.2f} s",
                _gain(row),
                _ceiling(row),
            )
            table.append(f"| {' | '.join(cells)} |")
    follows = []
    for name, found in lines.items():
        for result in (one for one in found if "cont_kl" in one):
            once = next(
                row for row in load_quality(folder / name) if row["sources"] == result["sources"] and row["weights"] == "model"
            )
            cells = [f"{row['cont_ppl_ratio']:.3f}x | {row['cont_kl']:.3f}" for row in (result, once)]
            follows.append(f"| {_short(result['model'])} | {' | '.join(cells)} |")
    if follows:
        table += [
            "",
            "What follows a document, the documents of the tables above; read once: of those tables, in their type.",
            "",
            "| model | continuation ppl | KL | ppl, read once | KL |",
            "|---|--:|--:|--:|--:|",
            *follows,
        ]
    for found in lines.values():
        both = sorted((one for one in found if "likelihood" in one), key=lambda one: -one["reread"])
        if len(both) == 2:
            table += ["", *_answers_beside(both, _short(both[0]["model"]), "read once")]
    return "\n".join(table)


def _loss(likelihood: Row) -> str:
    return f"{likelihood['loss']:.3f}" + _interval(likelihood["interval"], " ({:.3f} to {:.3f})")


def rivals_table(bench: list[Row], llama: list[Row], served: list[Row]) -> str:
    """What else runs the same model on this machine; "" where that was not measured. llama: lines of llama-bench. served: steps
    of serving.py."""
    ours = next((result for result in bench if _eight(result) and result.get("compare")), None)
    if ours is None:
        return ""
    row = ours["rows"][0]
    tokens = row["prompt_tokens"]
    sparse = next((r for result in bench if not _eight(result) for r in result["rows"] if r["prompt_tokens"] == tokens), None)
    times = {
        f"fastfill, {ours['sparsity']:.0%} sparsity, int8": row["ttft_sparse_s"],
        **({f"fastfill, {ours['sparsity']:.0%} sparsity, {ours['dtype']}": sparse["ttft_sparse_s"]} if sparse else {}),
        "fastfill, int8, all neurons kept": row["ttft_all_neurons_s"],
        f"transformers, {ours['dtype']}": row["ttft_dense_s"],
        **{
            one["name"] + f" ({one['weights']})" * (one["weights"] not in one["name"]): one["ttft_s"]
            for one in ours["compare"]
            if one.get("prompt_tokens") == tokens and not (llama and one["name"] == "llama-bench")
        },
        **{
            f"vLLM{what}, {step['dtype']}": one[key]
            for step in served
            for one in step["rows"]
            if one["prompt_tokens"] == tokens
            for what, key in ((" with fastfill", "ttft_sparse_s"), ("", "ttft_stock_s"))
        },
        **{f"llama.cpp, {_format(one)}": one["avg_ns"] / 1e9 for one in llama if one["n_prompt"] == tokens},
    }
    lines = [
        f"{_short(ours['model'])}, {tokens:,} tokens, beside what else runs it ({_where(ours['machine'])}). Runs of "
        f"their own: sparse in {ours['dtype']}{', vLLM' * bool(served)}{', llama.cpp (llama-bench)' * bool(llama)}.",
        "",
        "| engine | TTFT | over ours in int8 |",
        "|---|--:|--:|",
    ]
    for name, seconds in sorted(times.items(), key=lambda item: item[1]):
        lines.append(f"| {name} | {seconds:.2f} s | {seconds / row['ttft_sparse_s']:.2f}x |")
    return "\n".join(lines)


def _format(line: Row) -> str:
    """The number format that llama-bench names, as its files are called."""
    return str(line["model_type"]).split("B ", 1)[-1].replace(" - Medium", "_M")


def answers_table(result: Row) -> str:
    """Scores of the written answers and the likelihood of the right ones, by set; behind the mean the sets at chance."""
    machine, sets = result["machine"], result["datasets"]
    able = [line for line in sets if not line.get("at_chance")]
    lost = [line for line in sets if line.get("at_chance")]
    mean = {**result["average"], "examples": sum(line["examples"] for line in able)}
    mean |= {"recovery": mean.get("mean_recovery"), "interval": mean.get("mean_recovery_interval")}
    apart = " Behind the mean: sets at chance, on which the dense model is not shown to be better than that." if lost else ""
    lines = [
        f"{_short(result['model'])}, {result['dtype']}, {result['sparsity']:.0%} sparsity, blocks of {result['block_size']}, "
        f"{result['kernel']} kernel; {machine['gpu'] or _where(machine)}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}: {ANSWERED[result['task']].format(len(sets))}, prompts of at most "
        f"{result['max_prompt_tokens']:,} tokens ({result['cut_prompts']} cut in the middle). Scores in percent. Chance: what "
        "answers to other rows of the set score. Recovery: sparse score over dense; the mean row has the mean of the "
        "recoveries. Loss and KL: of the right answer, nats per token. Brackets: 95 % intervals over rows. Sets weigh the "
        f"same.{apart}",
        "",
        "| | rows | dense score | sparse score | chance | recovery | loss | KL |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(_answered(line["dataset"], line, line["likelihood"]) for line in able),
        _answered(f"**mean of {len(able)} set{'s' * (len(able) != 1)}**", mean, {} if lost else result["likelihood"]),
        *(_answered(f"{line['dataset']} (at chance)", {**line, "recovery": None}, line["likelihood"]) for line in lost),
    ]
    if lost:
        lines.append(_answered(f"**mean of all {len(sets)} sets**", {"examples": result["examples"]}, result["likelihood"]))
    return "\n".join(lines)


def _answered(name: str, scores: Row, loss: Row) -> str:
    """A row of `answers_table`; cells of what is not known stay empty."""
    recovery = scores.get("recovery")
    cells = (
        name,
        f"{scores['examples']:,}",
        *("" if scores.get(key) is None else f"{scores[key]:.1f}" for key in ("dense", "sparse", "chance")),
        "" if recovery is None else f"{recovery:.1%}" + _interval(scores["interval"], " ({:.1%} to {:.1%})"),
        _loss(loss) if loss else "",
        f"{loss['kl']:.3f}" if loss else "",
    )
    return f"| {' | '.join(cells)} |"


def likelihood_table(result: Row) -> str:
    """The likelihood of the right answers of LongBench's official rows, all sets and each."""
    rows = [("all sets", result["likelihood"]), *((line["dataset"], line["likelihood"]) for line in result["datasets"])]
    lines = [
        f"{_short(result['model'])}, {result['dtype']}, {result['sparsity']:.0%} sparsity: the right answer to rows of "
        f"MiniLongBench ({len(result['datasets'])} of LongBench's 21 sets), prompts cut in the middle to "
        f"{result['max_prompt_tokens']:,} tokens; nats per token of the answer, teacher-forced after a dense and after a "
        "sparse prefill. Sets weigh the same.",
        "",
        "| | rows | dense | sparse | loss | 95 % interval | KL | same first token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows:
        cells = (
            name,
            str(row["examples"]),
            f"{row['dense']:.3f}",
            f"{row['sparse']:.3f}",
            f"{row['loss']:.3f}",
            _interval(row["interval"], "{:.3f} to {:.3f}"),
            f"{row['kl']:.3f}",
            f"{row['first_token_agreement']:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    head, rest = lines[:5], lines[5:]
    return "\n".join([*head, "", "<details><summary>By set</summary>", "", *lines[2:4], *rest, "", "</details>"])


def bench_tables(bench: list[Row]) -> str:
    """One table per bench result; prompts on which we lose or do nothing are marked."""
    if not bench:
        return "{{bench: from benchmarks/results/bench-*.json}}"
    tables = []
    for result in bench:
        machine = result["machine"]
        kept = all("ttft_all_neurons_s" in row for row in result["rows"])  # measured since 0.2
        lines = [
            f"{_short(result['model'])}, {result['dtype']}{', sparse in int8' * _eight(result)}"
            f"{', FFNs packed' * _packed(result)}{', its attention by chunks' * by_chunks(result)}, "
            f"{result['sparsity']:.0%} sparsity, blocks of {result['block_size']}, {result['kernel']} kernel; "
            f"{_where(machine)}, torch {machine['torch']}, transformers {machine['transformers']}; medians of "
            f"{result['repeats']}.",
            "",
            f"| prompt tokens | dense TTFT |{' all neurons kept |' * kept} sparse TTFT | speed-up | ceiling | "
            f"FFN share of dense | FFN time, sparse / dense |{' all kept / dense |' * kept}",
            "|--:|--:|--:|--:|--:|--:|--:|" + "--:|--:|" * kept,
        ]
        for row in result["rows"]:
            cells = (
                f"{row['prompt_tokens']:,}",
                f"{row['ttft_dense_s']:.3f} s",
                *([f"{row['ttft_all_neurons_s']:.3f} s"] if kept else []),
                f"{row['ttft_sparse_s']:.3f} s",
                _gain(row),
                _ceiling(row),
                f"{row['ffn_share']:.0%}",
                f"{row['ffn_ratio']:.2f}",
                *([f"{row['ffn_all_neurons_s'] / row['ffn_dense_s']:.2f}"] if kept else []),
            )
            lines.append(f"| {' | '.join(cells)} |")
        if result.get("growth_dense") is not None:  # results of 0.1.0 have neither this nor other engines
            lines += ["", _growth(result)]
        if result.get("compare"):
            lines += ["", _peers(result["compare"])]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _more(row: Row) -> str:
    return ", the rest being the kernel's or noise" if round(row["speedup"], 2) > round(ceiling(row), 2) else ""


def _gain(row: Row) -> str:
    if not row["sparse_tokens"]:
        return "all dense"
    word = " (within the noise)" if row.get("clear") is False else " (slower)" if row["speedup"] < 1 else ""
    return f"{row['speedup']:.2f}x{word}"


def _ceiling(row: Row) -> str:
    return f"{ceiling(row):.2f}x" if row["sparse_tokens"] else ""


def _growth(result: Row) -> str:
    tokens = [row["prompt_tokens"] for row in result["rows"]]
    return (
        f"From {min(tokens):,} to {max(tokens):,} tokens the time grows with the prompt length to the power "
        f"{result['growth_dense']:.2f} dense and {result['growth_sparse']:.2f} sparse."
    )


def _peers(rows: list[Row]) -> str:
    """One sentence per other engine, measured or not."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    sentences = []
    for name, found in groups.items():
        if "skipped" in found[0]:
            sentences.append(f"{name} was not measured: {found[0]['skipped']}.")
            continue
        times = ", ".join(f"{row['ttft_s']:.3f} s for {row['prompt_tokens']:,}" for row in found)
        sentences.append(f"{name} {found[0]['version']} ({found[0]['weights']}) takes {times} tokens.")
    return " ".join(sentences)


def split_tables(bench: list[Row]) -> str:
    """Where the time of a prefill goes, its arithmetic and its memory; of the first bench result that has them."""
    for result in bench:
        if not all("split_dense" in row for row in result["rows"]):
            continue
        lines = [
            f"{_short(result['model'])}, {result['dtype']}, {result['sparsity']:.0%} sparsity, "
            f"blocks of {result['block_size']}, {result['kernel']} kernel; profiled runs. Memory is what a prefill adds to "
            f"{result['model_mb']:,.0f} MB of weights and {result['attached_mb']:,.0f} MB that attaching adds.",
            "",
            "| prompt tokens | | attention | FFN | predictor | compensator | rest | GFLOP | peak memory |",
            "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["rows"]:
            for kind in ("dense", "sparse"):
                peak = row[f"peak_{kind}_mb"]
                cells = (
                    f"{row['prompt_tokens']:,}",
                    kind,
                    *(f"{seconds:.3f} s" for seconds in row[f"split_{kind}"].values()),
                    f"{row[f'flops_{kind}'] / 1e9:,.0f}",
                    "" if peak is None else f"{peak:,.0f} MB",
                )
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)
    return "{{split: from benchmarks/results/bench-*.json}}"


SEEDED = {
    "ppl_ratio": ("strict ratio", "{:.3f}"),
    "kl": ("KL", "{:.4f}"),
    "cont_ppl_ratio": ("continuation ratio", "{:.4f}"),
    "cont_kl": ("KL", "{:.4f}"),
}


def seeds(rows: list[Row]) -> str:
    """What the seed of the calibration changes: every value, and their standard deviation."""
    parts = []
    for key, (name, form) in SEEDED.items():
        values = [row[key] for row in rows]
        listed = ", ".join(form.format(value) for value in values)
        parts.append(f"{name} {listed} (standard deviation {form.format(statistics.stdev(values))})")
    return f"The learned row of the first table, from {len(rows)} calibrations with different seeds: {'; '.join(parts)}."


def quality_tables(quality: list[Row]) -> str:
    """One table per setting: dense, then the learned selection beside the baselines."""
    if not quality:
        return "{{quality: from benchmarks/results/quality.jsonl}}"
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in quality:
        groups.setdefault(_setting(row), []).append(row)
    tables = []
    for rows in groups.values():
        rows.sort(key=lambda row: (_rank(row["predictor"]), not row["compensator"]))
        first = rows[0]
        lines = [
            f"{_short(first['model'])}, {first['dtype']}{', sparse in int8' * _eight(first)}, "
            f"{first['sparsity']:.0%} sparsity, blocks of {first['block_size']}; "
            f"{_documents(first)}, {first['tokens']:,} tokens scored strictly, "
            f"{first['cont_tokens']:,} as continuation. Without any context the continuation has perplexity "
            f"{first['no_context_ppl']:.2f}.",
            "",
            "| selection | compensator | strict ppl | ratio | KL | top-1 | continuation ppl | ratio | KL | context kept |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
            f"| dense | | {first['ppl_dense']:.2f} | | | | {first['cont_ppl_dense']:.2f} | | | 100% |",
        ]
        for row in rows:
            kept = row.get("context_kept")
            cells = (
                f"**{row['predictor']}**" if row["predictor"] == "learned" else row["predictor"],
                "yes" if row["compensator"] else "no",
                _ppl(row["ppl_sparse"]),
                f"{row['ppl_ratio']:.2f}x" + _interval(row.get("ppl_ratio_interval")),
                f"{row['kl']:.3f}",
                f"{row['top1_agreement']:.0%}",
                _ppl(row["cont_ppl_sparse"]),
                f"{row['cont_ppl_ratio']:.2f}x" + _interval(row.get("cont_ppl_ratio_interval")),
                f"{row['cont_kl']:.3f}",
                "" if kept is None else f"{kept:.0%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _interval(ends: list[float] | None, form: str = " ({:.2f} to {:.2f})") -> str:
    return form.format(*ends) if ends else ""


def tasks_tables(folder: Path) -> str:
    """Answers to long prompts: the averages, and behind them every dataset."""
    files = {name: folder / file for file, name in TASKS.items()}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    if not found:
        return "{{tasks: from benchmarks/results/ruler-1024.json and results/eval}}"
    head = ["| | rows | dense score | sparse score | recovery | 95 % interval |", "|---|--:|--:|--:|--:|--:|"]
    first = next(iter(found.values()))
    lines = [
        f"{_short(first['model'])}, {first['dtype']}, {first['sparsity']:.0%} sparsity, blocks of {first['block_size']}.",
        "",
        *head,
        *(_task(name, result["average"], result["examples"]) for name, result in found.items()),
        "",
        "<details><summary>By dataset</summary>",
    ]
    for name, result in found.items():
        lines += ["", f"{name}:", "", *head, *(_task(line["dataset"], line, line["examples"]) for line in result["datasets"])]
    lines += ["", "</details>"]
    return "\n".join(lines)


def _task(name: str, scores: Row, examples: int) -> str:
    recovery = "" if scores["recovery"] is None else f"{scores['recovery']:.0%}"
    interval = _interval(scores["interval"], "{:.0%} to {:.0%}")
    dense, sparse = ("" if scores[kind] is None else f"{scores[kind]:.1f}" for kind in ("dense", "sparse"))
    return f"| {name} | {examples} | {dense} | {sparse} | {recovery} | {interval} |"


def load_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def vllm_tables(steps: list[Row], file: str = "vllm.jsonl") -> str:
    """Stock vLLM beside vLLM with an artifact: speed, then what a server did under load."""
    speed, load = [s for s in steps if "one_copy" in s], [s for s in steps if "requests" in s]
    if not speed:
        return f"{{{{vllm: from benchmarks/results/{file}}}}}"
    machine = speed[0]["machine"]
    shaped = any("shaped" in step["model"] for step in speed)
    lines = [
        f"vLLM {speed[0]['vllm']}, {speed[0]['dtype']}, blocks of {speed[0]['block_size']}; {_where(machine)}, torch "
        f"{machine['torch']}; medians.{' The models called *shaped* have random weights.' * shaped}",
        "",
        "| model | sparsity | prompt tokens | stock vLLM | with fastfill | speed-up | ceiling | FFN share of dense |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for step in speed:
        name = _short(step["model"]) + (" (one copy)" if step["one_copy"] else "")
        for row in step["rows"]:
            cells = (
                name,
                f"{step['sparsity']:.0%}",
                f"{row['prompt_tokens']:,}",
                f"{row['ttft_stock_s']:.3f} s",
                f"{row['ttft_sparse_s']:.3f} s",
                _gain(row),
                _ceiling(row),
                f"{row['ffn_share']:.0%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    for step in (s for s in steps if s["step"] == "decode"):
        times = (f"{_short(r['model'])} {r['stock_ms']:.1f} and {r['sparse_ms']:.1f} ({r['ratio']:.2f}x)" for r in step["rows"])
        what = "Median milliseconds from one new token to the next, stock and with fastfill (median ratio of the rounds)"
        lines += ["", f"{what}: {', '.join(times)}."]
    for step in load:
        lines += [
            "",
            f"A server of {_short(step['model'])}, {step['dtype']}, under load: {step['requests']} prompts of "
            f"{step['shortest']:,} to {step['longest']:,} tokens, {step['per_second']:g} a second (Poisson), "
            f"{step['new_tokens']} new tokens each.",
            "",
            "| server | median TTFT | p99 | prompt tokens/s | new tokens/s | errors | same answer as when sent alone |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in step["rows"]:
            cells = (
                "stock" if row["engine"] == "stock" else "with fastfill",
                f"{row['ttft_median_s']:.2f} s",
                f"{row['ttft_p99_s']:.2f} s",
                f"{row['prompt_tokens_s']:,.0f}",
                f"{row['new_tokens_s']:.1f}",
                f"{len(row['errors'])}",
                f"{row['answers_equal_to_alone']} of {step['requests']}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rank(predictor: str) -> int:
    return PREDICTORS.index(predictor) if predictor in PREDICTORS else len(PREDICTORS)


def _short(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    return NAMES.get(name, name)


def _ppl(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _where(machine: Row) -> str:
    return f"{machine['gpu'] or processor(machine)}, {machine['threads']} threads"


def render(readme: str, folder: Path = RESULTS) -> str:
    """A page's text with every marked part written anew. Raises ValueError for a marker of unknown name."""
    bench, quality, seeded = load_bench(folder), load_quality(folder), load_lines(folder / "seeds.jsonl")
    first = next((folder / name for name in REAL if load_bench(folder / name) and load_quality(folder / name)), folder)
    parts = {
        "claim": claim(load_bench(first), load_quality(first), load_lines(first / "llama-bench.jsonl")),
        "speed": speed_summary(folder),
        "quality-short": quality_summary(folder),
        "real": real_tables(folder),
        "avx2": machine_table(folder / "avx2"),
        "amx": machine_table(folder / "amx"),
        "reread": reread_tables(folder, "avx2"),
        "reread-amx": reread_tables(folder, "amx"),
        "bench": bench_tables(bench),
        "split": split_tables(bench),
        "quality": "\n\n".join([quality_tables(quality), *([seeds(seeded)] if len(seeded) > 1 else [])]),
        "tasks": tasks_tables(folder),
        "vllm": vllm_tables(load_lines(folder / "vllm.jsonl")),
        "vllm-avx2": vllm_tables(load_lines(folder / "avx2" / "vllm.jsonl"), "avx2/vllm.jsonl"),
        "vllm-amx": vllm_tables(load_lines(folder / "amx" / "vllm.jsonl"), "amx/vllm.jsonl"),
    }

    def replace(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"results:{match[1]} is not known; there are {', '.join(parts)}")
        return f"<!-- results:{match[1]} -->\n{parts[match[1]]}\n<!-- /results -->"

    return re.sub(r"<!-- results:(\S+) -->\n.*?<!-- /results -->", replace, readme, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and docs/results.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README differs")
    arguments = parser.parse_args()
    stale = 0
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if arguments.check and before != after:
            print(f"{page.name} is not what benchmarks/results say; run: python benchmarks/report_tables.py", file=sys.stderr)
            stale = 1
        elif before != after:
            page.write_text(after, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
