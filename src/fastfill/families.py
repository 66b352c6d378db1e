"""The only file that knows model families: where the layers are, and where gate, up, down and the activation live."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastfill.errors import UserError


@dataclass(frozen=True)
class Family:
    """Attribute names, from the base model down to one FFN."""

    layers: str = "layers"
    ffn: str = "mlp"
    attention: str = "self_attn"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "hidden_act"  # in the model's config


# model_type -> names. One row is all that a new SwiGLU family needs.
FAMILIES = {
    "llama": Family(),  # Llama 2/3.x, SmolLM2 and everything else that uses the LLaMA architecture
    "mistral": Family(),
    "qwen2": Family(),  # Qwen2, Qwen2.5
    "qwen3": Family(),
}


@dataclass(frozen=True)
class FFN:
    """One feed-forward network: y = (silu(x gate^T) * (x up^T)) down^T.

    gate, up: (F, H). down: (H, F). module: the instance whose forward is swapped.
    """

    module: nn.Module
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Anatomy:
    """What the rest of the package needs of a model. hidden: H, intermediate: F."""

    base: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    ffns: list[FFN]
    hidden: int
    intermediate: int
    model_type: str


def supported() -> str:
    return ", ".join(FAMILIES)


def dissect(model: Any) -> Anatomy:
    """Find layers and FFN weights.

    Raises UserError if the model is of no known family, quantised, or has an FFN that the sparse kernel cannot read.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if config is None or family is None:
        raise UserError(f"Models of type {model_type!r} are not supported; supported are: {supported()}.")
    base = getattr(model, "base_model", model)
    layers = list(getattr(base, family.layers, []))
    if not layers:
        raise UserError(f"This {model_type} model has no decoder layers at {family.layers!r}; pass the loaded causal LM.")
    activation = getattr(config, family.activation, None)
    if activation not in ("silu", "swish"):
        raise UserError(f"The FFN activation {activation!r} is not supported; the sparse FFN computes silu (SwiGLU).")
    ffns = [_ffn(getattr(layer, family.ffn), family, index) for index, layer in enumerate(layers)]
    shape = tuple(ffns[0].gate.shape)
    if any(tuple(ffn.gate.shape) != shape for ffn in ffns):
        raise UserError("The layers' FFNs differ in width; only models with one intermediate size are supported.")
    attentions = [getattr(layer, family.attention) for layer in layers]
    return Anatomy(base, layers, attentions, ffns, shape[1], shape[0], model_type)


def _ffn(module: nn.Module, family: Family, index: int) -> FFN:
    weights: dict[str, torch.Tensor] = {}
    for role in ("gate", "up", "down"):
        name = getattr(family, role)
        linear = getattr(module, name, None)
        if type(linear) is not nn.Linear or type(linear.weight.data) is not torch.Tensor or linear.weight.dtype.itemsize < 2:
            raise UserError(
                f"Layer {index}: {name} is {type(linear).__name__}, not a plain floating-point Linear; "
                "load the model unquantised and without adapters (merge them first)."
            )
        if linear.bias is not None:
            raise UserError(f"Layer {index}: {name} has a bias, which is not supported.")
        if linear.weight.device.type == "meta":
            raise UserError("The model's weights are offloaded (device 'meta'); load it whole on one device.")
        weights[role] = linear.weight.data
    return FFN(module, **weights)


def fingerprint(anatomy: Anatomy) -> str:
    """SHA-256 over the shapes and a sample of every FFN's weights (8 rows each), rounded to bf16.

    Rounding makes it the same whether a checkpoint is loaded in fp32 or bf16; the sample keeps it fast at any size.
    """
    samples = ([sample(weight) for weight in (ffn.gate, ffn.up, ffn.down)] for ffn in anatomy.ffns)
    return fingerprint_of(anatomy.hidden, anatomy.intermediate, len(anatomy.ffns), samples)


def sampled_rows(rows: int) -> range:
    """The rows of a weight that go into the fingerprint."""
    return range(0, rows, max(1, rows // 8))[:8]


def sample(weight: torch.Tensor) -> torch.Tensor:
    return weight[list(sampled_rows(weight.shape[0]))]


def fingerprint_of(hidden: int, intermediate: int, layers: int, samples: Iterable[Iterable[torch.Tensor]]) -> str:
    """The fingerprint from `sample`d gate, up and down weights, layer by layer."""
    digest = hashlib.sha256(f"{hidden}x{intermediate}x{layers}".encode())
    for weights in samples:
        for weight in weights:
            digest.update(weight.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
