"""Checkpoints whose weights are quantised: the one scheme that the sparse kernel reads as it is, and names for all others.

Read is what llm-compressor writes as W8A8 with dynamic activations (compressed-tensors, "int-quantized"): `weight` in int8
(O, I), `weight_scale` (O, 1), symmetric; activations are rounded by the engine, per token.
"""

from __future__ import annotations

from typing import Any

from fastfill.errors import UserError, listed, quoted

METHOD, FORMAT = "compressed-tensors", "int-quantized"
READ = "int8 weights with a scale per channel and dynamic int8 activations per token (compressed-tensors W8A8)"
WEIGHTS, ACTIVATIONS = "int8 static per channel", "int8 dynamic per token"


def check(document: Any) -> None:
    """Raise UserError, which names what was found, unless the scheme is the one that is read.

    document: `quantization_config` of the model's config.json.
    """
    if what := _other(document):
        raise UserError(
            f"The model is quantised in a way that the sparse prefill does not read ({what}); take the floating-point model, "
            f"or one with {READ}."
        )


def _other(document: Any) -> str | None:
    """What is not as it should be; None if all is."""
    if not isinstance(document, dict) or document.get("quant_method") != METHOD:
        found = document if isinstance(document, dict) else {}
        bits = found.get("bits") or found.get("w_bit")
        return f"{quoted(found.get('quant_method'))}" + (f", {quoted(bits)} bits" if bits else "")
    for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if document.get(name):
            return f"{METHOD} with a {name}"
    groups = document.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()) or not groups:
        return f"{METHOD} without config_groups"
    for group in groups.values():
        layout = group.get("format") or document.get("format")
        weights, activations = words(group.get("weights")), words(group.get("input_activations"))
        if (weights, activations) != (WEIGHTS, ACTIVATIONS):
            return f"{METHOD}: weights {weights}, activations {activations}"
        if layout != FORMAT:
            return f"{METHOD} in the format {quoted(layout)}"
        if group.get("output_activations"):
            return f"{METHOD} with rounded outputs of {listed(group.get('targets') or ())}"
    return None


def words(arguments: Any) -> str:
    """How values are rounded: 'int4 static per group', 'fp8 asymmetric dynamic per token'."""
    if not isinstance(arguments, dict):
        return "as they are"
    strategy = arguments.get("strategy") or ("group" if arguments.get("group_size") else "tensor")
    return " ".join(
        (
            f"{'fp' if arguments.get('type') == 'float' else 'int'}{arguments.get('num_bits', 8)}",
            *(() if arguments.get("symmetric", True) is True else ("asymmetric",)),
            "dynamic" if arguments.get("dynamic") is True else "static",
            f"per {strategy}",
        )
    )
