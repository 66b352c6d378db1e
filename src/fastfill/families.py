"""The only file that knows model families: where the layers are, and where gate, up, down and the activation live."""

from __future__ import annotations

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


class ModuleFFN(FFN):
    """The FFN of a decoder layer. Its weights are looked up at every use, so that they are those the model has now."""

    layer: nn.Module
    family: Family
    index: int
    shape: tuple[int, int]  # (F, H)

    def __init__(self, layer: nn.Module, family: Family, index: int):
        module = getattr(layer, family.ffn)
        neurons, hidden = _weight(module, family.gate, index).shape
        found = {"layer": layer, "family": family, "index": index, "module": module, "shape": (neurons, hidden)}
        vars(self).update(found)  # the fields are frozen
        self.parameters()

    @property
    def gate(self) -> torch.Tensor:
        return getattr(self.module, self.family.gate).weight.data

    @property
    def up(self) -> torch.Tensor:
        return getattr(self.module, self.family.up).weight.data

    @property
    def down(self) -> torch.Tensor:
        return getattr(self.module, self.family.down).weight.data

    def parameters(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up and down as they are now, with what autograd knows of them.

        Raises UserError if the sparse kernel cannot read them: the FFN or one of its Linears was replaced (an adapter, a
        quantiser), a weight has another shape, type or device than the others, or is not there (device 'meta').
        """
        family, index = self.family, self.index
        if getattr(self.layer, family.ffn) is not self.module:
            raise UserError(f"Layer {index}: {family.ffn} was replaced while attached; detach, then attach again.")
        gate, up, down = (_weight(self.module, name, index) for name in (family.gate, family.up, family.down))
        neurons, hidden = self.shape
        for name, weight, shape in (
            (family.gate, gate, (neurons, hidden)),
            (family.up, up, (neurons, hidden)),
            (family.down, down, (hidden, neurons)),
        ):
            if weight.shape != shape:
                raise UserError(f"Layer {index}: {name} has the shape {tuple(weight.shape)}, not {shape}.")
            if name != family.down and weight.stride(1) != 1:
                raise UserError(f"Layer {index}: the rows of {name} are not contiguous; call .contiguous() on its weight.")
            if weight.dtype != gate.dtype or weight.device != gate.device:
                raise UserError(
                    f"Layer {index}: {name} is {weight.dtype} on {weight.device}, but {family.gate} is {gate.dtype} on "
                    f"{gate.device}; give an FFN's weights one type and one device."
                )
        return gate, up, down


@dataclass(frozen=True)
class Anatomy:
    """What the rest of the package needs of a model. hidden: H, intermediate: F."""

    base: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]
    ffns: list[ModuleFFN]
    hidden: int
    intermediate: int
    model_type: str

    @property
    def adapters(self) -> list[str]:
        """Names of the adapted modules outside the FFNs, each once: ['q_proj', 'v_proj']."""
        inside = {id(part) for ffn in self.ffns for part in ffn.module.modules()}
        named = ((name, part) for name, part in self.base.named_modules() if id(part) not in inside)
        return sorted({name.rpartition(".")[2] for name, part in named if _is_adapter(part)})


def supported() -> str:
    return ", ".join(FAMILIES)


def base_of(model: Any) -> Any:
    """The module that runs the decoder layers: inside a causal LM, which may be inside peft's wrappers."""
    while True:
        inner = getattr(model, "base_model", None)
        if inner is None:
            inner = getattr(model, "model", None)
        if inner is None or inner is model:
            return model
        model = inner


def dissect(model: Any) -> Anatomy:
    """Find layers and FFN weights. A `PeftModel` is looked into: adapters outside the FFNs are the caller's to judge.

    Raises UserError if the model is of no known family, quantised, or has an FFN that the sparse kernel cannot read.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if config is None or family is None:
        raise UserError(f"Models of type {model_type!r} are not supported; supported are: {supported()}.")
    base = base_of(model)
    layers = list(getattr(base, family.layers, []))
    if not layers:
        raise UserError(f"This {model_type} model has no decoder layers at {family.layers!r}; pass the loaded causal LM.")
    activation = getattr(config, family.activation, None)
    if activation not in ("silu", "swish"):
        raise UserError(f"The FFN activation {activation!r} is not supported; the sparse FFN computes silu (SwiGLU).")
    ffns = [ModuleFFN(layer, family, index) for index, layer in enumerate(layers)]
    shape = ffns[0].shape
    if any(ffn.shape != shape for ffn in ffns):
        raise UserError("The layers' FFNs differ in width; only models with one intermediate size are supported.")
    attentions = [getattr(layer, family.attention) for layer in layers]
    return Anatomy(base, layers, attentions, ffns, shape[1], shape[0], model_type)


def _is_adapter(module: nn.Module) -> bool:
    """peft's layers keep the module that they adapt under one of these names."""
    return any(hasattr(module, name) for name in ("base_layer", "original_module"))


def _weight(module: nn.Module, name: str, index: int) -> torch.Tensor:
    """The weight of a plain Linear of layer `index`'s FFN, or UserError."""
    linear: Any = getattr(module, name, None)
    if any(map(_is_adapter, (module, linear))):
        raise UserError(
            f"Layer {index}: {name} carries an adapter ({type(linear).__name__}); merge it first (with peft: "
            "model = model.merge_and_unload()) and make an artifact for the merged model with `fastfill calibrate`."
        )
    if type(linear) is not nn.Linear or not _is_plain(linear.weight):
        raise UserError(
            f"Layer {index}: {name} is {type(linear).__name__}, not a plain floating-point Linear; "
            "load the model unquantised and without adapters (merge them first)."
        )
    if linear.bias is not None:
        raise UserError(f"Layer {index}: {name} has a bias, which is not supported.")
    if linear.weight.device.type == "meta":
        raise UserError("The model's weights are offloaded (device 'meta'); load it whole on one device.")
    return linear.weight


def _is_plain(weight: Any) -> bool:
    """Not a quantiser's or a distributed tensor; floating point of at least two bytes."""
    plain = isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor
    return plain and weight.is_floating_point() and weight.dtype.itemsize >= 2
