"""Figures of quality: against speed, at equal FLOPs, by selection, along the prompt, and by task."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastfill.lab.report.draw import HEX, Sheet, Style, as_percent, dots, label, log_axis, style
from fastfill.lab.report.values import (
    MISSING,
    Table,
    count,
    distinct,
    known,
    number,
    numbers,
    pair,
    percent,
    plain,
    text,
    times,
)

Document = dict[str, Any]
METHODS = ("learned", "oracle", "static", "low-rank", "first-block", "random")  # the same look in every figure
PER_TOKEN = ("gate-threshold", "input-threshold")  # each token has its own choice, which no matrix product of a prefill can use
TASKS = {"longbench": "LongBench", "ruler": "RULER", "suite": "the suite"}
READINGS = (("strict", "ppl_ratio"), ("continuation", "cont_ppl_ratio"))
NAMED_BY = ("model", "dtype", "predictor", "compensator", "sparsity", "block_size", "sources")


def looks(methods: Sequence[str]) -> list[Style]:
    """A style per series; of two with the same method the first has the method's own."""
    own = {method: style(index) for index, method in enumerate(METHODS)} | {"dense": Style("ink", "*", "")}
    free = (style(index) for index in itertools.count(len(METHODS)))
    return [next(free) if method in methods[:i] or method not in own else own[method] for i, method in enumerate(methods)]


def pareto(document: Document, name: str = "quality") -> str:
    """Perplexity ratio against TTFT speed-up, strict and continuation. Filled marks were timed; hollow ones (a method without
    a speed of its own, such as the oracle) stand at the learned selection's speed at the same sparsity. document: what
    `evaluate --task pareto` prints. name: prefix of the ids."""
    methods = list(dict.fromkeys(_method(row) for row in document["rows"]))
    named = list(enumerate(zip(methods, looks(methods), strict=True)))
    with Sheet(name, "Quality against speed", pareto_caption(document), 400) as sheet:
        panels = sheet.axes(1, 2)
        for ax, (reading, key) in zip(panels, READINGS, strict=True):
            for index, (method, look) in named:
                rows = [row for row in document["rows"] if _method(row) == method]
                rows.sort(key=lambda row: (math.isnan(number(row.get("sparsity"))), number(row.get("sparsity"))))
                timed = bool(known(numbers(rows, "speedup")))
                at, values = [_speed(row, document) for row in rows], numbers(rows, key)
                series = {"color": HEX[look.colour], "marker": look.marker, "linestyle": look.line}
                series |= {"markersize": 12} if method == "dense" else {}
                series |= {} if timed else {"markerfacecolor": HEX["page"], "linewidth": 1.2}
                ax.plot(
                    at,
                    values,
                    label=label(method) + ("" if timed else " (not timed)"),
                    gid=f"{reading}-{index}",
                    **series,
                )
                if method == "learned":
                    for x, y, row in zip(at, values, rows, strict=True):
                        shown = row in (rows[0], rows[-1]) or row.get("sparsity") == document.get("sparsity")
                        if shown and len(known([x, y])) == 2:
                            place = {"xytext": (-5, 6), "textcoords": "offset points", "ha": "right", "fontsize": 12}
                            place |= {"bbox": {"facecolor": HEX["page"], "edgecolor": "none", "pad": 0.5}, "zorder": 9}
                            ax.annotate(budget(row), (x, y), **place)
            ax.axhline(1, color=HEX["ink"], linewidth=1)
            ax.set_title(f"{reading}: perplexity, sparse / dense")
            ax.set_xlabel("speed-up of TTFT (lower right is better)")
            ax.margins(x=0.14, y=0.1)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:.2f}x")
            ax.locator_params(axis="x", nbins=6)
            log_axis(ax.yaxis, [value for line in ax.get_lines() for value in line.get_ydata()], lambda v: f"{v:g}x")
        sheet.legend(panels)
    return sheet.svg


def _method(row: Document) -> str:
    return text(row.get("method", "?"), 60)


