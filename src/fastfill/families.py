"""The only file that knows model families: where the layers are, and where gate, up, down and the activation live."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastfill import eight_bits, packed
from fastfill.errors import UserError
from fastfill.ffn import FFN
from fastfill.kernels import Scales
from fastfill.packed import PackedLinear

ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """Attribute names, from the base model down to one FFN.

    gate_up: one Linear that holds gate's rows and, behind them, up's, in place of `gate` and `up`. scale, cap: names in the
    config of what the logits are divided by, and of the value c that they are bent to, c tanh(logits / c). vllm: vLLM's
    architecture; None where it has none of its own.
    """

    layers: str = "layers"
    ffn: str = "mlp"
    attention: str = "self_attn"
    recurrent: str | None = None  # in attention's place in some layers
    gated: bool = False  # attention's q_proj makes a gate as well
    since: tuple[int, int] = (5, 0)  # the first transformers that computes it rightly
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    norm: str = "norm"  # in the names of all that normalises
    activation: str = "hidden_act"  # in the model's config
    scale: str | None = None
    cap: str | None = None
    vllm: str | None = None

    @property
    def fused(self) -> Family:
        """As vLLM holds it: gate and up in one, in every family."""
        return replace(self, gate_up=self.gate_up or "gate_up_proj")

    def layers_of(self, base: Any) -> list[Any]:
        """The decoder layers of a base model of torch's or of vLLM's."""
        return list(getattr(base, self.layers, []))

    def ffns(self, base: Any) -> list[Any]:
        return [getattr(layer, self.ffn) for layer in self.layers_of(base)]

    def attentions(self, base: Any) -> list[Any]:
        """Of the layers that have one."""
        return [getattr(layer, self.attention) for layer in self.layers_of(base) if hasattr(layer, self.attention)]

    def mixers(self, base: Any) -> list[Any]:
        """What mixes tokens, one for each layer: its attention, or what is in its place."""
        other = self.recurrent or self.attention
        return [getattr(layer, self.attention if hasattr(layer, self.attention) else other) for layer in self.layers_of(base)]

    def linear(self, role: str) -> str:
        """The name of the Linear that holds 'gate', 'up' or 'down'."""
        return self.down if role == "down" else self.gate_up or getattr(self, role)

    def linears(self, module: Any) -> list[Any]:
        """The Linears of an FFN, each once."""
        return [getattr(module, name) for name in dict.fromkeys(map(self.linear, ROLES))]

    def share(self, role: str, rows: int) -> slice:
        """Which of the rows of the Linear that holds it are role's."""
        half = rows // 2 if self.gate_up and role != "down" else rows
        return slice(half, rows) if self.gate_up and role == "up" else slice(0, half)

    def part(self, module: Any, role: str, kind: str, data: bool = False) -> torch.Tensor | None:
        """Role's 'weight' or 'bias' in an FFN of torch's or of vLLM's, a view where gate and up are one; None for no bias.
        data: as autograd does not know it."""
        whole: torch.Tensor | None = getattr(getattr(module, self.linear(role)), kind)
        if whole is None:
            return None
        whole = eight_bits.stored(whole)
        whole = whole.data if data else whole
        return whole if role == "down" or self.gate_up is None else whole[self.share(role, len(whole))]

    def read(self, module: Any, activation: str, data: bool = False) -> FFN:
        """The FFN that a module is. Arguments as those of `part`."""
        if isinstance(getattr(module, self.down), PackedLinear):
            return packed.ffn_of(self.linears(module), activation)
        parts: dict[str, Any] = {role: self.part(module, role, "weight", data) for role in ROLES}
        parts |= {f"{role}_bias": self.part(module, role, "bias", data) for role in ROLES}
        if parts["gate"].dtype == torch.int8 and (scales := self.scales(module)):
            parts |= {"scales": scales, "compute": getattr(module, self.down).weight.dtype}
        return FFN(**parts, activation=activation)

    def scales(self, module: Any) -> Scales | None:
        """Of the int8 rows that the weights of an FFN of torch's stand for; None where they stand for none."""
        parts: list[torch.Tensor] = []
        for role in ROLES:
            whole = eight_bits.scale(getattr(module, self.linear(role)))
            if whole is None:
                return None
            parts.append(whole[self.share(role, len(whole))])
        return Scales(*parts)


