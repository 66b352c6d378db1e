"""Models and artifacts of a given shape with random weights: for measuring time, which does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastfill import artifact as artifacts
from fastfill import config as cfg
from fastfill import families, files, models
from fastfill.artifact import Artifact
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.lab import flops
from fastfill.models import LoadedModel


def _shape(kind: str, hidden: int, neurons: int, layers: int, heads: tuple[int, int, int], vocabulary: int, tied: bool) -> Any:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


# name -> the part of its published config that decides the time. heads: of queries, of keys, size of one.
SHAPES = {
    "Llama-3.2-1B": _shape("llama", 2048, 8192, 16, (32, 8, 64), 128256, True),
    "Llama-3.2-3B": _shape("llama", 3072, 8192, 28, (24, 8, 128), 128256, True),
    "Llama-3.1-8B": _shape("llama", 4096, 14336, 32, (32, 8, 128), 128256, False),
    "Qwen3-8B": _shape("qwen3", 4096, 12288, 36, (32, 8, 128), 151936, False),
    "Qwen3.5-9B": _shape("qwen3_5_text", 4096, 12288, 32, (16, 4, 256), 248320, False),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18944, 28, (28, 4, 128), 152064, False),
}


def config(name: str, layers: int | None = None) -> Any:
    """The Hugging Face config of a shape: one of `SHAPES`, or a folder with a config.json. layers: cut to so many.

    Raises UserError if there is no such shape, or fewer layers.
    """
    import transformers

    if name in SHAPES:
        values = dict(SHAPES[name])
    elif (Path(name) / "config.json").is_file():
        with files.reading(Path(name) / "config.json", "is not the configuration of a model", "give a model's folder"):
            found = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            values = found.get_text_config(decoder=True).to_dict()  # where there is vision as well
            values = {k: v for k, v in values.items() if k not in ("layer_types", "transformers_version")}
    else:
        raise UserError(f"There is no shape {name!r}; use one of {', '.join(SHAPES)}, or a folder with a config.json.")
    if layers is not None:
        cfg.check_integer("--layers", layers, 1)
        if layers > values["num_hidden_layers"]:
            raise UserError(f"{name} has {values['num_hidden_layers']} layers; --layers {layers} asks for more.")
        values["num_hidden_layers"] = layers
    with files.reading(name, "is not a shape that a model can have", "mend its config.json"):
        made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    if (kinds := getattr(made, "layer_types", None)) and all(kind == flops.RECURRENT for kind in kinds):
        raise UserError(
            f"The first {len(kinds)} layers of {name} have no attention, without which there is no cache; give more."
        )
    return made


def model(name: str, dtype: str = "auto", device: str = "cpu", layers: int | None = None, seed: int = 0) -> LoadedModel:
    """A model of that shape with random weights, made on the device; it has no tokenizer."""
    import transformers

    models.check_device(device)
    shape = config(name, layers)
    torch.manual_seed(seed)
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(shape, dtype=models.parse_dtype(dtype, device))
    made.eval().requires_grad_(False)
    cut = f", {layers} layers" if layers is not None else ""
    return LoadedModel(made, None, f"{Path(name).name} (random weights{cut})")


def artifact(model: Any, name: str, prefill: PrefillConfig | None = None, seed: int = 0) -> Artifact:
    """An artifact for that model with random weights of the default ranks and the same importance for each layer. Blocks
    choose at random: neighbours share fewer rows than in real text, where a kernel finds more of them in its cache."""
    anatomy = families.dissect(model)
    base = artifacts.describe_model(anatomy, name)
    limits = (min(anatomy.hidden, anatomy.intermediate), anatomy.hidden, anatomy.hidden)
    ranks = dict(zip(("predictor", "linear", "silu"), map(min, cfg.default_ranks(anatomy.hidden), limits), strict=True))
    gate = anatomy.ffns[0].gate
    generator = torch.Generator(gate.device).manual_seed(seed)
    tensors = {
        key: torch.randn(shape, generator=generator, device=gate.device, dtype=gate.dtype) / shape[-1] ** 0.5
        for key, shape in artifacts.shapes(base, ranks).items()
    }
    return Artifact(base, prefill or PrefillConfig(), ranks, [1.0] * base["layers"], tensors)
