"""What several verbs share: their options, and what is done by them."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from fastfill import reading
from fastfill.config import PREFILL_FIELDS, PrefillConfig, check_integer
from fastfill.errors import UserError

PROMPT_BYTES = 1 << 26  # of a prompt's file, more than any model holds: told before the model is loaded
ARTIFACT_HELP = "folder, 'default' for the shipped one, or org/name[@revision] on the Hugging Face hub"
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
    sub.add_argument("--packed", action="store_true", help="keep the FFNs of a .gguf file as they are there, 4 to 8 bits (CPU)")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def attach_options(sub: argparse.ArgumentParser, required: bool = True, default: str | None = "default") -> None:
    sub.add_argument(
        "--artifact",
        metavar="DIR",
        required=required,
        default=None if required else default,
        help=ARTIFACT_HELP,
    )
    finetuned_option(sub)
    settings_options(sub)
    sub.add_argument("--kernel", default="auto", help="auto, native, triton or torch (default: auto)")


def finetuned_option(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--allow-finetuned", action="store_true", help="accept a model that was fine-tuned since")


def settings_options(sub: argparse.ArgumentParser, **other_names: str) -> None:
    """An option for each field of `PrefillConfig`, in place of the artifact's. other_names: options of another name."""
    for field in dataclasses.fields(PrefillConfig):
        name, text = other_names.get(field.name, option_of(field.name)), field.metadata["help"]
        kind, choices = type(field.default), field.metadata.get("choices")
        sub.add_argument(name, dest=field.name, type=kind, choices=choices, help=f"{text} (default: the artifact's)")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of the fields of `PrefillConfig`; None where nothing was."""
    return {name: getattr(arguments, name) for name in PREFILL_FIELDS}


def option_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def set_threads(arguments: argparse.Namespace) -> None:
    import torch

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
    return models.load(arguments.model, arguments.dtype, arguments.device, arguments.packed)


def attach_model(arguments: argparse.Namespace, model: Any, artifact: Any, *, measured: bool = False, **extra: Any) -> Any:
    """measured: as `attach` finds to be faster here. Otherwise min_tokens is named: what compares sparse with dense shows the
    rows that lose, too, and quality depends on no clock."""
    from fastfill.attachment import attach

    settings = settings_of(arguments) | {"kernel": arguments.kernel, "allow_finetuned": arguments.allow_finetuned}
    if not measured:
        settings["min_tokens"] = settings["min_tokens"] or artifact.prefill.min_tokens
    return attach(model, artifact, **settings, **extra)


def read_text(name: str) -> str:
    text = reading.text(name, most=PROMPT_BYTES)
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text
