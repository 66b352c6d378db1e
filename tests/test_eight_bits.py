"""Matrices of an artifact in eight bits."""

import dataclasses
import json

import pytest
import torch
from conftest import logits, tiny_artifact
from safetensors.torch import load_file, save_file

import fastfill
from fastfill import artifact as artifacts
from fastfill import tensors as stored
from fastfill.errors import UserError


def narrow(artifact):
    return dataclasses.replace(artifact, tensors=stored.narrow(artifact.tensors))


def test_rows_are_scaled_to_127():
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [-254.0, 3.0, 0.9]])
    found = stored.narrow({"w": weight, "bias": torch.ones(3)})
    assert found["w"].tolist() == [[127, -64, 32], [0, 0, 0], [-127, 2, 0]]  # 63.5 and 31.75; 1.5: half to even
    torch.testing.assert_close(found["w.scale"], torch.tensor([1 / 127, 0.0, 2.0]))
    assert torch.equal(found["bias"], torch.ones(3)) and set(found) == {"w", "w.scale", "bias"}
    assert torch.equal(stored.wide(found, "w")[2], torch.tensor([-254.0, 4.0, 0.0]))


def test_the_error_is_half_a_step():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    found = stored.narrow({"w": weight})
    error = (stored.wide(found, "w") - weight).abs().amax(1) / weight.abs().amax(1)
    assert float(error.max()) <= 1 / 254 * (1 + 1e-5)  # and fp32 rounding of the scale
    assert float(error.max()) > 1 / 300  # which the bound is near to
    for empty in (torch.zeros(0, 4), torch.zeros(4, 0)):
        assert stored.wide(stored.narrow({"w": empty}), "w").shape == empty.shape


def test_saved_and_loaded(model, tmp_path):
    wide, eight = tiny_artifact(model), narrow(tiny_artifact(model))
    old = [dataclasses.replace(artifact, samples={}) for artifact in (wide, eight)]
    for name, artifact, version in zip(("wide", "eight", "sampled"), (*old, eight), (1, 2, 3), strict=True):
        artifacts.save(artifact, tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["schema_version"] == version
        back = artifacts.load(tmp_path / name)
        assert back.tensors.keys() == artifact.tensors.keys()
        assert all(torch.equal(back.tensors[key], artifact.tensors[key]) for key in back.tensors)
    assert old[1].bytes() < 0.6 * old[0].bytes()  # rows of 32 with a scale each, and vectors as they were; of fp32


def test_it_computes_what_its_values_say(model):
    artifact = narrow(tiny_artifact(model))
    values = {name: stored.wide(artifact.tensors, name) for name in artifact.tensors if not name.endswith(stored.SCALE)}
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(1))
    found = []
    for one in (artifact, dataclasses.replace(artifact, tensors=values), tiny_artifact(model)):
        with fastfill.attach(model, one):
            found.append(logits(model, ids))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("layers.0.predictor.w_in.scale"), "does not fit"),
        (lambda t: t.update({"layers.0.predictor.bias.scale": torch.ones(96)}), "does not fit"),
        (lambda t: t.update({"layers.0.predictor.bias": torch.ones(96, dtype=torch.int8)}), "non-float"),
        (
            lambda t: t.update({"layers.0.predictor.w_in": t["layers.0.predictor.w_in"].to(torch.uint8)}),
            "does not fit|non-float",
        ),
        (lambda t: t["layers.0.predictor.w_in.scale"].fill_(float("nan")), "NaN"),
        (lambda t: t["layers.0.predictor.w_in.scale"].mul_(2), "damaged"),
    ],
)
def test_what_does_not_belong_together_is_refused(model, tmp_path, change, message):
    artifacts.save(narrow(tiny_artifact(model)), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "weights.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "a" / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        artifacts.load(tmp_path / "a")


def test_artifacts_by_name(tmp_path, monkeypatch):
    assert artifacts.load("default").base_model == artifacts.load("smollm2-135m").base_model
    monkeypatch.setitem(artifacts.SHIPPED, "some-model", "no-such-folder")
    with pytest.raises(UserError, match="comes with fastfill's source"):
        artifacts.load("some-model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-model").mkdir()  # a folder of that name is meant itself
    assert str(artifacts.folder_of("some-model")) == "some-model"
