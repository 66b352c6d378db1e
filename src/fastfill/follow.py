"""Keep sparse FFNs at the weights that their modules have now: merged adapters, loaded state, training, moves and casts.

gate and up are the module's own. What is made from its weights is kept until one of them is another tensor, has been written
to, or has another type or device; and, because writing through `weight.data` leaves no trace, until a sample of them differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastfill import kernels, tensors
from fastfill.compensator import Compensator
from fastfill.config import PrefillConfig
from fastfill.errors import UserError
from fastfill.families import ModuleFFN
from fastfill.ffn import FFN
from fastfill.kernels import Kernel
from fastfill.packed import PackedFFN
from fastfill.predictor import Predictor
from fastfill.sparse_ffn import AllNeurons, SparseFFN

# The weights' like (type, device) -> what was learned, cast to it.
Learned = Callable[[torch.Tensor], tuple[Predictor, Compensator | None]]


class Follower:
    """One layer: its module, and the sparse FFN that stands in for it."""

    def __init__(self, part: ModuleFFN, kept: int, learned: Learned, kernel: str | Kernel, config: PrefillConfig):
        self.part, self._learned, self._kernel, self._config = part, learned, kernel, config
        self._stamps: list[Any] = []
        self._chosen: dict[Any, Kernel] = {}  # type and device of the weights -> kernel
        self.ffn = SparseFFN(dense=part.module.forward, kept=kept, **self._made(kept))

    def choose(self, kernel: Kernel) -> None:
        """Take this kernel, as long as the weights have the type and the device that they have now; not where it cannot run
        on them, as on a layer that lies elsewhere than the others."""
        ffn = self.ffn.ffn
        if kernel.name not in (self.ffn.kernel.name, "torch"):
            return
        self._chosen = {(ffn.dtype, ffn.gate.device): kernel}
        self.ffn.kernel = kernel

    def renew(self) -> None:
        """Make everything anew from the weights that are there now. Raises UserError if they cannot be followed."""
        vars(self.ffn).update(self._made(self.ffn.kept))

    def stale(self) -> bool:
        return self._stamps != _stamps(self.part.now())

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same few entries of down as it is, and as it was when the copy was made of it."""
        return tensors.diagonal(self.part.down), self._sample

    @torch.inference_mode(False)  # what is made under inference_mode could not be used outside it
    @torch.no_grad()
    def _made(self, kept: int) -> dict[str, Any]:
        ffn = self.part.now()
        like = torch.empty(0, dtype=ffn.dtype, device=ffn.gate.device)
        try:
            kernel = self._kernel if isinstance(self._kernel, Kernel) else kernels.resolve(self._kernel, like)
        except ValueError as error:
            raise UserError(str(error)) from error
        kernel = self._chosen.get((like.dtype, like.device), kernel)
        predictor, compensator = self._learned(like)
        self._stamps, self._sample = _stamps(ffn), tensors.diagonal(ffn.down.detach()).clone()
        packed = isinstance(ffn, PackedFFN)
        inside = ffn.scales is not None  # torchao's rows are the model's own
        eight = packed or inside or self._config.weights == "int8"
        if eight and ffn.gate.device.type != "cpu":
            raise UserError(f'weights="int8" runs on the CPU, and this model is on {ffn.gate.device}.')
        own = tuple(self.part.module.parameters()) if eight else ()
        ffn = ffn.int8(self.part.rows) if eight and not inside else ffn
        copies = not packed and (eight or kept < ffn.neurons)
        down_t = ffn.down.t().contiguous() if copies else ffn.down.new_empty(0)
        made = {"ffn": ffn, "down_t": down_t, "predictor": predictor, "compensator": compensator, "kernel": kernel}
        made |= {
            "all_neurons": AllNeurons(ffn, down_t, kernel) if eight else None,
            "own": own,
            "copied": not inside and not packed,
        }
        # A few tokens are faster multiplied by packed rows than by a layer that is unpacked for them.
        return made | {"dense_int8": self._config.dense_weights == "int8" and not packed}


def follow(followers: Sequence[Follower], samples: bool = True) -> bool:
    """Renew the layers whose weights have changed; whether any had. samples: compare these too. Raises UserError as
    `ModuleFFN.now` does."""
    made = [layer for layer in followers if layer.ffn.all_neurons or layer.ffn.kept < layer.part.shape[0]]
    stale = [layer for layer in made if layer.stale()]
    if samples and not _same_samples([layer for layer in made if layer not in stale]):
        stale = made
    for layer in stale:
        layer.renew()
    return bool(stale)


@torch.no_grad()
def _same_samples(layers: Sequence[Follower]) -> bool:
    for device in {layer.part.down.device for layer in layers}:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            continue  # the host cannot look at anything now
        here = [layer.sample() for layer in layers if layer.part.down.device == device]
        now, then = (torch.cat(parts).view(torch.uint8) for parts in zip(*here, strict=True))  # bytes: NaN equals NaN
        if not torch.equal(now, then):
            return False
    return True


def _stamps(ffn: FFN) -> list[Any]:
    parts = (ffn.gate, ffn.up, ffn.down, ffn.gate_bias, ffn.up_bias, ffn.down_bias)
    return [None if part is None else tensors.stamp(part) for part in parts]
