"""Put another forward on module instances for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def swapped(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Run each module with the forward beside it while the block runs; restored in any case, the last one first."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in pairs:
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in reversed(before):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
