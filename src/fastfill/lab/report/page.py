"""The page: every figure that has data, in one HTML file that loads nothing from the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from html import escape
from operator import itemgetter
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fastfill.lab.report import draw, layers, quality, speed
from fastfill.lab.report.runs import Run
from fastfill.lab.report.values import (
    MISSING,
    Table,
    ceiling,
    count,
    distinct,
    known,
    number,
    percent,
    plain,
    seconds,
    short,
    speedup,
    text,
    times,
)
from fastfill.machine import processor
from fastfill.progress import stage

CLAIM_TOKENS = 1024  # the prompt length of the first lines, or the one nearest to it
HERE = Path(__file__).parent


class Figure(NamedTuple):
    """A figure of the page. draw, caption, tables: of all documents of the kind, or of one at a time (`each`). has: whether a
    document holds the data."""

    name: str
    title: str
    kind: str
    draw: Callable[..., str]
    caption: Callable[[Any], str]
    tables: Callable[[Any], list[Table]]
    each: bool
    has: Callable[[Any], Any] = bool


def _figure(name: str, title: str, kind: str, module: Any, function: str, each: bool, has: Any = bool) -> Figure:
    """`function` of a module, with its `_caption` and `_tables`."""
    draw_it, caption, tables = (getattr(module, function + end) for end in ("", "_caption", "_tables"))
    return Figure(name, title, kind, draw_it, caption, tables, each, has)


FIGURES = (
    _figure("ttft", "Time to first token", "bench", speed, "ttft", False, itemgetter("rows")),
    _figure("split", "Where the time goes", "bench", speed, "split", True, speed.split_rows),
    _figure("demo", "One document, dense and sparse", "demo", speed, "bars", True),
    _figure("quality", "Quality against speed", "pareto", quality, "pareto", True, itemgetter("rows")),
    _figure("peers", "Quality at equal FLOPs", "peers", quality, "peers", True, itemgetter("rows")),
    _figure("selection", "Quality by selection", "perplexity", quality, "selection", False),
    _figure("curve", "Loss along the prompt", "perplexity", quality, "curve", False, quality.points),
    _figure("longbench", "Recovery on LongBench", "longbench", quality, "recovery", True, quality.scored),
    _figure("ruler", "Recovery on RULER", "ruler", quality, "recovery", True, quality.scored),
    _figure("suite", "Recovery on the suite", "suite", quality, "recovery", True, quality.scored),
    _figure("recall", "Predictor recall by layer", "recall", layers, "recall", False, itemgetter("layers")),
    _figure("sparsity", "Sparsity by layer", "inspect", layers, "sparsity", False, itemgetter("layer_sparsity")),
    _figure("picks", "Selected neurons by layer", "picks", layers, "picks", True, itemgetter("share")),
    _figure("maps", "Selected neurons by block", "picks", layers, "maps", True, itemgetter("maps")),
    _figure("kernel", "The FFN kernel alone", "kernel", speed, "kernel", False),
)


class Drawn(NamedTuple):
    """A figure with its data in it. name: unique on the page, also the name of its file."""

    name: str
    title: str
    caption: str
    svg: str
    tables: list[Table]


def figures(runs: Sequence[Run]) -> tuple[list[Drawn], list[str]]:
    """Every figure whose data is among the runs, and the titles of the others."""
    drawn, missing = [], []
    with stage("figures", len(FIGURES)) as bar:
        for figure in FIGURES:
            documents = [run.document for run in runs if run.kind == figure.kind and figure.has(run.document)]
            if not documents:
                missing.append(figure.title)
            elif not figure.each:
                drawn.append(_drawn(figure, figure.name, figure.title, documents))
            else:
                names = distinct(
                    documents, ("model", "engine", "kernel", "dtype", "sparsity", "block_size", "predictor", "document")
                )
                for index, (document, name) in enumerate(zip(documents, names, strict=True)):
                    title = f"{figure.title}: {name}" if name else figure.title
                    drawn.append(_drawn(figure, figure.name + (f"-{index + 1}" if index else ""), title, document, True))
            bar.step()
    return drawn, missing


def _drawn(figure: Figure, name: str, title: str, data: Any, named: bool = False) -> Drawn:
    svg = figure.draw(data, name) if named else figure.draw(data)
    return Drawn(name, title, figure.caption(data), svg, figure.tables(data))


def html(runs: Sequence[Run], drawn: Sequence[Drawn], missing: Sequence[str]) -> str:
    """The whole page. Everything that comes from files is escaped."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    light, dark = (draw.variables(scheme) for scheme in (0, 1))
    palette = (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}"
    )
    models = list(dict.fromkeys(filter(None, (_model(run.document) for run in runs))))
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=escape("fastfill report" + (f": {', '.join(models)}" if models else "")),
        style=palette + (HERE / "page.css").read_text(encoding="utf-8"),
        claims="".join(f"<li>{escape(claim)}</li>" for claim in claims(runs))
        or "<li>No speed or perplexity in these runs.</li>",
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(runs)),
        runs=_table(_runs(runs)),
        links="".join(f'<li><a href="#fig-{figure.name}">{escape(figure.title)}</a></li>' for figure in drawn),
        figures="".join(_section(figure) for figure in drawn),
        missing=f'<p class="missing">not in these runs: {escape("; ".join(missing))}</p>' if missing else "",
        script=script,
    )


