"""evaluate: quality, dense beside sparse, on held-out text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastfill.cli.options import (
    Commands,
    attach_model,
    attach_options,
    command,
    load_model,
    model_options,
    set_threads,
    settings_of,
)
from fastfill.errors import UserError
from fastfill.terminal import say


def add_evaluate(commands: Commands) -> None:
    evaluate = command(
        commands,
        "evaluate",
        run_evaluate,
        "Quality, dense beside sparse, on held-out text.",
        "fastfill evaluate default --artifact default --task perplexity --data held_out.jsonl --limit 8",
    )
    model_options(evaluate)
    attach_options(evaluate)
    evaluate.add_argument(
        "--task",
        default="perplexity",
        choices=["perplexity", "longbench", "ruler", "suite", "recall", "picks", "peers", "pareto"],
    )
    evaluate.add_argument("--engine", default="transformers", choices=["transformers", "vllm"], help="default: transformers")
    evaluate.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="as for calibrate; longbench: .jsonl files or their folder; ruler: rows for qa; picks: default is the demo's",
    )
    evaluate.add_argument(
        "--limit", type=int, help="at most this many documents, or examples of each dataset (ruler: 10, suite: 100)"
    )
    evaluate.add_argument("--out", metavar="DIR", help="keep predictions here; the same command goes on after a kill")
    evaluate.add_argument("--seed", type=int, default=0, help="of the examples and the intervals (default: 0)")
    # These belong to some tasks, which have their defaults and refuse them for others: evaluate.tasks.OWNED.
    evaluate.add_argument("--tokens", type=int, help="first tokens of each document that are read (default: 2048)")
    evaluate.add_argument("--continuation", type=int, help="last tokens, read densely (default: 256)")
    evaluate.add_argument(
        "--datasets", metavar="NAMES", help="of longbench ('all' for all 21), ruler or both (suite), separated by commas"
    )
    evaluate.add_argument(
        "--lengths", help="ruler, suite: tokens of prompt and answer; ranges too, as 1024-4096 (default: 1024,4096)"
    )
    evaluate.add_argument("--haystack", metavar="FILE", help="ruler, suite: text to hide things in (default: RULER's noise)")
    evaluate.add_argument(
        "--max-prompt-tokens", type=int, help="longbench, suite: cut prompts (default: to what the model holds)"
    )
    evaluate.add_argument("--max-new-tokens", type=int, help="shorten the answers (no longer comparable)")
    evaluate.add_argument(
        "--score",
        choices=["both", "likelihood", "answers"],
        help="longbench, ruler, suite: of the right answer its likelihood, of the written answer its score (default: both)",
    )
    evaluate.add_argument("--minutes", type=float, help="longbench, ruler, suite: stop in time; --out keeps what is done")
    evaluate.add_argument("--no-chat", action="store_true", help="never use the chat template (base models)")
    evaluate.add_argument("--predictor", default="learned", help="learned, oracle, static, first-block, low-rank or random")
    evaluate.add_argument("--no-compensator", action="store_true", help="leave the correction out")
    evaluate.add_argument(
        "--calibration", nargs="+", metavar="FILE", help="peers: text for thresholds (default: the package's demo document)"
    )
    evaluate.add_argument("--sparsities", help="pareto: separated by commas (default: 0.1 to 0.8)")
    evaluate.add_argument("--methods", help="pareto: predictors, separated by commas (default: learned,oracle,static)")
    evaluate.add_argument("--prompt-tokens", type=int, help="pareto: of the TTFT (default: 2048)")
    evaluate.add_argument("--repeats", type=int, help="pareto: TTFT measurements after one warm-up (default: 3)")
    evaluate.add_argument("--record", action="store_true", help="store the result in the artifact (config.json and README.md)")


def run_evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import config as cfg
    from fastfill import machine
    from fastfill.cli import show
    from fastfill.lab import tasks

    folder = artifacts.folder_of(arguments.artifact)
    artifact = artifacts.load(folder)
    task = tasks.prepare(arguments, artifact)
    with _evaluated(arguments, artifact) as (attachment, loaded):
        scores = task(attachment, loaded)
        config = attachment.config
    result = {
        "task": arguments.task,
        "engine": arguments.engine,
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "predictor": arguments.predictor,
        "compensator": not arguments.no_compensator,
        **cfg.to_dict(config),
        "kernel": attachment.choices["kernel"],
        **scores,
        "machine": machine.describe(),
    }
    shown = {
        "perplexity": show.evaluation,
        "recall": show.recall,
        "picks": show.picks,
        "peers": show.methods,
        "pareto": show.pareto,
    }
    shown.get(arguments.task, show.tasks)(result)
    if arguments.record:
        artifacts.record(artifact, folder, {k: v for k, v in result.items() if k not in ("machine",)})
        say(f"recorded in {folder}")
    return result


@contextmanager
def _evaluated(arguments: argparse.Namespace, artifact: Any) -> Iterator[tuple[Any, Any]]:
    """The attached model and what it was loaded from, in the engine that was asked for."""
    if arguments.engine == "transformers":
        loaded = load_model(arguments)
        from fastfill.lab import baselines

        extra = {"predictor": baselines.named(arguments.predictor), "compensator": not arguments.no_compensator}
        with attach_model(arguments, loaded.model, artifact, **extra) as attachment:
            yield attachment, loaded
        return
    if arguments.task not in ("longbench", "ruler", "suite"):
        raise UserError(f"--task {arguments.task} looks inside the model; it needs --engine transformers.")
    if arguments.predictor != "learned" or arguments.no_compensator:
        raise UserError("--predictor and --no-compensator need --engine transformers.")
    import transformers

    from fastfill import models
    from fastfill.engines import vllm

    set_threads(arguments)
    settings = {key: getattr(arguments, key) for key in ("dtype", "device", "kernel")} | settings_of(arguments)
    with vllm.bench(arguments.model, artifact, **settings) as runner:
        tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve(arguments.model))
        yield runner, models.LoadedModel(runner.model, tokenizer, runner.name)
