"""vLLM's scheduler, with prefix caches that keep sparse and dense requests apart, and chunks that end at block boundaries."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from fastfill.vllm_plugin import settings
from fastfill.vllm_plugin.requests import is_sparse


class _Salted:
    """Adds a salt to the cache of requests that are read sparsely. So a dense request never gets keys and values that were
    computed sparsely, and the other way round."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        prefill = settings.read(vllm_config).prefill
        self._min_tokens, self._block = prefill.min_tokens, prefill.block_size
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.need_mamba_block_aligned_split = True  # so that it asks the method below

    def add_request(self, request: Any) -> None:
        embeddings = request.prompt_token_ids is None
        if not embeddings and is_sparse(request.sampling_params, request.num_prompt_tokens, self._min_tokens):
            request.cache_salt = f"{settings.SALT}{request.cache_salt or ''}"
            request.block_hashes.clear()  # they were made without the salt
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]

    def _mamba_block_aligned_split(self, request: Any, new_tokens: int, *computed: int) -> int:
        """How many of these tokens of a request are computed now: vLLM's hook for models whose chunks must not end anywhere.
        No chunk of ours cuts a block, so that a prompt is read the same way however it is chunked. computed: by others."""
        start = request.num_computed_tokens + sum(computed)
        end = start + new_tokens
        if end >= request.num_prompt_tokens or not (request.cache_salt or "").startswith(settings.SALT):
            return new_tokens
        return max(0, end // self._block * self._block - start)


class SaltedScheduler(_Salted, Scheduler):
    pass


class SaltedAsyncScheduler(_Salted, AsyncScheduler):
    pass


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """What vLLM makes its scheduler with; it knows only now whether that is the asynchronous one."""
    kind = SaltedAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SaltedScheduler
    return kind(vllm_config, *args, **kwargs)
