"""What each verb shows people: tables and bars, from the document that --json prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from fastfill.artifact import Artifact, documents
from fastfill.schema import READINGS
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
            f"\ncalibrated on {record.get('sequences')} sequences from {documents(artifact)}:\n"
            f"{record.get('tokens_distilled')} tokens distilled, loss {record.get('loss_first')} -> {record.get('loss_last')} "
            f"nats, {record.get('seconds')} s"
        )
    if artifact.quality:
        evaluation(artifact.quality)
    else:
        _say("quality not measured yet: fastfill evaluate MODEL --artifact DIR --data HELD_OUT --record")


def evaluation(result: dict[str, Any]) -> None:
    """Strict and continuation readings of `evaluate`."""
    rows = []
    for name, prefix in (("strict", ""), ("continuation", "cont_")):
        rows.append([name, *(_cell(result.get(f"{prefix}{key}"), ".3f") for key in READINGS)])
    title = f"{result.get('documents', '-')} documents, {_cell(result.get('sparsity'), '.0%')} sparsity, "
    title += f"blocks of {result.get('block_size', '-')}, predictor {result.get('predictor', '-')}"
    table(title, ["reading", "dense ppl", "sparse ppl", "ratio", "KL nats", "top-1"], rows)
    if result.get("context_kept") is not None:
        console().print(
            f"without context the continuation has ppl {_cell(result.get('no_context_ppl'), '.2f')}: "
            f"{result['context_kept']:.1%} of the context's worth is kept"
        )
    if len(result.get("curve", ())) > 1:
        table(
            "loss along the prompt (strict), nats",
            ["positions", "dense", "sparse", "difference"],
            [
                [
                    f"{point['from']} to {point['to'] - 1}",
                    *(f"{value:.3f}" for value in (point["nll_dense"], point["nll_sparse"])),
                    f"{point['nll_sparse'] - point['nll_dense']:+.3f}",
                ]
                for point in result["curve"]
            ],
        )
    _read(result)


def _read(result: dict[str, Any]) -> None:
    counts = (result.get(f"{kind}_tokens", "-") for kind in ("sparse", "dense"))
    console().print("{} tokens read sparsely, {} densely".format(*counts))


def answers(result: dict[str, Any]) -> None:
    """Scores and recovery of `evaluate --task longbench` and `ruler`."""

    def cells(name: str, line: dict[str, Any], examples: int) -> list[str]:
        recovery = "-" if line["recovery"] is None else f"{line['recovery']:.1%}"
        interval = f"{line['interval'][0]:.1%} to {line['interval'][1]:.1%}" if line["interval"] else "-"
        return [name, str(examples), f"{line['dense']:.2f}", f"{line['sparse']:.2f}", recovery, interval]

    rows = [cells(line["dataset"], line, line["examples"]) for line in result["datasets"]]
    if len(rows) > 1:
        rows.append(cells("average", result["average"], result["examples"]))
    title = f"{result['task']}, {result['sparsity']:.0%} sparsity, blocks of {result['block_size']}, "
    columns = ["dataset", "n", "dense", "sparse", "recovery", "95 % interval"]
    table(title + f"predictor {result['predictor']}", columns, rows)
    console().print(
        f"{result['same_answers']} of {result['examples']} answers are the same; {result['cut_prompts']} prompts were cut"
    )
    _read(result)


def tasks(result: dict[str, Any]) -> None:
    """Results of `evaluate --task longbench`, `ruler` and `suite`: scores, sets at chance apart, likelihoods."""
    lines = result["datasets"]
    lost = [line for line in lines if line.get("at_chance")]
    if "average" in result:
        answers({**result, "datasets": [line for line in lines if not line.get("at_chance")]})
        if (mean := result["average"].get("mean_recovery")) is not None and result["average"]["sets"] > 1:
            low_high = result["average"]["mean_recovery_interval"]
            console().print(
                f"mean of the {result['average']['sets']} recoveries: {mean:.1%}"
                + (f" ({low_high[0]:.1%} to {low_high[1]:.1%})" if low_high else "")
            )
    if lost:
        table(
            "\nat chance, and not in the average",
            ["dataset", "n", "dense", "sparse", "chance"],
            [
                [line["dataset"], str(line["examples"]), *(f"{line[key]:.2f}" for key in ("dense", "sparse", "chance"))]
                for line in lost
            ],
        )
    if "likelihood" in result:
        _likelihoods(result)
    if result["examples"] < result["planned"]:
        console().print(f"{result['examples']} of {result['planned']} examples are done")


def _likelihoods(result: dict[str, Any]) -> None:
    """The right answer's nats per token after the dense and after the sparse prompt."""
    rows = [(line["dataset"], line["likelihood"]) for line in result["datasets"] if "likelihood" in line]
    if len(rows) > 1:
        rows.append(("average", result["likelihood"]))
    table(
        "\nthe right answer, nats per token",
        ["dataset", "n", "dense", "loss", "95 % interval", "KL", "first"],
        [
            [
                name,
                str(line["examples"]),
                f"{line['dense']:.3f}",
                f"{line['loss']:+.3f}",
                "{:+.3f} to {:+.3f}".format(*line["interval"]) if line["interval"] else "-",
                f"{line['kl']:.3f}",
                f"{line['first_token_agreement']:.0%}",
            ]
            for name, line in rows
        ],
    )
    console().print("loss: sparse - dense; first: the same most likely first token")


