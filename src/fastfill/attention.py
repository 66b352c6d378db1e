"""The attention of a transformers model while an artifact is on it: watched for what a prompt's end attends to
(`fastfill.attended`), and computed by chunks of queries where that is faster.

torch's attention multiplies more slowly than its own matrix products do where the processor has no AMX: by chunks the heads of
Qwen2.5-1.5B are 2.6 times as fast at 1,024 tokens (torch 2.13, bf16, Zen 5, two threads).
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastfill import attended, cache, compiling, machine
from fastfill.errors import UserError, quoted
from fastfill.sparse_ffn import current_plan
from fastfill.swap import Swaps

IMPLEMENTATION = "sdpa"  # the name of the attention whose queries and keys are read
ROWS = 384  # of a product: queries of a chunk, times the heads that share a key head; 192 to 768 are within a tenth
TOKENS = 1024  # of the prompt that is timed
MARGIN = 1.1  # a gain below it may be noise
LARGE = 32.0  # a score beyond it would be off by more than 0.06 in bf16, and its token's share by as much of itself

# Whether the attachment whose call is running wants chunks, and whether it does for all calls and not sparse prompts alone, as
# while something is measured. Not a matter of the name that stands in: models may share one config.
wanted: ContextVar[bool] = ContextVar("fastfill_attention_chunks", default=False)
always: ContextVar[bool] = ContextVar("fastfill_attention_always", default=False)


@torch.no_grad()
def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of a whole prompt. query: (batch, heads, T, d). key, value: (batch, key heads, T, d). Gives
    (batch, T, heads, d).

    Scores are rounded to the type of the query, and computed again in fp32 where one is larger than `LARGE`. Softmax does not
    change when all keys move by one vector, so each head's mean key is taken off first: Qwen2.5-0.5B's largest score is 1,464
    before and 70 after.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    shared = heads // groups
    chunk = max(32, ROWS // shared)
    out = query.new_empty(batch, tokens, heads, width)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    for row in range(batch):
        exact = key[row].float()
        # Of a key that is not finite there is no mean; it must not reach the tokens before it.
        exact = ((exact - exact.mean(1, keepdim=True).nan_to_num(0, 0, 0)) * scale).transpose(1, 2)
        keys = exact.to(query.dtype)
        queries = query[row].view(groups, shared, tokens, width)
        for begin in range(0, tokens, chunk):
            end = min(begin + chunk, tokens)
            size = end - begin
            asks = queries[:, :, begin:end].reshape(groups, shared * size, width)
            scores = asks @ keys[:, :, :end]
            if query.dtype == torch.bfloat16 and max(map(abs, map(float, scores.aminmax()))) > LARGE:
                scores = asks.float() @ exact[:, :, :end]
            scores = scores.view(groups, shared, size, end)
            scores[..., begin:].masked_fill_(later[:size, :size], -math.inf)
            shares = scores.softmax(-1).to(value.dtype).view(groups, shared * size, end)
            out[row, begin:end] = (shares @ value[row, :, :end]).view(heads, size, width).transpose(0, 1)
    return out


class Name(str):
    """The name of an attention that stands in; copies and pickles as the one that it stands in for. over: its attachment has
    ended, though it may have come back on a config that models share, from below a later one."""

    over = False

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return IMPLEMENTATION

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (IMPLEMENTATION,)


def check(config: Any, field: str, leave: str) -> None:
    """Raise UserError if the model computes its attention in a way that a setting cannot work with."""
    own = getattr(config, "_attn_implementation", None)
    if not _is_sdpa(own):
        raise UserError(
            f"{field} reads the attention of {IMPLEMENTATION}, and this model runs {quoted(own)}; load it with "
            f'attn_implementation="{IMPLEMENTATION}", or leave {leave}.'
        )


def _is_sdpa(name: Any) -> bool:
    """Whether an attention is torch's, or what stands in for it on a model that shares its config."""
    return name == IMPLEMENTATION or isinstance(name, Name)


