"""What runs a model with an artifact on it: `transformers` or `vllm`. One module per engine, one protocol: `Engine`.

An engine NAME is a module `fastfill.engines.NAME` with a context manager

    load(model, artifact, *, dtype, device, packed, kernel, **fields) -> Engine

that loads MODEL (as the user names it), puts the artifact on it (fields: of `PrefillConfig`; None keeps the artifact's) and
takes it off again. What measures and evaluates (`fastfill.lab`) knows nothing else of an engine; what looks inside the model
asks for it with `transformers.inside`.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastfill.config import PrefillConfig
from fastfill.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastfill.artifact import Artifact
    from fastfill.attachment import Stats
    from fastfill.cost import Cost

NAMES = ("transformers", "vllm")


@dataclass(frozen=True)
class Prefill:
    """One prompt's prefill. seconds: its TTFT. sparse_tokens: how many of its tokens were computed sparsely. skipped_above: how
    many the upper layers did not read. unread_tokens: how many the last layer's FFN left out. reread_tokens: how many were read
    again."""

    seconds: float
    sparse_tokens: int
    skipped_above: int = 0
    unread_tokens: int = 0
    reread_tokens: int = 0


class Engine(Protocol):
    """A loaded model with an artifact on it. ids are (1, T), on the CPU.

    engine: which one, of `NAMES`. artifact: what is on the model. name: of the model. shape: its Hugging Face config. dtype:
    "bfloat16", ... device: "cpu", "cuda:0", ...
    config: the settings in force. cost: multiply-adds and neurons kept. choices: what results record beside config: kernel,
    kernel_reason, expected_gain, predictor, compensator, packed, attention_by. model_mb, attached_mb: memory held between
    prefills, the weights and what the artifact adds (10^6 bytes). local: whether that memory is this process's.
    """

    @property
    def engine(self) -> str: ...
    @property
    def artifact(self) -> Artifact: ...
    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def config(self) -> PrefillConfig: ...
    @property
    def cost(self) -> Cost: ...
    @property
    def choices(self) -> dict[str, Any]: ...
    @property
    def stats(self) -> Stats: ...
    @property
    def model_mb(self) -> float: ...
    @property
    def attached_mb(self) -> float: ...
    @property
    def local(self) -> bool: ...

    def prefill(self, ids: torch.Tensor) -> Prefill:
        """Prefill ids and produce one token; only the whole is timed."""

    def generate(self, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Greedy continuation of ids -> new ids (n,)."""

    def dense(self) -> AbstractContextManager[None]:
        """Inside, all is dense, by the engine's own FFN."""

    def all_neurons(self) -> AbstractContextManager[None]:
        """Inside, all is dense, by the sparse kernel with all neurons kept: what it gains without skipping any."""

    def clocks(self) -> AbstractContextManager[dict[str, float]]:
        """Clock the parts of what runs inside: seconds by `clocks.PARTS`, filled in at the end."""


def load(engine: str, model: Any, artifact: Any, **settings: Any) -> AbstractContextManager[Any]:
    """An `Engine` by its name. Raises UserError if there is none of that name."""
    if engine not in NAMES:
        raise UserError(f"There is no engine {engine!r}; use one of {', '.join(NAMES)}.")
    return importlib.import_module(f"{__name__}.{engine}").load(model, artifact, **settings)
