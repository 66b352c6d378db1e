"""Is a model the one that an artifact was learned for? Fingerprints of its weights, under any rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from fastfill import families

# What a weight may have been rounded to before it is compared. bf16 is coarser than fp32 and nearly everywhere than fp16, but
# fp16 rounds what is below 6e-5 where bf16 does not: a bf16 checkpoint loaded in fp16 is known by the second alone.
ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fingerprint(anatomy: families.Anatomy) -> str:
    """SHA-256 over the shapes and a sample of every FFN's weights (8 rows each), rounded to bf16.

    Rounding makes it the same whether a checkpoint is loaded in fp32 or bf16; the sample keeps it fast at any size.
    """
    return fingerprints(anatomy)["bf16"]


def fingerprints(anatomy: families.Anatomy) -> dict[str, str]:
    """`fingerprint` under each of ROUNDINGS: 'bf16', 'fp16'."""
    samples = ([sample(weight) for weight in (ffn.gate, ffn.up, ffn.down)] for ffn in anatomy.ffns)
    return fingerprints_of(anatomy.hidden, anatomy.intermediate, len(anatomy.ffns), samples)


def fingerprints_outside(anatomy: families.Anatomy) -> dict[str, str]:
    """As `fingerprints`, over all else that the base model has: embeddings, attentions, norms, adapters. Not the head."""
    inside = {id(weight) for ffn in anatomy.ffns for weight in ffn.module.parameters()}
    outside = [weight.detach() for weight in anatomy.base.parameters() if id(weight) not in inside]
    shapes = " ".join("x".join(map(str, weight.shape)) for weight in outside)
    there = (weight for weight in outside if weight.device.type != "meta" and type(weight.data) is torch.Tensor)
    return _digests(shapes, (sample(weight) if weight.dim() > 1 else weight for weight in there))


def sampled_rows(rows: int) -> range:
    """The rows of a weight that go into the fingerprint."""
    return range(0, rows, max(1, rows // 8))[:8]


def sample(weight: torch.Tensor) -> torch.Tensor:
    return weight[list(sampled_rows(weight.shape[0]))]


def fingerprint_of(hidden: int, intermediate: int, layers: int, samples: Iterable[Iterable[torch.Tensor]]) -> str:
    """The fingerprint from `sample`d gate, up and down weights, layer by layer."""
    return fingerprints_of(hidden, intermediate, layers, samples)["bf16"]


def fingerprints_of(hidden: int, intermediate: int, layers: int, samples: Iterable[Iterable[torch.Tensor]]) -> dict[str, str]:
    """`fingerprint_of` under each of ROUNDINGS."""
    return _digests(f"{hidden}x{intermediate}x{layers}", (weight for weights in samples for weight in weights))


def _digests(shapes: str, weights: Iterable[torch.Tensor]) -> dict[str, str]:
    digests = {name: hashlib.sha256(shapes.encode()) for name in ROUNDINGS}
    for weight in weights:
        for name, dtype in ROUNDINGS.items():
            digests[name].update(weight.to(dtype).reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}
