"""generate: answer a prompt. env: what this machine runs, and why."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from fastfill.cli.options import Commands, attach_model, attach_options, command, load_model, model_options, read_text
from fastfill.terminal import say


def add_generate(commands: Commands) -> None:
    generate = command(
        commands,
        "generate",
        run_generate,
        "Answer a prompt with a sparse prefill.",
        "fastfill generate default --artifact default --prompt-file prompt.txt --max-new-tokens 64 --chat",
    )
    model_options(generate)
    attach_options(generate)
    generate.add_argument("--prompt-file", required=True, metavar="F", help="text file with the prompt ('-' for stdin)")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--dense", action="store_true", help="without the artifact's sparsity, for comparison")
    generate.add_argument("--chat", action="store_true", help="use the model's chat template")


def run_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import context
    from fastfill.config import check_integer
    from fastfill.engines import transformers as engine

    check_integer("--max-new-tokens", arguments.max_new_tokens, 1)
    prompt = read_text(arguments.prompt_file)
    artifact = artifacts.load(arguments.artifact)
    loaded = load_model(arguments)
    context.check_characters(loaded.model.config, prompt)
    ids = engine.encode(loaded.tokenizer, prompt, arguments.chat)
    with attach_model(arguments, loaded.model, artifact, measured=not arguments.dense) as attachment:
        engine.check_length(loaded.model, ids, arguments.max_new_tokens)
        with attachment.dense() if arguments.dense else nullcontext():
            new = engine.generate(loaded.model, ids, arguments.max_new_tokens)
        stats = attachment.stats
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    say(text)
    above = f", {stats.skipped_above:,} not read by the upper layers" if attachment.config.upper_share < 1 else ""
    above += "".join(f"; all were read ({reason})" for reason in stats.whole_because)
    again = f", {stats.reread_tokens:,} read again" if attachment.config.reread else ""
    again += "".join(f" ({reason})" for reason in stats.once_because)
    counts = f"{stats.sparse_tokens:,} tokens prefilled sparsely, {stats.dense_tokens:,} computed densely"
    print(f"({counts}{above}{again})", file=sys.stderr)
    return {
        "text": text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "sparse_tokens": stats.sparse_tokens,
        "dense_tokens": stats.dense_tokens,
        **({"skipped_above": stats.skipped_above} if above else {}),
        **({"reread_tokens": stats.reread_tokens} if again else {}),
    }


def add_env(commands: Commands) -> None:
    command(commands, "env", run_env, "Show versions, processor and which kernel runs, and why.", "fastfill env")


def run_env(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import kernels, machine

    described = machine.describe()
    for key, value in described.items():
        say(f"{key:14} {value}")
    say(kernels.describe())
    return {**described, "kernels": kernels.available(), "kernel": kernels.choose("auto")}
