"""Read a GGUF file and write it as a folder that `transformers` loads: nothing it says is dropped, nothing it lacks is made up.

The header is read here and not by a library, because every length in it is checked against the file; so are the shapes of all
tensors against the metadata. Values are unpacked by the package ``gguf``. Format: ggml's docs/gguf.md. Meaning of the metadata:
llama.cpp, whose defaults hold where a key is absent.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastfill.errors import UserError, listed, quoted
from fastfill.gguf_config import config_of
from fastfill.gguf_tokenizer import save as save_tokenizer
from fastfill.gguf_tokenizer import tokenizer_of
from fastfill.kernels import packed

_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # type -> format of `struct`
_STRING, _ARRAY = 8, 9
_HEADER_LIMIT = 1 << 28  # bytes; vocabularies of 250,000 tokens take 12 MB
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SHARD = 1 << 30  # bytes of unpacked weights that are held in memory before they are written
_ROWS = 1 << 22  # elements that are unpacked at once

_PAIRS = ("llama", "smollm3")  # their queries and keys are permuted (`_unpermute`)

# Floats stay what they are; all else is unpacked to bf16.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# GGUF's names of tensors and those of `transformers`
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as the header describes it. shape: in torch's order. start, size: bytes in the file `path`."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    path: Path
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        return _FLOATS.get(self.kind.name, torch.bfloat16)

    @property
    def unpacked(self) -> int:
        """Bytes once it is unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> torch.Tensor:
        """Its rows as they are in the file, (R, bytes) uint8. Raises UserError if the file has become shorter."""
        rows = math.prod(self.shape[:-1])
        try:
            raw = np.fromfile(self.path, np.uint8, self.size, offset=self.start)
            return torch.from_numpy(raw.reshape(rows, self.size // rows))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path.name} could not be read to its end: {error}.") from error

    def read(self) -> torch.Tensor:
        """Its values. Raises UserError if one of them is not finite or the file has become shorter."""
        import gguf

        values = torch.empty(self.shape, dtype=self.dtype)
        flat = values.view(-1, self.shape[-1])
        row_bytes = self.size // len(flat)
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                for rows in flat.split(max(_ROWS // self.shape[-1], 1)):
                    raw = np.fromfile(file, np.uint8, len(rows) * row_bytes).reshape(len(rows), row_bytes)
                    rows.copy_(torch.from_numpy(gguf.dequantize(raw, self.kind)))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path.name} could not be read to its end: {error}.") from error
        if not torch.isfinite(values).all():
            raise UserError(f"{self.path.name} is damaged: tensor {self.name!r} has values that are not finite.")
        return values


@dataclass(frozen=True)
class Model:
    """A GGUF model: its metadata, and its tensors by name, from all files that it was split into."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Header:
    """Takes one value after the other from the beginning of a file, and never more than it has."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.position = file, path, 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > self.size:
            raise UserError(f"{self.path.name} is incomplete: it ends inside its header; download it again.")
        if self.position > _HEADER_LIMIT:
            raise self.damaged("its header has no end")
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a text in it is not UTF-8") from error

    def value(self) -> Any:
        """A number, a text, or an array: numbers as numpy's, texts as a list."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                return [self.text() for _ in range(count)]
            if kind in _NUMBERS:
                dtype = np.dtype("<" + _NUMBERS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        raise self.damaged(f"it has a value of type {kind}, which does not exist")

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self.path.name} is damaged: {why}; download it again.")


def _read_part(path: Path) -> Model:
    with path.open("rb") as file:
        header = _Header(file, path)
        if header.size < 24 or header.take(4) != b"GGUF":
            raise UserError(f"{path.name} is not a GGUF file.")
        version, tensor_count, value_count = header.number("I"), header.number("Q"), header.number("Q")
        if version not in (2, 3):
            raise UserError(f"{path.name} has GGUF version {version}; versions 2 and 3 (little-endian) can be read.")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = header.text()
            if key in metadata:
                raise header.damaged(f"it has {quoted(key)} twice")
            metadata[key] = header.value()
        rows = [_read_tensor_row(header) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise header.damaged("general.alignment is not a power of two from 8")

        def aligned(position: int) -> int:
            return -(-position // alignment) * alignment

        tensors: dict[str, Tensor] = {}
        start = expected = aligned(header.position)
        for name, shape, kind, offset in rows:
            size = _byte_count(header, name, shape, kind)
            if name in tensors or start + offset != expected:
                raise header.damaged(f"tensor {quoted(name)} is not where it should be")
            tensors[name] = Tensor(name, shape, kind, path, expected, size)
            if expected + size > header.size:
                raise UserError(
                    f"{path.name} is incomplete: it has {header.size:,} bytes, and tensor {quoted(name)} ends at "
                    f"{expected + size:,}; download it again."
                )
            expected = aligned(expected + size)
    return Model(metadata, tensors)


def _read_tensor_row(header: _Header) -> tuple[str, tuple[int, ...], Any, int]:
    import gguf

    name, dimensions = header.text(), header.number("I")
    if not 1 <= dimensions <= 4:
        raise header.damaged(f"tensor {quoted(name)} has {dimensions} dimensions")
    shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    try:
        return name, shape, gguf.GGMLQuantizationType(kind), offset
    except ValueError as error:
        raise UserError(
            f"{header.path.name} has tensor {quoted(name)} in quantisation type {kind}, which the installed package gguf does "
            "not know."
        ) from error


def _byte_count(header: _Header, name: str, shape: tuple[int, ...], kind: Any) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise header.damaged(f"tensor {quoted(name)} has shape {shape}")
    return math.prod(shape) // block * block_bytes


def parts(path: Path) -> list[Path]:
    """All files of a model, of which `path` is one; itself if it was not split. Raises UserError if one is not there."""
    split = _PART.fullmatch(path.name)
    if split is None:
        return [path]
    stem, _, count = split.groups()
    files = [path.with_name(f"{stem}-{part:05d}-of-{count}.gguf") for part in range(1, int(count) + 1)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path.name} is a part of a split model, and {file.name} is not beside it; put all parts there.")
    return files


def read(path: Path) -> Model:
    """Header of a GGUF model, whole: split files are joined. Raises UserError, in a sentence that names what is wrong."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {path.name} needs the package 'gguf'; run: pip install 'fastfill[gguf]'.")
    files = parts(path)
    found = [_read_part(file) for file in files]
    for number, (file, part) in enumerate(zip(files, found, strict=True)):
        count = part.metadata.get("split.count", 0) or 1
        if count != len(files) or part.metadata.get("split.no", 0) != number:
            raise UserError(
                f"{path.name} does not fit its name, or a part of it does not: {file.name} says it is part "
                f"{quoted(part.metadata.get('split.no', 0))} (from 0) of {quoted(count)}; name parts ...-00001-of-0000N.gguf "
                "or join them with llama-gguf-split --merge."
            )
    tensors = {name: tensor for part in found for name, tensor in part.tensors.items()}
    total = found[0].metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != sum(len(part.tensors) for part in found) or total != len(tensors):
        raise UserError(
            f"{path.name} should have {quoted(total)} tensors with its parts, and has {len(tensors)}; download it again."
        )
    _check_kinds(path, tensors)
    return Model(found[0].metadata, tensors)


def _check_kinds(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError if the package `gguf` cannot unpack one of the quantisation types."""
    import gguf

    for kind in {tensor.kind for tensor in tensors.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise UserError(
                f"{path.name} has tensors of quantisation type {kind.name}, which cannot be unpacked here."
            ) from error


def _their_name(name: str) -> str | None:
    """``blk.3.ffn_up.weight`` -> ``model.layers.3.mlp.up_proj.weight``; None for a tensor that no model of ours has."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, middle, end = match.groups()
    theirs = (_TOP if layer is None else _LAYER).get(middle)
    return theirs and f"{theirs}.{end}" if layer is None else theirs and f"model.layers.{layer}.{theirs}.{end}"


def _wanted(config: Any, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors by the names of `transformers`: exactly those that the model has, in its shapes. Raises UserError."""
    import transformers

    if config.num_hidden_layers > len(tensors):  # before a model of so many layers is built
        raise UserError(f"{name} says that it has {config.num_hidden_layers} layers, and holds {len(tensors)} tensors.")
    auto = transformers.AutoModelForCausalLM  # imported before: what a module computes while it is imported must be real
    with torch.device("meta"):
        model = auto.from_config(config)
    config.architectures = [type(model).__name__]
    shapes = {key: tuple(values.shape) for key, values in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    found = {_their_name(tensor) or tensor: tensor for tensor in tensors if tensor != "rope_freqs.weight"}
    if unknown := [tensor for theirs, tensor in found.items() if theirs not in shapes]:
        raise UserError(f"{name} has tensors that a {config.model_type} model has no place for: {listed(unknown)}.")
    if missing := [theirs for theirs in shapes if theirs not in found]:
        raise UserError(f"{name} is incomplete, these tensors are missing: {listed(missing)}; download it again.")
    for theirs, shape in shapes.items():
        if tensors[found[theirs]].shape != shape:
            raise UserError(
                f"{name} contradicts itself: tensor {found[theirs]!r} has shape {tensors[found[theirs]].shape}, its metadata "
                f"ask for {shape}."
            )
    return {theirs: tensors[found[theirs]] for theirs in shapes}


def _unpermute(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as `transformers` rotates them, halves of a head; llama.cpp keeps LLaMA's pairs of neighbours."""
    halves = values.view(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _value(name: str, tensor: Tensor, config: Any, architecture: str) -> torch.Tensor:
    values = tensor.read()
    if architecture in _PAIRS and ".q_proj." in name:
        return _unpermute(values, config.num_attention_heads)
    if architecture in _PAIRS and ".k_proj." in name:
        return _unpermute(values, config.num_key_value_heads)
    return values


def _shards(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names in groups of `_SHARD` bytes, so that memory does not grow with the model."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.unpacked > _SHARD:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.unpacked
    yield group


def ffns(model: Model, name: str) -> dict[str, Tensor]:
    """The matrices of the FFNs by the names of their Linears. Raises UserError if one is of a type that cannot stay packed."""
    found = {their: tensor for key, tensor in model.tensors.items() if (their := _their_name(key)) and ".mlp." in their}
    if any(their.endswith(".bias") for their in found):
        raise UserError(f"{name} has FFNs with biases, which cannot stay packed; load it unpacked.")
    odd = sorted({tensor.kind.name for tensor in found.values()} - packed.KINDS.keys())
    if odd:
        raise UserError(f"{name} has FFN weights of type {listed(odd)}; packed can stay {', '.join(packed.KINDS)}.")
    return {their.removesuffix(".weight"): tensor for their, tensor in found.items()}


def unpacked_bytes(model: Model) -> int:
    """Bytes that the weights take on disk once they are unpacked."""
    return sum(tensor.unpacked for tensor in model.tensors.values())


def convert(model: Model, name: str, folder: Path, step: Callable[[], None] = lambda: None) -> None:
    """Write config, tokenizer and weights of a GGUF model into a folder that exists. step: called after each tensor.

    Raises UserError for metadata or tensors that `transformers` would read as another model; then nothing was unpacked yet.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config, generation = config_of(model, name)
    tokenizer = tokenizer_of(model.metadata, name, config.vocab_size)
    tensors = _wanted(config, model.tensors, name)
    config.dtype = tensors["model.layers.0.mlp.gate_proj.weight"].dtype
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, name)
    groups = list(_shards(tensors))
    index = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        values = {}
        for theirs in group:
            values[theirs] = _value(theirs, tensors[theirs], config, model.metadata["general.architecture"])
            step()
        try:
            save_file(values, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # the disk is full, say
            raise OSError(str(error)) from error
        index.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        document = {"metadata": {"total_size": sum(t.unpacked for t in tensors.values())}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
