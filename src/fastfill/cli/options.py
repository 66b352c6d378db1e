"""What several verbs share: their options, and what is done by them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from fastfill import reading
from fastfill.errors import UserError

OVERRIDES = ("sparsity", "block_size", "min_tokens", "dense_tail", "kernel")  # options in place of the artifact's settings
PROMPT_BYTES = 1 << 26  # of a prompt's file, more than any model holds: told before the model is loaded
MODEL_HELP = "a Hugging Face id, a local folder, a .gguf file, or 'default' (the embedded SmolLM2-135M-Instruct)"


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with a command line as everything else is told: in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def command(commands: Commands, name: str, run: Callable[[argparse.Namespace], Any], text: str, example: str) -> Parser:
    """A verb: `run` takes what was parsed and returns the document of --json."""
    sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    sub.set_defaults(run=run)
    sub.add_argument("--json", action="store_true", help="print one JSON document as the last line of stdout")
    return sub


def model_options(sub: argparse.ArgumentParser, **more: Any) -> None:
    sub.add_argument("model", metavar="MODEL", help=MODEL_HELP, **more)
    device_options(sub)


def device_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", default="auto", help="auto (bf16 where the processor has it, else fp32), bf16, fp16, fp32")
    sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def attach_options(sub: argparse.ArgumentParser, required: bool = True, default: str | None = "default") -> None:
    sub.add_argument(
        "--artifact",
        metavar="DIR",
        required=required,
        default=None if required else default,
        help="folder, or 'default' for the shipped one",
    )
    sub.add_argument("--sparsity", type=float, help="share of FFN neurons skipped, 0 to 0.95 (default: the artifact's)")
    sub.add_argument("--block-size", type=int, help="tokens per selection (default: the artifact's)")
    sub.add_argument("--min-tokens", type=int, help="shorter prompts stay dense (default: the artifact's)")
    sub.add_argument("--dense-tail", type=int, help="last tokens of a prompt that stay dense (default: the artifact's)")
    sub.add_argument("--kernel", default="auto", help="auto, native, triton or torch (default: auto)")


def set_threads(arguments: argparse.Namespace) -> None:
    import torch

    from fastfill.config import check_integer

    if arguments.threads is not None:
        check_integer("--threads", arguments.threads, 1)
        if arguments.threads > (os.cpu_count() or arguments.threads):
            raise UserError(f"--threads {arguments.threads} is more than the {os.cpu_count()} processors of this machine.")
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def load_model(arguments: argparse.Namespace) -> Any:
    import transformers

    from fastfill import models

    set_threads(arguments)
    transformers.utils.logging.set_verbosity_error()  # the process is ours: its stderr has our sentences only
    return models.load(arguments.model, arguments.dtype, arguments.device)


def attach_model(arguments: argparse.Namespace, model: Any, artifact: Any, **extra: Any) -> Any:
    from fastfill.attachment import attach

    return attach(model, artifact, **{key: getattr(arguments, key) for key in OVERRIDES}, **extra)


def read_text(name: str) -> str:
    text = reading.text(name, most=PROMPT_BYTES)
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text
