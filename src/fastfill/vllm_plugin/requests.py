"""Which requests of a step are prefilled sparsely, and how long their prompts are.

A model sees only where each request's tokens lie. vLLM tells logits processors what else is known of a request, before
every step and row by row; so this is one, which leaves all logits alone.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from fastfill.vllm_plugin import settings, steps

_KEY = "fastfill.requests"


class Requests(LogitsProcessor):
    """prompts: row of the running batch -> length of the prompt (or `steps.EMBEDDINGS`), for requests that are to be read
    sparsely. whole: the rows that ask for the log-probabilities of their prompts."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        settings.wants_sparse(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.min_tokens = settings.read(vllm_config).prefill.min_tokens
        self.prompts: dict[int, int] = {}
        self.whole: dict[int, bool] = {}
        # Where the model of the same engine finds it, and as long as that engine lives.
        vllm_config.compilation_config.static_forward_context[_KEY] = self

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.prompts, batch_update, self._prompt)
        process_dict_updates(self.whole, batch_update, lambda params, *_: params.prompt_logprobs is not None or None)

    def _prompt(self, params: Any, prompt: list[int] | None, _output: list[int]) -> int | None:
        if not prompt:
            return steps.EMBEDDINGS if settings.wants_sparse(params.extra_args) else None
        return len(prompt) if is_sparse(params, len(prompt), self.min_tokens) else None


def is_sparse(params: Any, prompt_tokens: int, min_tokens: int) -> bool:
    """Whether a request is prefilled sparsely at all; scheduler and model decide by the same rule."""
    return prompt_tokens >= min_tokens and settings.wants_sparse(params.extra_args if params is not None else None)


def of(vllm_config: Any) -> Requests:
    return vllm_config.compilation_config.static_forward_context[_KEY]
