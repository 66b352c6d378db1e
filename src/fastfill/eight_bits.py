"""Linears that others have put in eight bits, read as they are: compressed-tensors' W8A8 and torchao's `Int8Tensor`.

compressed-tensors makes a model's weights floating point before its first forward (`dissect` has it done) and leaves the scales
beside them. The int8 values come back exactly: |q| <= 127 times a scale is off by at most 2^-8 of itself once it is rounded to
bf16, which is less than half a scale; -128 times a scale is exact but for its rounding in fp16 below 2^-14, again less than
half.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastfill import quantised
from fastfill.errors import UserError

READ = f"{quantised.READ[:-1]}, torchao's Int8DynamicActivationInt8WeightConfig)"
BESIDE = ("_scale", "_zero_point")  # how the names end of what compressed-tensors keeps beside a weight
BF16 = 2.0**-8  # the relative error of rounding to it, at most


def problem(linear: Any) -> str | None:
    """What a Linear's quantisation is, in words, where it cannot be read; None for one that can, or that has none."""
    scheme = getattr(linear, "quantization_scheme", None)
    if scheme is not None:
        return _odd_scheme(linear, scheme)
    weight = getattr(linear, "weight", None)
    return _odd_tensor(weight) if from_torchao(weight) else None


def scale(linear: Any) -> Tensor | None:
    """Of the int8 rows that a Linear's weight stands for: (O,) fp32; None where it is not quantised."""
    scheme = getattr(linear, "quantization_scheme", None)
    torchao = from_torchao(getattr(linear, "weight", None))
    own = torchao or (scheme is not None and scheme.input_activations is not None)
    if not own or problem(linear):
        return None
    values: Tensor = linear.weight.scale if torchao else linear.weight_scale
    return values.detach().float().reshape(-1)


def rows(linear: Any) -> tuple[Tensor, Tensor] | None:
    """int8 (O, I), torchao's own tensor, and `scale`; None where the Linear is not quantised. Raises UserError as `on_grid`."""
    by = scale(linear)
    if by is None:
        return None
    return (stored(linear.weight) if from_torchao(linear.weight) else on_grid(linear.weight, by)), by


def stored(weight: Any) -> Tensor:
    """The tensor that is in memory: torchao's int8 (O, I), or the weight itself."""
    found: Tensor = weight.qdata if from_torchao(weight) else weight
    return found


def wide(weight: Any) -> Tensor:
    """The weight in floating point."""
    found: Tensor = weight.dequantize() if from_torchao(weight) else weight
    return found


@torch.no_grad()
def on_grid(weight: Tensor, by: Tensor) -> Tensor:
    """int8 (O, I), of which the floating-point weight (O, I) is the product with the rows' scales (O,), rounded to its type.

    Raises UserError if it is not such a product.
    """
    values, step = weight.float(), by[:, None]
    q = (values / step).nan_to_num_(0, 0, 0).round_().clamp_(-128, 127)
    if not bool(((q * step).sub_(values).abs_() <= values.abs() * BF16 * 1.01).all()):
        raise UserError(
            "The model's weights are no longer the int8 values that it was loaded with: they were trained, merged or cast; "
            'load the checkpoint in the type that you need, or with dequantize=True, and round it by weights="int8".'
        )
    return q.to(torch.int8)


def decompress(model: Any, linears: Iterable[Any]) -> None:
    """Let compressed-tensors do now what it would before the model's first forward. linears: those that are to be read; where
    one cannot be, nothing is done."""
    if hasattr(model, "ct_decompress_hook") and not any(map(problem, linears)):
        model.hf_quantizer.compressor.decompress_model(model)


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """While the block runs, compressed-tensors rounds no activations: the model is the floating-point one of its weights.
    Its rounding has no gradient."""
    found = [vars(module) for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    before = [parts.get("quantization_enabled", True) for parts in found]
    try:
        for parts in found:
            parts["quantization_enabled"] = False
        yield
    finally:
        for parts, enabled in zip(found, before, strict=True):
            parts["quantization_enabled"] = enabled


def from_torchao(weight: Any) -> bool:
    """Known by its name: nothing of torchao is imported."""
    return type(weight).__name__ == "Int8Tensor" and hasattr(weight, "qdata")


def _odd_tensor(weight: Any) -> str | None:
    """torchao's."""
    activations = weight.act_quant_kwargs
    if activations is None:
        return "int8 weights alone (torchao, activations in floating point)"
    if weight.act_quant_scale is not None or weight.act_pre_scale is not None:
        return "int8 with activation scales that were set before (torchao)"
    if type(activations.granularity).__name__ != "PerRow" or weight.scale.numel() != weight.shape[0]:
        return "int8 with scales over other than rows and tokens (torchao)"
    even = activations.mapping_type.name == "SYMMETRIC" and (weight.zero_point is None or not bool(weight.zero_point.any()))
    if not even:
        return "int8 with zero points (torchao, asymmetric)"
    return None


def _odd_scheme(linear: Any, scheme: Any) -> str | None:
    """compressed-tensors'."""
    status = getattr(linear, "quantization_status", None)
    status = getattr(status, "value", status)
    if scheme.input_activations is None and status == "decompressed":
        return None  # it computes as any other Linear
    odd = _odd_parts((scheme.weights, scheme.input_activations, scheme.output_activations))
    if odd:
        return odd
    return None if status in ("compressed", "decompressed") else f"int8 that it is not rounded to yet (status {status!r})"


_judged: dict[tuple[int, ...], tuple[tuple[Any, ...], str | None]] = {}  # with the parts themselves, so that ids stay theirs


def _odd_parts(parts: tuple[Any, ...]) -> str | None:
    """Of a scheme's weights, inputs and outputs. Dumped once: every call of an FFN asks."""
    key = tuple(map(id, parts))
    found = _judged.get(key)
    if found is None:
        weights, inputs, outputs = (quantised.words(part and part.model_dump(mode="json")) for part in parts)
        odd = (weights, inputs) != (quantised.WEIGHTS, quantised.ACTIVATIONS) or parts[2]
        more = f", outputs {outputs}" if parts[2] else ""
        if len(_judged) > 1000:  # models come and go
            _judged.clear()
        found = _judged[key] = parts, f"weights {weights}, activations {inputs}{more} (compressed-tensors)" if odd else None
    return found[1]
