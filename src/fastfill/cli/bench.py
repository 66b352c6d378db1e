"""bench: time to first token, dense and sparse in alternation."""

from __future__ import annotations

import argparse
from typing import Any

from fastfill.cli.options import Commands, attach_options, command, model_options, set_threads, settings_of
from fastfill.errors import UserError
from fastfill.terminal import say


def add_bench(commands: Commands) -> None:
    bench = command(
        commands,
        "bench",
        run_bench,
        "Time to first token (TTFT), dense and sparse in alternation.",
        "fastfill bench default --artifact default --prompt-lengths 512,1024,2048,4096 --repeats 5",
    )
    model_options(bench, nargs="?")
    attach_options(bench, required=False, default=None)
    bench.add_argument("--shape", metavar="NAME", help="random weights instead of MODEL: Llama-3.1-8B, ..., or a folder")
    bench.add_argument("--layers", type=int, help="of the shape, to make it smaller (default: all)")
    bench.add_argument("--engine", default="transformers", choices=["transformers", "vllm"], help="default: transformers")
    lengths = "256,512,1024,2048,4096,8192,16384"
    bench.add_argument("--prompt-lengths", default=lengths, help=f"tokens, cut to the context window (default: {lengths})")
    bench.add_argument("--repeats", type=int, default=5, help="rounds after one warm-up (default: 5)")
    bench.add_argument("--compare", action="store_true", help="also measure vLLM and llama.cpp, where they are installed")
    bench.add_argument("--seed", type=int, default=0)


def run_bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill.cli import show
    from fastfill.config import check_integer

    check_integer("--repeats", arguments.repeats, 1)
    try:
        lengths = [int(length) for length in arguments.prompt_lengths.split(",")]
    except ValueError as error:
        raise UserError(f"--prompt-lengths must be numbers separated by commas, not {arguments.prompt_lengths!r}.") from error
    for length in lengths:
        check_integer("each prompt length", length, 2)
    result, vocabulary = _bench(arguments, lengths)
    if arguments.compare:
        result["compare"] = _compare(arguments, result, vocabulary)
    show.bench(result)
    return result


def _bench(arguments: argparse.Namespace, lengths: list[int]) -> tuple[dict[str, Any], int]:
    """The document of `bench` without other engines, and the model's vocabulary. The model is gone afterwards."""
    from fastfill import config as cfg
    from fastfill import context, engines, machine
    from fastfill.lab import cuda, ffn_op, speed

    set_threads(arguments)
    model, artifact = _bench_model(arguments)
    options = ("dtype", "device", "packed", "kernel", "allow_finetuned")
    settings = {key: getattr(arguments, key) for key in options} | settings_of(arguments)
    with engines.load(arguments.engine, model, artifact, **settings) as engine:
        limit = context.positions(engine.shape)
        fitting = speed.fitting(lengths, limit)
        if max(lengths) > max(fitting):
            say(f"The model holds {limit} tokens: that is the longest prompt here, not {max(lengths)}.")
        timed = cuda.fastest(engine)
        rows = speed.bench(timed, fitting, arguments.repeats, arguments.seed)
        tokens = [row["prompt_tokens"] for row in rows]
        result = {
            "model": engine.name,
            "dtype": engine.dtype,
            **cfg.to_dict(engine.config),
            **{name: engine.choices[name] for name in ("kernel", "kernel_reason", "expected_gain", "packed", "attention_by")},
            "choice": _choice(arguments, engine),
            "engine": arguments.engine,
            "repeats": arguments.repeats,
            "seed": arguments.seed,
            "rows": rows,
            "growth_dense": speed.growth(tokens, [row["ttft_dense_s"] for row in rows]),
            "growth_sparse": speed.growth(tokens, [row["ttft_sparse_s"] for row in rows]),
            "model_mb": round(engine.model_mb, 1),
            "attached_mb": round(engine.attached_mb, 1),
            "compare": [],
            "machine": machine.describe(),
        }
        if isinstance(timed, cuda.CudaEngine):
            result["ways"] = timed.ways
            result["ffn_op"] = ffn_op.of_engine(engine, fitting, arguments.repeats)
        return result, engine.shape.vocab_size


def _choice(arguments: argparse.Namespace, engine: Any) -> dict[str, Any] | None:
    """What `attach` would choose if nothing were named (`fastfill.choice`). None in vLLM, and where a kernel is named."""
    from fastfill import choice
    from fastfill.engines.transformers import TransformersEngine

    if not isinstance(engine, TransformersEngine) or arguments.kernel != "auto":
        return None
    found = choice.choose(engine.attachment.ffns, engine.config)
    if found is None:
        return None
    kernel = found.kernel
    return {"kernel": kernel.name, "min_tokens": found.first, "expected_gain": kernel.expected_gain, "reason": kernel.reason}


def _bench_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """MODEL and its artifact, or both of a shape, with random weights."""
    from fastfill import artifact as artifacts
    from fastfill.lab import stand_in

    if arguments.shape is None:
        if arguments.model is None or arguments.artifact is None or arguments.layers is not None:
            raise UserError("Name MODEL and --artifact, or --shape (and --layers) for random weights.")
        return arguments.model, artifacts.load(arguments.artifact)
    if arguments.model is not None or arguments.artifact is not None or arguments.compare or arguments.engine != "transformers":
        raise UserError("--shape makes model and artifact itself, for transformers; leave out what names others.")
    loaded = stand_in.model(arguments.shape, arguments.dtype, arguments.device, arguments.layers, arguments.seed)
    return loaded, stand_in.artifact(loaded.model, loaded.name, seed=arguments.seed)


def _compare(arguments: argparse.Namespace, result: dict[str, Any], vocabulary: int) -> list[dict[str, Any]]:
    import gc

    import torch

    from fastfill import models
    from fastfill.lab import compare

    gc.collect()
    torch.cuda.empty_cache()  # another engine on the same GPU finds its memory free; does nothing without one
    gguf = models.gguf_file(arguments.model)
    return compare.compare(
        compare.Job(
            folder=models.resolve(arguments.model),
            gguf=str(gguf) if gguf else None,
            dtype=result["dtype"],
            device=arguments.device,
            lengths=[row["prompt_tokens"] for row in result["rows"]],
            repeats=arguments.repeats,
            threads=result["machine"]["threads"],
            vocabulary=vocabulary,
            seed=arguments.seed,
        )
    )
