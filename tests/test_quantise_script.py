"""benchmarks/quantise.py: the W8A8 checkpoint has the model's values to half a step, and smoothing changes no function."""

import copy
import json

import pytest
import torch
from conftest import FAMILIES, logits, script, tiny_model, tiny_text, tiny_tokenizer, token_ids
from safetensors.torch import load_file, save_file

quantise = script("quantise")


def saved(folder, family="llama", dtype=torch.float32, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def read(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def wide(tensors):
    """The values that the checkpoint stands for, by the names of the floating-point model."""
    scales = {name for name in tensors if name.endswith("_scale")}
    found = {name: tensor.float() for name, tensor in tensors.items() if name not in scales}
    return {name: v * tensors[f"{name}_scale"].float() if f"{name}_scale" in scales else v for name, v in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_off_by_half_a_scale(tmp_path, family, dtype):
    model = saved(tmp_path / "model", family, dtype)
    assert quantise.main([str(tmp_path / "model"), str(tmp_path / "eight")]) == 0
    before, after = read(tmp_path / "model"), read(tmp_path / "eight")
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert set(after) == set(before) | {f"{name}_scale" for name in layers} and len(layers) >= 4 * 3
    for name, values in wide(after).items():
        if name not in layers:
            assert torch.equal(after[name], before[name])
            continue
        rows, scale = after[name], after[f"{name}_scale"]
        assert rows.dtype == torch.int8 and rows.shape == before[name].shape and scale.shape == (len(rows), 1)
        assert scale.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        error = ((values - before[name].float()).abs() / scale.float()).max()
        assert 0.45 < error <= 0.5 + 2e-5  # 127 fp32 roundings of 2^-24 on either side
        assert rows.abs().amax(1).min() == 127 and int(rows.min()) >= -127


def test_a_row_of_zeros_and_one_that_is_not_finite():
    rows, scale = quantise.rows_in_eight_bits(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert rows.tolist() == [[0, 0], [-127, 64]] and bool((scale > 0).all())
    with pytest.raises(quantise.UserError, match="not finite"):
        quantise.rows_in_eight_bits(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_changes_the_weights_and_not_the_function(tmp_path, family, monkeypatch):
    model = saved(tmp_path / "model", family)
    with torch.no_grad():  # an outlier in two channels, and norms that are not all ones
        for name, value in model.named_parameters():
            if "norm" in name:
                value.add_(torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
            if name.endswith("layernorm.weight"):
                value[3] *= 100
            if name.endswith(("up_proj.weight", "up_proj.bias")):
                value[-5] *= 50
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(600))
    loaded = quantise.models.LoadedModel(copy.deepcopy(model), tiny_tokenizer(), "tiny")
    monkeypatch.setattr(quantise.models, "load", lambda *_: loaded)  # transformers 5 gives Qwen2 a tokenizer of its own
    folds = quantise.smoothing(str(tmp_path / "model"), 0.5, str(tmp_path / "text.txt"), 512)
    ids = token_ids(1, 40)
    before = logits(model, ids)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(folds.apply(name, value))
    roles = {name.split(".")[-2] for name, fold in folds.of.items() if fold.columns is not None}
    assert "down_proj" in roles and (family in ("olmo2", "olmo3") or len(roles) >= 3)  # these have no norm before their Linears
    assert all(torch.equal(f.rows.log2(), f.rows.log2().round()) for f in folds.of.values() if f.rows is not None)
    # Powers of two round nothing, except in Gemma's 1 + weight, and in sums whose order is the same
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-4, atol=2e-4)


def test_smoothing_makes_the_activations_even(tmp_path):
    found = quantise.power_of_two(torch.tensor([64.0, 1.0, 0.0]), [torch.tensor([[1.0, 1.0, 1.0], [0.5, -4.0, 0.0]])], 0.5)
    assert found.tolist() == [8.0, 0.5, 1.0]  # (64/1)^0.5, (1/4)^0.5, never used


def test_what_is_refused_leaves_nothing(tmp_path, capsys):
    saved(tmp_path / "model")
    eight, other = tmp_path / "eight", tmp_path / "other"
    assert quantise.main([str(tmp_path / "model"), str(eight)]) == 0
    assert quantise.main([str(eight), str(other)]) == 2 and "quantised already" in capsys.readouterr().err
    assert quantise.main([str(tmp_path / "model"), str(other), "--smooth", "0.5"]) == 2 and "--data" in capsys.readouterr().err
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert quantise.main([str(tmp_path / "model"), str(other)]) == 2 and "up_proj" in capsys.readouterr().err
    assert not other.exists()


def test_shards_and_their_index(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")
    monkeypatch.setattr(quantise, "SHARD", 20_000)
    assert quantise.main([str(tmp_path / "model"), str(tmp_path / "eight")]) == 0
    index = json.loads((tmp_path / "eight" / quantise.INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 2 and set(index) == set(read(tmp_path / "eight"))
    assert all(name in load_file(tmp_path / "eight" / file) for name, file in index.items())
    assert f"{len(list(model.model.layers)) - 1}" in {name.split(".")[2] for name in index if ".layers." in name}


def test_transformers_reads_the_same_values(tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    import transformers

    saved(tmp_path / "model")
    assert quantise.main([str(tmp_path / "model"), str(tmp_path / "eight")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "eight", dtype=torch.float32)
    up, stored = model.model.layers[1].mlp.up_proj, read(tmp_path / "eight")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(up.weight.data, stored[name]) and torch.equal(up.weight_scale.data, stored[f"{name}_scale"])
    logits(model, token_ids(1, 8))  # which unpacks them
    assert torch.equal(up.weight.data, wide(stored)[name])
