"""What of a causal LM's call is read: so the last layer's FFN may leave out the tokens that nobody reads (docs/method.md)."""

from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from fastfill import families
from fastfill.clocks import Look
from fastfill.projections import Projection
from fastfill.sparse_ffn import SparseFFN
from fastfill.swap import StandIn

HIDDEN = "output_hidden_states"


class Readers:
    """Who reads the causal LM's logits and what runs from the last layer's FFN on."""

    def __init__(self, causal: Any, anatomy: families.Anatomy):
        self._causal, self._anatomy = causal, anatomy

    def logits(self, kwargs: dict[str, Any]) -> int | None:
        """Of a call with these arguments: how many rows of logits are read, from the end, where nothing else is; None where all
        may be."""
        read = kwargs.get("logits_to_keep")
        if not isinstance(read, int) or read <= 0 or kwargs.get("labels") is not None or torch.is_grad_enabled():
            return None
        return None if self._watched(kwargs) else read

    def _watched(self, kwargs: dict[str, Any]) -> bool:
        """Whether somebody reads hidden states, or may: through an option, a hook, or a forward of their own."""
        asked, base = kwargs.get(HIDDEN), self._anatomy.base
        if getattr(base.config, HIDDEN, False) if asked is None else asked:
            return True
        parts = (self._causal, base, self._anatomy.norms[-1], *self._anatomy.layers[-1].modules())
        found = [*_global_forward_hooks.values(), *_global_forward_pre_hooks.values()]
        for part in parts:
            found += [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
            found += [forward] if (forward := vars(part).get("forward")) else []
        return not all(map(_reads_nothing, found))


def _reads_nothing(hook: Any) -> bool:
    """Whether a hook or a forward is ours, or transformers': its hooks stay where hidden states were asked for once, and read
    nothing when they are not."""
    return isinstance(hook, (Look, StandIn, SparseFFN, Projection)) or is_transformers(hook)


def is_transformers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("transformers.")
