"""The command `fastfill`: one subcommand per verb. Heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fastfill import reading
from fastfill.errors import UserError
from fastfill.terminal import complain, say

OVERRIDES = ("sparsity", "block_size", "min_tokens", "dense_tail", "kernel")  # options in place of the artifact's settings
PROMPT_BYTES = 1 << 26  # of a prompt's file, more than any model holds: told before the model is loaded
MODEL_HELP = "a Hugging Face id, a local folder, a .gguf file, or 'default' (the embedded SmolLM2-135M-Instruct)"


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong with a command line as everything else is told: in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")


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
    if rest and arguments.run is not run_serve:
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
    parser = _Parser(
        prog="fastfill",
        description="Faster LLM prefill: skip the feed-forward neurons that a block of prompt tokens does not need.",
        epilog="example: fastfill demo",
    )
    import fastfill

    parser.add_argument("--version", action="version", version=f"fastfill {fastfill.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str, example: str) -> argparse.ArgumentParser:
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

    demo = command("demo", run_demo, "Read a long document, dense and sparse, side by side.", "fastfill demo")
    model_options(demo, nargs="?", default="default")
    attach_options(demo, required=False)
    demo.add_argument("--document", metavar="FILE", help="text to read (default: one that comes with the package)")
    demo.add_argument("--question", help="question about the document")
    demo.add_argument("--repeats", type=int, default=5, help="TTFT measurements of each kind (default: 5)")
    demo.add_argument("--max-new-tokens", type=int, default=48, help="length of the answers (default: 48)")
    demo.add_argument("--web", action="store_true", help="as a page in the browser, for this machine only (127.0.0.1)")
    demo.add_argument("--port", type=int, default=7860, help="of the page; 0 takes any free one (default: 7860)")
    demo.add_argument("--no-open", action="store_true", help="do not open a browser")

    calibrate = command(
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
    calibrate.add_argument("--resume", action="store_true", help="go on from the checkpoint of a killed run")
    calibrate.add_argument("--processes", type=int, default=1, help="share the work; on CUDA a GPU for each (default: 1)")
    _config_options(calibrate)

    inspect = command(
        "inspect", run_inspect, "Show what is in an artifact.", "fastfill inspect artifacts/smollm2-135m-instruct"
    )
    inspect.add_argument("artifact", metavar="DIR", help="artifact folder ('default' for the shipped one)")

    generate = command(
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

    bench = command(
        "bench",
        run_bench,
        "Time to first token, dense and sparse in alternation.",
        "fastfill bench default --artifact default --prompt-lengths 512,1024,2048,4096 --repeats 5",
    )
    model_options(bench, nargs="?")
    attach_options(bench, required=False, default=None)
    bench.add_argument("--shape", metavar="NAME", help="random weights instead of MODEL: Llama-3.1-8B, ..., or a folder")
    bench.add_argument("--layers", type=int, help="of the shape, to make it smaller (default: all)")
    bench.add_argument("--engine", default="transformers", choices=["transformers", "vllm"], help="default: transformers")
    lengths = "256,512,1024,2048,4096,8192,16384"
    bench.add_argument("--prompt-lengths", default=lengths, help=f"tokens, cut to what the model holds (default: {lengths})")
    bench.add_argument("--repeats", type=int, default=5, help="measurements of each kind after one warm-up (default: 5)")
    bench.add_argument("--compare", action="store_true", help="also measure vLLM and llama.cpp, where they are installed")
    bench.add_argument("--seed", type=int, default=0)

    evaluate = command(
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

    report = command(
        "report",
        run_report,
        "Show results as one HTML page with figures.",
        "fastfill report benchmarks/results artifacts/smollm2-135m-instruct --out report.html",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="stored --json output, a folder of it, or an artifact folder")
    report.add_argument("--out", default="report.html", metavar="FILE", help="page to write (default: report.html)")
    report.add_argument("--svg", metavar="DIR", help="write each figure as a file of its own, too")

    serve = commands.add_parser(
        "serve",
        help="vLLM's OpenAI-compatible server with the artifact on.",
        description="vLLM's OpenAI-compatible server with the artifact on. All other options go to `vllm serve`; it binds to "
        "127.0.0.1 unless --host says otherwise.",
        usage="fastfill serve MODEL --artifact DIR [options] [any option of vllm serve]",
        epilog="example: fastfill serve default --artifact default --port 8000 --max-model-len 4096",
        allow_abbrev=False,
    )
    serve.set_defaults(run=run_serve, json=False)
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    serve.add_argument("--artifact", metavar="DIR", required=True, help="folder, or 'default' for the shipped one")
    serve.add_argument("--sparsity", type=float, help="share of FFN neurons skipped, 0 to 0.95 (default: the artifact's)")
    serve.add_argument("--sparse-block-size", type=int, help="tokens per selection (default: the artifact's)")
    serve.add_argument("--min-tokens", type=int, help="shorter prompts stay dense (default: the artifact's)")
    serve.add_argument("--dense-tail", type=int, help="last tokens of a prompt that stay dense (default: 0, see docs/vllm.md)")
    serve.add_argument("--kernel", help="auto, native or torch (default: auto)")
    serve.add_argument(
        "--one-copy",
        action="store_true",
        help="less memory: dense tokens by the sparse kernel too, no copy of the FFN for vLLM's",
    )

    command("env", run_env, "Show versions, processor and which kernel runs, and why.", "fastfill env")
    return parser


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
            group.add_argument(
                "--" + field.name.replace("_", "-"), type=plain[0], default=field.default, help=f"default: {field.default}"
            )


def _configs(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import dataclasses

    from fastfill.config import CalibrationConfig, PrefillConfig

    def build(kind: Any) -> Any:
        return kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})

    return build(PrefillConfig), build(CalibrationConfig)


def _threads(arguments: argparse.Namespace) -> None:
    import torch

    from fastfill.config import check_integer

    if arguments.threads is not None:
        check_integer("--threads", arguments.threads, 1)
        if arguments.threads > (os.cpu_count() or arguments.threads):
            raise UserError(f"--threads {arguments.threads} is more than the {os.cpu_count()} processors of this machine.")
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)


def _load(arguments: argparse.Namespace) -> Any:
    import transformers

    from fastfill import models

    _threads(arguments)
    transformers.utils.logging.set_verbosity_error()  # the process is ours: its stderr has our sentences only
    return models.load(arguments.model, arguments.dtype, arguments.device)


def _attach(arguments: argparse.Namespace, model: Any, artifact: Any, **extra: Any) -> Any:
    from fastfill.attachment import attach

    return attach(model, artifact, **{key: getattr(arguments, key) for key in OVERRIDES}, **extra)


def run_demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill.config import check_integer
    from fastfill.lab import demo

    if not arguments.web and (arguments.no_open or arguments.port != 7860):
        raise UserError("--port and --no-open are for the page; add --web, or leave them out.")
    if arguments.web and arguments.repeats != 5:
        raise UserError("--repeats does nothing with --web: each question is one measurement; leave it out.")
    check_integer("--repeats", arguments.repeats, 1)
    check_integer("--max-new-tokens", arguments.max_new_tokens, 1)
    document = _read_text(arguments.document) if arguments.document else None
    artifact = artifacts.load(arguments.artifact)
    if arguments.web:
        from fastfill.lab import web
        from fastfill.lab.side_by_side import Comparison

        sock = web.listen(arguments.port)
        loaded = _load(arguments)
        with _attach(arguments, loaded.model, artifact) as attachment:
            comparison = Comparison(attachment, loaded, arguments.max_new_tokens)
            return {"url": web.serve(comparison, sock, document, arguments.question, not arguments.no_open)}
    arguments.json = True  # the demo's last line is always its JSON document
    loaded = _load(arguments)
    with _attach(arguments, loaded.model, artifact) as attachment:
        return demo.run(
            attachment, loaded, document, arguments.question, repeats=arguments.repeats, max_new_tokens=arguments.max_new_tokens
        )


def run_calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import data, files, show
    from fastfill.calibration import calibrate, team

    prefill, config = _configs(arguments)
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
    loaded = _load(arguments)
    artifact = calibrate(
        loaded.model,
        loaded.tokenizer,
        documents,
        arguments.out,
        prefill=prefill,
        config=config,
        name=loaded.name,
        resume=arguments.resume,
    )
    team.leave()
    if me.rank:
        arguments.json = False
    else:
        show.artifact(artifact, Path(arguments.out))
        found = artifact.calibration.get("max_loss")
        if found:
            print(f"sparsity {found['chosen']:.0%}: the highest whose loss stays within {found['limit']} on text set aside")
    return {"out": arguments.out, **show.summary(artifact)}


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


def run_inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import show

    folder = artifacts.folder_of(arguments.artifact)
    artifact = artifacts.load(folder)
    show.artifact(artifact, folder)
    return show.summary(artifact)


def run_generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import context
    from fastfill.config import check_integer
    from fastfill.engines import transformers as engine

    check_integer("--max-new-tokens", arguments.max_new_tokens, 1)
    prompt = _read_text(arguments.prompt_file)
    artifact = artifacts.load(arguments.artifact)
    loaded = _load(arguments)
    context.check_characters(loaded.model.config, prompt)
    ids = engine.encode(loaded.tokenizer, prompt, arguments.chat)
    with _attach(arguments, loaded.model, artifact) as attachment:
        engine.check_length(loaded.model, ids, arguments.max_new_tokens)
        if arguments.dense:
            with attachment.dense():
                new = engine.generate(loaded.model, ids, arguments.max_new_tokens)
        else:
            new = engine.generate(loaded.model, ids, arguments.max_new_tokens)
        stats = attachment.stats
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    say(text)
    print(f"({stats.sparse_tokens} tokens read sparsely, {stats.dense_tokens} densely)", file=sys.stderr)
    return {
        "text": text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "sparse_tokens": stats.sparse_tokens,
        "dense_tokens": stats.dense_tokens,
    }


def run_bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import show
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
    """The document of `bench` without its peers, and the model's vocabulary. The model is gone afterwards."""
    import torch

    from fastfill import config as cfg
    from fastfill import context, engines, machine
    from fastfill.lab import ffn_op, speed

    bench = engines.bench_of(arguments.engine)
    _threads(arguments)
    model, artifact = _bench_model(arguments)
    settings = {key: getattr(arguments, key) for key in ("dtype", "device", *OVERRIDES)}
    with bench(model, artifact, **settings) as runner:
        limit = context.positions(runner.shape)
        fitting = speed.fitting(lengths, limit)
        if max(lengths) > max(fitting):
            say(f"The model holds {limit} tokens: that is the longest prompt here, not {max(lengths)}.")
        rows = speed.bench(runner, fitting, arguments.repeats, arguments.seed)
        tokens = [row["prompt_tokens"] for row in rows]
        result = {
            "model": runner.name,
            "dtype": runner.dtype,
            **cfg.to_dict(runner.config),
            "kernel": runner.kernel,
            "engine": arguments.engine,
            "repeats": arguments.repeats,
            "seed": arguments.seed,
            "rows": rows,
            "growth_dense": speed.growth(tokens, [row["ttft_dense_s"] for row in rows]),
            "growth_sparse": speed.growth(tokens, [row["ttft_sparse_s"] for row in rows]),
            "model_mb": round(runner.model_mb, 1),
            "attached_mb": round(runner.attached_mb, 1),
            "compare": [],
            "machine": machine.describe(),
        }
        if ways := getattr(runner, "ways", None):
            result["ways"] = ways
        if torch.device(arguments.device).type == "cuda":
            result["ffn_op"] = ffn_op.of_runner(runner, fitting, arguments.repeats)
        return result, runner.shape.vocab_size


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
    torch.cuda.empty_cache()  # a peer on the same GPU finds its memory free; does nothing without one
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


