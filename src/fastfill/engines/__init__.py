"""What runs the model: `transformers` or `vllm`. One module per engine.

An engine that `fastfill bench --engine NAME` can measure is a module `fastfill.engines.NAME` with a function

    bench(model, artifact, *, dtype, device, kernel, **fields)

that loads MODEL (as the user names it), puts the artifact on it (fields: of `PrefillConfig`, None keeps the artifact's) and is
a context manager giving a `Runner`. `evaluate.speed` measures runners and knows nothing else of an engine.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastfill.config import PrefillConfig
from fastfill.errors import UserError

if TYPE_CHECKING:
    import torch

NAMES = ("transformers", "vllm")
PARTS = ("attention", "ffn", "predictor", "compensator", "rest")


@dataclass(frozen=True)
class Prefill:
    """One prompt read. seconds: its TTFT. sparse_tokens: how many of its tokens were read sparsely."""

    seconds: float
    sparse_tokens: int


class Runner(Protocol):
    """A loaded model with an artifact on it, as one engine runs it. ids are (1, T), on the CPU.

    name, dtype, kernel: for the record. shape: the model's Hugging Face config. config: the settings in force. kept:
    neurons kept per layer. overhead: multiply-adds of predictor and compensator per token of a layer.
    model_mb, attached_mb: memory that is held between prefills, the weights and what the artifact adds (10^6 bytes).
    """

    name: str
    dtype: str
    kernel: str
    shape: Any
    config: PrefillConfig
    kept: list[int]
    overhead: tuple[int, int]
    model_mb: float
    attached_mb: float

    def prefill(self, ids: torch.Tensor, sparse: bool) -> Prefill:
        """Read ids and produce one token, with no clock inside."""

    def split(self, ids: torch.Tensor, sparse: bool) -> dict[str, float]:
        """Seconds of another prefill by `PARTS`; their sum is its TTFT."""

    def peak_mb(self, ids: torch.Tensor, sparse: bool) -> float | None:
        """MB by which another prefill raises the memory held, at the highest; None where that cannot be told."""


def bench_of(name: str) -> Callable[..., AbstractContextManager[Runner]]:
    """The function `bench` of an engine. Raises UserError if that engine has none."""
    if name in NAMES and importlib.util.find_spec(f"{__name__}.{name}"):
        bench = getattr(importlib.import_module(f"{__name__}.{name}"), "bench", None)
        if bench is not None:
            return bench
    raise UserError(f"There is no sparse prefill for the engine {name!r} yet; use --engine transformers.")
