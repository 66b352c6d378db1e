"""Where a step's requests lie, told by the host.

Attention metadata lies on the device, and who reads it there waits for the device, once a step. Its builder is handed the
same numbers on the host, by the runner and in the order of the runner's batch; ours keeps them with what it builds.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend

from fastfill.vllm_plugin.steps import Batch

_KEY = "fastfill_batch"


def watch(vllm_config: VllmConfig) -> list[str]:
    """Let all attention layers of a model, before the runner makes their builders, build metadata that `batch_of` can read.
    Returns the names of their backends."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    for layer in layers:
        layer.attn_backend = _watched(layer.attn_backend)
    return [layer.attn_backend.get_name() for layer in layers]


def batch_of(metadata: Any) -> Batch | None:
    """The batch that attention metadata was built for; None if the host was not told."""
    return getattr(metadata, _KEY, None)


@functools.cache  # layers of one backend share a builder
def _watched(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            setattr(metadata, _KEY, Batch.of(common_attn_metadata))
            return metadata

    return subclass_attention_backend("Fastfill", backend, Builder)
