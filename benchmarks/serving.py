"""Stock vLLM against vLLM with an artifact, on a CPU, in one run.

    python benchmarks/serving.py [--steps smollm2,load] [--prompt-lengths 1024] [--quick] [--again] [--out FILE]

Each step appends one JSON line to --out (benchmarks/results/vllm.jsonl) and is skipped when it is there, so a killed run goes
on where it was. Steps of speed hold two engines side by side in this process, stock and with the artifact, and ask them in
turn: a prompt of random tokens, one new token, until the noise is less than the gain, or four times as often as listed. "off"
is the second engine with the request switched off; it should take what stock takes. Afterwards clocks in the second engine
measure the FFN in runs of their own, dense and sparse, without torch.compile. The FFN's share is its part of such a dense
run; the ceiling is what would be left if every skipped neuron took its part of that time with it. The models that are called
shaped have random weights and a random artifact, which is enough for speed.

The steps "load" run `fastfill serve` twice, with sparsity 0 (vLLM's own code) and with the artifact, and a real OpenAI client:
32 prompts of 200 to 4,000 tokens at Poisson arrivals, then each of them alone; in bf16, and fewer and shorter ones in fp32, to
see whether it is rounding that changes answers. --quick is a short trial, not a result.
"""

# ruff: noqa: E402 (threads first)

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

# Before torch and vLLM are imported; the engines' processes inherit it.
for _name, _value in {
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

import torch

from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import families, machine, models, progress
from fastfill.engines import vllm as engine
from fastfill.lab import speed as speedup
from fastfill.vllm_plugin import settings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vllm.jsonl"
MADE = Path("build") / "vllm-models"  # the random models
LONGEST = 4096
SHAPES = {
    "qwen2.5-0.5b-shaped": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "llama-3.2-1b-shaped": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Speed:
    """One pair of engines, in bf16 where the processor has it. lengths: prompt tokens -> timed runs of each kind, at least."""

    model: str
    lengths: dict[int, int]
    sparsity: float = 0.5
    one_copy: bool = False
    eager: bool = False


@dataclass(frozen=True)
class Decode:
    """Pairs of engines, one after the other; each answers a prompt again and again, one request at a time."""

    models: tuple[str, ...]
    prompt: int = 512
    tokens: int = 32
    rounds: int = 7
    eager: bool = False


@dataclass(frozen=True)
class Load:
    """What a server is asked. per_second: mean rate of the Poisson arrivals."""

    requests: int = 32
    shortest: int = 200
    longest: int = 4000
    per_second: float = 0.5
    new_tokens: int = 32
    dtype: str = "bfloat16"
    eager: bool = False


STEPS: dict[str, Speed | Decode | Load] = {
    "smollm2": Speed("default", {64: 15, 256: 9, 512: 9, 1024: 15, 4096: 5}),
    "qwen": Speed("qwen2.5-0.5b-shaped", {64: 9, 1024: 9, 4096: 3}),
    "qwen-70": Speed("qwen2.5-0.5b-shaped", {1024: 9}, sparsity=0.7),
    "qwen-one-copy": Speed("qwen2.5-0.5b-shaped", {64: 9, 1024: 5}, one_copy=True),
    "llama": Speed("llama-3.2-1b-shaped", {1024: 7}),
    "coder-0.5b": Speed("qwen2.5-coder-0.5b", {1024: 5, 4096: 3}),
    "coder-1.5b": Speed("qwen2.5-coder-1.5b", {1024: 3, 4096: 3}),
    "decode": Decode(("default", *SHAPES)),
    "load": Load(),
    "load-fp32": Load(requests=12, longest=1500, per_second=0.3, dtype="float32"),
}


def random_model(name: str) -> tuple[str, str]:
    """(model folder, artifact folder) of a shape, made once; the artifact has the recipe of the shipped one."""
    import transformers

    folder = MADE / name
    if (folder / "artifact").is_dir():
        return str(folder / "model"), str(folder / "artifact")
    with progress.waiting(f"making {name}"):
        values = dict(SHAPES[name])
        config = transformers.AutoConfig.for_model(
            **values, max_position_embeddings=32768, tie_word_embeddings=True, dtype="bfloat16"
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shipped = artifacts.load(artifacts.folder_of("default"))
        base = artifacts.describe_model(families.dissect(model), name)
        tensors = {
            key: torch.randn(shape) / max(shape[-1], 1) ** 0.5 for key, shape in artifacts.shapes(base, shipped.ranks).items()
        }
        importance = [1.0] * base["layers"]
        MADE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MADE) as beside:
            made = Path(beside) / name
            model.save_pretrained(made / "model")
            artifact = artifacts.Artifact(base, shipped.prefill, shipped.ranks, importance, tensors)
            artifacts.save(artifact, made / "artifact", readme="random\n")
            made.rename(folder)
    return str(folder / "model"), str(folder / "artifact")


def made_or_real(name: str) -> tuple[str, str]:
    """The model and the artifact of a step's name; a real model is fetched, if it is not there."""
    if name in SHAPES:
        return random_model(name)
    command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip(), name


def dtype() -> str:
    return str(models.default_dtype("cpu")).removeprefix("torch.")


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 5) for value in speedup.quartiles(values)]