def run_evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import artifact as artifacts
    from fastfill import config as cfg
    from fastfill import machine, show
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


def run_report(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill.lab import report

    result = report.write(arguments.runs, arguments.out, arguments.svg)
    say(f"{result['out']}: {len(result['figures'])} figures from {result['runs']} results")
    if result["missing"]:
        say(f"not in these runs: {'; '.join(result['missing'])}")
    return result


@contextmanager
def _evaluated(arguments: argparse.Namespace, artifact: Any) -> Iterator[tuple[Any, Any]]:
    """The attached model and what it was loaded from, in the engine that was asked for."""
    if arguments.engine == "transformers":
        loaded = _load(arguments)
        extra = {"predictor": arguments.predictor, "compensator": not arguments.no_compensator}
        with _attach(arguments, loaded.model, artifact, **extra) as attachment:
            yield attachment, loaded
        return
    if arguments.task not in ("longbench", "ruler", "suite"):
        raise UserError(f"--task {arguments.task} looks inside the model; it needs --engine transformers.")
    if arguments.predictor != "learned" or arguments.no_compensator:
        raise UserError("--predictor and --no-compensator need --engine transformers.")
    import transformers

    from fastfill import models
    from fastfill.engines import vllm

    _threads(arguments)
    settings = {key: getattr(arguments, key) for key in ("dtype", "device", *OVERRIDES)}
    with vllm.bench(arguments.model, artifact, **settings) as runner:
        tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve(arguments.model))
        yield runner, models.LoadedModel(runner.model, tokenizer, runner.name)


def run_serve(arguments: argparse.Namespace) -> None:
    from fastfill.engines import vllm

    vllm.serve(
        arguments.model,
        arguments.artifact,
        arguments.rest,
        sparsity=arguments.sparsity,
        block_size=arguments.sparse_block_size,
        min_tokens=arguments.min_tokens,
        dense_tail=arguments.dense_tail,
        kernel=arguments.kernel,
        one_copy=arguments.one_copy or None,
    )


def run_env(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfill import kernels, machine

    described = machine.describe()
    for key, value in described.items():
        say(f"{key:14} {value}")
    say(kernels.describe())
    return {**described, "kernels": kernels.available(), "kernel": kernels.choose("auto")}


def _read_text(name: str) -> str:
    text = reading.text(name, most=PROMPT_BYTES)
    if not text.strip():
        raise UserError(f"{name} is empty.")
    return text


if __name__ == "__main__":
    from fastfill.__main__ import program

    sys.exit(program())
