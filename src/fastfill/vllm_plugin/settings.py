"""What the user asks of the plugin: the field `fastfill` of the model's configuration, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import families, kernels, partner, quantised
from fastfill.artifact import Artifact
from fastfill.config import PREFILL_FIELDS, PrefillConfig
from fastfill.errors import UserError
from fastfill.kernels import cpu

SUPPORTED = ((0, 32), (0, 33))  # from, below
FIELD = "fastfill"
# What has been tried: other builders of attention metadata may not tell the host where requests lie.
ATTENTION = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
# Those that hand checkpoints' weights to `load_weights`, and have been tried; the others write to the modules themselves, or
# need packages that have not been.
LOAD_FORMATS = ("auto", "hf", "safetensors", "pt")
SWITCH = "fastfill"  # name of the per-request switch in SamplingParams.extra_args
# Shorter prompts stay dense unless the user says otherwise: vLLM's dense prefill is the faster one there (SmolLM2 on two
# cores: 0.92x at 256 tokens, 1.04x at 512; docs/log.md).
MIN_TOKENS = 512


@dataclass(frozen=True)
class Settings:
    """artifact: its folder. fields: of `PrefillConfig`, in place of the artifact's. kernel: see `fastfill.kernels`.

    one_copy: keep one copy of the FFN weights, the sparse kernel's, and compute dense tokens with it too.
    allow_finetuned: serve a model that was fine-tuned since the artifact was learned (`fastfill.partner`).
    """

    artifact: str
    fields: dict[str, Any]
    kernel: str = "auto"
    one_copy: bool = False
    allow_finetuned: bool = False

    @classmethod
    def of(cls, document: dict[str, Any]) -> Settings:
        """From the names and values that the user gives, all side by side. Raises UserError for an unknown name."""
        own = {field.name for field in dataclasses.fields(cls)} - {"fields"}
        if unknown := sorted(set(document) - own - set(PREFILL_FIELDS)):
            known = ", ".join(sorted({*own, *PREFILL_FIELDS}))
            raise UserError(f"{FIELD}: unknown setting(s) {', '.join(unknown)}; known are {known}.")
        given = {key: value for key, value in document.items() if value is not None}
        fields = {key: given.pop(key) for key in PREFILL_FIELDS if key in given}
        return cls(fields=fields, **given)

    @property
    def document(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "fields"}
        return {**own, **self.fields}

    @property
    def prefill(self) -> PrefillConfig:
        """What is in force, once `configure` has filled in the artifact's values."""
        return PrefillConfig(**self.fields)


def read(vllm_config: Any) -> Settings:
    """Raises UserError for a field that is missing or not understood."""
    document = getattr(vllm_config.model_config.hf_config, FIELD, None)
    if not isinstance(document, dict) or not isinstance(document.get("artifact"), str):
        raise UserError(f'Give vLLM the artifact: --hf-overrides \'{{"{FIELD}": {{"artifact": "DIR"}}, ...}}\'.')
    return Settings.of(document)


def configure(vllm_config: Any) -> None:
    """Check what can be checked before the engine starts, and name the parts of ours that vLLM is to load.

    Raises UserError with one sentence for what does not fit.
    """
    check_version()
    settings = read(vllm_config)
    refuse(vllm_config)
    if settings.kernel not in ("auto", *kernels.KERNELS):
        raise UserError(f"kernel {settings.kernel!r} is not known; use auto, {' or '.join(kernels.KERNELS)}.")
    if vllm_config.device_config.device_type == "cpu":
        try:
            kernels.choose(settings.kernel, torch.empty(0, dtype=vllm_config.model_config.dtype))
        except ValueError as error:
            raise UserError(str(error)) from error
    for name in ("one_copy", "allow_finetuned"):
        if getattr(settings, name) not in (True, False):
            raise UserError(f"{name} must be true or false, not {getattr(settings, name)!r}.")
    if settings.one_copy and vllm_config.device_config.device_type != "cpu":
        raise UserError("one_copy is for CPUs; elsewhere vLLM's own copy of gate and up is the one that is used.")
    artifact = artifacts.load(settings.artifact)
    prefill = in_force(artifact, settings.fields)
    if prefill.weights != "model":
        raise UserError('weights="int8" rounds a transformers model; for vLLM the checkpoint itself must be in eight bits.')
    if prefill.attention == "chunks":
        raise UserError('attention="chunks" is for transformers: vLLM has its own; leave it at "auto".')
    if prefill.reread:
        raise UserError("reread is for transformers: vLLM's pages are not written twice; leave it at 0.")
    if prefill.upper_share < 1:
        raise UserError("upper_share is for transformers: what vLLM keeps of a prefix serves any question; leave it at 1.")
    say_later_start(prefill, artifact, settings.fields)
    settings = dataclasses.replace(settings, fields=cfg.to_dict(prefill))
    if settings.one_copy and prefill.sparsity == 0:
        raise UserError("one_copy does nothing at sparsity 0, which is vLLM's own model; leave it out.")
    check_shapes(artifact, vllm_config.model_config.hf_config)
    check_checkpoint(artifact, Path(vllm_config.model_config.model), settings.allow_finetuned)
    model, parallel, scheduler = vllm_config.model_config, vllm_config.parallel_config, vllm_config.scheduler_config
    setattr(model.hf_config, FIELD, settings.document)
    parallel.worker_extension_cls = "fastfill.vllm_plugin.models.WorkerExtension"
    if prefill.sparsity == 0:
        return  # all of it is vLLM's own code
    choose_attention(vllm_config.attention_config)
    check_graphs(vllm_config)
    model.logits_processors = [*(model.logits_processors or []), "fastfill.vllm_plugin.requests:Requests"]
    check_blocks(vllm_config, prefill.block_size)
    scheduler.scheduler_cls = "fastfill.vllm_plugin.scheduler.scheduler"


