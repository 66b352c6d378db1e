"""The plugin that puts an artifact to work inside vLLM. vLLM calls `register` in each of its processes; see docs/vllm.md.

Registering only adds names: without an artifact nothing of this package runs.
"""

from __future__ import annotations

from fastfill import families

MODELS = {row.vllm: f"Fastfill{row.vllm}" for row in families.FAMILIES.values() if row.vllm}  # vLLM's architecture -> ours


def register() -> None:
    """The entry point in vLLM's group `vllm.general_plugins`: adds our architectures and their configuration hook.

    Both are looked up by an architecture's name, and nothing has such a name until somebody asks for it.
    """
    # `from vllm import ModelRegistry` can fail in the process that inspects a model's class.
    from vllm.model_executor.models.registry import ModelRegistry

    for ours in MODELS.values():
        if ours not in ModelRegistry.models:
            ModelRegistry.register_model(ours, f"{__name__}.models:{ours}")
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError:  # a version outside our range: our models say so when they are asked for
        return

    class Configure(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config) -> None:
            from fastfill.vllm_plugin import settings

            settings.configure(vllm_config)

    for ours in MODELS.values():
        MODELS_CONFIG_MAP.setdefault(ours, Configure)
