"""All results for the embedded model, as files in benchmarks/results/eval and a report on them; 40 minutes on two cores.

    [DATA=folder] python benchmarks/eval.py [--steps bench,peers] [--out benchmarks/results/eval]

DATA is the folder of benchmarks/recipes/smollm2.sh, squad_v2_dev_part.json (SQuAD 2.0) beside its files; documents that the
shipped artifact was not calibrated on are taken. Without DATA the text is what comes with the package and with Python.
A step whose result is there is skipped, and a killed step goes on where it was: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FASTFILL = [sys.executable, "-m", "fastfill.cli"]
MAKE_TASKS = [sys.executable, str(ROOT / "benchmarks" / "make_tasks.py")]
RUNS = Path("build") / "eval"  # what a killed step has finished
RESULTS = Path("benchmarks") / "results" / "eval"
FIGURES = "docs/figures"  # of those results; two of them are in the README
KERNEL = Path("benchmarks") / "results" / "kernel.jsonl"  # of `make bench-kernel`, shown too if it is there
MODEL = ["default", "--artifact", "default"]


@dataclass(frozen=True)
class Step:
    """command: of fastfill. seconds: what it takes on two slow cores, for the ETA. result: writes NAME.json."""

    name: str
    command: list[str]
    seconds: float
    result: bool = True


@dataclass(frozen=True)
class Text:
    """documents: to evaluate on. other: of the same kind, for thresholds. news, squad: where there are some."""

    documents: list[str]
    other: list[str]
    news: str | None = None
    squad: str | None = None


def find_text(folder: str | None) -> Text:
    """The held-out slices of a DATA folder, or what everybody has."""
    if folder:
        news, speeches = (f"{folder}/{name}.jsonl" for name in ("longbench_multi_news_part", "us_presidential_speeches"))
        squad = Path(folder) / "squad_v2_dev_part.json"
        return Text(
            documents=[f"{news}[:20]", f"{speeches}[100:]"],
            other=[f"{news}[20:40]", f"{speeches}[:20]"],
            news=f"{news}[:4]",
            squad=str(squad) if squad.is_file() else None,
        )
    library = Path(sysconfig.get_path("stdlib"))
    demo = str(ROOT / "src" / "fastfill" / "demo_document.txt")
    # The shipped artifact was calibrated on modules a to c.
    code = [f"{library / name}.py[:2]" for name in ("pickle", "subprocess", "threading", "typing")]
    return Text(documents=[demo, *code], other=[f"{library / name}.py[:2]" for name in ("shutil", "tarfile", "zipfile")])


def plan(text: Text, out: Path, tasks: Path) -> list[Step]:
    """What is run, in order."""

    def evaluate(name: str, task: str, *more: str, seconds: float, data: Sequence[str] = ()) -> Step:
        options = ["--task", task, *(["--data", *data] if data else []), *more, "--out", str(RUNS / name)]
        return Step(name, ["evaluate", *MODEL, *options, "--json"], seconds)

    kernel = [str(KERNEL)] if KERNEL.is_file() else []
    figures = FIGURES if out == RESULTS else str(out / "figures")
    both = ["--methods", "learned,oracle"]
    steps = [
        Step("inspect", ["inspect", "default", "--json"], 2),
        Step("demo", ["demo", "--json"], 20),
        Step("bench", ["bench", *MODEL, "--prompt-lengths", "128,256,512,1024,2048,4096", "--repeats", "5", "--json"], 240),
        evaluate("perplexity", "perplexity", "--limit", "8", seconds=90, data=text.documents),
        evaluate("recall", "recall", "--limit", "4", seconds=40, data=text.documents),
        # Reads one document, and so takes no --out.
        Step("picks", ["evaluate", *MODEL, "--task", "picks", "--data", *text.documents, "--json"], 20),
        evaluate("ruler", "ruler", "--lengths", "1024,4096", "--limit", "2", seconds=330),
        evaluate("longbench-made", "longbench", seconds=240 if text.squad else 60, data=[str(tasks)]),
        evaluate("peers", "peers", "--limit", "6", "--calibration", *text.other, seconds=600, data=text.documents),
        evaluate("pareto", "pareto", "--limit", "3", *both, "--repeats", "9", seconds=640, data=text.documents),
        Step("report", ["report", str(out), *kernel, "--out", str(out / "report.html"), "--svg", figures], 10, result=False),
    ]
    if text.news:
        steps.insert(8, evaluate("multi_news", "longbench", "--datasets", "multi_news", seconds=150, data=[text.news]))
    return steps


def shown(command: Sequence[str]) -> str:
    return "fastfill " + " ".join(f"'{word}'" if "[" in word else word for word in command)


def run(step: Step, out: Path) -> str | None:
    """Run a step and keep the last line that it prints, a JSON document. Returns what went wrong, or None."""
    done = subprocess.run([*FASTFILL, *step.command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return f"exit code {done.returncode}"
    if not step.result:
        return None
    lines = done.stdout.splitlines()
    try:
        json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return "its last line is not a JSON document"
    beside = out / f"{step.name}.json.part"
    beside.write_text(lines[-1] + "\n", encoding="utf-8")
    beside.replace(out / f"{step.name}.json")
    shutil.rmtree(RUNS / step.name, ignore_errors=True)  # measured: the next time is a new one
    return None


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All results for the embedded model, and a report on them.")
    parser.add_argument("--steps", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args(argv)
    out, tasks = arguments.out, RUNS / "tasks"
    text = find_text(os.environ.get("DATA"))
    steps = plan(text, out, tasks)
    names = [step.name for step in steps]
    if arguments.steps:
        wanted = arguments.steps.split(",")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            parser.error(f"there is no step {unknown[0]!r}; there are {', '.join(names)}")
        steps = [step for step in steps if step.name in wanted]
    if text.news is None:
        print("DATA is not set: the text is the demo document and Python's standard library; no multi_news, no questions.")
    out.mkdir(parents=True, exist_ok=True)
    ready = {step.name: step.result and (out / f"{step.name}.json").is_file() for step in steps}
    if not ready.get("longbench-made", True):
        squad = ["--squad", text.squad] if text.squad else []
        made = subprocess.run([*MAKE_TASKS, "--out", str(tasks), "--rows", "6", *squad])
        if made.returncode:
            return 1
    table: list[tuple[str, str]] = []
    spent = planned = 0.0
    for number, step in enumerate(steps, 1):
        if ready[step.name]:
            table.append((step.name, "there already"))
            continue
        left = sum(other.seconds for other in steps[number - 1 :] if not ready[other.name])
        pace = spent / planned if planned else 1.0  # of this machine against the estimates
        print(f"[{number}/{len(steps)}] {step.name}, about {minutes(left * pace)} left: {shown(step.command)}", flush=True)
        begin = time.monotonic()
        problem = run(step, out)
        seconds = time.monotonic() - begin
        if problem:
            print(f"{step.name} failed ({problem}). Its command was:\n{shown(step.command)}", file=sys.stderr)
            return 1
        table.append((step.name, f"{seconds:.0f} s"))
        spent, planned = spent + seconds, planned + step.seconds
    print()
    for name, seconds_or_word in (*table, ("all", minutes(spent))):
        print(f"{name:16}{seconds_or_word:>14}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