def ratios(times: dict[str, list[float]]) -> list[float]:
    """Of stock over sparse, round by round."""
    return [stock / sparse for stock, sparse in zip(times["stock"], times["sparse"], strict=True)]


class Pair:
    """The two engines. `read` times one request in one of the three kinds."""

    def __init__(self, stock: Any, ours: Any):
        self.engines = {"stock": stock, "off": ours, "sparse": ours}
        self._last: Any = None
        self._asked = 0

    def read(self, kind: str, ids: list[int]) -> float:
        """Seconds until the first new id is there."""
        engine, params = self._turn_to(kind, ids, 1)
        begin = time.perf_counter()
        engine.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return time.perf_counter() - begin

    def token_time(self, kind: str, ids: list[int], tokens: int) -> float:
        """Median of the seconds from one new id to the next, of `tokens` after the first."""
        engine, params = self._turn_to(kind, ids, tokens + 1)
        core, times = engine.llm_engine, []
        self._asked += 1
        core.add_request(f"{kind}-{self._asked}", {"prompt_token_ids": ids}, params)
        while core.has_unfinished_requests():
            if core.step():
                times.append(time.perf_counter())
        return statistics.median(after - before for before, after in pairwise(times))

    def _turn_to(self, kind: str, ids: list[int], tokens: int) -> tuple[Any, Any]:
        """The engine, and what it is to be asked. An engine that was not the last one first reads a few tokens: its weights are
        no longer in the caches."""
        import vllm

        def params(tokens: int) -> Any:
            extra = {} if kind == "stock" else {"extra_args": {"fastfill": kind == "sparse"}}
            return vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, **extra)

        engine = self.engines[kind]
        if engine is not self._last:
            self._last = engine
            engine.generate([{"prompt_token_ids": ids[:8]}], params(1), use_tqdm=False)
        return engine, params(tokens)

    def in_turn(
        self, kinds: list[str], repeats: int, call: Callable[[str], float], until_clear: bool = False
    ) -> dict[str, list[float]]:
        """`repeats` values of each kind, after one that is not counted; every other round runs backwards, so that no kind is
        always first and few rounds change engines twice. until_clear: rounds go on while the noise is as large as the gain of
        sparse on stock, as those of `fastfill bench`."""
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in itertools.count(-1):
            if repeat >= repeats and (not until_clear or speedup.enough(ratios(found), repeats)):
                return found
            for kind in kinds[:: -1 if repeat % 2 else 1]:
                value = call(kind)
                if repeat >= 0:
                    found[kind].append(value)
        raise AssertionError  # the count has no end

    def clocked(self, kind: str, ids: list[int]) -> dict[str, float]:
        """Seconds by part of one prefill in the engine with the artifact."""
        ours, _ = self._turn_to(kind, ids, 1)
        ours.collective_rpc("fastfill_start_clocks")
        try:
            total = self.read(kind, ids)
        finally:
            parts = ours.collective_rpc("fastfill_stop_clocks")[0]
        return {"total": total, **parts}

    def counts(self) -> dict[str, Any]:
        return self.engines["off"].collective_rpc("fastfill_stats")[0]


