"""Run a model over text layer by layer, so that only one layer's inputs are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastfill.families import Anatomy
from fastfill.swap import swapped

Calls = list[tuple[torch.Tensor, dict[str, Any]]]
"""How a model calls its layers: the input and the keyword arguments of each."""


@torch.no_grad()
def embed(anatomy: Anatomy, tokens: torch.Tensor) -> tuple[torch.Tensor, Calls]:
    """The first layer's input for tokens (S, T), (S, T, H), and how the model calls its layers for one sequence.

    Taken from the model itself: some families scale their embeddings.
    """
    inputs, calls = [], Calls()
    form = _form(anatomy)
    with swapped((layer, lambda hidden_states, *_args, **_kwargs: form(hidden_states)) for layer in anatomy.layers):
        for row in tokens:
            with layer_calls(anatomy) as calls:
                anatomy.base(input_ids=row[None].to(anatomy.ffns[0].gate.device), use_cache=False)
            inputs.append(calls[0][0])
    return torch.cat(inputs), calls


@torch.no_grad()
def stream_ffns(
    anatomy: Anatomy, hidden: torch.Tensor, calls: Calls, part: slice = slice(None)
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (layer, X, A) for each layer in turn, dense below: X (S, T', H) are its FFN's inputs in each sequence's
    `part` of T' tokens, A (S, T', F) the inputs of its down projection. Both are overwritten for the next layer; `hidden`
    (S, T, H), from `embed`, becomes the last layer's output.

    Memory: S * T * (2 H + F) values, in the model's dtype. Capturing A saves two thirds of an FFN twice a layer.
    """
    inputs = torch.empty_like(hidden[:, part])
    activations = hidden.new_empty(*inputs.shape[:2], anatomy.intermediate)
    for index, layer in enumerate(anatomy.layers):
        ffn = anatomy.ffns[index]
        for row in range(hidden.shape[0]):
            with _inputs(ffn.module) as ffn_input, _inputs(ffn.linear_down) as down_input:
                out = layer(hidden[row : row + 1], **calls[index][1])
            hidden[row] = (out[0] if isinstance(out, tuple) else out)[0]
            inputs[row], activations[row] = ffn_input[0][0, part], down_input[0][0, part]
        yield index, inputs, activations


def known(anatomy: Anatomy, layers: int, out: torch.Tensor) -> AbstractContextManager[None]:
    """While the block runs, the first `layers` layers are not computed: the last of them gives `out` (1, T, H)."""
    given = _form(anatomy)(out) if layers else out
    return swapped((layer, lambda *_args, **_kwargs: given) for layer in anatomy.layers[:layers])


_tuples: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _form(anatomy: Anatomy) -> Callable[[torch.Tensor], Any]:
    """Hidden states as the model's layers give them: themselves, or first in a tuple (Granite in transformers 5.0)."""
    first = anatomy.layers[0]
    if first not in _tuples:
        hook = first.register_forward_hook(lambda _module, _args, out: _tuples.update({first: isinstance(out, tuple)}))
        try:
            anatomy.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=anatomy.ffns[0].gate.device), use_cache=False)
        finally:
            hook.remove()
    return lambda hidden: (hidden,) if _tuples[first] else hidden


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the module is called with while the block runs."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def layer_calls(anatomy: Anatomy) -> Iterator[Calls]:
    """How the model calls each layer while the block runs (masks and rotary tables differ between layers in some families)."""
    calls: Calls = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        calls.append((args[0] if args else kwargs["hidden_states"], rest))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in anatomy.layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
