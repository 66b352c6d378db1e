"""How many tokens a model holds, and how much text that is at most."""

from __future__ import annotations

from typing import Any

from fastfill.errors import UserError

# A tokenizer takes 150 bytes of memory for each byte of text, so text that is too long is told before. English has 4 to 5
# characters a token, code with deep indents up to 10.
CHARACTERS_PER_TOKEN = 64
UNLIMITED = 1 << 20  # tokens, of a model that names no limit


def positions(config: Any) -> int | None:
    """Tokens that a model holds, from its Hugging Face config; None if it does not say.

    `max_position_embeddings`, times the factor of a rope scaling that stretches it (linear, dynamic: as vLLM derives it), or
    YaRN's `original_max_position_embeddings` times its factor, whether or not the first number has it already (Qwen's pages
    add YaRN and leave that number as it was). Llama 3's and LongRoPE's scaling is always in it.
    """
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(most, int) or not isinstance(rope, dict):
        return most if isinstance(most, int) else None
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind not in ("linear", "dynamic", "yarn") or not isinstance(factor, (int, float)) or not 1 <= factor < 1e6:
        return most
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(most, int((original if isinstance(original, int) else most) * factor))


def check_characters(config: Any, text: str, what: str = "The prompt") -> None:
    """Raises UserError, before tokenizing, for text with certainly more tokens than the model holds."""
    most = positions(config) or UNLIMITED
    if len(text) > most * CHARACTERS_PER_TOKEN:
        raise UserError(
            f"{what} has {len(text):,} characters, more than the {most:,} tokens that the model holds can be; shorten it."
        )