def budget(row: Document) -> str:
    """The sparsity as a label: 62.5 stays 62.5."""
    value = number(row.get("sparsity"))
    return MISSING if math.isnan(value) else f"{100 * value:.3g}%"


def _speed(row: Document, document: Document) -> float:
    """The row's speed-up; for a method that was not timed the learned selection's at the same sparsity."""
    own = number(row.get("speedup"))
    if math.isnan(own):
        partners = (r for r in document["rows"] if _method(r) == "learned" and r.get("sparsity") == row.get("sparsity"))
        partner: Document = next(partners, {})
        own = number(partner.get("speedup"))
    return own


def pareto_caption(document: Document) -> str:
    learned = [row for row in document["rows"] if _method(row) == "learned" and known([number(row.get("speedup"))])]
    if not learned:
        return "No learned selection was timed in this run."
    asked = number(document.get("sparsity"))
    row = min(learned, key=lambda row: (abs(number(row.get("sparsity")) - asked), -number(row["speedup"])))
    sentence = (
        f"At {budget(row)} sparsity and {count(document.get('prompt_tokens'))} tokens the learned "
        f"selection reaches the first token {times(row['speedup'])} as fast as dense; perplexity is "
        f"{times(row.get('ppl_ratio'))} the dense one on the sparse tokens (strict) and "
        f"{times(row.get('cont_ppl_ratio'))} on what follows (continuation)"
    )
    oracle = [r for r in document["rows"] if _method(r) == "oracle" and r.get("sparsity") == row.get("sparsity")]
    if oracle:
        sentence += f"; an oracle would have {times(oracle[0].get('ppl_ratio'))} and {times(oracle[0].get('cont_ppl_ratio'))}"
    return sentence + "."


def pareto_tables(document: Document) -> list[Table]:
    columns = [
        "method",
        "sparsity",
        "TTFT (s)",
        "dense TTFT (s)",
        "speed-up",
        "strict ratio",
        "KL (nats)",
        "continuation ratio",
    ]
    columns += ["context kept", "FFN FLOPs, share of dense"]
    rows = [
        [
            _method(row),
            budget(row),
            *(plain(row.get(key)) for key in ("ttft_s", "ttft_dense_s")),
            *(times(row.get(key)) for key in ("speedup", "ppl_ratio")),
            plain(row.get("kl"), 3),
            times(row.get("cont_ppl_ratio")),
            percent(row.get("context_kept")),
            percent(row.get("ffn_flops")),
        ]
        for row in document["rows"]
    ]
    return [Table("Quality against speed", columns, rows)]


def peers(document: Document, name: str = "peers") -> str:
    """Ways to skip neurons at equal FLOPs, best strict ratio first. document: what `evaluate --task peers` prints. name:
    prefix of the ids."""
    rows = [row for row in _by_ratio(document["rows"]) if _method(row) != "dense"]
    with Sheet(name, "Quality at equal FLOPs", peers_caption(document), 120 + 30 * len(rows)) as sheet:
        _ratios(sheet, _peers(rows), rows)
    return sheet.svg


def _by_ratio(rows: Sequence[Document]) -> list[Document]:
    return sorted(rows, key=lambda row: (math.isnan(number(row.get("ppl_ratio"))), number(row.get("ppl_ratio"))))


def _ratios(sheet: Sheet, names: list[str], rows: Sequence[Document]) -> None:
    """Strict and continuation ratio of each row, with intervals where there are some."""
    (ax,) = sheet.axes()
    series = []
    for reading, key in READINGS:
        intervals = [pair(row.get(f"{key}_interval")) for row in rows]
        some = any(known(ends) for ends in intervals)
        series.append((reading, numbers(rows, key), intervals if some else []))
    dots(ax, names, series)
    ax.axvline(1, color=HEX["ink"], linewidth=1)
    ax.set_title("perplexity, sparse / dense (1.0x: no loss)")
    log_axis(ax.xaxis, [value for _, values, _ in series for value in values], lambda v: f"{v:g}x")
    sheet.legend([ax])


def _peers(rows: Sequence[Document]) -> list[str]:
    """Name, published name, and what is not the same for all."""
    flops = [percent(row.get("ffn_flops"), 0) for row in rows]
    names = []
    for row, share in zip(rows, flops, strict=True):
        name = label(row.get("method", "?"), 24)
        name += f" ({label(row['published_as'], 20)})" if row.get("published_as") else ""
        name += f", {share} FLOPs" if len(set(flops)) > 1 else ""
        names.append(name + (" + compensator" if row.get("compensator") else ""))
    return names


def peers_caption(document: Document) -> str:
    rows = [row for row in _by_ratio(document["rows"]) if _method(row) != "dense"]
    names = dict(zip(map(id, rows), _peers(rows), strict=True))
    real = [row for row in rows if _method(row) != "oracle"]  # the oracle knows what no method can
    flops = sorted({percent(value, 0) for value in known(numbers(real, "ffn_flops"))})
    spread = f" at {' to '.join(dict.fromkeys((flops[0], flops[-1])))} of the dense FFN's multiply-adds" if flops else ""
    best = []
    for place, key in (("the sparse tokens", "ppl_ratio"), ("what follows", "cont_ppl_ratio")):
        measured = [row for row in real if known([number(row.get(key))])]
        if measured:
            row = min(measured, key=lambda row: number(row[key]))
            best.append(f"{names[id(row)]} loses least on {place} ({times(row[key])})")
    sentence = f"Of {len(real)} rows{spread}, {', and '.join(best) or 'none has a perplexity'}"
    oracle = next((row for row in rows if _method(row) == "oracle"), None)
    if oracle:
        sentence += f"; an oracle reaches {times(oracle.get('ppl_ratio'))} and {times(oracle.get('cont_ppl_ratio'))}"
    per_token = [names[id(row)] for row in rows if _method(row) in PER_TOKEN]
    if per_token:
        sentence += f". {' and '.join(per_token)} choose anew for each token, which saves no time in a prefill"
    return sentence + "."


def peers_tables(document: Document) -> list[Table]:
    columns = [
        "method",
        "published as",
        "compensator",
        "sparsity",
        "FFN FLOPs, share of dense",
        "prefill FLOPs, share of dense",
    ]
    columns += ["strict ratio", "KL (nats)", "top-1 agreement", "continuation ratio", "continuation KL", "context kept", "note"]
    rows = [
        [
            text(row.get("method", "?"), 60),
            text(row.get("published_as") or MISSING, 80),
            "yes" if row.get("compensator") else "no",
            percent(row.get("sparsity")),
            percent(row.get("ffn_flops")),
            percent(row.get("prefill_flops")),
            times(row.get("ppl_ratio")),
            plain(row.get("kl"), 3),
            percent(row.get("top1_agreement")),
            times(row.get("cont_ppl_ratio")),
            plain(row.get("cont_kl"), 3),
            percent(row.get("context_kept")),
            text(row.get("note") or MISSING, 400),
        ]
        for row in _by_ratio(document["rows"])
    ]
    return [Table("Quality at equal FLOPs", columns, rows)]


def selection(documents: Sequence[Document]) -> str:
    """Perplexity ratio by selection, with bootstrap intervals; from `evaluate --task perplexity`."""
    documents = _by_ratio(documents)
    with Sheet("selection", "Quality by selection", selection_caption(documents), 120 + 34 * len(documents)) as sheet:
        _ratios(sheet, _names(documents), documents)
    return sheet.svg


def _names(documents: Sequence[Document]) -> list[str]:
    """By what tells them apart; the text only where it is not the one that most were measured on."""
    ((usual, _),) = Counter(str(document.get("sources")) for document in documents).most_common(1)
    told = [document if str(document.get("sources")) != usual else {**document, "sources": None} for document in documents]
    return [
        name or text(document.get("predictor", "sparse"), 60)
        for name, document in zip(distinct(told, NAMED_BY), documents, strict=True)
    ]


