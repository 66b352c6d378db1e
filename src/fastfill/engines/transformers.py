"""Prefill and generation through `transformers`, timed."""

from __future__ import annotations

import time
from typing import Any

import torch


def encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Prompt text -> ids (1, T). chat: wrap it as one user turn of the model's chat template."""
    if chat and getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return tokenizer(prompt, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]


def generate(model: Any, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Greedy continuation of ids (1, T) -> new ids (n,)."""
    ids = ids.to(model.device)
    pad = model.config.eos_token_id if model.config.pad_token_id is None else model.config.pad_token_id
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad[0] if isinstance(pad, list) else pad,
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
