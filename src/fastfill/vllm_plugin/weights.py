"""The weights of a checkpoint on their way into vLLM: are they those that the artifact was made for?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch

from fastfill import artifact as artifacts
from fastfill import partner
from fastfill.artifact import Artifact
from fastfill.errors import UserError

# Names of an FFN's weights in Hugging Face's format, and in that of Mistral's own `consolidated` files.
ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_NAME = re.compile(rf"(?:^|\.)layers\.(\d+)\.(?:mlp|feed_forward)\.({'|'.join(ROLES)})\.weight$")


class Checkpoint:
    """Hands on (name, tensor) of all weights, and keeps what the fingerprint needs of the FFNs'.

    A checkpoint's own dtype is the one the artifact knows: rounded to another by the loader (`--dtype half`), the weights
    would have another fingerprint. And here they are whole, however many ranks share them.
    """

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]]):
        self._weights = weights
        self._samples: dict[tuple[int, str], torch.Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._weights:
            if found := _NAME.search(name):
                self._samples[int(found[1]), ROLES[found[2]]] = partner.sample(weight)
            yield name, weight

    def check(self, artifact: Artifact) -> None:
        """Raise UserError unless all that went by are the weights the artifact was made for."""
        base = artifact.base_model
        names = [[(index, role) for role in ("gate", "up", "down")] for index in range(base["layers"])]
        if missing := [name for layer in names for name in layer if name not in self._samples]:
            index, role = missing[0]
            raise UserError(
                f"The checkpoint has no {role} weights of layer {index} under a name that is known ({len(missing)} weights are "
                "missing in all); serve a complete checkpoint in Hugging Face's format."
            )
        samples = ([self._samples[name] for name in layer] for layer in names)
        found = partner.fingerprints_of(base["hidden_size"], base["intermediate_size"], base["layers"], samples)
        if not artifacts.same_weights(base, found):
            raise UserError(artifacts.wrong_partner(base["name"], "same shapes, other weights"))