class Attention:
    """The attention of the prompts of one attachment. chunks: whether sparse ones' is computed by `causal`.

    config: the base model's. asked: `PrefillConfig.attention`. watched: the setting that is to be told of it, and the value
    that leaves it out; None if there is none.
    like: the type and the device of the weights. Raises UserError for a model whose attention cannot be read.
    """

    def __init__(self, config: Any, asked: str, watched: tuple[str, str] | None, like: Tensor):
        if watched:
            check(config, *watched)
        self.chunks, self._reason = by_chunks(config, asked, like)
        self._config, self._watched, self._name = config, watched, Name()

    def put(self, swaps: Swaps) -> None:
        """Stand in for torch's, where there is something to do."""
        if self._watched or self.chunks:
            self._name = stand_in()
            swaps.put(self._config, "_attn_implementation_internal", self._name)

    def end(self) -> None:
        """Behind `swaps.undo()`: this name is over, and so may be one that has come back from below."""
        self._name.over = True
        if getattr(getattr(self._config, "_attn_implementation", None), "over", False):
            self._config._attn_implementation_internal = IMPLEMENTATION

    def told(self, attached: bool) -> str:
        """Who computes the attention of sparse prompts, and why."""
        if self.chunks and attached and not isinstance(getattr(self._config, "_attn_implementation", None), Name):
            return "model (its attention was changed while attached)"
        return f"{'chunks' if self.chunks else 'model'} ({self._reason})"


def stand_in() -> Name:
    """A name of attention for a transformers config: as before, tells the prompt's `Upper`, and computes sparse prompts by
    `causal` where the attachment wants it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            plain = attend if query.shape[2] == 1 else None
            return compiling.traced(attention, plain, (module, query, key, value, attention_mask), kwargs)
        watcher = attended.watcher.get()
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if watcher is not None:
            watcher.watch(module.layer_idx, query, key, attention_mask, scale)
        ours = wanted.get() and (current_plan.get() is not None or always.get())
        if ours and _plain(module, query, key, value, attention_mask, kwargs):
            return causal(query, key, value, scale), None
        return attend(module, query, key, value, attention_mask, **kwargs)

    name = Name(f"fastfill_{IMPLEMENTATION}")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[IMPLEMENTATION])
    return name


def _plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is causal attention of whole prompts and no more: no padding, no cache before it, no window."""
    forward = kwargs.get("is_causal")
    forward = getattr(module, "is_causal", True) if forward is None else forward
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    same = query.shape[2] == key.shape[2] and query.shape[3] == value.shape[3] and query.shape[2] > 1
    known = not kwargs.get("dropout") and all(
        kwargs.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux")
    )
    return mask is None and bool(forward) and same and known and not learns and query.dtype != torch.float16


def by_chunks(config: Any, asked: str, like: Tensor) -> tuple[bool, str]:
    """Whether sparse prompts' attention is computed by chunks, and why. config: the base model's. asked:
    `PrefillConfig.attention`. like: the type and the device of the weights. Raises UserError as `check`."""
    if asked == "chunks":
        check(config, 'attention="chunks"', 'attention="auto"')
        return True, "asked for"
    if asked == "model":
        return False, "asked for"
    if not _is_sdpa(getattr(config, "_attn_implementation", None)):
        return False, f"it is not {IMPLEMENTATION}"
    if like.device.type != "cpu" or like.dtype not in (torch.bfloat16, torch.float32):
        return False, "by chunks is for bf16 and fp32 on the CPU"
    gain = _gain(config, like.dtype)
    return gain >= MARGIN, f"by chunks {gain:.2f}x as fast at {TOKENS} tokens"


def _gain(config: Any, dtype: torch.dtype) -> float:
    """Time of torch's attention over that of `causal`, for the model's heads: measured once, and remembered in the cache."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key = hashlib.sha256(repr((heads, groups, width, dtype, ROWS, TOKENS, machine.describe())).encode()).hexdigest()[:32]
    found = cache.measured(
        f"attention-{key}",
        lambda: {"gain": measure(heads, groups, width, dtype)},
        lambda found: 0 < found["gain"] < math.inf,
    )
    return float(found["gain"])


def measure(heads: int, groups: int, width: int, dtype: torch.dtype) -> float:
    """`_gain`, measured: the fastest of three, in turn."""
    generator = torch.Generator().manual_seed(0)  # torch's own is the user's
    query, key, value = (
        torch.randn(1, TOKENS, count, width, generator=generator, device="cpu").to(dtype).transpose(1, 2)
        for count in (heads, groups, groups)
    )
    own = torch.nn.functional.scaled_dot_product_attention
    ways: tuple[Callable[[], Any], ...] = (
        lambda: own(query, key, value, is_causal=True, enable_gqa=True),  # as transformers does
        lambda: causal(query, key, value, width**-0.5),
    )
    times = [[_seconds(way) for way in ways] for _ in range(4)][1:]  # after one to warm up
    stock, ours = (min(column) for column in zip(*times, strict=True))
    return round(stock / ours, 3)


def _seconds(way: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin
