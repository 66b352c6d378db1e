"""Where the time and the memory of a prefill go. For extra runs only: nothing here touches a run whose TTFT is reported."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastfill import families
from fastfill.attachment import Attachment
from fastfill.blocks import Plan
from fastfill.engines import PARTS
from fastfill.sparse_ffn import SparseFFN, tapped


class Stopwatch:
    """Adds up spans of time by part. On CUDA a mark is an event on the current stream, so that nothing waits."""

    def __init__(self, device: torch.device):
        self.device = device
        self.spans: list[tuple[str, Any, Any]] = []
        self._open: list[Any] = []

    def start(self) -> None:
        self._open.append(self._mark())

    def stop(self, part: str) -> None:
        self.spans.append((part, self._open.pop(), self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, part: str) -> float:
        """Call it when the run is over and the device is synchronised."""
        spans = [(begin, end) for name, begin, end in self.spans if name == part]
        if self.device.type == "cuda":
            return sum((begin.elapsed_time(end) / 1e3 for begin, end in spans), 0.0)
        return sum((end - begin for begin, end in spans), 0.0)


def clocks(attachment: Attachment) -> AbstractContextManager[Stopwatch]:
    """`clocks_on` all parts of an attached model."""
    attentions = families.dissect(attachment.model).attentions
    return clocks_on(attachment.model.device, attentions, attachment.modules, attachment.ffns)


@contextmanager
def clocks_on(
    device: torch.device, attentions: Iterable[nn.Module], ffns: Iterable[nn.Module], sparse: Iterable[SparseFFN]
) -> Iterator[Stopwatch]:
    """Clocks on attentions, FFNs, predictors and compensators while the block runs; taken off in any case.

    ffns: the modules that are called. sparse: what runs inside them.
    """
    watch = Stopwatch(device)
    hooks: list[Any] = []

    def tap(step: str, ffn: SparseFFN, _plan: Plan, _value: torch.Tensor | None) -> None:
        if step in ("input", "selected"):
            watch.start()
        elif step == "scores":
            watch.stop("predictor")
        elif step == "corrected":
            watch.stop("compensator" if ffn.compensator else "")

    try:
        for part, modules in (("attention", attentions), ("ffn", ffns)):
            for module in modules:
                hooks.append(module.register_forward_pre_hook(lambda *_: watch.start()))
                hooks.append(module.register_forward_hook(lambda *_, part=part: watch.stop(part)))
        with tapped(list(sparse), tap):
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


def split(attachment: Attachment, run: Callable[[], float]) -> dict[str, float]:
    """Seconds of one prefill by `PARTS`. run: reads the prompt and returns its TTFT.

    attention: the attention modules, projections included. predictor: scoring. compensator: the correction. ffn: what else
    the FFN modules do, choosing the K best included. rest: all else (embedding, norms, the head,
    `generate` itself), by subtraction, so that the sum is this run's TTFT.
    """
    with clocks(attachment) as watch:
        total = run()
    parts = {part: watch.seconds(part) for part in PARTS}
    parts["rest"] = total - parts["attention"] - parts["ffn"]
    parts["ffn"] -= parts["predictor"] + parts["compensator"]
    return parts


def peak_mb(device: torch.device, run: Callable[[], Any]) -> float | None:
    """MB (10^6 bytes) by which `run` raises memory above what was held before, at the highest.

    On CUDA: tensors, by torch.cuda.max_memory_allocated. On a CPU: resident memory of this process, by Linux's high-water
    mark, which is reset before; freed memory is handed back to the system first, so that earlier runs do not hide it.
    Activations, KV cache and temporary buffers count; weights and buffers that a library keeps between calls do not.
    None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
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
