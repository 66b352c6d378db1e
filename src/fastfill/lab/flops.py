"""Floating-point operations of a prefill, from the model's config and how each token was computed."""

from __future__ import annotations

from typing import Any

from fastfill import families
from fastfill.cost import Cost
from fastfill.upper import first_upper

RECURRENT = "linear_attention"  # in `layer_types`


def prefill(
    config: Any, tokens: int, sparse_tokens: int = 0, cost: Cost | None = None, skipped_above: int = 0, reread_tokens: int = 0
) -> dict[str, int]:
    """FLOPs of one prompt of T = `tokens`, by part, two for each multiply-add.

    config: the model's Hugging Face config. sparse_tokens: those that ran sparsely; head, tail and the rest of the prompt
    count as dense. cost: of these (`Engine.cost`). skipped_above: sparse tokens that the upper layers do not read.
    reread_tokens: tokens that are read again, densely; each counts as one that sees the whole prompt.

    projections: q, k, v and o, and what a recurrent layer has instead. attention: scores and values, causal: only the
    T (T + 1) / 2 pairs of a query and a key that it sees (fewer in a sliding window); a kernel that computes the masked half
    too does up to twice that. Of a recurrent layer its convolution, and its state read and written token by token. predictor:
    for sparse tokens. compensator: for all tokens of a prompt that has sparse ones, as the forward does it. head: logits of
    the last token. Norms, rotary embedding, softmax, activations and the choice of the K best are not counted.
    """
    hidden, intermediate, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    left_out = [skipped_above if index >= first_upper(layers) else 0 for index in range(layers)]
    read = [tokens - left for left in left_out]
    attended = [(own, window) for own, (kind, window) in zip(read, layers_of(config), strict=True) if kind != RECURRENT]
    recurrent = layers - len(attended)
    projected, mixed = recurrence(config) if recurrent else (0, 0)
    gates = queries if families.of(config).gated else 0
    # The layers that have sparse tokens at all: index, neurons that each of these skips.
    thin = [(index, intermediate - k) for index, k in enumerate(cost.kept) if k < intermediate] if cost else []
    helped = [index for index, skips in thin if skips < intermediate]  # where none is kept nothing is predicted or corrected
    predictor, compensator = (cost.predictor, cost.compensator) if cost else (0, 0)
    sparse = [sparse_tokens - left for left in left_out]
    skipped = sum(sparse[index] * neurons for index, neurons in thin)
    attention = 2 * hidden * (2 * queries + 2 * keys + gates)
    return {
        "projections": sum(own + reread_tokens for own, _ in attended) * attention + recurrent * tokens * projected,
        "attention": 4 * queries * sum(pairs(*each) + reread_tokens * tokens for each in attended) + recurrent * tokens * mixed,
        "ffn": 6 * hidden * ((sum(read) + layers * reread_tokens) * intermediate - skipped),
        "predictor": 2 * sum(sparse[index] for index in helped) * predictor,
        "compensator": 2 * sum(read[index] for index in helped) * compensator if sparse_tokens else 0,
        "head": 2 * hidden * config.vocab_size,
    }


def pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key at or before it, at most `window` keys each."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full


def layers_of(config: Any) -> list[tuple[str, int | None]]:
    """The kind of each layer, and its sliding window; None where it sees the whole prompt."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [(kind, window if kind == "sliding_attention" else None) for kind in kinds]


def recurrence(config: Any) -> tuple[int, int]:
    """FLOPs of a token in a recurrent layer (gated delta rule): projections; convolution, and the state (keys x values of each
    value head) read by key, written, and read by query."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    projections = config.hidden_size * (2 * keys + 3 * values + 2 * config.linear_num_value_heads)
    return 2 * projections, 2 * (2 * keys + values) * config.linear_conv_kernel_dim + 6 * values * config.linear_key_head_dim


def ffn(parts: dict[str, int]) -> int:
    """What the FFNs cost, predictors and compensators included."""
    return parts["ffn"] + parts["predictor"] + parts["compensator"]
