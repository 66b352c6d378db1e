"""Tensors in files: safetensors, read into memory, named by checksums."""

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
