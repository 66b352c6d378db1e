"""GGUF metadata -> the configuration of `transformers`. A key that changes results is converted, or refused by its name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfill.errors import UserError, quoted
from fastfill.gguf_tokenizer import special_ids

if TYPE_CHECKING:
    from fastfill.gguf import Model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")  # llama: also Mistral and SmolLM2; named alike by `transformers`

# Keys that are converted below. All that follow "ARCHITECTURE." and are in neither list are refused, unless they are neutral.
_CONVERTED = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_WITHOUT_EFFECT = {"rope.scaling.finetuned", "tensor_data_layout"}

# Llama 3.1 and later: constants of the formula that its rope_freqs tensor was made with (Llama 3.1's config.json)
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Metadata:
    """The metadata of one architecture, with types and ranges checked."""

    def __init__(self, metadata: dict[str, Any], name: str):
        self.name, self.all = name, metadata
        if metadata.get("general.type", "model") != "model":
            raise UserError(f"{name} is of type {quoted(metadata['general.type'])}, not a model.")
        self.architecture = metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise UserError(
                f"{name} has architecture {quoted(self.architecture)}; GGUF files of {', '.join(ARCHITECTURES)} can be read."
            )
        prefix = f"{self.architecture}."
        self.values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}

    def refuse(self, key: str, why: str) -> UserError:
        value = quoted(self.values[key]) if key in self.values else "nothing"
        return UserError(f"{self.name} has {quoted(f'{self.architecture}.{key}')[1:-1]} = {value}, {why}.")

    def _single(self, key: str) -> Any:
        """A value; one per layer counts if all are the same."""
        value = self.values[key]
        if isinstance(value, (list, np.ndarray)):
            if len(value) == 0 or any(each != value[0] for each in value):
                raise self.refuse(key, "a list where one number for all layers is needed")
            value = value[0].item() if isinstance(value, np.ndarray) else value[0]
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._single(key) if key in self.values else default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
            raise self.refuse(key, "which has to be a whole number from 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._single(key) if key in self.values else default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.refuse(key, "which has to be a number above 0")
        return float(value)


def config_of(model: Model, name: str) -> tuple[Any, Any]:
    """Model and generation configuration of a GGUF model. name: of the file, for messages.

    Raises UserError, naming the key, for metadata that cannot be converted without a change of results.
    """
    import transformers

    meta = _Metadata(model.metadata, name)
    hidden, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    head_size = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_size) != head_size:
            raise meta.refuse(key, f"and heads of {head_size} channels, which transformers cannot run")
    context = meta.integer("context_length")
    _refuse_the_rest(meta, head_size, context)
    if "token_embd.weight" not in model.tensors:
        raise UserError(f"{name} is incomplete: it has no tensor 'token_embd.weight'.")
    vocabulary = model.tensors["token_embd.weight"].shape[0]
    if meta.integer("vocab_size", vocabulary) != vocabulary:
        raise meta.refuse("vocab_size", f"and embeddings for {vocabulary} tokens")
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": context,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "rope_parameters": _rope(meta, model, head_size, context),
    }
    if heads % values["num_key_value_heads"]:
        raise meta.refuse("attention.head_count_kv", f"which does not divide the {heads} heads")
    if meta.architecture in ("llama", "qwen3", "smollm3"):
        values["attention_bias"] = any(".attn_" in tensor and tensor.endswith(".bias") for tensor in model.tensors)
    if meta.architecture in ("llama", "smollm3"):
        values["mlp_bias"] = any(".ffn_" in tensor and tensor.endswith(".bias") for tensor in model.tensors)
    if meta.architecture == "smollm3":
        values["no_rope_layer_interval"] = 4  # llama.cpp's constant
    special = _ends(special_ids(model.metadata, name))
    config = transformers.AutoConfig.for_model(str(meta.architecture), **values, **special)
    return config, transformers.GenerationConfig(**special)


def _refuse_the_rest(meta: _Metadata, head_size: int, context: int) -> None:
    """Raises UserError for the first key that is neither converted nor known to change nothing."""
    neutral: dict[str, tuple[Any, ...]] = {
        "attention.scale": (0, head_size**-0.5),
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "logit_scale": (0, 1),
        "embedding_scale": (0, 1),
        "residual_scale": (0, 1),
        "use_parallel_residual": (False,),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "pooling_type": (0,),
        "rope.scaling.yarn_ext_factor": (1,),
        "rope.scaling.yarn_log_multiplier": (0,),
    }
    for key, value in meta.values.items():
        if key in _CONVERTED or key in _WITHOUT_EFFECT:
            continue
        if key == "attention.sliding_window" and isinstance(value, int) and (value == 0 or value >= context):
            continue
        if isinstance(value, (int, float)) and any(math.isclose(value, same, rel_tol=1e-6) for same in neutral.get(key, ())):
            continue
        raise meta.refuse(key, "which changes what the model computes and cannot be converted")


def _rope(meta: _Metadata, model: Model, head_size: int, context: int) -> dict[str, Any]:
    """`rope_parameters` of transformers: none, linear, yarn, or llama3 from the tensor rope_freqs.

    Formulas: llama.cpp's ggml_rope_yarn; there the attention factor multiplies YaRN's own, 0.1 ln(factor) + 1 (arXiv
    2309.00071).
    """
    base = meta.number("rope.freq_base", 10000.0)
    kind = meta.values.get("rope.scaling.type", "linear")
    key = "rope.scaling.factor" if "rope.scaling.factor" in meta.values else "rope.scale_linear"
    factor = meta.number(key, 1.0) if meta.values.get(key, 0) else 1.0  # llama.cpp: 0 stands for none
    original = meta.integer("rope.scaling.original_context_length", context)
    attention = meta.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise meta.refuse("rope.scaling.type", "which cannot be converted")
    if kind != "yarn" and attention != 1:
        raise meta.refuse("rope.scaling.attn_factor", "which transformers knows for YaRN only")
    if "rope_freqs.weight" in model.tensors:
        if kind == "yarn" or factor != 1:
            raise meta.refuse("rope.scaling.type", "and the tensor rope_freqs.weight as well: two ways to scale positions")
        return {"rope_theta": base, **_llama3(meta, model, head_size, base)}
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_theta": base, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": base, "rope_type": "linear", "factor": factor}
    own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return {
        "rope_theta": base,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": attention * meta.number("rope.scaling.yarn_attn_factor", 1.0) * own,
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _llama3(meta: _Metadata, model: Model, head_size: int, base: float) -> dict[str, Any]:
    """Parameters of Llama 3.1's formula, checked to give the factors of the tensor rope_freqs; UserError if they do not."""
    tensor = model.tensors["rope_freqs.weight"]
    if tensor.shape != (head_size // 2,):
        raise UserError(f"{meta.name} has the tensor 'rope_freqs.weight' in shape {tensor.shape}, not ({head_size // 2},).")
    given = tensor.read().double().numpy()
    if (given == 1).all():
        return {"rope_type": "default"}
    constants = {**_LLAMA3}
    if "rope.scaling.original_context_length" in meta.values:
        constants["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
    factor, low, high = given.max(), constants["low_freq_factor"], constants["high_freq_factor"]
    turns = constants["original_max_position_embeddings"] * base ** (-np.arange(0, head_size, 2) / head_size) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(given, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise UserError(
            f"{meta.name} has a tensor 'rope_freqs.weight' that does not come from Llama 3.1's formula; how it scales "
            "positions cannot be converted."
        )
    return {"rope_type": "llama3", "factor": float(factor), **constants}


def _ends(ids: dict[str, int]) -> dict[str, Any]:
    """bos, eos and pad for both configurations. End of turn and end of message end an answer too, as in llama.cpp."""
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if key in ids))
    eos = ends if len(ends) > 1 else ends[0] if ends else None
    return {"bos_token_id": ids.get("bos"), "eos_token_id": eos, "pad_token_id": ids.get("padding")}
