"""Run a model over text layer by layer, so that only one layer's inputs are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastfill.families import Anatomy


@torch.no_grad()
def stream_ffn_inputs(model: Any, anatomy: Anatomy, tokens: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (layer, X) for each layer in turn; X: (S, T, H) is what its FFN reads, dense below. tokens: (S, T).

    Memory: two copies of S * T * H values, in the model's dtype.
    """
    first, keywords = _layer_calls(anatomy, tokens[:1].to(anatomy.ffns[0].gate.device))
    embed = model.get_input_embeddings()
    hidden = torch.cat([embed(row[None].to(first.device)) for row in tokens])
    # Some families scale or norm the embeddings; then the first layer's input is taken as it came.
    if not torch.equal(hidden[:1], first):
        raise RuntimeError("this model changes its embeddings before the first layer; capture does not know how")
    for index, layer in enumerate(anatomy.layers):
        inputs = torch.empty_like(hidden)
        seen: list[torch.Tensor] = []
        hook = anatomy.ffns[index].module.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        try:
            for row in range(hidden.shape[0]):
                out = layer(hidden[row : row + 1], **keywords[index])
                hidden[row] = (out[0] if isinstance(out, tuple) else out)[0]
                inputs[row] = seen.pop()[0]
        finally:
            hook.remove()
        yield index, inputs


def _layer_calls(anatomy: Anatomy, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """One dense pass that notes how the model calls each layer (masks and rotary tables differ between layers in some
    families): the first layer's input and every layer's keyword arguments."""
    inputs: list[torch.Tensor] = []
    keywords: list[dict[str, Any]] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])
        keywords.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in anatomy.layers]
    try:
        anatomy.base(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs[0], keywords
