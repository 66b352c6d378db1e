"""What each verb shows people: tables and bars, from the document that --json prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from fastfill.artifact import Artifact
from fastfill.card import documents
from fastfill.lab.tasks.perplexity import Perplexity
from fastfill.machine import processor
from fastfill.tables import console, table
from fastfill.terminal import text_of


def _say(text: str | Text) -> None:
    console().print(text, soft_wrap=isinstance(text, Text))


def artifact(artifact: Artifact, folder: Path) -> None:
    base, prefill = artifact.base_model, artifact.prefill
    info = artifact.summary()
    flops, record = info["flops"], artifact.calibration
    title = Text.assemble((text_of(str(folder)), "bold"), text_of(f": artifact for {base['name']} ({base['model_type']})"))
    _say(title)
    _say(f"{base['layers']} layers, hidden size {base['hidden_size']}, intermediate size {base['intermediate_size']}")
    _say(f"sparsity {prefill.sparsity:.0%}, blocks of {prefill.block_size} tokens")
    ends = f"the first {prefill.dense_head} and the last {prefill.dense_tail} tokens"
    _say(f"dense: {ends}, and prompts under {prefill.shortest_prompt}")
    _say(
        f"FFN arithmetic per sparse token: {flops['total']:.1%} of dense\n"
        f"  = neurons {flops['ffn']:.1%} + predictor {flops['predictor']:.1%} + compensator {flops['compensator']:.1%}"
    )
    _say(
        f"memory: attaching adds the artifact, {artifact.bytes() / 1e6:.1f} MB,\n"
        f"  and the transposed down weights, {info['transposed_down_values'] * 2 / 1e6:.1f} MB in bf16"
    )
    _say("\nsparsity by layer")
    bar = "█" if console().encoding.startswith("utf") else "#"
    for layer, sparsity in enumerate(info["layer_sparsity"]):
        _say(f"{layer:3d} {bar * round(sparsity * 50):50s} {sparsity:6.1%}")
    if record:
        _say(
            f"\ncalibrated on {record.get('sequences')} sequences from {documents(artifact.calibration)}:\n"
            f"{record.get('tokens_distilled')} tokens distilled, loss {record.get('loss_first')} -> {record.get('loss_last')} "
            f"nats, {record.get('seconds')} s"
        )
        if len(record.get("loss_aside") or ()) == 2:
            _say("loss on text set aside, before and after: {} -> {} nats".format(*record["loss_aside"]))
    if artifact.quality:
        Perplexity.show(artifact.quality)
    else:
        _say("quality not measured yet: fastfill evaluate MODEL --artifact DIR --data HELD_OUT --record")


def bench(result: dict[str, Any]) -> None:
    """TTFT; where the time goes; arithmetic and memory; other engines, if they were asked for."""
    machine, rows, out = result["machine"], result["rows"], console()
    out.print(f"{result['model']}, {result['dtype']}, kernel {result['kernel']}", soft_wrap=True)
    table(
        f"TTFT, {result['sparsity']:.0%} sparsity, blocks of {result['block_size']}",
        ["prompt", "dense s", "all kept s", "sparse s", "speed-up", "quartiles", "ceiling"],
        [
            [
                str(row["prompt_tokens"]),
                *(f"{row[f'ttft_{mode}_s']:.3f}" for mode in ("dense", "all_neurons", "sparse")),
                *_speedup(row),
                "-" if row["ceiling"] is None else f"{row['ceiling']:.2f}x",
            ]
            for row in rows
        ],
    )
    also = " and attention by chunks" if result.get("attention_by", "").startswith("chunks") else ""
    out.print(f"all kept: the {result['kernel']} kernel{also} with all neurons; that gain is theirs, the rest the sparsity's")
    if chosen := result.get("choice"):
        from_where = f"from {chosen['min_tokens']} tokens on" if chosen["min_tokens"] else "nowhere"
        out.print(f"attach, if nothing is named: kernel {chosen['kernel']}, sparse {from_where} ({chosen['reason']})")
    if any(row["clear"] is False for row in rows):
        most = max(row["rounds"] for row in rows)
        out.print(f"?: within the noise after {most} rounds (quartiles farther apart than the gain)")
    out.print(
        f"medians of {result['repeats']} rounds or more; {processor(machine)}, {machine['threads']} threads, "
        f"torch {machine['torch']}, transformers {machine['transformers']}"
    )
    if result["growth_dense"] is not None:
        tokens = [row["prompt_tokens"] for row in rows]
        out.print(
            f"from {min(tokens)} to {max(tokens)} tokens TTFT grows with the prompt length to the power "
            f"{result['growth_dense']:.2f} dense, {result['growth_sparse']:.2f} sparse (log-log fit)"
        )
    parts = ("attention", "ffn", "predictor", "compensator", "rest")
    table(
        "\nwhere the time goes, s (profiled runs of their own)",
        ["prompt", "", "attention", "FFN", "predictor", "compensator", "rest", "FFN share"],
        [
            [
                str(row["prompt_tokens"]) if mode == "dense" else "",
                "all kept" if mode == "all_neurons" else mode,
                *(f"{row[f'split_{mode}'][part]:.3f}" for part in parts),
                f"{row['ffn_share']:.0%}" if mode == "dense" else "",
            ]
            for row in rows
            for mode in ("dense", "all_neurons", "sparse")
        ],
    )
    table(
        "\narithmetic and peak memory of a prefill",
        ["prompt", "GFLOP dense", "sparse", "FFN FLOPs", "FFN time", "all kept", "MB dense", "sparse"],
        [
            [
                str(row["prompt_tokens"]),
                *(f"{row[f'flops_{kind}'] / 1e9:,.0f}" for kind in ("dense", "sparse")),
                f"{row['ffn_flops_ratio']:.2f}",
                f"{row['ffn_ratio']:.2f}",
                f"{row['ffn_all_neurons_s'] / row['ffn_dense_s']:.2f}",
                *("-" if row[f"peak_{kind}_mb"] is None else f"{row[f'peak_{kind}_mb']:,.0f}" for kind in ("dense", "sparse")),
            ]
            for row in rows
        ],
    )
    out.print(
        "FFN FLOPs, FFN time: sparse over dense, predictor and compensator included; all kept: FFN time over dense\n"
        f"MB: above the {result['model_mb']:,.0f} MB of weights and the {result['attached_mb']:,.0f} MB that attaching adds"
    )
    if result["compare"]:
        engines(result)


def _speedup(row: dict[str, Any]) -> tuple[str, str]:
    """Speed-up, and the quartiles of the rounds' ratios."""
    if not row["sparse_tokens"]:
        return "all dense", "-"
    low, _, high = row["ratio_quartiles"]
    return f"{row['speedup']:.2f}x{'' if row['clear'] else '?'}", f"{low:.2f}-{high:.2f}"


def engines(result: dict[str, Any]) -> None:
    """Other engines on the same prompt lengths, and why some are missing."""
    ours = {row["prompt_tokens"]: row for row in result["rows"]}
    measured = [row for row in result["compare"] if "ttft_s" in row]
    if measured:
        table(
            "\nother engines, TTFT in s",
            ["engine", "prompt", "TTFT", "here dense", "here sparse"],
            [
                [
                    row["name"],
                    str(row["prompt_tokens"]),
                    f"{row['ttft_s']:.3f}",
                    *(f"{ours[row['prompt_tokens']][f'ttft_{kind}_s']:.3f}" for kind in ("dense", "sparse")),
                ]
                for row in measured
            ],
        )
    for line in dict.fromkeys(f"{row['name']} {row['version']}, weights {row['weights']}" for row in measured):
        console().print(line)
    for row in result["compare"]:
        if "skipped" in row:
            console().print(f"not measured: {row['name']}, {row['skipped']}")
