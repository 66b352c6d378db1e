"""Functions that stand in for others on single instances, and their way back. Nothing is patched on classes."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastfill import compiling

ABSENT = object()


class Swaps:
    """Attributes that were put on instances, to be taken off again."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        self._made.append((owner, name, value, vars(owner).get(name, ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put back what was there. What somebody else has put on top stays: it may still call what it found, which has to
        pass calls through from now on. Can be called again after an interruption."""
        while self._made:
            owner, name, value, before = self._made[-1]
            if vars(owner).get(name) is value:
                if before is ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
            self._made.pop()


@contextmanager
def swapped(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Run each module with the forward beside it while the block runs; restored in any case, the last one first."""
    swaps = Swaps()
    try:
        for module, forward in pairs:
            swaps.put(module, "forward", forward)
        yield
    finally:
        swaps.undo()


class StandIn:
    """Calls `run(original, args, kwargs)` in place of `original`, and has its name and signature. decodes: in a compiled decode
    step `original` does, too."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> StandIn:
        # A code object of its own: of one that all share dynamo would compile eight, and run the ninth attachment uncompiled.
        call = types.FunctionType(cls.__call__.__code__.replace(), globals(), "__call__")
        return object.__new__(type(cls.__name__, (cls,), {"__call__": call}))

    def __init__(
        self,
        original: Callable[..., Any],
        run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
        decodes: bool = False,
    ):
        self._original, self._run, self._decodes = original, run, decodes
        if hasattr(original, "__name__"):
            functools.update_wrapper(self, original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            plain = self._decodes and compiling.one_token(args, kwargs)
            return compiling.traced(self, self._original if plain else None, args, kwargs)
        return self._run(self._original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model gets the original, bound to the copy."""
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """So does a pickled model, and loading it needs nothing of ours."""
        return copy.copy, (self._original,)
