"""What a call of the model is: which of its rows are tokens, which of these are prompt, and what of them ran sparsely.

An FFN sees only (batch, T, H). So the base model's pre-hook inspects each call before it runs and makes its `Plan`. Only
prompt is prefilled sparsely, and this counts as prompt:

1. Inside `Attachment.prompt(end)`: the columns before `end`, of the cache and the call together.
2. Inside `model.generate`: the columns of its input. It says so itself, through `GenerateHook`.
3. Nothing said: a call that brings at least `min_tokens` tokens of a sequence looks like a prefill. All of it is prompt, and
   its end the prompt's. Shorter calls are decode steps, drafts to be checked, short turns: dense.

Where the end is known, a prompt of at least `min_tokens` new tokens may come in pieces of any size, behind other text in
the cache, with draft tokens behind it, or again and again without a cache: its dense tail is at its end, and what lies behind
is dense.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastfill import attended, blocks, compiling, kv_cache, reread, upper
from fastfill.blocks import Plan
from fastfill.config import PrefillConfig
from fastfill.reread import Reread
from fastfill.sparse_ffn import current_plan
from fastfill.swap import StandIn
from fastfill.upper import Upper

Row = tuple[int, int, int]  # of one sequence: its first and last row in the call, and the position of the first; see blocks

# Why a call that is long enough stays dense: the keys of `Stats.dense_because`.
PACKED = "packed batch"
POSITIONS = "positions that restart or leap"
HOLES = "mask with holes"
READY_MASK = "4-D mask"
STATIC_CACHE = "static cache"  # with a mask that is not the plain causal one, a sliding window's for instance
OTHER_MASK = "mask of another shape"
OTHER_CACHE = "cache of unknown length"
OTHER_TEXT = "another text inside a prompt"
SLOWER = "sparse is not faster on this machine"  # measured at attach, which has told it
NOT_RUN = "FFNs that were given other shapes than the model"


@dataclass
class Stats:
    """Tokens (padding not counted) that passed through the model while attached, and forward calls.

    Sparse tokens are those that FFNs did compute sparsely; all others are dense. A call that raises counts nowhere.
    dense_because: reason -> calls that were long enough to be sparse, or part of such a prompt, and were dense nevertheless.
    unread_tokens: sparse tokens that the last layer's FFN left out, because nobody reads what it gives for them.
    skipped_above: tokens that the upper layers did not read (`upper_share`). whole_because: reason -> sparse calls of which
    they read all nevertheless.
    reread_tokens: tokens that were read again (`reread`), dense ones; the other counts have each token once. once_because:
    reason -> sparse calls of which none was nevertheless.
    """

    sparse_tokens: int = 0
    dense_tokens: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    dense_because: dict[str, int] = field(default_factory=dict)
    unread_tokens: int = 0
    skipped_above: int = 0
    whole_because: dict[str, int] = field(default_factory=dict)
    reread_tokens: int = 0
    once_because: dict[str, int] = field(default_factory=dict)

    @property
    def sparse_share(self) -> float:
        return self.sparse_tokens / max(1, self.sparse_tokens + self.dense_tokens)


@dataclass
class Prompt:
    """A prompt whose end is known. end: its columns, those in the cache and padding included, as `attention_mask` counts.

    given: by the caller, and not by `GenerateHook`. start: columns in the cache when its first call came. read: whether all
    of it has been read.
    """

    end: int
    given: bool = False
    start: int | None = None
    read: bool = False

    @property
    def size(self) -> int:
        """Its columns that are not in the cache when it begins."""
        return self.end - (self.start or 0)

    def takes(self, past: int, width: int) -> bool:
        """Whether a call of `width` columns behind `past` cached ones belongs to this prompt, and not to another text."""
        if self.start is None:
            self.start = past
        whole = past + width >= self.end
        if past < self.start or (self.read and not whole):
            return False
        self.read |= whole
        return True

    def part(self, row: Row, past: int, width: int) -> tuple[int, int]:
        """How many new tokens of a sequence are prompt, in this and other calls, and the row of the call that it ends at."""
        first, last, position = row
        end = self.end if last == width else min(self.end, past + last)  # right padding ends it before
        return end - max(past + first - position, self.start or 0), end - past


@dataclass
class _Running:
    """A call between its two hooks. outer: the plan of a model that is running around it. tokens: those of the call that are
    not padding; None for a call that could not be read at all. asked: what is done with what its end attends to, or why
    nothing. arguments: of the call, by name."""

    outer: Plan | None
    outer_watcher: attended.Watcher | None
    plan: Plan | None = None
    tokens: int | None = None
    reason: str | None = None
    asked: Upper | Reread | str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


class _Said(threading.local):
    """What a thread has said about its calls."""

    dense = False
    whole = False  # somebody watches all that is computed
    read: int | None = None  # of a sequence nothing is read but the logits of so many last tokens
    prompt: Prompt | None = None
    counted = False  # `after` has run, in a compiled call


class Calls:
    """Reads and counts the calls of one attached model, from any number of threads.

    parameters: names of the base model's arguments, in order. layers: how many it has. thins: False if no layer skips a neuron.
    gains: False if sparse was found to be no faster, and all stays dense. own: what the model makes where it is given no cache,
    for `upper_share` and `reread`.
    """

    def __init__(
        self, config: PrefillConfig, parameters: list[str], layers: int, thins: bool, gains: bool = True, own: Any = None
    ):
        self.own = own
        self.config, self.parameters, self.layers, self.thins, self.gains = config, parameters, layers, thins, gains
        self.stats = Stats()
        self.said = _Said()
        self._lock = threading.Lock()
        self._threads = threading.local()

    @contextmanager
    def saying(self, **said: Any) -> Iterator[None]:
        """Inside, this thread says so: a field of `_Said`."""
        before = {name: getattr(self.said, name) for name in said}
        vars(self.said).update(said)
        try:
            yield
        finally:
            vars(self.said).update(before)

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the call that is about to run, and put its plan where the FFNs find it."""
        running = _Running(current_plan.get(), attended.watcher.get())
        read, self.said.read = self.said.read, None  # of this call; a hook may call the base model inside it
        current_plan.set(None)
        attended.watcher.set(None)
        self._running().append(running)
        running.arguments = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        named = {**running.arguments, "cache": kv_cache.find(running.arguments, self.parameters)}
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
            return  # the model will say what is wrong
        self._read(running, (tokens.shape[0], tokens.shape[1]), named, read)
        current_plan.set(running.plan)
        attended.watcher.set(running.asked if isinstance(running.asked, Upper | Reread) else None)

    def reread(self, forward: Callable[..., Any], output: Any) -> None:
        """Read some tokens of the call that has given `output` again, where that is asked for. forward: the base model's."""
        running = self._running()[-1]
        again = running.asked
        if isinstance(again, Reread) and again.plan.runs:
            attended.watcher.set(None)
            name = kv_cache.NAME if kv_cache.NAME in self.parameters else kv_cache.OLD_NAME
            again.run(forward, running.arguments, output, name)

    def decoding(self, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of `compiled`, the causal LM as `generate` has it for decode steps: they are counted here, because they pass
        no code of ours (`fastfill.compiling`)."""
        with self.saying(counted=False):
            output = compiled(*args, **kwargs)
            tokens = 0 if self.said.counted else compiling.one_token(args, kwargs)
        with self._lock:
            self.stats.dense_tokens += tokens
            self.stats.dense_calls += tokens > 0
        return output

    def after(self, done: bool) -> None:
        """Count the call that has run. done: False if it raised."""
        self.said.counted = True
        stack = self._running()
        running = stack.pop() if stack else _Running(None, None)
        current_plan.set(running.outer)
        attended.watcher.set(running.outer_watcher)
        if not done or running.tokens is None:
            return
        plan, reason = running.plan, running.reason
        sparse = plan.sparse_tokens if plan and plan.runs and self.thins else 0
        if plan and not plan.runs and self.thins:
            reason = NOT_RUN
        asked = running.asked
        skipped = asked.skipped if isinstance(asked, Upper) else 0
        unused = asked if isinstance(asked, str) else asked and asked.why
        unread = sparse - skipped if plan and False in plan.runs else 0
        with self._lock:
            stats = self.stats
            stats.sparse_tokens += sparse
            stats.dense_tokens += running.tokens - sparse
            stats.unread_tokens += unread
            stats.sparse_calls += sparse > 0
            stats.dense_calls += sparse == 0
            known = reason in (None, SLOWER) or reason in stats.dense_because
            if reason:
                stats.dense_because[reason] = stats.dense_because.get(reason, 0) + 1
            if unused:
                counts = stats.once_because if self.config.reread else stats.whole_because
                counts[unused] = counts.get(unused, 0) + 1
            stats.skipped_above += skipped
            stats.reread_tokens += asked.tokens if isinstance(asked, Reread) else 0
        if not known:
            warnings.warn(
                f"fastfill: a call of {running.tokens} tokens stayed dense: {reason}. Further ones are counted in "
                '`attached.stats.dense_because`; see docs/transformers.md, "What stays dense".',
                stacklevel=2,
            )

    def _running(self) -> list[_Running]:
        """This thread's calls between their hooks, innermost last; nearly always at most one."""
        if not hasattr(self._threads, "running"):
            self._threads.running = []
        return self._threads.running

    def _read(self, running: _Running, shape: tuple[int, int], named: dict[str, Any], read: int | None) -> None:
        """Fill in tokens, and the plan or the reason against it. read: as `_Said.read`."""
        batch, width = shape
        running.tokens = batch * width
        if width < 2:
            return  # a decode step: nothing is looked at
        prompt, least = self.said.prompt, self.config.min_tokens
        past = cached(named["cache"])
        mine = prompt is None or prompt.takes(past or 0, width)
        if prompt and (past or 0) >= prompt.end:
            return  # behind the prompt, drafts to be checked for instance
        rows = OTHER_CACHE if past is None else call_rows(shape, past, named)
        if not isinstance(rows, str):
            running.tokens = sum(last - first for first, last, _ in rows)
        thin = self.config.upper_share < 1
        if not (self.thins or thin or self.config.weights == "int8") or self.said.dense:
            return
        if past is not None and mine and not isinstance(rows, str):
            parts = [prompt.part(row, past, width) for row in rows] if prompt else None
            running.plan = blocks.make_plan(rows, width, self.config, parts)
            if running.plan and not self.gains:
                running.plan, running.reason = None, SLOWER
            if running.plan and read and not self.said.whole and running.plan.ends_before(read):
                running.plan = replace(running.plan, unread=True)
            again = self.thins and self.config.reread > 0
            if running.plan and (thin or again):
                makes = named["cache"] is None and named.get("use_cache") is not False
                cache, end = self.own if makes else named["cache"], prompt.end if prompt else None
                use = upper.of_call if thin else reread.of_call
                running.asked = use(running.plan, self.config, self.layers, cache, rows, end)
        elif (prompt.size if prompt and mine else width) >= least:
            running.reason = rows if isinstance(rows, str) else OTHER_TEXT


def cached(cache: Any) -> int | None:
    """Columns in the cache, or None if it does not say."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError):
        return None


def call_rows(shape: tuple[int, int], past: int, named: dict[str, Any]) -> list[Row] | str:
    """Which rows of a base-model call are tokens, and at which positions; or the reason why that cannot be told.

    shape: (batch, T). past: columns in the cache. named: the call's arguments by name, `cache` among them.
    """
    batch, width = shape
    if any("cu_seq" in name and value is not None for name, value in named.items()):
        return PACKED
    mask = named.get("attention_mask")
    if isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim == 4):
        fixed = getattr(named["cache"], "is_compileable", False)  # `generate` makes ready masks for these
        mask = plain_mask(mask, batch, past, width) if fixed else None
        if mask is None:
            return STATIC_CACHE if fixed else READY_MASK
    if mask is None:
        rows: list[Row] | None = [(0, width, past)] * batch
    elif isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= past + width:
        rows = blocks.rows_from_mask(mask[:, : past + width], past)  # a static cache may bring a longer mask
    else:
        return OTHER_MASK
    if rows is None:
        return HOLES
    positions = named.get("position_ids")
    if isinstance(positions, torch.Tensor):
        if positions.ndim != 2 or positions.shape[1] != width:
            return POSITIONS
        host = positions.cpu().expand(batch, -1)
        for row, (first, last, _) in zip(host, rows, strict=True):
            if last > first and bool((row[first:last].diff() != 1).any()):
                return POSITIONS
    return rows


def plain_mask(ready: Any, batch: int, past: int, width: int) -> torch.Tensor | None:
    """The (batch, past + T) mask of ones and zeros from which a ready causal one was made; None if it is not that.

    ready: (batch or 1, heads or 1, T, at least past + T), True or 0.0 where a query sees a key, False or hugely negative where
    it does not; or several by the layers' kind of attention, of which that for full attention tells most.
    """
    columns = past + width
    if isinstance(ready, dict):
        ready = ready.get("full_attention", next(iter(ready.values()), None))
    if ready is None:
        return torch.ones(batch, columns, dtype=torch.bool)
    if not isinstance(ready, torch.Tensor) or not (ready.dtype == torch.bool or ready.is_floating_point()):
        return None
    mask: torch.Tensor = ready
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] != width or mask.shape[3] < columns:
        return None
    valid = _seen(mask[:, 0, -1, :columns])  # the last query sees every token before it, whether it is one itself or not
    plain = True
    for queries in torch.arange(width, device=mask.device).split(1024):  # the whole comparison at once would be as large again
        seen = mask[:, :, queries]
        causal = torch.arange(mask.shape[3], device=mask.device) <= past + queries[:, None]
        wanted = causal[:, :columns] & valid[:, None, None]
        right = torch.zeros_like(seen, dtype=torch.bool)
        right[..., :columns] = _seen(seen[..., :columns]) == wanted
        right[..., columns:] = _hidden(seen[..., columns:])
        if mask.dtype != torch.bool:
            right &= _seen(seen) | _hidden(seen)
        real = valid[:, past + queries]  # what padding sees does not matter
        plain = plain and bool((right.all(-1) | ~real[:, None]).all())
    return valid.expand(batch, -1) if plain else None


def _seen(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    return ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min


class GenerateHook(StandIn):
    """Stands in for a model's `generate`: while it runs, the prompt ends where its input does.

    A prompt that the caller has told goes before. A copy of the model gets its own method.
    """

    def __init__(self, generate: Callable[..., Any], calls: Calls):
        super().__init__(generate, self._run_told)
        self._calls = calls

    def _run_told(self, generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.prompt(generate_input(*args, **kwargs)):
            return generate(*args, **kwargs)

    def prompt(self, end: int | None, **said: Any) -> AbstractContextManager[None]:
        told = self._calls.said.prompt
        if end is not None and not (told and told.given):
            said["prompt"] = Prompt(end)
        return self._calls.saying(**said)


def generate_input(inputs: Any = None, *_: Any, **kwargs: Any) -> int | None:
    """Columns of the prompt of `generate`, those in its cache included; None for what is not one tensor of sequences.

    Behind a cache the input is the whole sequence, or its new part with the whole sequence's mask.
    """
    given = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
    tokens = next((one for one in given if one is not None), None)
    if tokens is None:
        return 1  # it begins with the token for the beginning
    mask = kwargs.get("attention_mask")
    widths = [one.shape[1] for one in (tokens, mask) if isinstance(one, torch.Tensor) and one.ndim >= 2]
    return max(widths, default=None)


def prompt(model: Any, end: int, read: int | None = None) -> AbstractContextManager[None]:
    """`Attachment.prompt` for who has only the model: does nothing if no artifact is on it. read: that of the base model's
    output only so many last tokens are read."""
    hook = vars(model).get("generate")
    return hook.prompt(end, read=read) if isinstance(hook, GenerateHook) else nullcontext()
