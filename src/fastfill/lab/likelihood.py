"""How likely the right answer is after a dense or a sparse prefill: every example counts, guessed or not.

A prompt is prefilled once, in one call of the base model. What follows starts from its last hidden state and its cache, and
is dense, as decoding is: the tokens of the right answer (teacher-forced), and the answer that the model generates (greedy).
Logits are computed only where they are needed, a few tokens at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastfill import calls, kv_cache
from fastfill.engines import transformers as engine
from fastfill.families import Head
from fastfill.lab import intervals

MOVING = ("dynamic", "longrope")  # rotations that depend on the longest sequence of a call
CHUNK = 64  # answer tokens whose logits (CHUNK, V) are in memory at a time

Row = dict[str, Any]


def answer_ids(tokenizer: Any, answers: Sequence[str], after: str, most: int) -> tuple[torch.Tensor, ...]:
    """Right answers -> ids (n,) of each, as they follow `after`, the plain text that the prompt ends with ("" after a chat
    template); at most `most` tokens of each, and none twice.

    A space comes between a prompt such as "Answer:" and its answer, as a model would write it; Chinese has none.
    """
    open_end = after[-1:].isascii() and not after[-1:].isspace()
    found = {}
    for answer in answers:
        text = f" {answer}" if after and open_end and not answer[:1].isspace() else answer
        ids = _behind(tokenizer, after[-1:] or "\n", text)[:most]
        if answer.strip() and ids:
            found[tuple(ids)] = torch.tensor(ids, dtype=torch.long)
    return tuple(found.values())


def _behind(tokenizer: Any, before: str, text: str) -> list[int]:
    """Ids of text behind a character, because some tokenizers put a space before what begins a text. Where the character would
    melt into the text's first token (it is a token of the prompt already), those of the text alone."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    start, whole = ids(before), ids(before + text)
    return whole[len(start) :] if whole[: len(start)] == start else ids(text)


@dataclass
class Prompt:
    """A prefilled prompt. state: (1, H), the last hidden state of its last token. cache: keys and values of all."""

    state: torch.Tensor
    cache: Any


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> Prompt:
    """Prefill ids (1, T), in the mode that the attachment is in."""
    with calls.prompt(model, ids.shape[1], read=1):
        out = model.base_model(input_ids=ids.to(model.device), use_cache=True)
    return Prompt(out.last_hidden_state[0, -1:].clone(), kv_cache.left(out))


@torch.no_grad()
def states(model: Any, prompt: Prompt, answer: torch.Tensor) -> torch.Tensor:
    """The hidden states (n, H) that predict the tokens of an answer (n,): the prompt's last, then those of all but the
    answer's last. The prompt stays as it is."""
    if len(answer) == 1:
        return prompt.state
    inputs = answer[None, :-1].to(model.device)
    cache = kv_cache.given(model.base_model, copy.deepcopy(prompt.cache))
    out = model.base_model(input_ids=inputs, **cache)
    return torch.cat([prompt.state, out.last_hidden_state[0]])


@torch.no_grad()
def write(model: Any, prompts: Sequence[Prompt], most: Sequence[int]) -> list[list[int]]:
    """The greedy answer to each prompt, up to so many ids, the end-of-sequence id included. All are written together, which is
    faster and rounds a little differently. It takes the prompts' caches."""
    if len(prompts) > 1 and not (_rotates_alike(model.config) and all(map(_whole, prompts))):
        return [write(model, [prompt], [limit])[0] for prompt, limit in zip(prompts, most, strict=True)]
    ends = engine.greedy(model).eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    head, state = Head(model), torch.cat([prompt.state for prompt in prompts])
    places = torch.tensor([[prompt.cache.get_seq_length()] for prompt in prompts], device=model.device)
    cache, mask = (prompts[0].cache, None) if len(prompts) == 1 else _joined(prompts, places)
    held = kv_cache.given(model.base_model, cache)
    new: list[list[int]] = [[] for _ in prompts]
    left = list(range(len(prompts)))  # prompts whose answers go on
    while True:
        tokens = head(state).argmax(-1)
        for index, token in zip(left, tokens.tolist(), strict=True):
            new[index].append(token)
        on = [row for row, index in enumerate(left) if len(new[index]) < most[index] and new[index][-1] not in ends]
        if not on:
            return new
        if len(on) < len(left):
            rows = torch.tensor(on, device=model.device)
            left, tokens, places = [left[row] for row in on], tokens[rows], places[rows]
            mask = None if mask is None else mask[rows]
            cache.batch_select_indices(rows)
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        step = {"attention_mask": mask, "position_ids": places, **held}
        state = model.base_model(input_ids=tokens[:, None], **step).last_hidden_state[:, -1]
        places = places + 1


