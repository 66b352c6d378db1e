"""Runs cases one after the other in a process of their own, watches it from outside, and counts how they end."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fastfill.errors import LONGEST, UserError

KINDS = ("artifacts", "kernel_calls", "gguf_files", "commands")
GOOD = ("right", "refused", "other")  # other: taken, with another result; only where nothing in the input could tell
FAULTS = ("traceback", "wrong", "words", "disagree", "changed", "memory", "hang", "crash")
CASE_S = 300.0  # a case takes seconds at most; only what never ends is meant, also where many share a core
START_S = 900.0
CONSTANT = 256 << 20  # bytes that a case may take whatever its input: limits of documents, a forward of the tiny model
PREFIX = len("fastfill: ")


@dataclass
class Outcome:
    """How a case ended. verdict: of GOOD or FAULTS. what: what was done to the input. words: the message, or what is wrong."""

    kind: str
    case: int
    verdict: str
    what: str
    words: str = ""


class Fault(Exception):
    """A case that broke the rule. verdict: of FAULTS."""

    def __init__(self, verdict: str, words: str):
        super().__init__(words)
        self.verdict = verdict


# A world is made once per process, in a folder of its own. It prepares a case: (what was done to the input, bytes of the input,
# the act that returns a verdict of GOOD and words).
Act = Callable[[], tuple[str, str]]
World = Callable[[random.Random], tuple[str, int, Act]]


def check_sentence(words: str, most: int = LONGEST) -> str:
    """The words, if they are one printable line of bounded length."""
    if not words or not words.isprintable() or len(words) > most or "Traceback" in words:
        raise Fault("words", f"{len(words)} characters: {words[:200]!r}")
    return words


def judge(kind: str, number: int, seed: int, world: World) -> Outcome:
    """Run one case here."""
    what, size, act = world(random.Random(f"{kind}-{seed}-{number}"))
    _reset_peak()
    before = _memory("VmRSS")
    try:
        verdict, words = act()
        rise = _memory("VmHWM") - before
        if rise > 2 * size + CONSTANT:
            verdict, words = "memory", f"{rise >> 20} MB for an input of {size:,} bytes"
    except Fault as fault:
        verdict, words = fault.verdict, str(fault)
    except UserError as error:
        verdict, words = "refused", str(error)
        try:
            check_sentence(words)
        except Fault as fault:
            verdict, words = fault.verdict, str(fault)
    except Exception:
        verdict, words = "traceback", traceback.format_exc()
    return Outcome(kind, number, verdict, what, words)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)


def world_of(kind: str, place: Path) -> World:
    return importlib.import_module(f"fuzz.{kind}").world(place)


def serve(kind: str, seed: int) -> None:
    """The worker: numbers of cases come in, outcomes go out, a line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory(prefix="fastfill-fuzz-") as place:
        world = world_of(kind, Path(place))
        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(asdict(judge(kind, int(line), seed, world))), file=answers, flush=True)


class Worker:
    """The process that runs the cases of a kind."""

    def __init__(self, kind: str, seed: int):
        command = [sys.executable, "-m", "fuzz", "--serve", kind, "--seed", str(seed)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.curdir for p in sys.path), "OMP_NUM_THREADS": "1"}
        here = Path(__file__).parents[1]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, env=env, cwd=here, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def answer(self, timeout_s: float) -> str | None:
        """The next line; '' at the process's end, None if none comes in time."""
        try:
            return self.lines.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def ask(self, number: int) -> str | None:
        try:
            print(number, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        return self.answer(CASE_S)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def outcomes(kind: str, seed: int, go_on: Callable[[int], bool]) -> Iterator[Outcome]:
    """Cases 0, 1, ... of a kind while `go_on(number)`. A worker that hangs or dies is replaced."""
    worker, number = None, 0
    try:
        while go_on(number):
            if worker is None:
                worker = Worker(kind, seed)
                if worker.answer(START_S) != "ready\n":
                    raise RuntimeError(
                        f"the worker for {kind} does not start; see: python -m fuzz --serve {kind} --seed {seed}"
                    )
            line = worker.ask(number)
            if line:
                yield Outcome(**json.loads(line))
            else:
                worker.end()
                code = worker.process.returncode
                yield Outcome(kind, number, "hang" if line is None else "crash", "?", f"exit code {code}")
                worker = None
            number += 1
    finally:
        if worker is not None:
            worker.end()


def count(found: list[Outcome]) -> dict[str, int]:
    """How many cases ended how: of the good and the bad verdicts those that occurred."""
    counted = Counter(outcome.verdict for outcome in found)
    return {verdict: counted[verdict] for verdict in (*GOOD, *FAULTS) if counted[verdict]}


def for_seconds(seconds: float) -> Callable[[int], bool]:
    end = time.monotonic() + seconds
    return lambda _: time.monotonic() < end
