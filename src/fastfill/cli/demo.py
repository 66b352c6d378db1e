"""demo: dense and sparse side by side. report: stored results as one page."""

from __future__ import annotations

import argparse
from typing import Any

from fastfill.cli.options import Commands, attach_model, attach_options, command, load_model, model_options, read_text
from fastfill.errors import UserError
from fastfill.terminal import say


def add_demo(commands: Commands) -> None:
    demo = command(commands, "demo", run_demo, "Prefill a long document, dense and sparse, side by side.", "fastfill demo")
    model_options(demo, nargs="?", default="default")
    attach_options(demo, required=False)
    demo.add_argument("--document", metavar="FILE", help="text file (default: one that comes with the package)")
    demo.add_argument("--question", help="question about the document")
    demo.add_argument("--repeats", type=int, default=5, help="rounds of TTFT (default: 5)")
    demo.add_argument("--max-new-tokens", type=int, default=48, help="length of the answers (default: 48)")
    demo.add_argument("--web", action="store_true", help="as a page in the browser, for this machine only (127.0.0.1)")
    demo.add_argument("--port", type=int, default=7860, help="of the page; 0 takes any free one (default: 7860)")
    demo.add_argument("--no-open", action="store_true", help="do not open a browser")


def run_demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill.config import check_integer
    from fastfill.engines.transformers import TransformersEngine
    from fastfill.lab import demo

    if not arguments.web and (arguments.no_open or arguments.port != 7860):
        raise UserError("--port and --no-open are for the page; add --web, or leave them out.")
    if arguments.web and arguments.repeats != 5:
        raise UserError("--repeats does nothing with --web: each question is one measurement; leave it out.")
    check_integer("--repeats", arguments.repeats, 1)
    check_integer("--max-new-tokens", arguments.max_new_tokens, 1)
    document = read_text(arguments.document) if arguments.document else None
    artifact = artifacts.load(arguments.artifact)
    if arguments.web:
        from fastfill.lab import web
        from fastfill.lab.side_by_side import Comparison

        sock = web.listen(arguments.port)
        loaded = load_model(arguments)
        with attach_model(arguments, loaded.model, artifact) as attachment:
            engine = TransformersEngine(attachment, loaded.name, loaded.tokenizer)
            comparison = Comparison(engine, arguments.max_new_tokens)
            return {"url": web.serve(comparison, sock, document, arguments.question, not arguments.no_open)}
    arguments.json = True  # the demo's last line is always its JSON document
    loaded = load_model(arguments)
    with attach_model(arguments, loaded.model, artifact) as attachment:
        engine = TransformersEngine(attachment, loaded.name, loaded.tokenizer)
        return demo.run(
            engine, document, arguments.question, repeats=arguments.repeats, max_new_tokens=arguments.max_new_tokens
        )


def add_report(commands: Commands) -> None:
    report = command(
        commands,
        "report",
        run_report,
        "Show results as one HTML page with figures.",
        "fastfill report benchmarks/results artifacts/smollm2-135m-instruct --out report.html",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="stored --json output, a folder of it, or an artifact folder")
    report.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default: report.html)")
    report.add_argument("--svg", metavar="DIR", help="write each figure as a file of its own, too")


def run_report(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill.lab import report

    result = report.write(arguments.runs, arguments.out, arguments.svg)
    say(f"{result['out']}: {len(result['figures'])} figures from {result['runs']} results")
    if result["missing"]:
        say(f"not in these runs: {'; '.join(result['missing'])}")
    return result
