"""Prefill and generation through `transformers`, timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fastfill import calls, context, models
from fastfill.artifact import Artifact
from fastfill.attachment import Attachment, attach
from fastfill.engines import Prefill, profile
from fastfill.errors import UserError, reason


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


class TransformersRunner:
    """An attached model for `evaluate.speed`; see `fastfill.engines.Runner`."""

    def __init__(self, attachment: Attachment, name: str):
        self.attachment, self.name = attachment, name
        model = attachment.model
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.kernel = attachment.choices["kernel"]
        self.shape, self.config, self.kept = model.config, attachment.config, attachment.kept
        first = attachment.ffns[0]
        self.overhead = (first.predictor.macs_per_token(), first.compensator.macs_per_token() if first.compensator else 0)
        self.model_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
        self.attached_mb = attachment.extra_bytes / 1e6

    def prefill(self, ids: torch.Tensor, sparse: bool) -> Prefill:
        before = self.attachment.stats.sparse_tokens
        with self._mode(sparse):
            seconds = time_to_first_token(self.attachment.model, ids)
        return Prefill(seconds, self.attachment.stats.sparse_tokens - before)

    def split(self, ids: torch.Tensor, sparse: bool) -> dict[str, float]:
        return profile.split(self.attachment, lambda: TransformersRunner.prefill(self, ids, sparse).seconds)

    def peak_mb(self, ids: torch.Tensor, sparse: bool) -> float | None:
        return profile.peak_mb(self.attachment.model.device, lambda: TransformersRunner.prefill(self, ids, sparse))

    def _mode(self, sparse: bool) -> AbstractContextManager[None]:
        return nullcontext() if sparse else self.attachment.dense()


@contextmanager
def bench(
    model: str | models.LoadedModel, artifact: Artifact, *, dtype: str, device: str, **settings: Any
) -> Iterator[TransformersRunner]:
    """A runner for `fastfill bench`; see `fastfill.engines`. settings: those of `attach`."""
    loaded = models.load(model, dtype, device) if isinstance(model, str) else model
    with attach(loaded.model, artifact, **settings) as attachment:
        if loaded.model.device.type == "cuda":
            from fastfill.engines.cuda import CudaRunner

            yield CudaRunner(attachment, loaded.name)
        else:
            yield TransformersRunner(attachment, loaded.name)
