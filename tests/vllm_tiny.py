"""Tiny random models inside vLLM. The engines run in this process, one after the other, so that tests can look inside.

H = 128, F = 256, heads of 32 (vLLM's CPU attention knows no smaller ones), two layers, fp32; blocks of 32.
"""

# ruff: noqa: E402 (first of all, whether there is a vLLM)

import functools
import gc
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

vllm = pytest.importorskip("vllm", reason="needs vLLM (make test-vllm)")

import torch
from conftest import VOCABULARY, tiny_artifact, tiny_model, tiny_tokenizer

from fastfill import artifact as artifacts
from fastfill.config import PrefillConfig
from fastfill.vllm_plugin import settings

BLOCK, HEAD, MIN_TOKENS = 32, 32, 96
PREFILL = PrefillConfig(sparsity=0.5, block_size=BLOCK, dense_head=HEAD, min_tokens=MIN_TOKENS, dense_tail=0)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "initializer_range": 128**-0.5,
    "max_position_embeddings": 1024,
}


def vllm_model(family="llama", **changes):
    return tiny_model(family, **{**SHAPE, **changes})


@functools.cache
def folders(family="llama", seed=0):
    """(model folder, artifact folder) of a family; made when asked for, gone when the process ends."""
    root, model = Path(_root().name) / f"{family}-{seed}", vllm_model(family, seed=seed)
    model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    artifacts.save(tiny_artifact(model, prefill=PREFILL), root / "artifact", readme="tiny\n")
    return str(root / "model"), str(root / "artifact")


@functools.cache
def _root():
    return tempfile.TemporaryDirectory(prefix="fastfill-vllm-")


@contextmanager
def engine(model, artifact=None, *, family="llama", fastfill=None, **arguments):
    """A running LLM; without an artifact it is stock. fastfill: settings of the plugin."""
    from vllm.distributed import cleanup_dist_env_and_memory

    values = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True, "enable_prefix_caching": False, "seed": 0}
    if artifact is not None:
        values["hf_overrides"] = settings.overrides(family, artifact, **{"min_tokens": MIN_TOKENS, **(fastfill or {})})
    llm = vllm.LLM(model, **{**values, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def inside(llm):
    """vLLM's scheduler and the model of an engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler, runner_of(llm).get_model()


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def prompt(tokens, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()


def answer(llm, prompts, tokens=12, sparse=True, n=1):
    """RequestOutputs of greedy continuations, with the log-probability of each new token."""
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1, extra_args={"fastfill": sparse}
    )
    if n > 1:
        params = vllm.SamplingParams(n=n, temperature=1.0, seed=7, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def tokens_of(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(output):
    new = output.outputs[0]
    return [line[token].logprob for token, line in zip(new.token_ids, new.logprobs, strict=True)]