def _rotates_alike(config: Any) -> bool:
    """Whether a token's rotation depends on its position alone, and not on what else is in the call."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(one for one in found.values() if isinstance(one, dict))]  # some families have one for each kind of layer
    return not any(one.get("rope_type") in MOVING for one in kinds)


def _whole(prompt: Prompt) -> bool:
    """Whether every layer of its cache holds all of the prompt: no windows, no states, no upper layers that left tokens out."""
    from transformers.cache_utils import DynamicLayer

    tokens = prompt.cache.get_seq_length()
    return all(type(layer) is DynamicLayer and layer.get_seq_length() == tokens for layer in prompt.cache.layers)


def _joined(prompts: Sequence[Prompt], lengths: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
    """One cache for prompts of lengths (n, 1), with padding before the shorter ones, and its mask (n, T)."""
    from transformers import DynamicCache

    longest, cache = int(lengths.max()), DynamicCache()

    def padded(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([F.pad(each, (0, 0, longest - each.shape[2], 0)) for each in tensors])

    for index, layers in enumerate(zip(*(prompt.cache.layers for prompt in prompts), strict=True)):
        cache.update(padded([layer.keys for layer in layers]), padded([layer.values for layer in layers]), index)
        for layer in layers:  # or memory would hold all of them twice
            layer.keys = layer.values = None
    mask = torch.arange(longest, device=lengths.device) >= longest - lengths
    return cache, None if mask.all() else mask.long()


def _log_probabilities(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


@torch.no_grad()
def nats(model: Any, hidden: torch.Tensor, answer: torch.Tensor) -> float:
    """Minus the log-likelihood of an answer (n,) by the states (n, H) that predict it."""
    head, answer = Head(model), answer.to(model.device)
    parts = zip(hidden.split(CHUNK), answer.split(CHUNK), strict=True)
    return sum(float(F.nll_loss(_log_probabilities(head, part), ids, reduction="sum")) for part, ids in parts)


@torch.no_grad()
def compare(model: Any, dense: torch.Tensor, sparse: torch.Tensor, answer: torch.Tensor) -> Row:
    """Sums over the tokens of an answer (n,), by the states (n, H) of both runs: minus log-likelihood, KL(dense || sparse)
    of the next token's distribution, and how often the most likely token is the same, apart for the first."""
    head, answer = Head(model), answer.to(model.device)
    nll_dense = nll_sparse = kl = 0.0
    same: list[bool] = []
    for d, s, ids in zip(dense.split(CHUNK), sparse.split(CHUNK), answer.split(CHUNK), strict=True):
        log_d, log_s = _log_probabilities(head, d), _log_probabilities(head, s)
        nll_dense += float(F.nll_loss(log_d, ids, reduction="sum"))
        nll_sparse += float(F.nll_loss(log_s, ids, reduction="sum"))
        kl += float(F.kl_div(log_s, log_d, reduction="sum", log_target=True))
        same += (log_d.argmax(-1) == log_s.argmax(-1)).tolist()
    return {
        "gold_tokens": len(answer),
        "nll_dense": nll_dense,
        "nll_sparse": nll_sparse,
        "kl": kl,
        "same_tokens": sum(same),
        "same_first": same[0],
    }


def summarize(groups: Sequence[Sequence[Row]], seed: int = 0) -> Row | None:
    """Nats per answer token after both prefills, their paired difference with its interval, KL and agreement.

    groups: rows of `compare`, by set. Within a set the tokens of all examples are pooled; sets weigh the same. None without
    rows.
    """
    groups = [group for group in groups if group]
    if not groups:
        return None
    keys = ("gold_tokens", "nll_dense", "nll_sparse", "kl", "same_tokens", "same_first")
    values = [[[float(row[key]) for key in keys] for row in group] for group in groups]
    tokens, dense, sparse, kl, same, first = np.array([np.mean(group, axis=0) for group in values]).T
    draws = intervals.resample(values, seed)
    losses = ((draws[:, :, 2] - draws[:, :, 1]) / draws[:, :, 0]).mean(axis=1)
    return {
        "examples": sum(len(group) for group in groups),
        "tokens": sum(row["gold_tokens"] for group in groups for row in group),
        "dense": round(float(np.mean(dense / tokens)), 4),
        "sparse": round(float(np.mean(sparse / tokens)), 4),
        "loss": round(float(np.mean((sparse - dense) / tokens)), 4),
        "interval": intervals.rounded(intervals.interval(losses, groups), 4),
        "kl": round(float(np.mean(kl / tokens)), 5),
        "top1_agreement": round(float(np.mean(same / tokens)), 4),
        "first_token_agreement": round(float(np.mean(first)), 4),
    }