# model_type -> names. One row is all that a new family of gated FFNs needs.
FAMILIES = {
    # Llama 2/3.x, SmolLM2 and everything else that uses the LLaMA architecture
    "llama": Family(vllm="LlamaForCausalLM"),
    "mistral": Family(vllm="MistralForCausalLM"),
    "qwen2": Family(vllm="Qwen2ForCausalLM"),  # Qwen2, Qwen2.5
    "qwen3": Family(vllm="Qwen3ForCausalLM"),
    "qwen3_5_text": Family(recurrent="linear_attn", gated=True, since=(5, 8)),  # Qwen3.5, dense; 5.6 loses states
    "phi3": Family(gate_up="gate_up_proj", vllm="Phi3ForCausalLM"),  # Phi-3, Phi-3.5 and Phi-4-mini
    "gemma2": Family(activation="hidden_activation", cap="final_logit_softcapping", vllm="Gemma2ForCausalLM"),
    "gemma3_text": Family(activation="hidden_activation", cap="final_logit_softcapping", vllm="Gemma3ForCausalLM"),
    "olmo2": Family(),  # vLLM runs it, as the next two, by way of transformers' modules
    "olmo3": Family(),
    "smollm3": Family(),
    "granite": Family(scale="logits_scaling", vllm="GraniteForCausalLM"),
}
# An activation in a model's config -> its name in `ffn.ACTIVATIONS`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


