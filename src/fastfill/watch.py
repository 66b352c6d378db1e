"""The attention of a transformers model, watched: what a prompt's question looks at (`fastfill.upper`)."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastfill.errors import UserError, quoted
from fastfill.upper import current_upper

IMPLEMENTATION = "sdpa"  # the name of the attention whose queries and keys are read


class _Name(str):
    """The name of the attention that is watched; copies and pickles as the one that it stands in for."""

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return IMPLEMENTATION

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (IMPLEMENTATION,)


def watched(config: Any) -> str:
    """A name of attention for a transformers config, which computes as before and tells the prompt's `Upper`.

    Raises UserError if the model computes its attention in a way that cannot be watched.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = getattr(config, "_attn_implementation", None)
    if own != IMPLEMENTATION:
        raise UserError(
            f"upper_share reads the attention of {IMPLEMENTATION}, and this model runs {quoted(own)}; load it with "
            f'attn_implementation="{IMPLEMENTATION}", or leave upper_share at 1.'
        )
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        upper = current_upper.get()
        if upper is not None:
            upper.watch(module.layer_idx, query, key, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return attend(module, query, key, value, attention_mask, **kwargs)

    name = _Name(f"fastfill_{IMPLEMENTATION}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION])
    return name
