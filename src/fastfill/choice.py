"""Which kernel runs, and from which prompt length on: measured where an artifact is attached, and remembered in the cache.

Sparse is not always the faster one: without a compiler the torch kernel copies the selected rows, and small layers and short
prompts gain little. So one layer's FFN is timed, dense and sparse, predictor and compensator included, on whole prompts (dense
head and tail as in use). Attention is `fastfill.attention`'s; norms and the head take the same time either way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastfill import cache, kernels, machine
from fastfill.blocks import make_plan
from fastfill.config import PrefillConfig, to_dict
from fastfill.kernels import Kernel
from fastfill.sparse_ffn import SparseFFN, current_plan

MARGIN = 1.03  # a gain below it may be noise
ROUNDS = 5  # of which the fastest counts, after one to warm up
DOUBLINGS = 3  # of the shortest prompt, at most; more tokens would gain hardly more, and take longer to time
MOST = 4096  # tokens that are timed; where the shortest prompt has more, nothing is: time and memory would have no bound


@dataclass(frozen=True)
class Choice:
    """kernel: the faster one. first: tokens of the shortest prompt that gains, of those tried; None: none gains, stay dense."""

    kernel: Kernel
    first: int | None

    @property
    def warning(self) -> str:
        """What to tell where nothing gains."""
        return (
            f"Sparse prefill does not gain here ({self.kernel.reason}), so all stays dense; name a kernel or min_tokens to run "
            "it nevertheless."
        )


def choose(ffns: Sequence[SparseFFN], config: PrefillConfig) -> Choice | None:
    """The choice for an attached model's layers; None where no layer skips a neuron, or no prompt is short enough to be timed.

    Takes some 100 ms where it is not remembered; larger layers take longer.
    """
    thin = sorted((ffn for ffn in ffns if ffn.kept < ffn.ffn.neurons), key=lambda ffn: ffn.kept)
    if not thin or config.shortest_prompt > MOST:
        return None
    ffn = thin[len(thin) // 2]
    names = list(dict.fromkeys((ffn.kernel.name, "torch")))

    def is_one(found: Any) -> bool:
        return found["kernel"] in names and isinstance(found["tokens"], int) and 0 < found["gain"] < math.inf

    found = cache.measured(_key(ffn, config, names), lambda: measure(ffn, config, names), is_one)
    name, tokens, gain = found["kernel"], found["tokens"], found["gain"]
    gains = gain >= MARGIN
    reason = f"{'fastest' if gains else 'at best'}, {gain:.2f}x of the dense FFN's speed at {tokens} tokens"
    return Choice(Kernel(name, reason, round(gain, 3)), tokens if gains else None)


def measure(ffn: SparseFFN, config: PrefillConfig, names: Sequence[str]) -> dict[str, Any]:
    """Time prompts, each twice as long as the one before, until one gains. Returns the kernel, the tokens and the gain (time
    of dense over that of sparse) of that prompt; or of the best where none gains."""
    best: dict[str, Any] = {"gain": 0.0}
    for doubling in range(DOUBLINGS + 1):
        tokens = config.shortest_prompt << doubling
        if tokens > MOST:
            break
        seconds = _seconds(ffn, config, names, tokens)
        name = min(names, key=lambda name: seconds[name])
        gain = seconds["dense"] / seconds[name]
        if gain > best["gain"]:
            best = {"kernel": name, "tokens": tokens, "gain": gain}
        if gain >= MARGIN:
            break
    return best


@torch.no_grad()
def _seconds(ffn: SparseFFN, config: PrefillConfig, names: Sequence[str], tokens: int) -> dict[str, float]:
    """ "dense" and each kernel -> seconds of one call of the layer's FFN on a prompt of so many tokens."""
    gate = ffn.ffn.gate
    generator = torch.Generator().manual_seed(0)  # torch's own is the user's
    x = torch.randn(1, tokens, ffn.ffn.hidden_size, generator=generator).to(gate.device, ffn.ffn.dtype)
    plan = make_plan([(0, tokens, 0)], tokens, config)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"dense": ffn.dense}
    ways |= {name: dataclasses.replace(ffn, kernel=Kernel(name), taps=[]) for name in names}
    best = dict.fromkeys(ways, math.inf)
    before = current_plan.set(plan)
    try:
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():  # in turn, so that a busy moment meets them all
                taken = clock(lambda way=way: way(x), gate.device)  # type: ignore[misc]
                if turn:
                    best[name] = min(best[name], taken)
    finally:
        current_plan.reset(before)
    return best


def clock(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run."""
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(ffn: SparseFFN, config: PrefillConfig, names: Sequence[str]) -> str:
    """Changes with whatever the times depend on."""
    shapes = [(tensor.dtype, tuple(tensor.shape)) for tensor in (ffn.ffn.gate, *ffn.tensors)]
    biases = [bias is not None for bias in (ffn.ffn.gate_bias, ffn.ffn.up_bias, ffn.ffn.down_bias)]
    layer = (type(ffn.predictor), ffn.ffn.dtype, shapes, ffn.kept, ffn.ffn.activation, biases, ffn.ffn.gate.device.type)
    here = (machine.describe(), kernels.available(), kernels.cpu.build(), list(names), MARGIN, MOST)
    return hashlib.sha256(repr((layer, here, to_dict(config))).encode()).hexdigest()[:32]
