"""`fastfill` as a command line: its words, its exit code, what stdout and stderr get. A verb is in the file of its group."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from fastfill import reading
from fastfill.cli import bench, calibrate, demo, evaluate, generate, serve
from fastfill.cli.options import Parser
from fastfill.errors import UserError
from fastfill.terminal import complain

VERBS = (  # in the order of --help
    demo.add_demo,
    calibrate.add_calibrate,
    calibrate.add_inspect,
    generate.add_generate,
    bench.add_bench,
    evaluate.add_evaluate,
    demo.add_report,
    serve.add_serve,
    generate.add_env,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 with one sentence on stderr for input the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            arguments = _parse(argv)
            result = arguments.run(arguments)
            if arguments.json:
                print(json.dumps(_strict(result), allow_nan=False))
            return 0
        finally:  # also of --help
            if sys.stdout is not None:
                sys.stdout.flush()  # while a full disk can still be told
    except KeyboardInterrupt:
        complain("interrupted.")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        sentence = str(error) if isinstance(error, UserError) else _surroundings(error)
        if sentence is None:
            raise
        complain(sentence)
        return 2


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not all(map(_can_be_passed, argv)):
        parser.error("an argument has a null character or half of a surrogate pair in it")
    arguments, rest = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    if rest and not getattr(arguments, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    if getattr(arguments, "seed", None) is not None:
        from fastfill.config import MAX_SEED, check_integer

        check_integer("--seed", arguments.seed, 0, MAX_SEED)
    return arguments


def _can_be_passed(word: str) -> bool:
    """Whether a system can pass this argument. A program that calls `main` can pass others, and paths of them have no file."""
    try:
        return b"\0" not in os.fsencode(word)
    except UnicodeEncodeError:
        return False


def _surroundings(error: Exception) -> str | None:
    """A sentence for what is wrong with the machine, not with fastfill: files, disk, memory. None for all else."""
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'} cannot be used: {error.strerror or error}."
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "There is not enough memory; take a shorter prompt, a smaller model or a smaller --dtype."
    return None


def _strict(value: Any) -> Any:
    """The document as JSON has it: a number that is not finite is null there, and half of a surrogate pair is no character."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return reading.whole(value)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastfill",
        description="Faster LLM prefill: skip the feed-forward neurons that a block of prompt tokens does not need.",
        epilog="example: fastfill demo",
    )
    import fastfill

    parser.add_argument("--version", action="version", version=f"fastfill {fastfill.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in VERBS:
        add(commands)
    return parser
