"""Checkpoints in eight bits inside vLLM: dense steps are its own, sparse ones read the checkpoint's int8 values."""

# ruff: noqa: E402 (first of all, whether there is a vLLM)

import functools
import json
import statistics
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

vllm = pytest.importorskip("vllm")

from conftest import FAMILIES, one_sentence, tiny_artifact
from test_quantise_script import quantise, read, saved, wide
from test_vllm_prefill import PROMPTS, halves
from test_vllm_serve import configure, refusal
from vllm.model_executor.kernels.linear.scaled_mm import cpu as products
from vllm_tiny import answer, engine, folders, inside, logprobs_of, tokens_of, vllm_model

import fastfill
from fastfill import families, kernels
from fastfill.errors import UserError
from fastfill.kernels import cpu, int8
from fastfill.kernels.int8 import Scales
from fastfill.vllm_plugin import models, settings
from fastfill.vllm_plugin.weights import Checkpoint

pytestmark = pytest.mark.vllm
EXACT = settings.multiplies_bytes_exactly(cpu.isas())
served = pytest.mark.skipif(not EXACT, reason="vLLM's own product of int8 is wrong on this processor: refused")
LONG = PROMPTS[:3]
# The engines' activations are equal to six digits; still a few lie on two sides of a rounding to eight bits, and are then a
# whole step apart where roundings are off by 0.29 steps. All roundings together make 0.10 to 0.16 here (against the model
# in floating point), so one of 128 entries that goes the other way in one of 14 Linears makes about
# 0.16 / 0.29 / sqrt(128 * 14) = 0.013; measured is 1e-6 where there is none, and at most 0.018.
CLOSE = 0.03


def checkpoint(folder, family):
    """(checkpoint in eight bits, artifact of the floating-point model that it was made of)."""
    floating, artifact = folders(family)
    assert quantise.main([floating, str(folder)]) == 0
    return folder, artifact


AMX = products.check_cpu_sgl_kernel(128, 128, torch.int8)


