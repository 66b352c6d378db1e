"""Clocks on the parts of a model. For extra runs only: nothing here touches a run whose TTFT is reported."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastfill.blocks import Plan
from fastfill.sparse_ffn import SparseFFN, tapped

PARTS = ("attention", "ffn", "predictor", "compensator")


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


@dataclass(frozen=True)
class Look:
    """A hook that reads the clock and nothing else. part: what ends; None where something begins."""

    watch: Stopwatch
    part: str | None = None

    def __call__(self, *_: Any) -> None:
        if self.part is None:
            self.watch.start()
        else:
            self.watch.stop(self.part)


@contextmanager
def clocked(
    device: torch.device, attentions: Iterable[nn.Module], ffns: Iterable[nn.Module], sparse: Iterable[SparseFFN]
) -> Iterator[dict[str, float]]:
    """Clocks on attentions, FFNs, predictors and compensators while the block runs; taken off in any case. Gives seconds by
    `PARTS`, filled in when the block has ended (the device must be done by then). ffn: predictor and compensator included.

    ffns: the modules that are called. sparse: what runs inside them.
    """
    watch, seconds = Stopwatch(device), dict.fromkeys(PARTS, 0.0)
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
                hooks.append(module.register_forward_pre_hook(Look(watch)))
                hooks.append(module.register_forward_hook(Look(watch, part)))
        with tapped(list(sparse), tap):
            yield seconds
        seconds.update({part: watch.seconds(part) for part in PARTS})
    finally:
        for hook in hooks:
            hook.remove()
