"""vLLM's scheduler, with prefix caches that keep sparse and dense requests apart."""

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
        self._min_tokens = settings.read(vllm_config).prefill.min_tokens
        super().__init__(vllm_config, *args, **kwargs)

    def add_request(self, request: Any) -> None:
        embeddings = request.prompt_token_ids is None
        if not embeddings and is_sparse(request.sampling_params, request.num_prompt_tokens, self._min_tokens):
            request.cache_salt = f"{settings.SALT}{request.cache_salt or ''}"
            request.block_hashes.clear()  # they were made without the salt
            request.update_block_hashes()
        super().add_request(request)  # type: ignore[misc]


class SaltedScheduler(_Salted, Scheduler):
    pass


class SaltedAsyncScheduler(_Salted, AsyncScheduler):
    pass


def scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """What vLLM makes its scheduler with; it knows only now whether that is the asynchronous one."""
    kind = SaltedAsyncScheduler if vllm_config.scheduler_config.async_scheduling else SaltedScheduler
    return kind(vllm_config, *args, **kwargs)