@pytest.fixture(scope="module", autouse=True)
def fp32():
    """With AMX vLLM takes another product, for bf16 and fp16 alone: it has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "check_cpu_sgl_kernel", lambda n, k, dtype: False)
        yield


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """With biases."""
    return checkpoint(tmp_path_factory.mktemp("granite") / "eight", "granite")


@pytest.fixture(scope="module")
def stock(granite):
    """What stock vLLM answers."""
    with engine(str(granite[0])) as llm:
        mlp = inside(llm)[1].model.layers[0].mlp
        assert mlp.gate_up_proj.weight is None and mlp.gate_up_proj.weight_scale.shape == (512, 1)  # packed, and dropped
        return answer(llm, PROMPTS)


def reference(folder, family, ranks=1):
    """A model of transformers with the checkpoint's values, in which every Linear of the layers rounds its input per token; of
    several ranks each rounds its share of what o_proj and down_proj read."""
    model, stored = vllm_model(family), read(folder)
    values = wide(stored)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:  # a head that is tied is not
                parameter.copy_(values[name])
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in stored:
            parts = ranks if name.endswith(("o_proj", "down_proj")) else 1
            rows, scale = stored[f"{name}.weight"].chunk(parts, 1), stored[f"{name}.weight_scale"].flatten()
            module.forward = functools.partial(linear, rows, scale, module.bias)
    return model


def linear(shares, scale, bias, x):
    """x (..., K), the rows (N, K) in shares of their columns -> (..., N)."""
    parts = x.reshape(-1, x.shape[-1]).chunk(len(shares), 1)
    y = sum(int8.linear(part, share.contiguous(), scale) for part, share in zip(parts, shares, strict=True))
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def check(model, outputs, prompts, attachment=None):
    """The log-probabilities of the answers are those of a model of transformers that is told them."""
    assert max(differences(model, outputs, prompts, attachment)) <= CLOSE


def differences(model, outputs, prompts, attachment=None):
    """Between the log-probabilities of the answers and those of a model of transformers that is told them."""
    found = []
    for ids, output in zip(prompts, outputs, strict=True):
        (new,) = tokens_of([output])
        with torch.no_grad(), attachment.prompt(len(ids)) if attachment else nullcontext():
            logits = model(input_ids=torch.tensor([ids + new[:-1]])).logits[0, len(ids) - 1 :]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0].tolist()
        found += [abs(a - b) for a, b in zip(logprobs_of(output), wanted, strict=True)]
    return found


@contextmanager
def attached(made, family="granite", ranks=1):
    """`reference`, and the artifact on it; its projections stay those of the reference."""
    model = reference(made[0], family, ranks)
    with pytest.warns(UserWarning, match="requantised or rounded"):
        attachment = fastfill.attach(model, made[1], weights="int8")
    with attachment:
        for projection in attachment.projections:
            projection.on = False
        yield model, attachment


@served
def test_stock_vllm_computes_what_the_checkpoint_says(granite, stock):
    check(reference(granite[0], "granite"), stock, PROMPTS)


@served
def test_sparse_steps_read_the_checkpoints_values_and_dense_ones_are_vllms(granite, stock):
    """The op, to the last bit, is that of the file's rows and scales; whole answers are those of the transformers engine that
    rounds in the same places."""
    seen = {}

    def tap(step, ffn, plan, value):
        if value is not None:
            seen.setdefault(step, (plan, value.clone()))

    with engine(str(granite[0]), granite[1], family="granite") as llm:
        _, loaded = inside(llm)
        loaded._layers[0].ffn.taps.append(tap)  # the last layer computes no sparse row here
        found, off = answer(llm, PROMPTS), answer(llm, PROMPTS, sparse=False)
        (counts,) = llm.collective_rpc("fastfill_stats")
        bias = loaded._layers[0].ffn.ffn.down_bias
        with pytest.raises(UserError, match="weights of a running engine cannot be replaced"):
            llm.collective_rpc("reload_weights")
        assert tokens_of(answer(llm, PROMPTS)) == tokens_of(found)
        assert tokens_of(answer(llm, PROMPTS, sparse=False)) == tokens_of(stock)
    assert counts["sparse_tokens"] == 448 + 64 + 256 and counts["dense_because"] == {}
    # A second copy of the int8 weights; predictor and compensator; the scales are vLLM's own.
    assert counts["extra_bytes"] == 2 * (3 * 128 * 256 + 4 * (8 * (128 + 256) + 256 + 2 * 8 * 128 + 128))
    assert tokens_of(off) == tokens_of(stock)
    assert [logprobs_of(output) for output in off] == [logprobs_of(output) for output in stock]

    stored, name = read(granite[0]), "model.layers.0.mlp"
    gate, up, down = (stored[f"{name}.{role}_proj.weight"] for role in families.ROLES)
    scales = Scales(*(stored[f"{name}.{role}_proj.weight_scale"].flatten() for role in families.ROLES))
    plan, x = seen["input"]
    ids, bounds = plan.with_dense(seen["selected"][1], 256)
    biases = {f"{role}_bias": stored[f"{name}.{role}_proj.bias"] for role in ("gate", "up")}
    assert all(biases[key].abs().max() > 0 for key in biases) and bias.abs().max() > 0
    y = kernels.sparse_ffn(
        x,
        gate,
        up,
        down.t().contiguous(),
        ids,
        rows=plan.rows,
        id_offsets=bounds,
        scales=scales,
        init=seen["corrected"][1],
        **biases,
    )
    assert torch.equal(y, seen["output"][1])

    with attached(granite) as (model, attachment):
        check(model, found, PROMPTS, attachment)
        assert attachment.stats.sparse_tokens == 448 + 64 + 256


@served
@pytest.mark.skipif(not AMX, reason="no AMX")
def test_with_amx_dense_steps_are_vllms(granite, monkeypatch):
    """Whose rows lie in another order there. In bf16 a sparse answer is as far from the reference in fp32 as a dense one: on
    average 0.040 and 0.052 here, and 0.315 from one that is told that all is dense."""
    monkeypatch.setattr(products, "check_cpu_sgl_kernel", lambda n, k, dtype: dtype == torch.int8 and n % 32 == k % 32 == 0)
    with engine(str(granite[0]), dtype="bfloat16") as llm:
        assert inside(llm)[1].model.layers[0].mlp.gate_up_proj.weight is not None  # packed by that kernel
        stock = answer(llm, PROMPTS)
    with engine(str(granite[0]), granite[1], family="granite", dtype="bfloat16") as llm:
        found, off = answer(llm, PROMPTS), answer(llm, PROMPTS, sparse=False)
        (counts,) = llm.collective_rpc("fastfill_stats")
    assert counts["sparse_tokens"] == 448 + 64 + 256 and counts["dense_because"] == {}
    assert tokens_of(off) == tokens_of(stock)
    assert [logprobs_of(output) for output in off] == [logprobs_of(output) for output in stock]
    rounding = statistics.mean(differences(reference(granite[0], "granite"), stock, PROMPTS))
    with attached(granite) as (model, attachment):
        assert statistics.mean(differences(model, found, PROMPTS, attachment)) < 2 * rounding
        assert statistics.mean(differences(model, found, PROMPTS)) > 4 * rounding  # told that all is dense


@served
def test_one_copy_computes_dense_tokens_too(granite, stock):
    with engine(str(granite[0]), granite[1], family="granite", fastfill={"one_copy": True}) as llm:
        _, loaded = inside(llm)
        found, off = answer(llm, PROMPTS), answer(llm, PROMPTS, sparse=False)
        assert loaded.stats.sparse_tokens == 448 + 64 + 256
        assert loaded.extra_bytes == 2 * 4 * (8 * (128 + 256) + 256 + 2 * 8 * 128 + 128)
        assert not any("gate_up_proj" in name for name, _ in loaded.named_modules())
    check(reference(granite[0], "granite"), off, PROMPTS)
    with attached(granite) as (model, attachment):
        check(model, found, PROMPTS, attachment)


@served
def test_two_ranks_share_rows_and_scales(tmp_path):
    """Of Phi-3 each rank takes its rows of gate and of up, and their scales, from one weight; down's scales are whole on both.
    Each rounds on its own what o_proj and down read."""
    folder, artifact = checkpoint(tmp_path / "eight", "phi3")
    ranks = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 2**26}
    dtype = "bfloat16" if AMX else "float32"  # the ranks are processes, which the fixture does not reach
    with engine(str(folder), artifact, family="phi3", dtype=dtype, **ranks) as llm:
        found, off = answer(llm, LONG), answer(llm, LONG, sparse=False) if AMX else []
        counts = llm.collective_rpc("fastfill_stats")
    assert [count["sparse_tokens"] for count in counts] == [448 + 64 + 256] * 2
    with attached((folder, artifact), "phi3", ranks=2) as (model, attachment):
        halves(attachment)
        if AMX:
            rounding = statistics.mean(differences(reference(folder, "phi3", 2), off, LONG))
            assert statistics.mean(differences(model, found, LONG, attachment)) < 2 * rounding
        else:
            check(model, found, LONG, attachment)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_knows_the_checkpoint_in_eight_bits(tmp_path, family):
    """Before it is loaded and while it is, whichever of rows and scales comes first; and no other."""
    artifact = tiny_artifact(saved(tmp_path / "model", family))
    other = tiny_artifact(saved(tmp_path / "other", family, seed=1))
    assert quantise.main([str(tmp_path / "model"), str(tmp_path / "eight")]) == 0
    stored = read(tmp_path / "eight")
    for weights in (stored, dict(reversed(stored.items()))):
        passed = Checkpoint(weights.items())
        assert dict(passed).keys() == stored.keys()
        passed.check(artifact)
        with pytest.raises(UserError, match="other weights"):
            passed.check(other)
    settings.check_checkpoint(artifact, tmp_path / "eight")
    with pytest.raises(UserError, match="other weights"):
        settings.check_checkpoint(other, tmp_path / "eight")
    lost = next(name for name in stored if name.endswith("layers.1.mlp.down_proj.weight_scale"))
    passed = Checkpoint((name, weight) for name, weight in stored.items() if name != lost)
    assert lost not in dict(passed)
    with pytest.raises(UserError, match="no down weights of layer 1"):
        passed.check(artifact)


def test_without_avx512_vnni_eight_bits_are_refused(tmp_path, monkeypatch):
    """vLLM's dense steps would be wrong. On other processors than x86 nothing is known of it."""
    folder, artifact = checkpoint(tmp_path / "eight", "llama")
    here = {"avx512_vnni": False, "avx512": False, "avx_vnni": True, "avx2": True, "portable": True}
    monkeypatch.setattr(cpu, "isas", lambda: here)
    words = refusal(str(folder), artifact)
    assert "needs AVX-512 VNNI, which this processor lacks" in words
    assert settings.multiplies_bytes_exactly({**here, "avx512_vnni": True})
    assert settings.multiplies_bytes_exactly({"portable": True}) and settings.multiplies_bytes_exactly({})