def selection_caption(documents: Sequence[Document]) -> str:
    documents = _by_ratio(documents)
    parts = [
        f"{name} {times(document.get('ppl_ratio'))} and {times(document.get('cont_ppl_ratio'))}"
        for name, document in zip(_names(documents), documents, strict=True)
    ]
    return (
        f"Perplexity against dense on {plain(documents[0].get('documents'))} documents, strict and continuation: "
        + "; ".join(parts)
        + ". Lines are 95 % bootstrap intervals over documents."
    )


def selection_tables(documents: Sequence[Document]) -> list[Table]:
    documents = _by_ratio(documents)
    columns = ["selection"]
    for reading in ("strict", "continuation"):
        columns += [f"{reading}: dense ppl", "sparse ppl", "ratio", "95 % interval", "KL (nats)", "top-1"]
    rows = []
    for name, document in zip(_names(documents), documents, strict=True):
        row = [name]
        for prefix in ("", "cont_"):
            row += [plain(document.get(f"{prefix}ppl_{kind}")) for kind in ("dense", "sparse")]
            row += [times(document.get(f"{prefix}ppl_ratio")), _interval(document.get(f"{prefix}ppl_ratio_interval"), times)]
            row += [plain(document.get(f"{prefix}kl"), 3), percent(document.get(f"{prefix}top1_agreement"))]
        rows.append([*row, percent(document.get("context_kept"))])
    return [Table("Perplexity by selection", [*columns, "context kept"], rows)]


def _interval(value: Any, show: Any) -> str:
    low, high = pair(value)
    return f"{show(low)} to {show(high)}" if known([low, high]) else MISSING


def points(document: Document) -> list[Document]:
    """The points of the curve that hold numbers."""
    found = document.get("curve")
    return [point for point in found if isinstance(point, dict)] if isinstance(found, list) else []


def curve(documents: Sequence[Document]) -> str:
    """Loss along the prompt (strict). Left: losses, dense and sparse. Right: what sparsity adds. From the `curve` of
    `evaluate --task perplexity`."""
    names, styles = _names(documents), looks([text(d.get("predictor", "?"), 60) for d in documents])
    with Sheet("curve", "Loss along the prompt", curve_caption(documents), 390) as sheet:
        left, right = sheet.axes(1, 2)
        seen: list[list[float]] = []
        for index, (document, name, look) in enumerate(zip(documents, names, styles, strict=True)):
            line = points(document)
            at = [(number(point.get("from")) + number(point.get("to"))) / 2 for point in line]
            dense, sparse = numbers(line, "nll_dense"), numbers(line, "nll_sparse")
            if str(dense) not in map(str, seen):
                end = f" ({name})" if seen else ""
                left.plot(
                    at,
                    dense,
                    color=HEX["ink"],
                    marker="*",
                    markersize=9,
                    linestyle="-",
                    label=f"dense{end}",
                    gid=f"dense-{index}",
                )
                seen.append(dense)
            series = {"color": HEX[look.colour], "marker": look.marker, "linestyle": look.line}
            left.plot(at, sparse, label=label(name), gid=f"sparse-{index}", **series)
            right.plot(at, [s - d for s, d in zip(sparse, dense, strict=True)], gid=f"added-{index}", **series)
        left.set_title("mean loss, nats per token")
        right.set_title("added by sparsity, nats per token")
        right.axhline(0, color=HEX["ink"], linewidth=1)
        for ax in (left, right):
            ax.set_xlabel("position in the prompt (tokens)")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            ax.locator_params(axis="x", nbins=6)
        sheet.legend([left])
    return sheet.svg


