"""vLLM's scheduler, with prefix caches that keep sparse and dense requests apart, and chunks that end at block boundaries."""

from __future__ import annotations

import copy
import secrets
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from fastfill.vllm_plugin import settings
from fastfill.vllm_plugin.requests import is_sparse


class _Salted:
    """Salts the cache of requests that are prefilled sparsely, so that sparse and dense requests share no keys and values."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        prefill = settings.read(vllm_config).prefill
        self._min_tokens, self._block, self._tail = prefill.min_tokens, prefill.block_size, prefill.dense_tail
        self._sparse_salt = f"fastfill-{secrets.token_hex(8)}-"  # requests can bring a salt, and none shall guess this one
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self.need_mamba_block_aligned_split = True  # so that it asks the method below

    def add_request(self, request: Any) -> None:
        self._salt(request)
        super().add_request(request)  # type: ignore[misc]

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        super()._update_request_as_session(session, update)  # type: ignore[misc]
        self._salt(session)  # a prompt that comes in parts can grow to one that is sparse

    def _salt(self, request: Any) -> None:
        if request.prompt_token_ids is None or self._is_salted(request):
            return  # a prompt of embeddings stays dense
        if is_sparse(request.sampling_params, request.num_prompt_tokens, self._min_tokens):
            request.cache_salt = f"{self._sparse_salt}{request.cache_salt or ''}"
            request.block_hashes.clear()  # they were made without the salt
            request.update_block_hashes()

    def _is_salted(self, request: Any) -> bool:
        return (request.cache_salt or "").startswith(self._sparse_salt)

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """What the prefix cache has of a request, without its dense tail: a longer prompt may have left that sparse. The other
        way round a page that was some prompt's tail, or its answer, is denser than asked, and is taken."""
        if self._tail and self._is_salted(request):
            end = max(0, request.num_prompt_tokens - self._tail)
            request = copy.copy(request)
            request._all_token_ids = request._all_token_ids[: end + 1]  # a hit ends before the last of these
        return super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]

    def _mamba_block_aligned_split(self, request: Any, new_tokens: int, *computed: int) -> int:
        """How many of these tokens of a request are computed now: vLLM's hook for models whose chunks must not end anywhere.
        No chunk of ours cuts a block, so that chunking does not change how a prompt is computed. computed: by others."""
        start = request.num_computed_tokens + sum(computed)
        end = start + new_tokens
        if end >= request.num_prompt_tokens or not self._is_salted(request):
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
