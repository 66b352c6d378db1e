"""evaluate: quality, dense beside sparse, on held-out text. The tasks and their options are those of `fastfill.lab.tasks`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from fastfill.cli.options import (
    Commands,
    attach_model,
    attach_options,
    command,
    load_model,
    model_options,
    option_of,
    set_threads,
    settings_of,
)
from fastfill.errors import UserError
from fastfill.lab.tasks import TASKS, Task
from fastfill.terminal import say

Field: TypeAlias = "dataclasses.Field[Any]"


def add_evaluate(commands: Commands) -> None:
    evaluate = command(
        commands,
        "evaluate",
        run_evaluate,
        "Quality, dense beside sparse, on held-out text.",
        "fastfill evaluate default --artifact default --task perplexity --data held_out.jsonl --limit 8",
    )
    evaluate.formatter_class = argparse.RawDescriptionHelpFormatter
    about = "".join(f"  {name:12}{task.about}\n" for name, task in TASKS.items())
    evaluate.epilog = f"tasks:\n{about}\noptions of a task: fastfill evaluate --task NAME --help\n{evaluate.epilog}"
    model_options(evaluate)
    attach_options(evaluate)
    evaluate.add_argument("--engine", default="transformers", choices=["transformers", "vllm"], help="default: transformers")
    evaluate.add_argument("--out", metavar="DIR", help="keep predictions here; the same command resumes")
    evaluate.add_argument("--predictor", default="learned", help="learned, oracle, static, first-block, low-rank or random")
    evaluate.add_argument("--no-compensator", action="store_true", help="without the compensator")
    evaluate.add_argument("--record", action="store_true", help="store the result in the artifact (config.json and README.md)")
    group = evaluate.add_argument_group("options of all tasks")
    actions: dict[str, argparse.Action] = {}
    kinds: list[type[Task]] = [Task, *TASKS.values()]
    for task in kinds:
        for name, field in _fields(task).items():
            if name not in actions:
                actions[name] = _add_option(group, task, field)
                actions[name].help = _help(field) if task is Task else argparse.SUPPRESS
    evaluate.add_argument(
        "--task",
        default="perplexity",
        choices=TASKS,
        action=_Chosen,
        group=group,
        actions=actions,
        help="what is measured (default: perplexity)",
    )


class _Chosen(argparse.Action):
    """--task NAME: from here on, --help shows the options of that task."""

    def __init__(self, *words: Any, group: Any, actions: dict[str, argparse.Action], **more: Any):
        super().__init__(*words, **more)
        self.group, self.actions = group, actions

    def __call__(self, _parser: Any, namespace: Any, name: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, name)
        fields = _fields(TASKS[name])
        self.group.title, self.group.description = f"options of --task {name}", TASKS[name].about
        for key, action in self.actions.items():
            action.help = _help(fields[key]) if key in fields else argparse.SUPPRESS


def _fields(task: type[Task]) -> dict[str, Field]:
    return {field.name: field for field in dataclasses.fields(task)}


def _flag(field: Field) -> str:
    return option_of(f"no_{field.name}" if field.default is True else field.name)


def _add_option(group: Any, task: type[Task], field: Field) -> argparse.Action:
    """The option of a field. One that is not given is not in the namespace."""
    more = {key: field.metadata[key] for key in ("nargs", "metavar", "choices") if key in field.metadata}
    if field.default is True:
        more["action"] = "store_false"
    elif "parse" not in field.metadata and "nargs" not in field.metadata:
        hint = typing.get_type_hints(task)[field.name]
        (more["type"],) = {*(typing.get_args(hint) or (hint,))} - {type(None)}
    return group.add_argument(_flag(field), dest=field.name, default=argparse.SUPPRESS, **more)


def _help(field: Field) -> str:
    if field.default in (None, ()) or field.default is True:
        return field.metadata["help"]
    shown = field.default if isinstance(field.default, tuple) else (field.default,)
    return f"{field.metadata['help']} (default: {','.join(map(str, shown))})"


def task_of(arguments: argparse.Namespace) -> Task:
    """The task with the options that were given. Raises UserError for those of other tasks, or values that do not fit."""
    kind = TASKS[arguments.task]
    own, known = _fields(kind), {name: field for task in TASKS.values() for name, field in _fields(task).items()}
    given = {name: getattr(arguments, name) for name in known if hasattr(arguments, name)}
    for name in given:
        if name not in own:
            owners = ", ".join(task.name for task in TASKS.values() if name in _fields(task))
            raise UserError(f"{_flag(known[name])} is an option of --task {owners}; leave it out for --task {kind.name}.")
        if "parse" in own[name].metadata:
            given[name] = own[name].metadata["parse"](given[name])
    return kind(**given)


def run_evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts

    folder = artifacts.folder_of(arguments.artifact)
    artifact = artifacts.load(folder)
    task = task_of(arguments)
    task.check(
        engine=arguments.engine,
        learned=arguments.predictor == "learned",
        compensator=not arguments.no_compensator,
        out=arguments.out,
    )
    if arguments.record:
        _check_record(arguments, artifact)
    items = task.read()  # before the model is loaded, so that a mistake is told at once
    with _evaluated(arguments, artifact) as engine:
        found = task.run(engine, engine.tokenizer, items, out=arguments.out)
    result = {**found, "compensator": not arguments.no_compensator}
    task.show(result)
    if arguments.record:
        artifacts.record(artifact, folder, {k: v for k, v in result.items() if k not in ("machine",)})
        say(f"recorded in {folder}")
    return result


def _check_record(arguments: argparse.Namespace, artifact: Any) -> None:
    from fastfill import files

    if arguments.task != "perplexity":
        raise UserError("--record stores perplexities; use it with --task perplexity.")
    changed = any(value is not None for value in settings_of(arguments).values())
    if changed or arguments.predictor != "learned" or arguments.no_compensator:
        raise UserError("--record stores what the artifact scores as it is; leave out what changes that.")
    if artifact.folder:
        files.check_file(artifact.folder / "config.json")


@contextmanager
def _evaluated(arguments: argparse.Namespace, artifact: Any) -> Iterator[Any]:
    """The engine that was asked for, with the artifact on its model."""
    if arguments.engine == "transformers":
        loaded = load_model(arguments)
        from fastfill.engines.transformers import TransformersEngine
        from fastfill.lab import baselines

        predictor, whole = baselines.named(arguments.predictor), not arguments.no_compensator
        with attach_model(arguments, loaded.model, artifact, predictor=predictor, compensator=whole) as attachment:
            yield TransformersEngine(attachment, loaded.name, loaded.tokenizer)
        return
    if arguments.predictor != "learned" or arguments.no_compensator:
        raise UserError("--predictor and --no-compensator need --engine transformers.")
    from fastfill import engines

    set_threads(arguments)
    options = ("dtype", "device", "packed", "kernel", "allow_finetuned")
    settings = {key: getattr(arguments, key) for key in options} | settings_of(arguments)
    with engines.load(arguments.engine, arguments.model, artifact, **settings) as engine:
        yield engine
