"""Where the time and the memory of a prefill go. For extra runs only: nothing here touches a run whose TTFT is reported."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastfill import clocks
from fastfill.engines import Engine

PARTS = (*clocks.PARTS, "rest")


def split(engine: Engine, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one prefill of ids (1, T) by `PARTS`.

    attention: the attention modules, projections included. predictor: scoring. compensator: the correction. ffn: what else
    the FFN modules do, choosing the K best included. rest: all else (embedding, norms, the head,
    `generate` itself), by subtraction, so that the sum is this run's TTFT.
    """
    with engine.clocks() as parts:
        total = engine.prefill(ids).seconds
    found = dict(parts)
    found["rest"] = total - found["attention"] - found["ffn"]
    found["ffn"] -= found["predictor"] + found["compensator"]
    return found


def peak_mb(engine: Engine, ids: torch.Tensor) -> float | None:
    """`rise_mb` of a prefill of ids (1, T) that is not timed; None where the engine's memory is another process's."""
    return rise_mb(engine.device, lambda: engine.generate(ids, 1)) if engine.local else None


def rise_mb(device: str, run: Callable[[], Any]) -> float | None:
    """Peak memory of `run` above what was held before, MB (10^6 bytes).

    On CUDA: tensors, by torch.cuda.max_memory_allocated. On a CPU: resident memory of this process, by Linux's high-water
    mark, which is reset before; freed memory is handed back to the system first, so that earlier runs do not hide it.
    Activations, KV cache and temporary buffers count; weights and buffers that a library keeps between calls do not.
    None where the system does not report it.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError, KeyError):
        return None
    run()
    return max(0, _status("VmHWM") - before) / 1e6


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status, which counts in units of 1,024."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) * 1024
