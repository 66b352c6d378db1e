"""Tensors in files: safetensors, read into memory, named by checksums; matrices in eight bits; traces of a change in memory."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from fastfill import files

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # what every operation knows; narrower ones it does not


def checksum(tensor: torch.Tensor) -> str:
    """SHA-256 over type, shape and values, 16 digits of it: finds damage, and is no signature."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(content(tensor))
    return digest.hexdigest()[:16]


def content(tensor: torch.Tensor) -> Any:
    """The bytes of the values, not copied if they lie in memory already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


SCALE = ".scale"


def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every matrix (R, C) in int8, with a scale (R,) in fp32 beside it, `NAME.scale`: its rows' largest magnitudes become 127.
    All else stays. A value is off by at most 1/254 of its row's largest."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.is_floating_point():
            rows = tensor.detach().float()
            scale = rows.abs().amax(1) / 127 if rows.shape[1] else rows.new_zeros(len(rows))
            found[name] = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
            found[name + SCALE] = scale
    return found


def wide(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The values of a tensor that may be in eight bits."""
    tensor = tensors[name]
    return tensor if tensor.is_floating_point() else tensor.float() * tensors[name + SCALE][:, None]


def read(file: Path, most: int | None = None) -> dict[str, torch.Tensor]:
    """Copies: a file that is overwritten later changes nothing here. Raises OSError, ValueError or SafetensorError.

    most: bytes that the file may have; never more than the memory of this machine.
    """
    memory = _memory()
    return load(files.read_bytes(file, memory if most is None else min(most, memory)))


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return 1 << 40


SAMPLE = 64  # entries of a weight that every call compares: 1 in 14,000 of SmolLM2's down


def diagonal(weight: torch.Tensor) -> torch.Tensor:
    """Up to SAMPLE entries of a matrix, spread evenly over the rows and over the columns. A view."""
    rows, columns = weight.shape
    count = min(SAMPLE, rows, columns)
    step = rows // count * weight.stride(0) + columns // count * weight.stride(1)
    return weight.as_strided((count,), (step,))


def stamp(weight: torch.Tensor) -> tuple[Any, ...]:
    """Differs after nearly every way to change a weight: not after writing through `.data`."""
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.stride(), version, weight.dtype, weight.device, weight.requires_grad