def test_other_quantisations_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "multiplies_bytes_exactly", lambda isas: True)
    folder, artifact = checkpoint(tmp_path / "eight", "llama")
    assert configure(str(folder), artifact).model_config.quantization == "compressed-tensors"
    assert "for vLLM the checkpoint itself must be in eight bits" in refusal(str(folder), artifact, {"weights": "int8"})
    assert "does not read ('fp8')" in refusal(folders()[0], artifact, quantization="fp8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "activations int8 static per tensor" in refusal(str(folder), artifact)
    config = configure(*folders())  # a model that works, as it would be on a GPU
    config.scheduler_config.scheduler_cls, config.parallel_config.worker_extension_cls = None, ""
    config.model_config.quantization = "compressed-tensors"
    document = quantise.scheme()
    config.model_config.model_arch_config = SimpleNamespace(quantization_config=document)
    settings.refuse(config)
    config.device_config = SimpleNamespace(device_type="cuda")
    with pytest.raises(UserError, match="on CPUs only") as refused:
        settings.refuse(config)
    one_sentence(refused.value)


def test_an_ffn_is_in_eight_bits_as_a_whole(monkeypatch):
    """`ignore` can leave down in floating point, or whole FFNs."""
    monkeypatch.setattr(models, "get_tensor_model_parallel_rank", lambda: 0)
    family = families.FAMILIES["llama"].fused
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    model = SimpleNamespace(_family=family, _config=vllm_model().config, _vllm_config=config)

    def part(*kinds):
        linears = [SimpleNamespace(weight=torch.ones(4, 2).to(k), weight_scale=torch.ones(4, 1), bias=None) for k in kinds]
        module = SimpleNamespace(gate_up_proj=linears[0], down_proj=linears[1])
        return models.SparsePrefill._part(model, module)

    for kinds in ((torch.int8, torch.float32), (torch.float32, torch.int8)):
        with pytest.raises(UserError, match="one part of an FFN in eight bits and another not") as refused:
            part(*kinds)
        one_sentence(refused.value)
    plain, eight = part(torch.float32, torch.float32), part(torch.int8, torch.int8)
    assert plain.scales is None and plain.dtype == torch.float32
    assert [scale.shape for scale in eight.scales] == [(2,), (2,), (4,)] and eight.dtype == torch.bfloat16