class ModuleFFN(FFN):
    """The FFN of a decoder layer. Its weights are looked up at every use, so that they are those the model has now.

    module: the instance whose forward is swapped. shape: (F, H).
    """

    layer: nn.Module
    family: Family
    index: int
    module: nn.Module
    shape: tuple[int, int]

    def __init__(self, layer: nn.Module, family: Family, index: int, activation: str = "silu"):
        module = getattr(layer, family.ffn)
        down = _linear(module, family.down, index)
        hidden, neurons = down.shape if isinstance(down, PackedLinear) else down.weight.shape
        found = {"layer": layer, "family": family, "index": index, "module": module, "activation": activation}
        vars(self).update(found, shape=(neurons, hidden))  # the fields are frozen
        self.now()

    @property
    def gate(self) -> torch.Tensor:
        return self.read().gate

    @property
    def up(self) -> torch.Tensor:
        return self.read().up

    @property
    def down(self) -> torch.Tensor:
        return self.read().down

    @property
    def gate_bias(self) -> torch.Tensor | None:
        return self.read().gate_bias

    @property
    def up_bias(self) -> torch.Tensor | None:
        return self.read().up_bias

    @property
    def down_bias(self) -> torch.Tensor | None:
        return self.read().down_bias

    @property
    def scales(self) -> Scales | None:
        return self.read().scales

    @property
    def compute(self) -> torch.dtype | None:
        return self.read().compute

    @property
    def rows(self) -> Scales | None:
        """The scales of the int8 rows that the model came with, whether its weights are in floating point by now or not."""
        return self.family.scales(self.module)

    @property
    def linear_down(self) -> Any:
        """The module that holds down."""
        return getattr(self.module, self.family.down)

    @property
    def packed(self) -> bool:
        """Whether the weights are blocks of a GGUF file."""
        return isinstance(self.linear_down, PackedLinear)

    def halves(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read().halves(x)

    def output(self, h: torch.Tensor) -> torch.Tensor:
        return self.read().output(h)

    def down_norm(self) -> torch.Tensor:
        return self.read().down_norm()

    def read(self) -> FFN:
        """The weights as they are now, unchecked, as autograd does not know them."""
        return self.family.read(self.module, self.activation, data=True)

    def now(self) -> FFN:
        """The weights as they are now, with what autograd knows of them.

        Raises UserError if the sparse kernel cannot read them: the FFN or one of its Linears was replaced (an adapter, a
        quantiser), a weight has another shape, type or device than the others, or is not there (device 'meta').
        """
        family, index = self.family, self.index
        if getattr(self.layer, family.ffn) is not self.module:
            raise UserError(f"Layer {index}: {family.ffn} was replaced while attached; detach, then attach again.")
        neurons, hidden = self.shape
        rows = (2 * neurons if family.gate_up else neurons, hidden)
        shapes = {family.linear(role): (hidden, neurons) if role == "down" else rows for role in ROLES}
        if self.packed:
            self._check_packed(shapes)
            return self.read()
        first: torch.Tensor | None = None
        leading = next(iter(shapes))
        for name, shape in shapes.items():
            linear = _linear(self.module, name, index)
            weight = linear.weight
            if weight.shape != shape:
                raise UserError(f"Layer {index}: {name} has the shape {tuple(weight.shape)}, not {shape}.")
            if name != family.down and eight_bits.stored(weight).stride(1) != 1:
                raise UserError(f"Layer {index}: the rows of {name} are not contiguous; call .contiguous() on its weight.")
            first = weight if first is None else first
            for tensor in (weight, linear.bias):
                if tensor is not None and (tensor.dtype != first.dtype or tensor.device != first.device):
                    raise UserError(
                        f"Layer {index}: {name} is {tensor.dtype} on {tensor.device}, but {leading} is {first.dtype} on "
                        f"{first.device}; give an FFN's weights one type and one device."
                    )
        eight = {name: eight_bits.scale(getattr(self.module, name)) is not None for name in shapes}
        if len(set(eight.values())) > 1:
            named = ", ".join(name for name in eight if eight[name])
            raise UserError(f"Layer {index}: {named} alone is in eight bits; quantise all of an FFN's Linears, or none.")
        with torch.inference_mode(False), torch.enable_grad():  # a part learns as the whole does, whoever asks for it
            return family.read(self.module, self.activation)

    def _check_packed(self, shapes: dict[str, tuple[int, int]]) -> None:
        for name, shape in shapes.items():
            linear = getattr(self.module, name)
            if not isinstance(linear, PackedLinear) or linear.shape != shape or linear.blocks.device.type != "cpu":
                raise UserError(
                    f"Layer {self.index}: {name} is not a packed Linear of {shape} on the CPU, as the rest of its FFN is; load "
                    "the model again."
                )


class Head:
    """Last hidden states -> logits, as the model's own forward makes them. scale, cap: see `Family`."""

    def __init__(self, model: Any):
        family = of(model.config)
        self._model = model
        self.scale: float | None = getattr(model.config, family.scale, None) if family.scale else None
        self.cap: float | None = getattr(model.config, family.cap, None) if family.cap else None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., V)."""
        logits = self._model.get_output_embeddings()(hidden)
        if self.scale is not None:
            logits = logits / self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class Anatomy:
    """What the rest of the package needs of a model. hidden: H, intermediate: F. head: of the causal LM."""

    base: nn.Module
    layers: list[nn.Module]
    attentions: list[nn.Module]  # of the layers that have one
    mixers: list[nn.Module]  # what mixes tokens in each layer
    norms: list[nn.Module]
    ffns: list[ModuleFFN]
    hidden: int
    intermediate: int
    model_type: str
    head: Head

    @property
    def eight_bits(self) -> bool:
        """Whether FFNs came in int8."""
        return any(ffn.rows is not None for ffn in self.ffns)

    @property
    def packed(self) -> bool:
        """Whether FFNs are blocks of a GGUF file."""
        return any(ffn.packed for ffn in self.ffns)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapted modules outside the FFNs, each once: ['q_proj', 'v_proj']."""
        inside = {id(part) for ffn in self.ffns for part in ffn.module.modules()}
        named = ((name, part) for name, part in self.base.named_modules() if id(part) not in inside)
        return sorted({name.rpartition(".")[2] for name, part in named if _is_adapter(part)})


def runs(family: Family) -> bool:
    """Whether this transformers computes it rightly."""
    major, minor, *_ = importlib.metadata.version("transformers").split(".")
    return (int(major), int(minor)) >= family.since


def supported() -> str:
    return ", ".join(FAMILIES)


def of(config: Any) -> Family:
    """The row of a model's Hugging Face config; that of LLaMA for a type that has none."""
    return FAMILIES.get(getattr(config, "model_type", ""), Family())