def in_force(artifact: Artifact, fields: dict[str, Any]) -> PrefillConfig:
    """The artifact's settings, with fields that the user gives (None: not given), from MIN_TOKENS on unless the user says
    otherwise. Raises UserError for values out of range."""
    prefill = artifact.prefill.with_(**fields)
    if fields.get("min_tokens") is None and prefill.min_tokens < MIN_TOKENS:
        return prefill.with_(min_tokens=MIN_TOKENS)
    return prefill


def say_later_start(prefill: PrefillConfig, artifact: Artifact, fields: dict[str, Any]) -> None:
    """Log that prompts are sparse from a greater length on than the artifact says, if the user has not asked for it."""
    from vllm.logger import init_logger

    if "min_tokens" not in fields and prefill.min_tokens > artifact.prefill.min_tokens:
        init_logger("vllm.fastfill").info(
            "fastfill: prompts under %d tokens stay dense, not only those under the artifact's %d: vLLM's dense prefill is the "
            "faster one there. The setting min_tokens changes it.",
            prefill.min_tokens,
            artifact.prefill.min_tokens,
        )


def choose_attention(attention: Any) -> None:
    """Check what the user chose; if it is nothing, choose for CUDA, where vLLM itself would take FlashInfer on some GPUs."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    check_attention(backend.name for backend in (attention.backend, *attention.backend_per_kind.values()) if backend)
    if attention.backend is None and current_platform.is_cuda():
        attention.backend = AttentionBackendEnum.FLASH_ATTN


def check_attention(backends: Iterable[str]) -> None:
    """Raise UserError for an attention backend that has not been tried."""
    for name in backends:
        if name not in ATTENTION:
            raise UserError(
                f"The sparse prefill has not been tried with the attention backend {name}; start with --attention-backend "
                "FLASH_ATTN or TRITON_ATTN, and on CPUs without that option."
            )


def check_graphs(vllm_config: Any) -> None:
    """Raise UserError if a captured graph of the dense model would be replayed over prompts; over decode steps it may."""
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is not None and mode.mixed_mode().name == "FULL":
        raise UserError(
            "The sparse prefill does not work with full CUDA graphs over prompts; start with "
            "-cc.cudagraph_mode=FULL_AND_PIECEWISE, FULL_DECODE_ONLY, PIECEWISE or NONE."
        )


def check_blocks(vllm_config: Any, block_size: int) -> None:
    """See that neither a chunk nor a hit of the prefix cache has to end inside a block, and that every step has room for a
    block beside all requests that are being answered: else a prompt could wait for ever. Raises UserError."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    others = min(scheduler.max_num_seqs, scheduler.max_num_active_seqs or scheduler.max_num_seqs)
    for option in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        limit, needed = getattr(scheduler, option), others + block_size
        if limit is not None and limit < needed:
            raise UserError(
                f"--{option.replace('_', '-')} {limit} is less than a token of each of {others} requests and a block of "
                f"{block_size}; give {needed} or more, or a smaller --max-num-seqs."
            )
    if 0 < (limit := scheduler.long_prefill_token_threshold) < block_size:
        raise UserError(f"--long-prefill-token-threshold {limit} is less than a block; give {block_size} or more.")
    if not cache.enable_prefix_caching:
        return
    if cache.prefix_match_unit and cache.prefix_match_unit % block_size:
        raise UserError(
            f"--prefix-match-unit {cache.prefix_match_unit} is no multiple of the sparse blocks of {block_size}; leave it out."
        )
    default = 128 if vllm_config.device_config.device_type == "cpu" else 16
    pages = cache.block_size if cache.user_specified_block_size else default
    if pages % block_size == 0:
        return
    fitting = math.lcm(pages, block_size)
    if cache.user_specified_block_size:
        raise UserError(f"--block-size {pages} is no multiple of the sparse blocks of {block_size}; give {fitting}.")
    cache.block_size, cache.user_specified_block_size = fitting, True


