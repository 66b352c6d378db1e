"""Figures of time: TTFT by prompt length, where it goes, one prompt as bars, and the kernel alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastfill.lab.report.draw import HEX, Sheet, as_percent, dots, label, log_axis, style, ticks
from fastfill.lab.report.values import (
    MISSING,
    NAN,
    Table,
    ceiling,
    count,
    differing,
    distinct,
    known,
    number,
    numbers,
    pair,
    percent,
    plain,
    seconds,
    speedup,
    text,
    times,
)

Document = dict[str, Any]
PARTS = (
    ("attention", "blue", ""),
    ("ffn", "orange", "///"),
    ("predictor", "green", ".."),
    ("compensator", "purple", "xx"),
    ("rest", "grey", "--"),
)
SHOWN = {"all_neurons": "all neurons kept"}
NAMED_BY = ("model", "engine", "kernel", "dtype", "sparsity", "block_size")


def ttft(documents: Sequence[Document]) -> str:
    """Left: time to first token against prompt length, dense and sparse, and engines beside them. Right: speed-up and its
    ceiling. documents: what `bench --json` prints."""
    names = distinct(documents, NAMED_BY)
    with Sheet("ttft", "Time to first token by prompt length", ttft_caption(documents), 400) as sheet:
        left, right = sheet.axes(1, 2)
        lengths: list[float] = []
        for index, (document, name) in enumerate(zip(documents, names, strict=True)):
            rows, look = sorted(document["rows"], key=lambda row: _order(row.get("prompt_tokens"))), style(2 * index)
            name = f", {name}" if name else ""
            at, colour = numbers(rows, "prompt_tokens"), HEX[look.colour]
            lengths += at
            for kind, line, face in (("dense", "--", HEX["page"]), ("all_neurons", ":", HEX["page"]), ("sparse", "-", colour)):
                if not known(numbers(rows, f"ttft_{kind}_s")):
                    continue  # results of before have no run with all neurons
                shown = label(SHOWN.get(kind, kind) + name, 60)
                series = {"color": colour, "marker": look.marker, "markerfacecolor": face, "linestyle": line}
                left.plot(
                    at,
                    numbers(rows, f"ttft_{kind}_s"),
                    label=shown,
                    gid=f"{kind}-{index}",
                    **series,
                )
                quartiles = [_ends(row.get(f"ttft_{kind}_quartiles_s")) for row in rows]
                left.vlines(at, *zip(*quartiles, strict=True), color=colour, linewidth=1)
            right.plot(at, [speedup(row) for row in rows], color=colour, marker=look.marker, gid=f"speedup-{index}")
            right.plot(
                at,
                [ceiling(row) for row in rows],
                color=colour,
                linestyle=":",
                label=label("ceiling" + name, 60),
                gid=f"ceiling-{index}",
            )
        others = [e for document in documents for e in compared(document) if known([number(e.get("ttft_s"))])]
        for index, engine in enumerate(dict.fromkeys(_engine(entry) for entry in others)):
            look = style(2 * len(documents) + 1 + index)
            mine = sorted((e for e in others if _engine(e) == engine), key=lambda e: _order(e.get("prompt_tokens")))
            lengths += numbers(mine, "prompt_tokens")
            series = {"color": HEX[look.colour], "marker": look.marker, "linestyle": look.line, "gid": f"engine-{index}"}
            left.plot(numbers(mine, "prompt_tokens"), numbers(mine, "ttft_s"), label=engine, **series)
        right.axhline(1, color=HEX["ink"], linewidth=1)
        left.set_title("time to first token, seconds (lower is better)")
        right.set_title("speed-up over dense (higher is better)")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
        left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        left.locator_params(axis="x", nbins=6)
        places = sorted({length for length in known(lengths) if length > 0})
        if places:
            right.set_xscale("log", base=2)
            ticks(right.xaxis, places[:: -(-len(places) // 7)], lambda v: f"{v:,.0f}")
        for ax in (left, right):
            ax.set_xlabel("prompt tokens")
        left.set_ylim(bottom=0)
        sheet.legend([left, right])
    return sheet.svg


def _order(value: Any) -> float:
    value = number(value)
    return math.inf if math.isnan(value) else value


def compared(document: Document) -> list[Document]:
    """The entries of other engines."""
    found = document.get("compare")
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _engine(entry: Document) -> str:
    more = [label(entry[key], 24) for key in ("version", "weights") if entry.get(key)]
    return ", ".join([label(entry.get("name", "?")), *more])


def ttft_caption(documents: Sequence[Document]) -> str:
    sentences = []
    for document, name in zip(documents, distinct(documents, NAMED_BY), strict=True):
        rows = [row for row in document["rows"] if known([speedup(row)])]
        if not rows:
            continue
        best = max(rows, key=lambda row: number(row["speedup"]))
        lost = [count(row.get("prompt_tokens")) for row in rows if number(row["speedup"]) < 1]
        sentence = (
            f"the largest gain is at {count(best.get('prompt_tokens'))} tokens, {seconds(best.get('ttft_dense_s'))} to "
            f"{seconds(best.get('ttft_sparse_s'))} ({times(best['speedup'])}, ceiling {times(ceiling(best))})"
        )
        if len(lost) == len(rows):
            sentence = f"sparse is slower at every length (at best {times(best['speedup'])})"
        elif lost:
            sentence += f"; sparse is slower at {', '.join(lost)}"
        growth = [number(document.get(f"growth_{kind}")) for kind in ("dense", "sparse")]
        if len(known(growth)) == 2:
            sentence += f"; time grows with the length to the power {growth[0]:.2f} dense and {growth[1]:.2f} sparse"
        sentence = f"{name}: {sentence}" if name else sentence
        sentences.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(sentences) or "No prompt of these runs was sparse and timed."


def ttft_tables(documents: Sequence[Document]) -> list[Table]:
    tables = []
    for document, name in zip(documents, distinct(documents, NAMED_BY), strict=True):
        columns = {
            "prompt tokens": lambda row: count(row.get("prompt_tokens")),
            "dense TTFT (s)": lambda row: plain(row.get("ttft_dense_s")),
            "dense quartiles (s)": lambda row: _quartiles(row.get("ttft_dense_quartiles_s")),
            "TTFT, all neurons kept (s)": lambda row: plain(row.get("ttft_all_neurons_s")),
            "sparse TTFT (s)": lambda row: plain(row.get("ttft_sparse_s")),
            "sparse quartiles (s)": lambda row: _quartiles(row.get("ttft_sparse_quartiles_s")),
            "speed-up": _gain,
            "speed-up, quartiles": lambda row: _quartiles(row.get("ratio_quartiles")),
            "ceiling": lambda row: times(ceiling(row)),
            "FFN share of dense": lambda row: percent(row.get("ffn_share")),
            "FFN time, sparse / dense": lambda row: plain(row.get("ffn_ratio"), 3),
            "FFN time, all kept / dense": lambda row: plain(_share(row, "ffn_all_neurons_s", "ffn_dense_s"), 3),
            "FFN FLOPs, sparse / dense": lambda row: percent(row.get("ffn_flops_ratio")),
            "FLOPs dense": lambda row: _flops(row.get("flops_dense")),
            "FLOPs sparse": lambda row: _flops(row.get("flops_sparse")),
            "peak memory dense (MB)": lambda row: plain(row.get("peak_dense_mb")),
            "peak memory sparse (MB)": lambda row: plain(row.get("peak_sparse_mb")),
            "sparse tokens": lambda row: count(row.get("sparse_tokens")),
        }
        cells = {title: [cell(row) for row in document["rows"]] for title, cell in columns.items()}
        cells = {title: column for title, column in cells.items() if title == "prompt tokens" or set(column) != {MISSING}}
        rows = [list(row) for row in zip(*cells.values(), strict=True)]
        tables.append(Table("Time to first token" + (f", {name}" if name else ""), list(cells), rows))
    others = [entry for document in documents for entry in compared(document)]
    if others:
        lines = [
            [
                _engine(e),
                count(e.get("prompt_tokens")),
                f"skipped: {text(e['skipped'])}" if "skipped" in e else plain(e.get("ttft_s")),
            ]
            for e in others
        ]
        tables.append(Table("Other engines on the same prompts", ["engine", "prompt tokens", "TTFT (s)"], lines))
    return tables


def _gain(row: Document) -> str:
    if row.get("sparse_tokens") == 0:
        return "all dense"
    return times(row.get("speedup")) + (" (within the noise)" if row.get("clear") is False else "")


def _share(row: Document, part: str, whole: str) -> float:
    whole_s = number(row.get(whole))
    return number(row.get(part)) / whole_s if whole_s > 0 else NAN


def _ends(value: Any) -> tuple[float, float]:
    """First and third of three quartiles."""
    return pair(value[::2] if isinstance(value, (list, tuple)) else None)


def _quartiles(value: Any) -> str:
    low, high = _ends(value)
    return f"{plain(low)} to {plain(high)}" if known([low, high]) else MISSING


def _flops(value: Any) -> str:
    value = number(value)
    return MISSING if math.isnan(value) else f"{value:.3g}"


def split(document: Document, name: str = "split") -> str:
    """Where the time goes: a stacked bar per prompt length, dense and sparse, as shares of the dense TTFT. document: what
    `bench --json` prints. name: prefix of the ids."""
    rows = split_rows(document)
    with Sheet(name, "Where the time goes", split_caption(document), 110 + 60 * len(rows)) as sheet:
        (ax,) = sheet.axes()
        places: list[float] = []
        names: list[str] = []
        for index, row in enumerate(rows):
            for offset, kind in ((0.0, "dense"), (1.0, "sparse")):
                at, left = 2.6 * index + offset, 0.0
                whole = number(row.get("ttft_dense_s"))
                for part, colour, hatch in PARTS:
                    share = number(row[f"split_{kind}"].get(part)) / whole if whole > 0 else NAN
                    bar = {"color": HEX[colour], "edgecolor": HEX["page"], "hatch": hatch, "height": 0.9}
                    ax.barh(at, share, left=left, label=_part(part), gid=f"{kind}-{part}-{index}", **bar)
                    left += 0.0 if math.isnan(share) else share
                ax.text(left + 0.01, at, seconds(row.get(f"ttft_{kind}_s")), va="center")
                places.append(at)
                names.append(f"{count(row.get('prompt_tokens'))} tokens, {kind}" if kind == "dense" else kind)
        ticks(ax.yaxis, places, names)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
        ax.set_title("share of the dense time to first token")
        as_percent(ax.xaxis)
        sheet.legend([ax])
    return sheet.svg


def split_rows(document: Document) -> list[Document]:
    """The rows with a split of the time."""
    return [row for row in document["rows"] if all(isinstance(row.get(f"split_{kind}"), dict) for kind in ("dense", "sparse"))]


def _part(part: str) -> str:
    return "FFN" if part == "ffn" else part


def split_caption(document: Document) -> str:
    row = max(split_rows(document), key=lambda row: number(row.get("prompt_tokens")))
    whole = number(row.get("ttft_dense_s"))

    def share(kind: str, *parts: str) -> str:
        return percent(sum(number(row[f"split_{kind}"].get(part)) for part in parts) / whole if whole > 0 else NAN, 0)

    return (
        f"At {count(row.get('prompt_tokens'))} tokens the FFN takes {share('dense', 'ffn')} of the dense time and attention "
        f"{share('dense', 'attention')}; in the sparse run the FFN takes {share('sparse', 'ffn')} of the dense time, predictor "
        f"and compensator {share('sparse', 'predictor', 'compensator')}."
    )


def split_tables(document: Document) -> list[Table]:
    columns = ["prompt", "TTFT (s)", *(f"{_part(part)} (s)" for part, _, _ in PARTS)]
    lines = [
        [
            f"{count(row.get('prompt_tokens'))} tokens, {kind}",
            plain(row.get(f"ttft_{kind}_s")),
            *(plain(row[f"split_{kind}"].get(part)) for part, _, _ in PARTS),
        ]
        for row in split_rows(document)
        for kind in ("dense", "sparse")
    ]
    return [Table("Where the time goes", columns, lines)]


def bars(document: Document, name: str = "bars") -> str:
    """Two bars, dense and sparse TTFT of one prompt, and the time that the ceiling allows. Needs `ttft_dense_s` and
    `ttft_sparse_s`; `ceiling` may be missing. name: prefix of the ids."""
    dense, sparse = (number(document.get(key)) for key in ("ttft_dense_s", "ttft_sparse_s"))
    most = ceiling(document)
    with Sheet(name, "Time to first token of one prompt", bars_caption(document), 170) as sheet:
        (ax,) = sheet.axes()
        for at, (value, colour, hatch) in enumerate(((dense, "grey", "///"), (sparse, "blue", ""))):
            ax.barh(at, value, color=HEX[colour], edgecolor=HEX["page"], hatch=hatch, height=0.7, gid=f"bar-{at}")
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            box = {"facecolor": HEX["page"], "edgecolor": "none", "pad": 1}
            ax.annotate(seconds(value), (0 if math.isnan(value) else value, at), bbox=box, **place)
        if most > 0 and dense > 0:
            ax.axvline(dense / most, color=HEX["ink"], linewidth=1.5, linestyle=":", label="what the ceiling allows")
        ticks(ax.yaxis, [0, 1], ["dense", "sparse"])
        ax.invert_yaxis()
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        sheet.legend([ax])
    return sheet.svg


def bars_caption(document: Document) -> str:
    tokens = number(document.get("prompt_tokens"))
    prompt = "The prompt" if math.isnan(tokens) else f"A prompt of {tokens:,.0f} tokens"
    allowed = f", where {times(ceiling(document))} would be the most possible" if ceiling(document) > 0 else ""
    return (
        f"{prompt} gives its first token after {seconds(document.get('ttft_dense_s'))} dense and "
        f"{seconds(document.get('ttft_sparse_s'))} sparse ({times(speedup(document))}{allowed})."
    )


def bars_tables(document: Document) -> list[Table]:
    keys = ("ttft_dense_s", "ttft_sparse_s", "ppl_dense", "ppl_sparse", "cont_ppl_dense", "cont_ppl_sparse")
    names = ("time to first token (s)", "perplexity, strict", "perplexity, continuation")
    rows = [[name, *(plain(document.get(key)) for key in keys[2 * i : 2 * i + 2])] for i, name in enumerate(names)]
    if "question" in document:
        rows.append(
            [
                f"answer to “{text(document['question'], 300)}”",
                *(text(document.get(f"answer_{k}"), 600) for k in ("dense", "sparse")),
            ]
        )
    return [Table("One document, dense and sparse", ["measure", "dense", "sparse"], rows)]


def kernel(documents: Sequence[Document]) -> str:
    """The sparse FFN kernel alone against the dense FFN, by shape and block size; from `benchmarks/kernel.py`."""
    rows, budgets = _kernel_rows(documents)
    with Sheet("kernel", "The FFN kernel alone", kernel_caption(documents), 110 + 24 * len(rows)) as sheet:
        (ax,) = sheet.axes()
        series: list[tuple[str, list[float], list[tuple[float, float]]]] = [
            (f"{percent(budget, 0)} sparsity", [found.get(budget, NAN) for found in rows.values()], []) for budget in budgets
        ]
        dots(ax, list(rows), series)
        ax.axvline(1, color=HEX["ink"], linewidth=1)
        ax.set_title("speed-up over the dense FFN of torch (1.0x: as fast)")
        log_axis(ax.xaxis, [value for _, values, _ in series for value in values], lambda v: f"{v:g}x")
        sheet.legend([ax])
    return sheet.svg


def _kernel_rows(documents: Sequence[Document]) -> tuple[dict[str, dict[float, float]], list[float]]:
    """Row name -> sparsity -> speed-up, and the sparsities."""
    names = [
        f"{count(d.get('H'))} x {count(d.get('F'))}, {label(d.get('dtype', '?'), 10)}, blocks of {plain(d.get('B'))}"
        for d in documents
    ]
    more = differing(documents, ("kernel", "isa", "threads", "T"))
    rows: dict[str, dict[float, float]] = {}
    for name, extra, document in zip(names, more, documents, strict=True):
        row = rows.setdefault(name + (f", {extra}" if extra else ""), {})
        row[number(document.get("sparsity"))] = number(document.get("speedup"))
    return rows, sorted({budget for row in rows.values() for budget in known(row)})


def kernel_caption(documents: Sequence[Document]) -> str:
    rows, budgets = _kernel_rows(documents)
    parts = []
    for budget in budgets:
        values = known(row.get(budget, NAN) for row in rows.values())
        if values:
            parts.append(f"at {percent(budget, 0)} sparsity {times(min(values))} to {times(max(values))}")
    return "The sparse FFN against torch's dense one, without the rest of the model: " + "; ".join(parts) + "."


def kernel_tables(documents: Sequence[Document]) -> list[Table]:
    rows, budgets = _kernel_rows(documents)
    columns = ["hidden x intermediate size", *(f"{percent(budget, 0)} sparsity" for budget in budgets)]
    return [
        Table(
            "Speed-up of the FFN kernel", columns, [[name, *(times(row.get(b)) for b in budgets)] for name, row in rows.items()]
        )
    ]
