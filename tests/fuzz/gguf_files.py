"""GGUF files with anything done to their headers, loaded as models. A changed header may be the header of another model: what
loads with another result counts as `other`, and is no fault."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import torch
from conftest import logits

from fastfill import models
from fuzz import bed, mutate

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 32, 64, 264, 2
IDS = torch.arange(20)[None] + 40


def world(place: Path) -> bed.World:
    os.environ["FASTFILL_CACHE"] = str(place / "cache")
    good = _write(place / "good.gguf").read_bytes()
    header = len(good) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(place / "good.gguf").tensors)
    expected = logits(models.load(str(place / "good.gguf"), "fp32").model, IDS)

    def case(rng: random.Random) -> tuple[str, int, bed.Act]:
        shutil.rmtree(place / "cache", ignore_errors=True)
        what, content = _header(rng, good, header)
        file = place / "bad.gguf"
        file.write_bytes(content)
        return what, len(content), lambda: _use(file, content, expected)

    return case


def _use(file: Path, content: bytes, expected: torch.Tensor) -> tuple[str, str]:
    found = logits(models.load(str(file), "fp32").model, IDS)  # a UserError is for the bed
    if file.read_bytes() != content:
        raise bed.Fault("changed", "the file was written to")
    same = found.shape == expected.shape and torch.equal(found, expected)
    return ("right" if same else "other"), ""


def _header(rng: random.Random, good: bytes, header: int) -> tuple[str, bytes]:
    kind = rng.choice(("bytes", "bytes", "number", "number", "cut", "word"))
    if kind == "cut":
        at = rng.randrange(len(good))
        return f"cut at {at}", good[:at]
    if kind == "number":  # most of a header are lengths, counts and types
        at, form = rng.randrange(header - 8), rng.choice("BHIQ")
        number = struct.pack(
            f"<{form}", rng.choice((0, 1, 2, 255, 2**8 ** struct.calcsize(form) - 1)) % 2 ** (8 * struct.calcsize(form))
        )
        return f"{form} at {at} is {number.hex()}", good[:at] + number + good[at + len(number) :]
    if kind == "word":
        word = rng.choice(
            [b"llama", b"gpt2", b"llama-bpe", b"blk.0.", b"blk.1.", b"attn_q", b"ffn_down", b"tokenizer.ggml.", b"block_count"]
        )
        other = bytes(rng.choice(b"abcx_.\x1b\xff") for _ in word)
        return f"{word!r} is {other!r}", good[:header].replace(word, other, rng.choice((1, -1))) + good[header:]
    what, content = mutate.some_bytes(rng, good[:header])
    return what, content + good[header:]


def _write(path: Path) -> Path:
    """A tiny LLaMA with a byte-level tokenizer."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in keep]
    letters = [chr(byte) if byte in keep else chr(256 + others.index(byte)) for byte in range(256)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*letters, "he", *(f"<x{i}>" for i in range(7))])
    writer.add_token_types([1] * 257 + [3] * 7)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    square, narrow = (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in zip(("attn_q", "attn_output"), (square, square), strict=True)}
        shapes |= {f"blk.{i}.{name}": narrow for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{i}.{name}": (INTERMEDIATE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{i}.ffn_down"] = (HIDDEN, INTERMEDIATE)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = np.ones(shape) if "norm" in name else rng.standard_normal(shape) * 0.18
        writer.add_tensor(f"{name}.weight", value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
