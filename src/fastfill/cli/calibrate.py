"""calibrate: learn an artifact. inspect: what is in one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastfill.cli.options import (
    ARTIFACT_HELP,
    Commands,
    command,
    finetuned_option,
    load_model,
    model_options,
    option_of,
    settings_of,
)
from fastfill.errors import UserError


def add_calibrate(commands: Commands) -> None:
    calibrate = command(
        commands,
        "calibrate",
        run_calibrate,
        "Learn an artifact for a model from text.",
        "fastfill calibrate default --data news.jsonl[20:] speeches.txt --sparsity 0.5 --out my-artifact",
    )
    model_options(calibrate)
    calibrate.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt, .jsonl or dataset name; a slice such as [20:100] may follow",
    )
    calibrate.add_argument("--out", required=True, metavar="DIR", help="artifact folder to write")
    calibrate.add_argument("--resume", action="store_true", help="continue from the checkpoint of an interrupted run")
    calibrate.add_argument(
        "--start", metavar="DIR", help=f"distil this artifact of the model further, with its settings: {ARTIFACT_HELP}"
    )
    finetuned_option(calibrate)
    calibrate.add_argument("--processes", type=int, default=1, help="share the work; on CUDA a GPU for each (default: 1)")
    _config_options(calibrate)


def _config_options(sub: argparse.ArgumentParser) -> None:
    """A flag per knob of both configurations; names and defaults come from `config`, documentation too."""
    import dataclasses
    import typing

    from fastfill.config import CalibrationConfig, PrefillConfig

    for kind in (PrefillConfig, CalibrationConfig):
        group = sub.add_argument_group(f"{kind.__name__} (see fastfill.config)")
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            plain = [t for t in (typing.get_args(types[field.name]) or (types[field.name],)) if t is not type(None)]
            text = f"{field.metadata['help']} (default: {field.default})" if field.metadata else f"default: {field.default}"
            group.add_argument(option_of(field.name), type=plain[0], help=text)


def _configs(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import dataclasses

    from fastfill.config import CalibrationConfig, PrefillConfig

    def build(kind: Any) -> Any:
        given = ((field.name, getattr(arguments, field.name)) for field in dataclasses.fields(kind))
        return kind(**{name: value for name, value in given if value is not None})

    return build(PrefillConfig), build(CalibrationConfig)


def run_calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import data, files
    from fastfill.calibration import calibrate, run, team
    from fastfill.cli import show

    prefill, config = _configs(arguments)
    run.left_out_of(arguments.out, arguments.start)
    start = artifacts.load(arguments.start) if arguments.start else None
    if start is not None:
        prefill = start.prefill.with_(**settings_of(arguments))
    files.check_folder(arguments.out)
    if arguments.processes != 1 and not team.launched():
        _check_processes(arguments, config)
        code = team.launch(arguments.argv, arguments.processes)
        if code:
            raise SystemExit(code)
        arguments.json = False  # the first process has printed it
        return {}
    me = team.join(arguments.device)
    if me.size > 1:
        arguments.device = str(me.device)
    documents = data.load_documents(arguments.data)
    loaded = load_model(arguments)
    artifact = calibrate(
        loaded.model,
        loaded.tokenizer,
        documents,
        arguments.out,
        prefill=prefill,
        config=config,
        name=loaded.name,
        resume=arguments.resume,
        start=start,
        allow_finetuned=arguments.allow_finetuned,
    )
    team.leave()
    if me.rank:
        arguments.json = False
    else:
        show.artifact(artifact, Path(arguments.out))
        found = artifact.calibration.get("max_loss")
        if found:
            print(f"sparsity {found['chosen']:.0%}: the highest whose loss stays within {found['limit']} on text set aside")
    return {"out": arguments.out, **artifact.summary()}


def _check_processes(arguments: argparse.Namespace, config: Any) -> None:
    import importlib.util

    import torch

    from fastfill.config import check_integer

    check_integer("--processes", arguments.processes, 1)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("--processes needs the package accelerate; run: pip install 'fastfill[accelerate]'.")
    cuda = arguments.device.split(":")[0] == "cuda"  # other names are refused where the model is loaded
    here, what = (torch.cuda.device_count(), "GPUs") if cuda else (os.cpu_count() or arguments.processes, "processors")
    shared = config.batch % arguments.processes == 0
    if arguments.processes > here and (cuda or shared):
        raise UserError(f"There are {here} {what} here, too few for --processes {arguments.processes}.")
    if not shared:
        raise UserError(
            f"{arguments.processes} processes cannot share a batch of {config.batch}; give --batch a multiple of them."
        )


def add_inspect(commands: Commands) -> None:
    inspect = command(
        commands, "inspect", run_inspect, "Show what is in an artifact.", "fastfill inspect artifacts/smollm2-135m-instruct"
    )
    inspect.add_argument("artifact", metavar="DIR", help="artifact folder ('default' for the shipped one)")


def run_inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill.cli import show

    folder = artifacts.folder_of(arguments.artifact)
    artifact = artifacts.load(folder)
    show.artifact(artifact, folder)
    return artifact.summary()
