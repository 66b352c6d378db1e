"""The weights of a checkpoint on their way into vLLM: are they those that the artifact was made for?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

import torch

from fastfill import families, partner
from fastfill.artifact import Artifact
from fastfill.errors import UserError

# Names of an FFN's weights in Hugging Face's format, and in that of Mistral's own `consolidated` files.
ROLES = {**families.roles(), "w1": ("gate",), "w3": ("up",), "w2": ("down",)}
log = logging.getLogger("vllm.fastfill")
_LAYERS, _FFNS = ("|".join({getattr(row, name): 0 for row in families.FAMILIES.values()}) for name in ("layers", "ffn"))
_NAME = re.compile(rf"(?:^|\.)(?:{_LAYERS})\.(\d+)\.(?:{_FFNS}|feed_forward)\.({'|'.join(ROLES)})\.weight(_scale)?$")


class Checkpoint:
    """Hands on (name, tensor) of all weights, and keeps samples of the FFNs'.

    They are judged before the loader rounds them (`--dtype half`), and while they are whole, however many ranks share them.
    """

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]]):
        self._weights = weights
        self._samples: dict[tuple[int, str], partner.Sample] = {}
        self._scales: dict[tuple[int, str], torch.Tensor] = {}  # of weights in eight bits, which may come before or after

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._weights:
            if found := _NAME.search(name):
                roles = ROLES[found[2]]
                for role, part in zip(roles, weight.chunk(len(roles)), strict=True):
                    place = int(found[1]), role
                    if found[3]:
                        self._scales[place] = part.cpu().clone()
                    else:
                        self._samples[place] = partner.sample(part)
            yield name, weight

    def _sample(self, place: tuple[int, str]) -> partner.Sample | None:
        """Of one weight that went by, as floating point. None if it is in eight bits, and its scale did not go by."""
        found = self._samples[place]
        if found.rows.is_floating_point():
            return found
        scale = self._scales.get(place)
        return None if scale is None else partner.widened(found, scale)

    def check(self, artifact: Artifact, allow_finetuned: bool = False) -> None:
        """Raise UserError unless all that went by are the weights the artifact was made for, by the rule in `partner`. Logs
        what is to be noted."""
        base = artifact.base_model
        names = [[(index, role) for role in ("gate", "up", "down")] for index in range(base["layers"])]
        samples = {name: found for name in self._samples if (found := self._sample(name))}
        if missing := [name for layer in names for name in layer if name not in samples]:
            index, role = missing[0]
            raise UserError(
                f"The checkpoint has no {role} weights of layer {index} under a name that is known ({len(missing)} weights are "
                "missing in all); serve a complete checkpoint in Hugging Face's format."
            )
        layers = ([samples[name] for name in layer] for layer in names)
        for note in partner.check(base, artifact.samples, layers, allow_finetuned):
            log.warning("fastfill: %s", note)
