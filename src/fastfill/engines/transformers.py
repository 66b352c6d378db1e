"""Prefill and generation through `transformers`."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch

from fastfill import attention, calls, context, families, models
from fastfill.artifact import Artifact
from fastfill.attachment import Attachment, Stats, attach
from fastfill.clocks import clocked
from fastfill.cost import Cost
from fastfill.engines import Engine, Prefill
from fastfill.errors import UserError, reason
from fastfill.sparse_ffn import AllNeurons
from fastfill.swap import Swaps


def encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Prompt text -> ids (1, T). chat: wrap it as one user turn of the model's chat template.

    Raises UserError if there is no template, or one that fails.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("The model's tokenizer has no chat template: leave --chat out, or give --no-chat to evaluate.")
        try:
            turn = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that came with the model
            raise UserError(f"The chat template of the model's tokenizer fails: {reason(error)}.") from error
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]


def check_length(model: Any, ids: torch.Tensor, max_new_tokens: int) -> None:
    """Raises UserError if the model cannot hold the prompt (1, T) and its answer."""
    limit = context.positions(model.config)
    if limit and ids.shape[1] + max_new_tokens > limit:
        raise UserError(
            f"The prompt has {ids.shape[1]:,} tokens and the answer up to {max_new_tokens}, more than the {limit:,} that the "
            "model holds; shorten it."
        )


class _Receiver:
    """What `generate` of transformers calls a streamer: it is given the prompt first, then each new id."""

    def __init__(self, receive: Callable[[int, float], None]):
        self.receive, self.prompt_seen, self.begin = receive, False, time.perf_counter()

    def put(self, ids: torch.Tensor) -> None:
        if self.prompt_seen:
            self.receive(int(ids), time.perf_counter() - self.begin)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def greedy(model: Any, **settings: Any) -> Any:
    """A `GenerationConfig` that chooses the likeliest token and nothing else, with a KV cache, up to the model's end tokens.

    Of the checkpoint's own it has the special tokens only. settings: what it shall say beside this.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None) or model.config
    eos = getattr(own, "eos_token_id", None)
    pad = model.config.eos_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        bos_token_id=getattr(own, "bos_token_id", None),
        eos_token_id=eos,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
        **settings,
    )


def generate(
    model: Any, ids: torch.Tensor, max_new_tokens: int, receive: Callable[[int, float], None] | None = None
) -> torch.Tensor:
    """Greedy continuation of ids (1, T) -> new ids (n,), whatever the checkpoint's generation_config asks for.

    receive(id, seconds since this call): called for each new id as soon as it is there; the first one's seconds are the time
    to first token. What it raises ends the generation.
    """
    synchronize(model)
    streamer = _Receiver(receive) if receive else None
    ids = ids.to(model.device)
    # `generate` fills what a configuration leaves open from the model's. So it runs on a view of the model that has ours.
    view = copy.copy(model)
    view.generation_config = greedy(model, max_new_tokens=max_new_tokens)
    vars(view).pop("generate", None)
    with calls.prompt(model, ids.shape[1]):
        out = view.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=view.generation_config, streamer=streamer
        )
    return out[0, ids.shape[1] :]


def time_to_first_token(model: Any, ids: torch.Tensor) -> float:
    """Seconds from ids (1, T) in memory to the first new id: what `generate` takes for one token, tokenising not counted."""
    synchronize(model)
    begin = time.perf_counter()
    generate(model, ids, 1)
    synchronize(model)
    return time.perf_counter() - begin


def synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


class TransformersEngine:
    """A `transformers` model with an artifact on it; see `fastfill.engines.Engine`. attachment, model: what is inside.

    tokenizer: None for a model that has none.
    """

    engine, local = "transformers", True

    def __init__(self, attachment: Attachment, name: str, tokenizer: Any = None):
        self.attachment, self.name, self.tokenizer = attachment, name, tokenizer
        self.model, self.artifact = attachment.model, attachment.artifact
        model = self.model
        self.shape, self.config = model.config, attachment.config
        self.dtype, self.device = str(model.dtype).removeprefix("torch."), str(model.device)
        self.model_mb = sum(t.nbytes for t in chain(model.parameters(), model.buffers())) / 1e6
        self.attached_mb = attachment.extra_bytes / 1e6

    @property
    def cost(self) -> Cost:
        return Cost.attached(self.attachment.ffns)

    @property
    def choices(self) -> dict[str, Any]:
        return self.attachment.choices

    @property
    def stats(self) -> Stats:
        return self.attachment.stats

    def prefill(self, ids: torch.Tensor) -> Prefill:
        return self._counted(lambda: time_to_first_token(self.model, ids))

    def _counted(self, run: Callable[[], Any]) -> Prefill:
        """What a prefill gives, its seconds, and how its tokens were computed."""
        kinds = ("sparse_tokens", "skipped_above", "unread_tokens", "reread_tokens")
        before = [getattr(self.stats, kind) for kind in kinds]
        seconds = run()
        return Prefill(seconds, *(getattr(self.stats, kind) - was for kind, was in zip(kinds, before, strict=True)))

    def generate(
        self, ids: torch.Tensor, max_new_tokens: int, receive: Callable[[int, float], None] | None = None
    ) -> torch.Tensor:
        return generate(self.model, ids, max_new_tokens, receive)

    def dense(self) -> AbstractContextManager[None]:
        return self.attachment.dense()

    @contextmanager
    def all_neurons(self) -> Iterator[None]:
        swaps = Swaps()
        try:
            for ffn in self.attachment.ffns:
                swaps.put(ffn, "dense", AllNeurons(ffn.ffn, ffn.down_t, ffn.kernel))
            for projection in self.attachment.projections:
                swaps.put(projection, "always", True)
            before = attention.always.set(True)
            try:
                with self.attachment.dense():
                    yield
            finally:
                attention.always.reset(before)
        finally:
            swaps.undo()

    def clocks(self) -> AbstractContextManager[dict[str, float]]:
        mixers = families.dissect(self.model).mixers
        return clocked(self.model.device, mixers, self.attachment.modules, self.attachment.ffns)


def engine_of(attached: Attachment | Engine, tokenizer: Any = None) -> Engine:
    """What `fastfill.attach` gave as an `Engine`, named as its artifact names the model; an `Engine` as it is."""
    if isinstance(attached, Attachment):
        return TransformersEngine(attached, attached.artifact.base_model["name"], tokenizer)
    return attached


def inside(engine: Engine, what: str) -> TransformersEngine:
    """The engine as one whose model can be looked into. Raises UserError, which begins with `what`, for any other."""
    if not isinstance(engine, TransformersEngine):
        raise UserError(f"{what} looks inside the model; it needs --engine transformers.")
    return engine


@contextmanager
def load(
    model: str | models.LoadedModel,
    artifact: Artifact,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    packed: bool = False,
    **settings: Any,
) -> Iterator[TransformersEngine]:
    """See `fastfill.engines`. settings: those of `attach`."""
    loaded = models.load(model, dtype, device, packed) if isinstance(model, str) else model
    settings["min_tokens"] = settings.get("min_tokens") or artifact.prefill.min_tokens  # named: rows that lose are measured too
    with attach(loaded.model, artifact, **settings) as attachment:
        yield TransformersEngine(attachment, loaded.name, loaded.tokenizer)
