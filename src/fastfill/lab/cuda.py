"""Prefill on a GPU, dense and sparse each in its fastest way, timed by CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfill import families
from fastfill.attachment import Attachment
from fastfill.engines import Engine, Prefill
from fastfill.engines.transformers import TransformersEngine

TRIALS = 5  # timed runs of each way, to choose by
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WAYS = ("eager", "graph", "compiled")

Run = Callable[[], Any]


class CudaEngine(TransformersEngine):
    """As `TransformersEngine`, but timed from the ids on the device to the first new id and the KV cache.

    Each prompt length is tried in three ways in each mode (sparse, dense, all neurons), and measured in the fastest: eager; as
    a CUDA graph; as a CUDA graph of a model whose norms and dense FFNs are compiled by torch.compile. ways: per length and
    mode the median seconds of each way, or the reason why it did not run. Clocked runs are eager.
    """

    def __init__(self, attachment: Attachment, name: str, tokenizer: Any = None):
        super().__init__(attachment, name, tokenizer)
        self.ways: dict[str, dict[str, float | str]] = {}
        self._mode, self._eager = "sparse", False
        self._ready: dict[tuple[int, str], tuple[torch.Tensor, Run, Prefill]] = {}

    def prefill(self, ids: torch.Tensor) -> Prefill:
        if self._eager:
            return super().prefill(ids)
        key = (ids.shape[1], self._mode)
        if any(tokens != ids.shape[1] for tokens, _ in self._ready):
            self._ready.clear()  # a graph keeps its memory as long as it lives
        if key not in self._ready:
            self._ready[key] = self._fastest(ids)
        there, run, counted = self._ready[key]
        there.copy_(ids)
        return replace(counted, seconds=clock(run))

    def dense(self) -> AbstractContextManager[None]:
        return self._in("dense", super().dense())

    @contextmanager
    def all_neurons(self) -> Iterator[None]:
        with self._in("all neurons", super().all_neurons()):
            yield

    @contextmanager
    def _in(self, mode: str, inner: AbstractContextManager[None]) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            with inner:
                yield
        finally:
            self._mode = before

    @contextmanager
    def clocks(self) -> Iterator[dict[str, float]]:
        self._ready.clear()
        self._eager = True
        try:
            with super().clocks() as seconds:
                yield seconds
        finally:
            self._eager = False

    def _fastest(self, ids: torch.Tensor) -> tuple[torch.Tensor, Run, Prefill]:
        there = ids.to(self.device, copy=True)
        counted = self._counted(lambda: self._first_id(there))
        seconds = self.ways.setdefault(f"{ids.shape[1]} {self._mode}", {})
        best: tuple[float, Run] | None = None
        for way in WAYS:
            try:
                run = self._way(way, there)
                found = statistics.median(clock(run) for _ in range(TRIALS))
            except Exception as error:  # a compiler or a driver that refuses: another way is measured instead
                seconds[way] = (str(error).strip() or type(error).__name__).splitlines()[0]
                if way == "eager":
                    raise
                continue
            seconds[way] = found
            if best is None or found < best[0]:
                best = found, run
        assert best is not None
        return there, best[1], counted

    def _way(self, way: str, ids: torch.Tensor) -> Run:
        def run() -> torch.Tensor:
            return self._first_id(ids)

        if way == "eager":
            run()
            return run
        if way == "graph":
            return capture(run)
        with compiled(self.attachment, ffns=self._mode == "dense"):
            return capture(run)

    @torch.no_grad()
    def _first_id(self, ids: torch.Tensor) -> torch.Tensor:
        # No mask and no positions: nothing to look at on the device. With a cache, because without one transformers checks
        # for packed sequences, and under capture assumes them.
        with sdpa_kernel(ATTENTION, set_priority=True):
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)


def fastest(engine: Engine) -> Engine:
    """The same engine for timing: a `CudaEngine` if it is transformers' on a GPU."""
    if isinstance(engine, TransformersEngine) and torch.device(engine.device).type == "cuda":
        return CudaEngine(engine.attachment, engine.name, engine.tokenizer)
    return engine


@contextmanager
def compiled(attachment: Attachment, ffns: bool, backend: str = "inductor") -> Iterator[None]:
    """Norms by torch.compile while the block runs, and with `ffns` the FFNs too, as the model has them: the artifact is off."""
    modules = list(families.dissect(attachment.model).norms)
    if ffns:
        attachment.detach()
        modules += attachment.modules
    try:
        for module in modules:
            module.compile(dynamic=False, backend=backend)
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None
        if ffns:
            attachment._swap()


def capture(run: Run) -> Run:
    """A CUDA graph of `run`, which is run twice before (kernels are loaded, layouts copied, compilers done)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay(_result: Any = result) -> Any:
        graph.replay()
        return _result

    return replay


def clock(run: Run) -> float:
    """Seconds of one run on the device, by events around it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