def claims(runs: Sequence[Run]) -> list[str]:
    """The main numbers as sentences: a speed, a perplexity, and the recovery of each task."""
    found = []
    benches = [run.document for run in runs if run.kind == "bench" and run.document["rows"]]
    if benches:
        bench = next((document for document in benches if document.get("kernel") == "native"), benches[0])
        row = min(bench["rows"], key=lambda row: _distance(number(row.get("prompt_tokens"))))
        found.append(
            f"Speed: a prompt of {count(row.get('prompt_tokens'))} tokens gives its first token after "
            f"{seconds(row.get('ttft_sparse_s'))} instead of {seconds(row.get('ttft_dense_s'))}, {times(speedup(row))} "
            f"(ceiling {times(ceiling(row))}; {percent(bench.get('sparsity'), 0)} of the FFN neurons skipped, "
            f"{text(bench.get('kernel', 'unknown'), 30)} kernel)."
        )
    perplexities = [run.document for run in runs if run.kind == "perplexity"]
    own = [d for d in perplexities if d.get("predictor") == "learned" and d.get("compensator")]
    for document in own[:1] or perplexities[:1]:
        found.append(
            f"Quality: text after a sparse prefill has perplexity {plain(document.get('cont_ppl_sparse'))} instead of "
            f"{plain(document.get('cont_ppl_dense'))} ({times(document.get('cont_ppl_ratio'))}); the sparse tokens "
            f"{plain(document.get('ppl_sparse'))} instead of {plain(document.get('ppl_dense'))} "
            f"({times(document.get('ppl_ratio'))}). {percent(document.get('context_kept'), 0)} of the context's worth is "
            "retained."
        )
    for run in runs:
        if run.kind in quality.TASKS and quality.scored(run.document):
            found.append(f"{quality.TASKS[run.kind]}: {quality.recovery_caption(run.document)}")
    return found


def _distance(tokens: float) -> float:
    return abs(tokens - CLAIM_TOKENS) if known([tokens]) else float("inf")


def facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What was measured, on what: every value that occurs, in the order of the runs."""

    def all_of(values: Iterable[Any]) -> str:
        shown = dict.fromkeys(text(value) for value in values if value not in (None, "", {}))
        return "; ".join(shown) or "not recorded"

    documents = [run.document for run in runs]
    machines = [_machine(document) for document in documents]
    return [
        ("model", all_of(_model(document) for document in documents)),
        ("number format", all_of(document.get("dtype") for document in documents)),
        ("machine", all_of(_where(machine) for machine in machines)),
        *((key, all_of(machine.get(key) for machine in machines)) for key in ("fastfill", "torch", "transformers", "python")),
        ("kernel", all_of(document.get("kernel") for document in documents)),
        ("seed", all_of(document.get("seed") for document in documents)),
        (
            "date",
            all_of(document.get("date", machine.get("date")) for document, machine in zip(documents, machines, strict=True)),
        ),
    ]


def _model(document: dict[str, Any]) -> str:
    base = document.get("base_model")
    name = document.get("model") or (base.get("name") if isinstance(base, dict) else None)
    return short(name) if name else ""


def _machine(document: dict[str, Any]) -> dict[str, Any]:
    machine = document.get("machine")
    return machine if isinstance(machine, dict) else {}


def _where(machine: dict[str, Any]) -> str:
    parts = [
        machine.get("gpu"),
        processor(machine) if machine.get("cpu") else None,
        f"{machine['threads']} threads" if machine.get("threads") else None,
        machine.get("system"),
    ]
    return ", ".join(str(part) for part in parts if part)


def _runs(runs: Sequence[Run]) -> Table:
    keys = ("model", "sparsity", "block_size", "kernel", "predictor", "seed")
    rows: dict[tuple[str, ...], int] = {}
    for run in runs:
        cells = [
            percent(run.document.get(key), 0) if key == "sparsity" else text(run.document.get(key) or MISSING, 60)
            for key in keys
        ]
        row = (text(run.source, 60), run.kind, *cells)
        rows[row] = rows.get(row, 0) + 1
    columns = ["file", "kind", "model", "sparsity", "block size", "kernel", "selection", "seed", "documents"]
    return Table("The runs of this page", columns, [[*row, str(count)] for row, count in rows.items()])


def _section(figure: Drawn) -> str:
    tables = "".join(_table(table) for table in figure.tables)
    return (
        f'<section id="fig-{figure.name}"><h2>{escape(figure.title)}</h2>'
        f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{escape(figure.title)}, figure">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        f"<details><summary>The numbers as a table</summary>{tables}</details></section>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.caption)}, table"><table>'
        f"<caption>{escape(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
