"""Write a W8A8 checkpoint of a model: `python benchmarks/quantise.py MODEL OUT [--smooth 0.5 --data TEXT]`.

The format is compressed-tensors' "int-quantized", which llm-compressor writes and vLLM and transformers (with the package
compressed-tensors) load: every Linear of the decoder layers in int8 with a scale per output channel, symmetric; activations are
quantised by the engine, per token. Embeddings, norms, biases and the head stay as they are.

--smooth ALPHA moves outliers of the activations into the weights (SmoothQuant, arXiv 2211.10438, equation 4): input channel j
of the Linears behind a norm is multiplied by s_j = max|X_j|^ALPHA / max|W_j|^(1 - ALPHA), and the norm divided by it; the same
for down, whose divisor goes into up's rows. s_j is a power of two, so that folding it rounds nothing.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastfill import cache, data, families, files, models
from fastfill.errors import UserError, listed
from fastfill.progress import Stage, stage

SHARD = 1 << 30  # bytes of a file, which are in memory before they are written
KEPT = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
)  # what a folder has beside its weights: tokenizer, template, defaults of generation
INDEX = "model.safetensors.index.json"


@dataclass
class Fold:
    """What smoothing does to one tensor: rows are divided, columns multiplied. offset: what a norm adds to its weight."""

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    offset: float = 0.0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        values = tensor.float()
        if self.rows is not None:
            values = (values + self.offset) / self.rows.view(-1, *[1] * (values.dim() - 1)) - self.offset
        return values if self.columns is None else values * self.columns


@dataclass
class Folds:
    of: dict[str, Fold] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Fold:
        return self.of.setdefault(name, Fold())

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self.of[name](tensor).to(tensor.dtype) if name in self.of else tensor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder, a .gguf file, or `default`")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument(
        "--smooth", type=float, metavar="ALPHA", help="share of the outliers that weights take, 0 to 1 (default: off)"
    )
    parser.add_argument("--data", help="text for --smooth, as `fastfill calibrate --data` takes it")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of it (default: 8192)")
    given = parser.parse_args(arguments)
    try:
        quantise(given.model, given.out, given.smooth, given.data, given.tokens)
    except UserError as error:
        print(f"quantise.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quantise.py: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def quantise(name: str, out: Path, alpha: float | None = None, text: str | None = None, tokens: int = 8192) -> None:
    """Write the checkpoint, whole or not at all. Raises UserError."""
    if alpha is not None and not (0 <= alpha <= 1 and text):
        raise UserError("--smooth takes a number from 0 to 1, and --data with text for the activations.")
    files.check_folder(out)
    folder = Path(models.resolve(name))
    if not folder.is_dir():
        raise UserError(f"{name} is no folder; download the model first and name its folder.")
    config = files.read_json(folder / "config.json", "name the folder of a whole model")
    if "quantization_config" in config:
        raise UserError(f"{name} is quantised already; name the floating-point model.")
    where = places(folder, name)
    linears = linears_of(folder, name)
    if missing := sorted(f"{linear}.weight" for linear in linears if f"{linear}.weight" not in where):
        if config.get("text_config"):
            raise UserError(f"{name} holds more than a text model; save that alone (models.load, save_pretrained) and name it.")
        raise UserError(f"The weights of {name} lack {listed(missing, 2)}.")
    folds = smoothing(name, alpha, text, tokens) if alpha is not None and text else Folds()
    shards = grouped(where, {f"{linear}.weight" for linear in linears})
    with stage(f"quantising {name}", len(where)) as bar:
        content = documents(folder, config, linears)
        index = {}
        for number, group in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            content[file] = functools.partial(write_shard, {key: where[key] for key in group}, linears, folds, bar)
            for key in group:
                index |= {key: file, **({f"{key}_scale": file} if key.removesuffix(".weight") in linears else {})}
        if len(shards) > 1:
            content[INDEX] = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        if stale := sorted(file.name for file in out.glob("*.safetensors*") if file.name not in content):
            raise UserError(f"{out} has {listed(stale, 2)} of another checkpoint; name another folder, or delete it.")
        files.replace_folder(out, content)


def places(folder: Path, name: str) -> dict[str, Path]:
    """Tensor -> its file, in the order of the files. Raises UserError for a folder without safetensors."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with files.reading(file, "cannot be read", "download it again"), safe_open(file, "pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    if not found:
        raise UserError(f"{name} has no .safetensors; save the model with save_pretrained and name that folder.")
    return found


def linears_of(folder: Path, name: str) -> set[str]:
    """Names of the Linears inside the decoder layers. Raises UserError for a family that is not known."""
    import transformers

    with files.reading(folder / "config.json", "describes no model", "name the folder of a whole model"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family = families.of(config)
        auto = transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    layers = family.layers_of(families.base_of(model))
    inside = {module for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Linear)}
    return {path for path, module in model.named_modules() if module in inside}


