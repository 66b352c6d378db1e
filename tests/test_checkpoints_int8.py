"""Models that come in eight bits: compressed-tensors W8A8 checkpoints, and torchao's Int8Tensor."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import (
    BLOCK,
    PREFILL,
    logits,
    script,
    snapshot,
    tiny_artifact,
    tiny_model,
    tiny_text,
    tiny_tokenizer,
    token_ids,
    user_error,
)
from safetensors.torch import load_file, save_file

import fastfill
from fastfill import eight_bits, families, models, partner
from fastfill.calibration import calibrate
from fastfill.config import CalibrationConfig

TORCHAO = Path(sys.prefix) / "torchao"  # where the Makefile puts it
compressed = pytest.mark.skipif(not importlib.util.find_spec("compressed_tensors"), reason="needs compressed-tensors")
torchao = pytest.mark.skipif(not (TORCHAO.is_dir() or importlib.util.find_spec("torchao")), reason="needs torchao")
ROLES = ("gate", "up", "down")


@pytest.fixture(scope="module", params=["llama", "phi3"])
def checkpoint(request, tmp_path_factory):
    """(floating-point model, folder of the same in W8A8)."""
    pytest.importorskip("compressed_tensors")
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    assert script("quantise").main([str(folder / "model"), str(folder / "eight")]) == 0
    tensors = load_file(folder / "eight" / "model.safetensors")
    weights = model.state_dict()
    for name in [name for name, rows in tensors.items() if rows.dtype == torch.int8]:
        top, low = weights[name].amax(1, keepdim=True), -weights[name].amin(1, keepdim=True)
        scale = torch.where(low > top, low / 128, top / 127)  # as others write them: down to -128,
        scale[::3] *= 1.5  # and with scales that no row's largest value tells
        tensors[name] = (weights[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
        assert tensors[name].min() == -128
    save_file(tensors, folder / "eight" / "model.safetensors", metadata={"format": "pt"})
    return model, folder / "eight"


def loaded(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def rows_of(folder, model):
    """Layer by layer {role: (int8 rows, fp32 scales)}, from the file."""
    tensors, family = load_file(folder / "model.safetensors"), families.of(model.config)
    found = []
    for layer in range(model.config.num_hidden_layers):
        parts = {}
        for role in ROLES:
            name = f"model.layers.{layer}.mlp.{family.linear(role)}.weight"
            share = family.share(role, len(tensors[name]))
            parts[role] = tensors[name][share], tensors[f"{name}_scale"][share].float()[:, 0]
        found.append(parts)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [False, True])
def test_the_checkpoints_own_values_feed_the_op(checkpoint, dtype, used):
    model, folder = checkpoint
    eight = loaded(folder, dtype)
    if used:  # compressed-tensors has dropped the int8 rows by then
        logits(eight, token_ids(1, 4))
    with fastfill.attach(eight, tiny_artifact(model)) as attached:
        assert attached.config.weights == "int8"
        for ffn, stored in zip((one.ffn for one in attached.ffns), rows_of(folder, model), strict=True):
            assert ffn.dtype == dtype
            for role in ROLES:
                rows, scales = stored[role]
                assert torch.equal(getattr(ffn, role), rows)
                assert torch.equal(getattr(ffn.scales, role), scales.to(dtype).float())  # as transformers loads them
        tensors = load_file(folder / "model.safetensors")
        names = {module: name for name, module in eight.named_modules()}
        for projection in attached.projections:
            assert torch.equal(projection.weight, tensors[f"{names[projection.linear]}.weight"])
        assert len(attached.projections) >= 2 * 3
        copied = sum(weight.nbytes for one in attached.ffns for weight in (one.ffn.gate, one.ffn.up, one.down_t))
        assert attached.extra_bytes > copied


def test_dense_calls_are_those_of_transformers(checkpoint):
    model, folder = checkpoint
    ids = token_ids(1, 8 * BLOCK)
    stock = logits(loaded(folder), ids)
    eight = loaded(folder)
    with fastfill.attach(eight, tiny_artifact(model)) as attached:
        sparse = logits(eight, ids)
        assert attached.stats.sparse_tokens == 7 * BLOCK
        with attached.dense():
            assert torch.equal(logits(eight, ids), stock)
        assert torch.equal(logits(eight, ids[:, : BLOCK - 1]), logits(loaded(folder), ids[:, : BLOCK - 1]))  # too short
    assert not torch.allclose(sparse, stock, atol=1e-3)
    assert torch.equal(logits(eight, ids), stock)


def as_near_as(stock, found, exact):
    """Whether what was found is as far from the model that rounds no activations as what the library computes: both round them
    once a Linear, in steps that differ by 127 / 127.5. 1.5: that the errors of one prompt are this much apart by chance."""
    away, own = (float((one - exact).norm() / exact.norm()) for one in (found, stock))
    return 0.001 < away < 1.5 * own


def test_all_neurons_are_as_near_as_transformers_own_eight_bits(checkpoint):
    model, folder = checkpoint
    ids = token_ids(1, 8 * BLOCK)
    eight = loaded(folder)
    stock = logits(eight, ids)
    with eight_bits.unrounded(eight):
        exact = logits(eight, ids)
    with fastfill.attach(eight, tiny_artifact(model), sparsity=0.0):
        found = logits(eight, ids)
    assert as_near_as(stock, found, exact)


def test_changed_weights_are_not_taken_for_int8(checkpoint):
    model, folder = checkpoint
    eight = loaded(folder)
    with fastfill.attach(eight, tiny_artifact(model)):
        before = logits(eight, token_ids(1, 4 * BLOCK))
        down = eight.model.layers[1].mlp.down_proj
        down.weight.data.mul_(1.0 + 1e-2)
        with user_error("no longer the int8 values"):
            logits(eight, token_ids(1, 4 * BLOCK))
        down.weight.data.copy_(loaded_weight(folder, "model.layers.1.mlp.down_proj"))
        assert torch.equal(logits(eight, token_ids(1, 4 * BLOCK)), before)


def loaded_weight(folder, name):
    tensors = load_file(folder / "model.safetensors")
    return tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"].float()


def test_the_partner_is_the_same_model_rounded(checkpoint, recwarn):
    model, folder = checkpoint
    artifact = tiny_artifact(model)
    anatomy = families.dissect(loaded(folder))
    notes = artifact.check_partner(anatomy, False, partner.sample_layers(anatomy))
    assert len(notes) == 1 and "requantised or rounded" in notes[0]
    other = tiny_artifact(tiny_model(model.config.model_type, seed=5))
    with user_error("belongs to another model"):
        other.check_partner(anatomy, True, partner.sample_layers(anatomy))


def test_calibrate_learns_on_the_dequantised_model(checkpoint, tmp_path):
    model, folder = checkpoint
    eight, wide = loaded(folder), copy.deepcopy(model)
    tensors = load_file(folder / "model.safetensors")
    for name, module in wide.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.weight.data = loaded_weight(folder, name)
    config = CalibrationConfig(fit_tokens=512, schedule_tokens=64, steps=2, sequence_length=64, predictor_rank=8)
    text = [tiny_text(900)]
    for one, name in ((eight, "eight"), (wide, "wide")):
        calibrate(one, tiny_tokenizer(), text, tmp_path / name, prefill=PREFILL, config=config, name="tiny")
    found = [snapshot(tmp_path / name)["weights.safetensors"] for name in ("eight", "wide")]
    assert found[0] == found[1]
    linear = eight.model.layers[0].self_attn.o_proj
    x = torch.randn(3, linear.in_features)
    assert not torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))  # it rounds again
    with fastfill.attach(eight, tmp_path / "eight") as attached:
        logits(eight, token_ids(1, 4 * BLOCK))
        assert attached.stats.sparse_tokens


def test_the_loader_takes_it(checkpoint, monkeypatch):
    model, folder = checkpoint
    found = models.load(str(folder), "fp32")
    with fastfill.attach(found.model, tiny_artifact(model)) as attached:
        found.model.generate(token_ids(1, 4 * BLOCK), max_new_tokens=3, do_sample=False)
        assert attached.stats.sparse_tokens == 3 * BLOCK
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with user_error(r"pip install 'fastfill\[int8\]'"):
        models.load(str(folder), "fp32")


@compressed
@pytest.mark.parametrize(
    "weights, activations, words",
    [
        ({}, {"dynamic": False, "strategy": "tensor"}, "activations int8 static per tensor"),
        ({"symmetric": False}, {}, "weights int8 asymmetric static per channel"),
        ({"strategy": "group", "group_size": 16}, {}, "weights int8 static per group"),
        ({"type": "float"}, {"type": "float"}, "weights fp8 static per channel"),
        (
            {"num_bits": 4, "strategy": "group", "group_size": 16},
            None,
            "weights int4 static per group, activations as they are",
        ),
        ({}, None, "weights int8 static per channel, activations as they are"),
    ],
)
def test_other_schemes_are_refused_by_name(weights, activations, words):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus

    model = tiny_model()
    token = {"num_bits": 8, "strategy": "token", "dynamic": True}
    given = None if activations is None else QuantizationArgs(**{**token, **activations})
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**{"num_bits": 8, "strategy": "channel", **weights}),
        input_activations=given,
    )
    linear = model.model.layers[1].mlp.up_proj
    linear.quantization_scheme, linear.quantization_status = scheme, QuantizationStatus.COMPRESSED
    with user_error(f"Layer 1: up_proj is quantised to .*{words}.* read are int8 weights with a scale per channel"):
        families.dissect(model)


# --- torchao --------------------------------------------------------------------------------------------------------------


def torchao_quantization():
    sys.path.append(str(TORCHAO))  # no longer than it takes: other tests hand their path to processes of their own
    try:
        return importlib.import_module("torchao.quantization")
    finally:
        sys.path.remove(str(TORCHAO))


def with_torchao(family="llama", dtype=torch.float32, **settings):
    made, model = torchao_quantization(), tiny_model(family, dtype=dtype)
    made.quantize_(model.model, made.Int8DynamicActivationInt8WeightConfig(**settings))
    return model


@torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "granite"])
def test_torchaos_rows_are_read_in_place(family, dtype):
    artifact, eight = tiny_artifact(tiny_model(family)), with_torchao(family, dtype)
    exact = tiny_model(family, dtype=dtype)
    for own, linear in zip(eight.model.modules(), exact.model.modules(), strict=True):
        if isinstance(own, torch.nn.Linear):
            linear.weight.data = own.weight.dequantize()
    ids = token_ids(1, 8 * BLOCK)
    stock = logits(eight, ids)
    with pytest.warns(UserWarning, match="requantised or rounded"):
        attached = fastfill.attach(eight, artifact)
    names, mlp, first = families.of(eight.config), eight.model.layers[0].mlp, attached.ffns[0].ffn
    for role in ROLES:
        weight = getattr(mlp, names.linear(role)).weight
        share = names.share(role, len(weight))
        assert getattr(first, role).data_ptr() == weight.qdata[share].data_ptr()
        assert torch.equal(getattr(first.scales, role), weight.scale[share, 0])
    logits(eight, ids)
    assert attached.stats.sparse_tokens == 7 * BLOCK
    with attached.dense():
        assert torch.equal(logits(eight, ids), stock)
    learned = sum(tensor.nbytes for tensor in artifact.tensors.values())
    downs = sum(one.down_t.nbytes for one in attached.ffns)
    assert attached.extra_bytes < 2 * learned + 1.5 * downs  # gate and up are two thirds of the FFN
    attached.detach()
    with fastfill.attach(eight, artifact, sparsity=0.0):
        found = logits(eight, ids)
    assert as_near_as(stock.float(), found.float(), logits(exact, ids).float())


@torchao
def test_torchaos_rows_are_followed():
    artifact, eight = tiny_artifact(tiny_model()), with_torchao()
    ids = token_ids(1, 4 * BLOCK)
    with fastfill.attach(eight, artifact):
        before = logits(eight, ids)
        weight = eight.model.layers[2].mlp.down_proj.weight
        weight.qdata.neg_()
        with pytest.warns(UserWarning, match="have changed"):
            assert not torch.equal(logits(eight, ids), before)


@torchao
def test_torchaos_other_schemes_are_refused_by_name():
    made, model = torchao_quantization(), tiny_model()
    made.quantize_(model.model, made.Int8WeightOnlyConfig())
    with user_error("quantised to int8 weights alone"):
        families.dissect(model)
    with user_error("Calibration needs weights in floating point"):
        calibrate(with_torchao(), tiny_tokenizer(), [tiny_text(900)], "nowhere", prefill=PREFILL)
