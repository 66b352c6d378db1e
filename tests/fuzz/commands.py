"""Command lines: working ones, with arguments left out, put in, doubled, exchanged, or given hostile values and files."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

from conftest import snapshot, tiny_artifact, tiny_model, tiny_text, tiny_tokenizer

from fastfill import artifact as artifacts
from fastfill import cli
from fuzz import bed, mutate

# Options whose value is an amount of work: a large one is right, and takes long.
WORK = {
    "--steps",
    "--fit-epochs",
    "--fit-tokens",
    "--repeats",
    "--max-new-tokens",
    "--prompt-lengths",
    "--batch",
    "--schedule-tokens",
}
VALUES = (
    "",
    " ",
    "0",
    "-1",
    "1e309",
    "nan",
    "inf",
    "-inf",
    "1.5",
    "9" * 30,
    "9" * 5000,
    "x" * 5000,
    "[0:1]",
    ",",
    "1,,2",
    "a=b",
    "--",
    "-",
)
WORK_VALUES = ("", "0", "-1", "nan", "1.5", "x", ",", "1,", "2")
PLACES = (
    "nothing",
    "empty",
    "folder",
    "pipe",
    "loop",
    "binary",
    "deep.jsonl",
    "surrogate.jsonl",
    "/dev/null",
    "/proc/self/mem",
    "a\0b",
    "n" * 300,
)


def world(place: Path) -> bed.World:
    model, home = tiny_model(), place / "in"
    model.save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    artifacts.save(tiny_artifact(model), home / "artifact", readme="tiny\n")
    (home / "text.txt").write_text("\n".join(tiny_text(120, seed) for seed in range(4)))
    bad = home / "bad"
    (bad / "folder").mkdir(parents=True)
    (bad / "empty").touch()
    os.mkfifo(bad / "pipe")
    (bad / "loop").symlink_to("loop")
    (bad / "binary").write_bytes(bytes(range(256)))
    (bad / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (bad / "surrogate.jsonl").write_text('{"text": "\\ud800 a"}\n' * 3)
    names = [name if name.startswith("/") or "\0" in name else str(bad / name) for name in PLACES]
    lines = _lines(home, place / "out")

    def case(rng: random.Random) -> tuple[str, int, bed.Act]:
        shutil.rmtree(place / "out", ignore_errors=True)
        (place / "out").mkdir()
        argv = _changed(rng, rng.choice(lines), names)
        size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
        return " ".join(argument[:60] for argument in argv), size, lambda: _use(argv, home, place / "out")

    return case


def _lines(home: Path, out: Path) -> list[list[str]]:
    model, artifact, text = (str(home / name) for name in ("model", "artifact", "text.txt"))
    fitted = [
        "--sequence-length",
        "64",
        "--block-size",
        "8",
        "--dense-head",
        "8",
        "--fit-tokens",
        "128",
        "--schedule",
        "uniform",
    ]
    judged = ["--artifact", artifact, "--data", text, "--tokens", "64", "--continuation", "16", "--limit", "1"]
    return [
        ["env", "--json"],
        ["inspect", artifact, "--json"],
        ["generate", model, "--artifact", artifact, "--prompt-file", text, "--max-new-tokens", "2", "--sparsity", "0.3"],
        ["calibrate", model, "--data", text, "--out", str(out / "made"), "--steps", "1", "--seed", "3", *fitted],
        ["evaluate", model, *judged, "--out", str(out / "run"), "--json"],
        ["evaluate", model, *judged, "--task", "recall", "--predictor", "static"],
        [
            "bench",
            model,
            "--artifact",
            artifact,
            "--prompt-lengths",
            "64",
            "--repeats",
            "1",
            "--seed",
            "1",
            "--kernel",
            "torch",
        ],
        ["report", artifact, "--out", str(out / "page.html"), "--svg", str(out / "figures")],
    ]


def _changed(rng: random.Random, line: list[str], names: list[str]) -> list[str]:
    argv = list(line)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        at = rng.randrange(1, len(argv)) if len(argv) > 1 else 0
        kind = rng.choice(("value", "value", "value", "place", "drop", "double", "add", "exchange"))
        if kind in ("value", "place"):
            work = argv[at - 1] in WORK
            argv[at] = rng.choice(WORK_VALUES if work else VALUES + mutate.HOSTILE_TEXT if kind == "value" else names)
        elif kind == "drop":
            del argv[at]
        elif kind == "double":
            argv[at:at] = argv[at : at + 2]
        elif kind == "add":
            argv.insert(at, rng.choice(("--json", "--nonsense", "--resume", "--no-compensator", "--record", *VALUES)))
        else:
            other = rng.randrange(1, len(argv)) if len(argv) > 1 else 0
            if not {argv[at - 1], argv[other - 1]} & WORK:
                argv[at], argv[other] = argv[other], argv[at]
    return argv


def _use(argv: list[str], home: Path, out: Path) -> tuple[str, str]:
    written = {value for option, value in itertools.pairwise(argv) if option in ("--out", "--svg")}
    inputs = [home / name for name in ("model", "text.txt", "bad/binary", *(() if "--record" in argv else ("artifact",)))]
    inputs = [path for path in inputs if str(path) not in written]  # what the line itself names is written to
    before = [_content(path) for path in inputs]
    here = os.getcwd()
    os.chdir(out)
    try:
        code, shown, said = _run(argv)
    finally:
        os.chdir(here)
    if [_content(path) for path in inputs] != before:
        raise bed.Fault("changed", "a file of the input")
    if left := [path.name for path in out.rglob(".*")]:
        raise bed.Fault("changed", f"left behind: {left}")
    for line in (shown + said).splitlines():
        if not line.replace("\t", " ").isprintable():
            raise bed.Fault("words", f"control characters: {line[:200]!r}")
    if code == 0:
        return "right", ""
    if code != 2:
        raise bed.Fault("traceback", f"exit code {code}: {said[-300:]}")
    lines = said.splitlines()
    return "refused", bed.check_sentence(lines[-1] if lines else "", bed.LONGEST + bed.PREFIX)


def _content(path: Path) -> object:
    return snapshot(path) if path.is_dir() else path.read_bytes() if path.is_file() else None


def _stdin() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(b"w5 " * 80))


def _run(argv: list[str]) -> tuple[object, str, str]:
    shown, said = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(said),
        mock.patch.object(sys, "stdin", _stdin()),
    ):
        try:
            code: object = cli.main(argv)
        except SystemExit as exit:
            code = exit.code
    return code, shown.getvalue(), said.getvalue()