def curve_caption(documents: Sequence[Document]) -> str:
    parts = []
    for document, name in zip(documents, _names(documents), strict=True):
        added = known(number(point.get("nll_sparse")) - number(point.get("nll_dense")) for point in points(document))
        if added:
            parts.append(f"{name} {added[0]:+.2f} in the first tokens and {added[-1]:+.2f} in the last")
    more = f"; {len(parts) - 3} more in the table" if len(parts) > 3 else ""
    return "What sparsity adds to the loss along the prompt, in nats: " + "; ".join(parts[:3]) + more + "."


def curve_tables(documents: Sequence[Document]) -> list[Table]:
    return [
        Table(
            f"Loss along the prompt, {name}",
            ["positions", "tokens", "dense (nats)", "sparse (nats)", "difference"],
            [
                [
                    f"{count(point.get('from'))} to {plain(number(point.get('to')) - 1, 7)}",
                    count(point.get("tokens")),
                    *(plain(point.get(f"nll_{kind}")) for kind in ("dense", "sparse")),
                    plain(number(point.get("nll_sparse")) - number(point.get("nll_dense")), 3),
                ]
                for point in points(document)
            ],
        )
        for document, name in zip(documents, _names(documents), strict=True)
    ]


def recovery(document: Document, name: str = "recovery") -> str:
    """Sparse score over dense score by dataset, with bootstrap intervals. document: what `evaluate --task longbench` or
    `ruler` prints. name: prefix of the ids."""
    lines = _datasets(document)
    with Sheet(name, recovery_title(document), recovery_caption(document), 100 + 30 * len(lines)) as sheet:
        (ax,) = sheet.axes()
        values = [number(line.get("recovery")) for _, line in lines]
        dots(ax, [title for title, _ in lines], [("recovery", values, [pair(line.get("interval")) for _, line in lines])])
        ax.axvline(1, color=HEX["ink"], linewidth=1)
        for row, value in enumerate(values):
            if math.isnan(value):
                words, place = "no recovery: the dense score is 0", ax.get_yaxis_transform()
                ax.text(0.01, row, words, va="center", fontsize=12, transform=place)
        ax.set_title("sparse score / dense score, 95 % bootstrap interval (100%: as good)")
        as_percent(ax.xaxis)
    return sheet.svg


def scored(document: Document) -> list[Document]:
    """The sets that have scores; a run of `--score likelihood` has none."""
    return [line for line in document["datasets"] if "recovery" in line]


def _datasets(document: Document) -> list[tuple[str, Document]]:
    lines = [(text(line.get("dataset", "?"), 48), line) for line in document["datasets"]]
    average = document.get("average")
    if len(lines) < 2 or not isinstance(average, dict) or average.get("sets") == 0:  # 0: the model can do none of them
        return lines
    return [*lines, ("average", average)]


def recovery_title(document: Document) -> str:
    return f"Recovery by dataset, {TASKS.get(document.get('task', ''), 'answers')}"


def recovery_caption(document: Document) -> str:
    title, line = _datasets(document)[-1] if document["datasets"] else ("no dataset", {})
    value, interval = number(line.get("recovery")), _interval(line.get("interval"), percent)
    if math.isnan(value):
        start = f"{title}: there is no recovery, because the dense model scores {plain(line.get('dense'))}"
    else:
        start = (
            f"{'On average' if title == 'average' else title}: the sparse model keeps {percent(value)} of the dense score"
            + (f" ({interval})" if interval != MISSING else "")
        )
    same, whole = number(document.get("same_answers")), number(document.get("examples"))
    end = f"; {plain(same)} of {plain(whole)} answers are the same word for word" if known([same, whole]) else ""
    return start + end + "."


def recovery_tables(document: Document) -> list[Table]:
    rows = [
        [
            title,
            plain(line.get("examples", document.get("examples")), 7),
            *(plain(line.get(kind)) for kind in ("dense", "sparse")),
            percent(line.get("recovery")),
            _interval(line.get("interval"), percent),
        ]
        for title, line in _datasets(document)
    ]
    return [
        Table(
            recovery_title(document), ["dataset", "examples", "dense score", "sparse score", "recovery", "95 % interval"], rows
        )
    ]