@contextmanager
def pair(step: Speed) -> Iterator[Pair]:
    import vllm

    model, artifact = model_and_artifact(step)
    engine.prepare()
    arguments = {
        "dtype": dtype(),
        "max_model_len": LONGEST + 1,  # the same for all steps, so that compiled models are found again
        "enforce_eager": step.eager,
        "kv_cache_memory_bytes": 2**29,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    overrides = {"sparsity": step.sparsity, "one_copy": step.one_copy}
    # vLLM's core as a process of its own polls on one of the machine's cores: on two of them the same prefill, dense or sparse,
    # then takes 0.66 s instead of 0.42 s, and how much longer changes from run to run.
    with mock.patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        stock = vllm.LLM(models.resolve(model), **arguments)
        try:
            with engine.engine(model, artifact, overrides=overrides, **arguments) as ours:
                yield Pair(stock, ours)
        finally:
            stock.llm_engine.engine_core.shutdown()


def model_and_artifact(step: Speed) -> tuple[str, str]:
    return ("default", "default") if step.model == "default" else made_or_real(step.model)


def speed(step: Speed) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    cost = artifacts.load(artifacts.folder_of(model_and_artifact(step)[1])).cost(step.sparsity)

    def prompt(tokens: int) -> list[int]:
        return torch.randint(3, 30000, (tokens,), generator=generator).tolist()

    rows = []
    with pair(step) as both, progress.stage(step.model, len(step.lengths) + 1) as bar:
        for tokens, repeats in step.lengths.items():
            ids = prompt(tokens)
            before = both.counts()
            both.read("sparse", ids)
            sparse_tokens, unread = (both.counts()[kind] - before[kind] for kind in ("sparse_tokens", "unread_tokens"))
            skipped = (cost.unread if unread else cost).skipped
            times = both.in_turn(
                ["stock", "sparse", "off"], repeats, lambda kind, ids=ids: both.read(kind, ids), until_clear=sparse_tokens > 0
            )
            split: dict[str, list[dict[str, float]]] = {"off": [], "sparse": []}
            for _ in range(min(3, repeats)):
                for kind, found in split.items():
                    found.append(both.clocked(kind, ids))
            rows.append(row(skipped, tokens, sparse_tokens, times, split) | ({"unread_tokens": unread} if unread else {}))
            bar.step(note=f"{tokens}: {rows[-1]['speedup']}x")
        held = both.counts()
        bar.step()
    name = models.DEFAULT_NAME if step.model == "default" else step.model
    found = {
        "model": name,
        "dtype": dtype(),
        **in_force(step.sparsity),
        "one_copy": step.one_copy,
    }
    memory = {f"{key}_mb": round(held[f"{key}_bytes"] / 1e6, 1) for key in ("model", "extra")}
    return found | {"rows": rows, **memory}


def row(skipped: float, tokens: int, sparse_tokens: int, times: Any, split: Any) -> dict[str, Any]:
    """skipped: share of neurons that a sparse token skips."""
    stock, sparse, off = (statistics.median(times[kind]) for kind in ("stock", "sparse", "off"))
    # predictor and compensator are inside
    ffn_dense, ffn_sparse = (statistics.median(parts["ffn"] for parts in split[kind]) for kind in ("off", "sparse"))
    share = statistics.median(parts["ffn"] / parts["total"] for parts in split["off"])
    ceiling = 1 / (1 - skipped * sparse_tokens / tokens * share)  # dense tokens skip nothing
    return {
        "prompt_tokens": tokens,
        "sparse_tokens": sparse_tokens,
        **{f"ttft_{kind}_s": round(statistics.median(found), 5) for kind, found in times.items()},
        **{f"ttft_{kind}_quartiles_s": quartiles(found) for kind, found in times.items()},
        "rounds": len(times["stock"]),
        "speedup": round(stock / sparse, 4),
        "ratio_quartiles": quartiles(ratios(times)),
        "clear": speedup.is_clear(ratios(times)) if sparse_tokens else None,
        "off_ratio": round(stock / off, 4),
        "ffn_dense_s": round(ffn_dense, 5),
        "ffn_sparse_s": round(ffn_sparse, 5),
        "predictor_s": round(statistics.median(p["predictor"] for p in split["sparse"]), 5),
        "compensator_s": round(statistics.median(p["compensator"] for p in split["sparse"]), 5),
        "ffn_share": round(share, 4),
        "ceiling": round(ceiling, 4),
        "ceiling_reached": round(stock / sparse / ceiling, 4),
    }


def decoding(step: Decode) -> dict[str, Any]:
    """Milliseconds from one new token to the next; off is a dense prompt's cache, sparse a sparse one's. ratio: stock over
    sparse, median of the rounds, each of which asks all three."""
    rows = []
    with progress.stage("decoding", len(step.models)) as bar:
        for model in step.models:
            ids = torch.randint(3, 30000, (step.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
            with pair(Speed(model, {}, eager=step.eager)) as both:
                found = both.in_turn(
                    ["stock", "sparse", "off"],
                    step.rounds,
                    lambda kind, both=both, ids=ids: both.token_time(kind, ids, step.tokens),
                )
            rows.append(
                {
                    "model": models.DEFAULT_NAME if model == "default" else model,
                    **{f"{kind}_ms": round(1000 * statistics.median(times), 3) for kind, times in found.items()},
                    "ratio": round(statistics.median(ratios(found)), 4),
                    "ratio_quartiles": quartiles(ratios(found)),
                }
            )
            bar.step(note=f"{rows[-1]['ratio']}x")
    shape = {"prompt_tokens": step.prompt, "new_tokens": step.tokens, "rounds": step.rounds}
    return {"dtype": dtype(), **in_force(), **shape, "rows": rows}


def in_force(sparsity: float = 0.5) -> dict[str, Any]:
    """What vLLM makes of the shipped artifact's settings, which the random models have, too; for the record."""
    return cfg.to_dict(settings.in_force(artifacts.load("default"), {"sparsity": sparsity}))


@contextmanager
def server(*options: str) -> Iterator[str]:
    """`fastfill serve` of the default model on a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    import openai

    address = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-m", "fastfill.cli", "serve", "default", "--artifact", "default", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=5)
            end = time.monotonic() + 300
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    if process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise SystemExit(log.read().decode()[-20000:]) from None
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def prompts_of(load: Load) -> tuple[list[list[int]], list[float]]:
    """Prompts cut from the demo document, read round and round, and the seconds at which they arrive."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(models.resolve("default"))
    text = tokenizer((ROOT / "src" / "fastfill" / "demo_document.txt").read_text())["input_ids"]
    rng, prompts, arrivals, now = random.Random(0), [], [], 0.0
    for _ in range(load.requests):
        tokens, start = rng.randint(load.shortest, load.longest), rng.randrange(len(text))
        prompts.append([text[(start + i) % len(text)] for i in range(tokens)])
        arrivals.append(now)
        now += rng.expovariate(load.per_second)
    return prompts, arrivals


async def ask(client: Any, ids: list[int], tokens: int, after: float) -> dict[str, Any]:
    """One streamed greedy answer: {"text", "ttft", "end"} or {"error"}; ttft in seconds, end on the loop's clock."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, after - loop.time()))
    begin, first, text = loop.time(), None, ""
    try:
        stream = await client.completions.create(
            model=models.DEFAULT_NAME,
            prompt=ids,
            max_tokens=tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True, "repetition_penalty": 1.0},  # a checkpoint's own settings may be others
        )
        async for event in stream:
            first = first or loop.time()
            text += event.choices[0].text
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text, "ttft": (first or loop.time()) - begin, "end": loop.time()}


async def under_load(address: str, load: Load) -> dict[str, Any]:
    import openai

    prompts, arrivals = prompts_of(load)
    client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
    loop = asyncio.get_running_loop()
    await ask(client, prompts[0], 2, 0.0)  # the first of all is slower
    begin = loop.time() + 0.5
    found = await asyncio.gather(
        *(ask(client, ids, load.new_tokens, begin + at) for ids, at in zip(prompts, arrivals, strict=True))
    )
    alone = [await ask(client, ids, load.new_tokens, 0.0) for ids in prompts]
    await client.close()
    good = [answer for answer in found if "error" not in answer]
    seconds = max(answer["end"] for answer in good) - begin
    ttft = sorted(answer["ttft"] for answer in good)
    return {
        "errors": [answer["error"] for answer in [*found, *alone] if "error" in answer],
        "ttft_median_s": round(statistics.median(ttft), 4),
        "ttft_p99_s": round(statistics.quantiles(ttft, n=100, method="inclusive")[98], 4),
        "ttft_alone_median_s": round(statistics.median(answer["ttft"] for answer in alone if "ttft" in answer), 4),
        "seconds": round(seconds, 2),
        "prompt_tokens_s": round(sum(map(len, prompts)) / seconds, 1),
        "new_tokens_s": round(load.new_tokens * len(good) / seconds, 2),
        "answers_equal_to_alone": sum(a.get("text") == b.get("text") for a, b in zip(found, alone, strict=True)),
    }


def loaded(load: Load) -> dict[str, Any]:
    rows = []
    for name, sparsity in (("stock", "0"), ("fastfill", "0.5")):
        with progress.waiting(f"{load.requests} requests, {name}"):
            options = (
                "--sparsity",
                sparsity,
                "--dtype",
                load.dtype,
                "--max-model-len",
                "4224",
                "--no-enable-prefix-caching",
                "--kv-cache-memory-bytes",
                str(2**30),
            )
            with server(*options, *(["--enforce-eager"] if load.eager else [])) as address:
                rows.append({"engine": name, **asyncio.run(under_load(address, load))})
    found = {"model": models.DEFAULT_NAME, **in_force()}
    return found | {**vars(load), "rows": rows}


def table(results: dict[str, dict[str, Any]]) -> str:
    """What was measured, 80 columns."""
    lines = [f"{'':18}{'tokens':>7}{'stock':>9}{'sparse':>9}{'off':>9}{'speed-up':>9}{'ceiling':>8}{'reached':>8}"]
    for name in (name for name in results if isinstance(STEPS[name], Speed)):
        for row in results[name]["rows"]:
            times = "".join(f"{row[f'ttft_{kind}_s']:>9.3f}" for kind in ("stock", "sparse", "off"))
            ratio = f"{row['speedup']:>8.2f}x{row['ceiling']:>7.2f}x{row['ceiling_reached']:>8.0%}"
            lines.append(f"{name:18}{row['prompt_tokens']:>7}{times}{ratio}")
        lines.append(f"{'':18}{results[name]['model_mb']:.0f} MB + {results[name]['extra_mb']:.0f} MB")
    for row in results["decode"]["rows"] if "decode" in results else []:
        times = "".join(f"{row[f'{kind}_ms']:>9.2f}" for kind in ("stock", "sparse", "off"))
        lines.append(f"{row['model'].rsplit('/', 1)[-1]:25}{times}{row['ratio']:>8.2f}x (ms a token)")
    for name in (name for name in results if isinstance(STEPS[name], Load)):
        head = f"{name:12}{'median TTFT':>12}{'p99':>8}{'prompt tok/s':>14}{'new tok/s':>11}{'errors':>8}{'as alone':>10}"
        lines += ["", head]
        for row in results[name]["rows"]:
            lines.append(
                f"{row['engine']:12}{row['ttft_median_s']:>12.3f}{row['ttft_p99_s']:>8.3f}{row['prompt_tokens_s']:>14.0f}"
                f"{row['new_tokens_s']:>11.1f}{len(row['errors']):>8}"
                f"{row['answers_equal_to_alone']:>6}/{results[name]['requests']}"
            )
    return "\n".join(lines)


def read(file: Path) -> dict[str, dict[str, Any]]:
    documents = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {document["step"]: document for document in documents}


def write(file: Path, results: dict[str, dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    beside.write_text("".join(json.dumps(document) + "\n" for document in results.values()))
    beside.replace(file)


def lengths(text: str) -> list[int]:
    return [int(tokens) for tokens in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, short prompts, nothing compiled: to see that it works"
    )
    parser.add_argument(
        "--prompt-lengths",
        type=lengths,
        help="of the steps of speed only these, as 1024,4096 (all of them later with --again)",
    )
    parser.add_argument("--again", action="store_true", help="measure steps again that are there")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}; with --quick build/vllm-quick.jsonl")
    arguments = parser.parse_args()
    names = arguments.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; there are {', '.join(STEPS)}")
    for name in names:
        if isinstance(found := STEPS[name], Speed) and (odd := set(arguments.prompt_lengths or ()) - set(found.lengths)):
            parser.error(f"{name} has no prompts of {min(odd)} tokens, but of {', '.join(map(str, found.lengths))}")
    out = arguments.out or (Path("build") / "vllm-quick.jsonl" if arguments.quick else RESULTS)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in names:
        results = read(out)
        if name in results and not arguments.again:
            continue
        begin, step = time.monotonic(), STEPS[name]
        if isinstance(step, Decode):
            document = decoding(Decode(step.models[:1], tokens=4, rounds=1, eager=True) if arguments.quick else step)
        elif isinstance(step, Load):
            quick = Load(requests=4, longest=600, per_second=2.0, new_tokens=8, dtype=step.dtype, eager=True)
            document = loaded(quick if arguments.quick else step)
        else:
            if arguments.quick:
                step = Speed(step.model, {64: 1, 512: 1}, step.sparsity, step.one_copy, eager=True)
            elif arguments.prompt_lengths:
                step = replace(step, lengths={tokens: step.lengths[tokens] for tokens in arguments.prompt_lengths})
            document = speed(step)
        import vllm

        rest = {"vllm": vllm.__version__, "seconds": round(time.monotonic() - begin, 1), "machine": machine.describe()}
        document = {"step": name, **document, **rest}
        results[name] = document
        write(out, results)
        print(f"{name}: {document['seconds']:.0f} s", file=sys.stderr)
    print(table({name: found for name, found in read(out).items() if name in STEPS}))


if __name__ == "__main__":
    main()
