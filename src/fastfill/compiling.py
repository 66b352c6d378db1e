"""What `torch.compile` sees of an attached model: a decode step is the model's own code, all else runs uncompiled.

A plan depends on the values of masks and positions, so that a prompt cannot be traced; nothing is planned for one token a
sequence, and `generate` compiles just these steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def ready() -> None:
    """Before anything of ours is traced. Not at import: it loads dynamo, which takes seconds; transformers' models do too."""
    global _eagerly
    why = {"reason": "fastfill plans a prompt by values, which cannot be traced; compile without fullgraph=True"}
    _eagerly = torch.compiler.disable(_run, **(why if "reason" in inspect.signature(torch.compiler.disable).parameters else {}))


def traced(run: Callable[..., Any], plain: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `run` that dynamo comes upon. plain: what can be traced in its place, in a decode step; None elsewhere."""
    return _eagerly(run, args, kwargs) if plain is None else plain(*args, **kwargs)


def traced_states(run: Any, x: torch.Tensor) -> Any:
    """As `traced`, of what stands in for an FFN or a Linear. x: (..., T, H)."""
    plain = x.shape[-2] == 1 and not run.dense_int8
    return traced(run, run.dense if plain else None, (x,), {})


def one_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many sequences a module is called with, (batch, 1, ...), if each brings one token; else 0."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states"))
    first = next((value for value in (*args[:1], *named) if value is not None), None)
    return first.shape[0] if isinstance(first, torch.Tensor) and first.ndim >= 2 and first.shape[1] == 1 else 0


def _run(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return run(*args, **kwargs)


_eagerly: Callable[..., Any] = _run