def check_version() -> None:
    import vllm

    low, high = SUPPORTED
    found = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if not low <= found < high:
        raise UserError(f"vLLM {vllm.__version__} is not supported by this fastfill; install {name_range()}.")


def name_range() -> str:
    """The supported versions, as pip writes them."""
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    return f"vllm>={low},<{high}"


def refuse(vllm_config: Any) -> None:
    """Raise UserError for what the sparse prefill does not know, rather than be wrong or silently dense."""
    parallel, model, scheduler = vllm_config.parallel_config, vllm_config.model_config, vllm_config.scheduler_config
    load, offload = vllm_config.load_config, vllm_config.offload_config
    families.activation_of(model.hf_config)
    for given, what in (
        (vllm_config.speculative_config is not None, "speculative decoding; start without it"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism; start with --pipeline-parallel-size 1"),
        (parallel.prefill_context_parallel_size > 1, "context parallelism; start without --prefill-context-parallel-size"),
        (parallel.decode_context_parallel_size > 1, "context parallelism; start without --decode-context-parallel-size"),
        (parallel.enable_dbo, "dual-batch overlap; start without --enable-dbo"),
        (parallel.ubatch_size > 1, "micro-batches; start without --ubatch-size"),
        (parallel.enable_eplb or parallel.enable_elastic_ep, "expert parallelism; start without --enable-eplb and elastic EP"),
        (vllm_config.lora_config is not None, "LoRA adapters; merge them, and calibrate the merged model"),
        (load.load_format == "dummy", "dummy weights; leave --load-format out"),
        (load.load_format not in LOAD_FORMATS, f"--load-format {load.load_format}; use {', '.join(LOAD_FORMATS)}"),
        (model.model_weights, "weights from an object store; download the checkpoint"),
        (model.enable_sleep_mode, "sleep mode, which gives the weights away; start without --enable-sleep-mode"),
        (vllm_config.weight_transfer_config is not None, "weights from a trainer; start without --weight-transfer-config"),
        (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size, "offloaded weights; start without offloading"),
        (vllm_config.kv_transfer_config is not None, "keys and values from elsewhere; start without --kv-transfer-config"),
        (vllm_config.cache_config.kv_offloading_size, "offloaded keys and values; start without --kv-offloading-size"),
        (model.runner_type == "pooling", "pooling models"),
        (scheduler.scheduler_cls is not None, "another scheduler class; start without --scheduler-cls"),
        (parallel.worker_extension_cls, "another worker extension; start without --worker-extension-cls"),
        (vllm_config.use_v2_model_runner, "vLLM's second model runner; set VLLM_USE_V2_MODEL_RUNNER=0"),
    ):
        if given:
            raise UserError(f"The sparse prefill does not work with {what}.")
    check_quantised(vllm_config)


def check_quantised(vllm_config: Any) -> None:
    """Raise UserError for quantised weights that the sparse kernel does not read. What a checkpoint leaves out of its scheme is
    looked at when the weights are there."""
    model = vllm_config.model_config
    if not model.quantization:
        return
    document = model.model_arch_config.quantization_config
    stored = document is not None and model.quantization == document.get("quant_method")
    quantised.check(document if stored else {"quant_method": model.quantization})  # else: rounded at the start
    if vllm_config.device_config.device_type != "cpu":
        raise UserError("The sparse prefill reads weights in eight bits on CPUs only; take the floating-point model here.")
    if not multiplies_bytes_exactly(cpu.isas()):
        raise UserError(
            "vLLM's own product of int8 needs AVX-512 VNNI, which this processor lacks: on AVX2 its answers are wrong, with or "
            "without an artifact; serve the floating-point model, or read this one with transformers."
        )


def multiplies_bytes_exactly(isas: dict[str, bool]) -> bool:
    """Whether vLLM does. 0.32 does with AVX-512 VNNI and not on AVX2 alone (Zen 3: sums of 256 products of -2 to 2 are off by
    up to 77); between them, AVX-VNNI too, it was not tried. isas: `kernels.cpu.isas()`, which knows those of x86."""
    return "avx2" not in isas or isas["avx512_vnni"]


def check_shapes(artifact: Artifact, model: Any) -> None:
    """Raise UserError if the artifact was made for a model of another shape. model: the Hugging Face config."""
    base = artifact.base_model
    mine = (base["hidden_size"], base["intermediate_size"], base["layers"])
    theirs = (model.hidden_size, model.intermediate_size, model.num_hidden_layers)
    if mine != theirs:
        raise UserError(partner.wrong_partner(base["name"], f"shapes {mine} against {theirs}"))


def check_checkpoint(artifact: Artifact, folder: Path, allow_finetuned: bool = False) -> None:
    """Raise UserError if the weights in a local folder are not those the artifact was made for, by the rule in `partner`. Reads
    some rows a layer; a checkpoint that is not a folder of safetensors is checked when it is loaded."""
    base = artifact.base_model
    try:
        with ExitStack() as stack:
            rows = _Rows(folder, stack)
            family = families.FAMILIES.get(base["model_type"], families.Family())
            layers = [f"model.{family.layers}.{i}.{family.ffn}." for i in range(base["layers"])]
            if not all(f"{layer}{family.linear(role)}.weight" in rows.files for layer in layers for role in families.ROLES):
                return
            samples = [[rows.sample(layer, family, role) for role in families.ROLES] for layer in layers]
    except (OSError, SafetensorError, KeyError, ValueError):
        return  # vLLM's loader will say what is wrong with the files
    partner.check(base, artifact.samples, samples, allow_finetuned)  # what it notes is said when the weights are loaded


class _Rows:
    """Single rows of the weights in a checkpoint folder. files: tensor name -> its open file."""

    def __init__(self, folder: Path, stack: ExitStack):
        index = folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        self.files: dict[str, Any] = {}
        for name in names:
            file = stack.enter_context(safe_open(folder / name, framework="pt"))
            self.files |= dict.fromkeys(file.keys(), file)

    def sample(self, layer: str, family: families.Family, role: str) -> partner.Sample:
        """Of role's weight in the FFN whose weights' names begin with `layer`."""
        name = f"{layer}{family.linear(role)}.weight"
        whole = self.files[name].get_slice(name)
        rows, columns = whole.get_shape()
        share = family.share(role, rows)
        shape = (share.stop - share.start, columns)
        found = partner.take(shape, lambda row, columns: whole[share.start + row : share.start + row + 1, columns][0])
        if whole.get_dtype() != "I8":
            return found
        return partner.widened(found, self.files[f"{name}_scale"].get_tensor(f"{name}_scale")[share])


def wants_sparse(extra_args: dict[str, Any] | None) -> bool:
    """The per-request switch: true unless extra_args has {"fastfill": false} (or 0). Raises ValueError for other values."""
    value = (extra_args or {}).get(SWITCH, True)
    if value not in (True, False):  # 0 and 1 too: the HTTP fields know no booleans
        raise ValueError(f"{SWITCH} must be true or false (1 or 0), not {value!r}.")
    return bool(value)


def overrides(model_type: str, artifact: str, **settings: Any) -> dict[str, Any]:
    """The value of vLLM's option --hf-overrides that turns the artifact on for a model of this type.

    settings: those of `Settings`; None leaves the artifact's. Raises UserError for a type that is not supported.
    """
    from fastfill.vllm_plugin import MODELS

    ours = {name: MODELS[row.vllm] for name, row in families.FAMILIES.items() if row.vllm}
    if model_type not in ours:
        raise UserError(f"Models of type {model_type!r} are not supported in vLLM; supported are: {', '.join(ours)}.")
    given = {key: value for key, value in settings.items() if value is not None}
    document = {"artifact": str(artifacts.folder_of(artifact).resolve()), **given}
    PrefillConfig().with_(**Settings.of(document).fields)  # what is wrong is told here, before vLLM starts
    return {"architectures": [ours[model_type]], FIELD: document}