def grouped(where: dict[str, Path], eight: set[str]) -> list[list[str]]:
    """Tensors in groups of at most SHARD bytes as they will be written; one that is larger is alone."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, file in where.items():
        with safe_open(file, "pt") as tensors:
            shape, kind = (part := tensors.get_slice(name)).get_shape(), part.get_dtype()
        values = functools.reduce(int.__mul__, shape, 1)
        bytes_ = values * (1 if name in eight else 4 if kind == "F32" else 2)
        if groups[-1] and size + bytes_ > SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_
    return groups


def write_shard(where: dict[str, Path], linears: set[str], folds: Folds, bar: Stage, file: Path) -> None:
    values = {}
    for name, source in where.items():
        with safe_open(source, "pt") as tensors:
            tensor = folds.apply(name, tensors.get_tensor(name))
        if name.removesuffix(".weight") in linears and name.endswith(".weight"):
            values[name], values[f"{name}_scale"] = rows_in_eight_bits(tensor, name)
        else:
            values[name] = tensor
        bar.step()
    try:
        save_file(values, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the disk is full, say
        raise OSError(str(error)) from error


def rows_in_eight_bits(weight: torch.Tensor, name: str = "a weight") -> tuple[torch.Tensor, torch.Tensor]:
    """weight (O, I) -> int8 (O, I) within +-127 and scale (O, 1) in the weight's type, off by half a scale at most.

    The scale is rounded before it divides, so that engines that keep it in bf16 and those that widen it see one value: bf16
    makes it 2^-9 too small at worst, and 127 (1 + 2^-9) is still rounded to 127. fp16's scale ends at 6e-8, hence fp32 there.
    """
    if not torch.isfinite(weight).all():
        raise UserError(f"{name} has values that are not finite; the model is damaged.")
    kind = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    rows = weight.float()
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny).to(kind)
    return (rows / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def documents(folder: Path, config: dict[str, Any], linears: set[str]) -> dict[str, files.Content]:
    """All files of the checkpoint but the weights."""
    found: dict[str, files.Content] = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in KEPT and file.name not in ("config.json", cache.SEAL, INDEX):
            found[file.name] = copy_of(file)
    found["config.json"] = json.dumps({**config, "quantization_config": scheme()}, indent=2)
    return found


def copy_of(source: Path) -> Callable[[Path], None]:
    return lambda file: shutil.copyfile(source, file) and None


def scheme() -> dict[str, Any]:
    """`quantization_config` as llm-compressor writes it for its preset W8A8 with dynamic activations."""
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False, "observer": "minmax"},
        "input_activations": {**eight, "strategy": "token", "dynamic": True, "observer": None},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


# --- smoothing ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def smoothing(name: str, alpha: float, text: str, tokens: int) -> Folds:
    """The powers of two that are to be folded, from the largest activations over `tokens` tokens of the text. The Linears that
    read a norm's output are found by watching one forward; where there is no such norm, nothing is smoothed."""
    loaded = models.load(name, "fp32")
    model, family = loaded.model, families.of(loaded.model.config)
    names = {module: path for path, module in model.named_modules()}
    layers = family.layers_of(families.base_of(model))
    largest: dict[Any, torch.Tensor] = {}
    readers: dict[Any, list[Any]] = {}  # norm -> the Linears behind it
    written: dict[int, tuple[Any, torch.Tensor]] = {}  # the outputs of the norms in one layer, by identity

    def norm_wrote(norm: Any, _: Any, output: torch.Tensor) -> None:
        written[id(output)] = norm, output

    def linear_reads(linear: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        now = inputs[0].abs().flatten(0, -2).amax(0)
        largest[linear] = torch.maximum(largest[linear], now) if linear in largest else now
        if (found := written.get(id(inputs[0]))) and linear not in readers.setdefault(found[0], []):
            readers[found[0]].append(linear)

    hooks = [layer.register_forward_pre_hook(lambda *_: written.clear()) for layer in layers]
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_pre_hook(linear_reads))
            elif family.norm in names[module].rpartition(".")[2]:
                hooks.append(module.register_forward_hook(norm_wrote))
    documents = data.load_documents([text])
    found = [token for document in documents for token in data.encode(loaded.tokenizer, document)][:tokens]
    if not found:
        raise UserError(f"{text} has no text; name a file with some thousand words.")
    ids = torch.tensor([found])
    with stage("activations", ids.shape[1]) as bar:
        for part in ids.split(1024, dim=1):
            model(input_ids=part, use_cache=False)
            bar.step(part.shape[1])
    for hook in hooks:
        hook.remove()

    folds = Folds()
    for norm, linears in readers.items():
        divisor = power_of_two(largest[linears[0]], [linear.weight for linear in linears], alpha)
        for key, _ in norm.named_parameters(recurse=False):
            folds[f"{names[norm]}.{key}"].rows = divisor
        folds[f"{names[norm]}.weight"].offset = offset_of(norm)
        for linear in linears:
            folds[f"{names[linear]}.weight"].columns = divisor
    for ffn in family.ffns(families.base_of(model)):
        up, down = (getattr(ffn, family.linear(role)) for role in ("up", "down"))
        divisor = power_of_two(largest[down], [down.weight], alpha)
        folds[f"{names[down]}.weight"].columns = divisor
        ones = torch.ones(up.out_features - len(divisor))  # gate's rows, where up lies behind them
        for key, _ in up.named_parameters():
            folds[f"{names[up]}.{key}"].rows = torch.cat((ones, divisor))
    return folds


def power_of_two(activations: torch.Tensor, weights: list[torch.Tensor], alpha: float) -> torch.Tensor:
    """SmoothQuant's s (I,), rounded to powers of two; 1 where a channel is never used."""
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    exponent = (alpha * activations.log2() - (1 - alpha) * largest.log2()).round().clamp(-20, 20)
    return torch.where((activations > 0) & (largest > 0), exponent.exp2(), torch.ones(()))


def offset_of(norm: Any) -> float:
    """1.0 for Gemma's norms, which multiply by 1 + weight; else 0.0."""
    probe = copy.deepcopy(norm)
    probe.weight.zero_()
    return float(probe(torch.ones(1, len(probe.weight))).max().round())


if __name__ == "__main__":
    sys.exit(main())