def activation_of(config: Any) -> str:
    """The FFN's activation, as `ffn.ACTIVATIONS` names it. Raises UserError for one that is not supported."""
    found = getattr(config, of(config).activation, None)
    if found not in ACTIVATIONS:
        raise UserError(f"The FFN activation {found!r} is not supported; supported are: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[found]


def roles() -> dict[str, tuple[str, ...]]:
    """The names of all families' Linears in an FFN -> what lies in one, in this order: gate, up, down."""
    found: dict[str, tuple[str, ...]] = {}
    for family in FAMILIES.values():
        for name in map(family.linear, ROLES):
            found[name] = tuple(role for role in ROLES if family.linear(role) == name)
    return found


def base_of(model: Any) -> Any:
    """The module that runs the decoder layers: inside a causal LM, which may be inside peft's wrappers."""
    while True:
        inner = getattr(model, "base_model", None)
        if inner is None:
            inner = getattr(model, "model", None)
        if inner is None or inner is model:
            return model
        model = inner


def causal_of(model: Any) -> Any:
    """The causal LM around the base model, inside whatever wraps it; the base model itself where there is none."""
    base = base_of(model)
    return next((part for part in model.modules() if base in part.children()), base)


def head_of(model: Any) -> nn.Linear | None:
    """The plain Linear that makes a causal LM's logits; None where it has none, or another."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    return head if type(head) is nn.Linear else None


def dissect(model: Any) -> Anatomy:
    """Find layers and FFN weights. A `PeftModel` is looked into: adapters outside the FFNs are the caller's to judge.

    Weights that compressed-tensors holds packed until the first forward are floating point afterwards (`eight_bits`).

    Raises UserError if the model is of no known family, quantised in another way than `eight_bits.READ`, or has an FFN that
    the sparse kernel cannot read.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if config is None or family is None:
        raise UserError(f"Models of type {model_type!r} are not supported; supported are: {supported()}.")
    if not runs(family):
        first = ".".join(map(str, family.since))
        raise UserError(f"Models of type {model_type!r} need transformers {first}; earlier ones compute them wrongly.")
    base = base_of(model)
    layers = family.layers_of(base)
    if not layers:
        raise UserError(f"This {model_type} model has no decoder layers at {family.layers!r}; pass the loaded causal LM.")
    activation = activation_of(config)
    eight_bits.decompress(model, (part for ffn in family.ffns(base) for part in ffn.children()))
    ffns = [ModuleFFN(layer, family, index, activation) for index, layer in enumerate(layers)]
    shape = ffns[0].shape
    if any(ffn.shape != shape for ffn in ffns):
        raise UserError("The layers' FFNs differ in width; only models with one intermediate size are supported.")
    norms = [module for name, module in base.named_modules() if family.norm in name.rpartition(".")[2]]
    attentions, mixers = family.attentions(base), family.mixers(base)
    return Anatomy(base, layers, attentions, mixers, norms, ffns, shape[1], shape[0], model_type, Head(model))


def _is_adapter(module: nn.Module) -> bool:
    """peft's layers keep the module that they adapt under one of these names."""
    return any(hasattr(module, name) for name in ("base_layer", "original_module"))


def _linear(module: nn.Module, name: str, index: int) -> Any:
    """A plain or packed Linear of layer `index`'s FFN, or UserError."""
    linear: Any = getattr(module, name, None)
    if any(map(_is_adapter, (module, linear))):
        raise UserError(
            f"Layer {index}: {name} carries an adapter ({type(linear).__name__}); merge it first (with peft: "
            "model = model.merge_and_unload()) and make an artifact for the merged model with `fastfill calibrate`."
        )
    if isinstance(linear, PackedLinear):
        return linear
    if found := eight_bits.problem(linear):
        raise UserError(f"Layer {index}: {name} is quantised to {found}; read are {eight_bits.READ}.")
    if type(linear) is not nn.Linear or not (_is_plain(linear.weight) or eight_bits.from_torchao(linear.weight)):
        raise UserError(
            f"Layer {index}: {name} is {_named(linear)}, not a plain floating-point Linear; "
            f"load the model unquantised and without adapters (merge them first); quantised, read are {eight_bits.READ}."
        )
    if linear.weight.device.type == "meta":
        raise UserError("The model's weights are offloaded (device 'meta'); load it whole on one device.")
    return linear


def _is_plain(weight: Any) -> bool:
    """Not a quantiser's or a distributed tensor; floating point of at least two bytes."""
    plain = isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor
    return plain and weight.is_floating_point() and weight.dtype.itemsize >= 2


def _named(linear: Any) -> str:
    """Its class, and that of its weight where it is not torch's."""
    weight = getattr(linear, "weight", None)
    kind = type(weight.data) if isinstance(weight, torch.Tensor) else torch.Tensor
    return type(linear).__name__ + ("" if kind is torch.Tensor else f" of {kind.__name__}")