def recall(result: dict[str, Any]) -> None:
    """Predictor against oracle, per layer."""
    keys = ("held", "held_oracle", "recovery", "recall")
    rows = [
        [str(line["layer"]), str(line["kept"]), *(f"{line[key]:.1%}" for key in keys), f"{line['by_chance']:.1%}"]
        for line in result["layers"]
    ]
    rows.append(["mean", "", *(f"{result[key]:.1%}" for key in keys), ""])
    table(
        f"importance held, {result['documents']} documents, {result['sparsity']:.0%} sparsity, predictor {result['predictor']}",
        ["layer", "kept", "predictor", "oracle", "recovery", "ids in common", "by chance"],
        rows,
    )
    _read(result)


def picks(result: dict[str, Any]) -> None:
    """Which neurons are picked, per layer."""
    rows = []
    for layer, kept in enumerate(result["kept"]):
        chance = kept / result["neurons"]
        shares = [result["overlap"][layer], chance, result["always"][layer], result["never"][layer]]
        rows.append([str(layer), str(kept), *("-" if share is None else f"{share:.1%}" for share in shares)])
    title = f"{result['document']}: {result['blocks']} blocks, {result['neurons']} neurons a layer, "
    table(
        title + f"predictor {result['predictor']}",
        ["layer", "kept", "as the block before", "by chance", "picked by all blocks", "by none"],
        rows,
    )
    _read(result)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def methods(result: dict[str, Any]) -> None:
    """`evaluate --task peers`: methods at equal arithmetic."""
    table(
        f"at equal FFN arithmetic, {result['documents']} documents of {result['prompt_tokens']} tokens, "
        f"blocks of {result['block_size']}",
        ["method", "comp.", "skipped", "FFN", "ppl", "KL", "ppl after", "KL after", "context"],
        [
            [
                row["published_as"] or row["method"],
                "yes" if row["compensator"] else "-",
                f"{row['sparsity']:.0%}",
                f"{row['ffn_flops']:.1%}",
                _cell(row["ppl_ratio"], ".2f"),
                _cell(row["kl"], ".3f"),
                f"{row['cont_ppl_ratio']:.3f}",
                f"{row['cont_kl']:.3f}",
                _cell(row["context_kept"], ".0%"),
            ]
            for row in result["rows"]
        ],
    )
    console().print(
        "comp.: with our compensators. FFN: share of the dense prefill FFN's\n"
        "multiply-adds. ppl: over dense, on sparsely read tokens and after them.\n"
        "NAME-like: re-implemented from the description; notes are in the JSON.\n"
        "Thresholds are from "
        f"{', '.join(result['calibration'])}."
    )


def pareto(result: dict[str, Any]) -> None:
    """Quality and time by sparsity."""
    table(
        f"{result['model']}, {result['documents']} documents; TTFT of {result['prompt_tokens']} tokens",
        ["method", "sparsity", "FFN", "ppl", "KL", "ppl after", "context", "TTFT s", "speed-up"],
        [
            [
                row["method"],
                f"{row['sparsity']:.0%}",
                f"{row['ffn_flops']:.0%}",
                f"{row['ppl_ratio']:.2f}x",
                f"{row['kl']:.3f}",
                f"{row['cont_ppl_ratio']:.3f}x",
                _cell(row["context_kept"], ".0%"),
                _cell(row["ttft_s"], ".3f"),
                _cell(row["speedup"], ".2f"),
            ]
            for row in result["rows"]
        ],
    )


def bench(result: dict[str, Any]) -> None:
    """TTFT; where the time goes; arithmetic and memory; other engines, if they were asked for."""
    machine, rows, out = result["machine"], result["rows"], console()
    out.print(f"{result['model']}, {result['dtype']}, kernel {result['kernel']}", soft_wrap=True)
    table(
        f"TTFT, {result['sparsity']:.0%} sparsity, blocks of {result['block_size']}",
        ["prompt", "dense s", "quartiles", "sparse s", "quartiles", "speed-up", "ceiling"],
        [
            [
                str(row["prompt_tokens"]),
                *(cell for kind in ("dense", "sparse") for cell in (f"{row[f'ttft_{kind}_s']:.3f}", _quartiles(row, kind))),
                f"{row['speedup']:.2f}x",
                f"{row['ceiling']:.2f}x",
            ]
            for row in rows
        ],
    )
    out.print(
        f"medians of {result['repeats']}; {machine['cpu']}, {machine['threads']} threads, "
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
                str(row["prompt_tokens"]) if kind == "dense" else "",
                kind,
                *(f"{row[f'split_{kind}'][part]:.3f}" for part in parts),
                f"{row['ffn_share']:.0%}" if kind == "dense" else "",
            ]
            for row in rows
            for kind in ("dense", "sparse")
        ],
    )
    table(
        "\narithmetic and peak memory of a prefill",
        ["prompt", "GFLOP dense", "sparse", "FFN FLOPs", "FFN time", "MB dense", "sparse"],
        [
            [
                str(row["prompt_tokens"]),
                *(f"{row[f'flops_{kind}'] / 1e9:,.0f}" for kind in ("dense", "sparse")),
                f"{row['ffn_flops_ratio']:.2f}",
                f"{row['ffn_ratio']:.2f}",
                *("-" if row[f"peak_{kind}_mb"] is None else f"{row[f'peak_{kind}_mb']:,.0f}" for kind in ("dense", "sparse")),
            ]
            for row in rows
        ],
    )
    out.print(
        "FFN FLOPs, FFN time: sparse over dense, predictor and compensator included\n"
        f"MB: above the {result['model_mb']:,.0f} MB of weights and the {result['attached_mb']:,.0f} MB that attaching adds"
    )
    if result["compare"]:
        peers(result)


def _quartiles(row: dict[str, Any], kind: str) -> str:
    low, _, high = row[f"ttft_{kind}_quartiles_s"]
    return f"{low:.3f}-{high:.3f}"


def peers(result: dict[str, Any]) -> None:
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
