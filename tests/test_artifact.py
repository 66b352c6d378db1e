import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, INTERMEDIATE, LAYERS, PREFILL, one_sentence, snapshot, tiny_artifact, tiny_model
from safetensors.torch import load_file, save_file

from fastfill import artifact as artifacts
from fastfill import attach, families, schedule
from fastfill.config import PrefillConfig
from fastfill.errors import UserError


def edit(folder, change):
    file = folder / "config.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def edit_weights(folder, change):
    tensors = load_file(folder / "weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "weights.safetensors")


def test_round_trip(model, tmp_path):
    artifact = tiny_artifact(model)
    artifact.calibration, artifact.quality = {"sequences": 3, "documents": ["a.txt"]}, {"ppl_ratio": 1.5}
    artifacts.save(artifact, tmp_path / "one", readme="hello\n")
    assert sorted(snapshot(tmp_path)) == ["one/README.md", "one/config.json", "one/weights.safetensors"]
    back = artifacts.load(tmp_path / "one")
    for name in ("base_model", "prefill", "ranks", "layer_importance", "calibration", "quality"):
        assert getattr(back, name) == getattr(artifact, name), name
    assert back.tensors.keys() == artifact.tensors.keys()
    assert all(torch.equal(back.tensors[k], artifact.tensors[k]) for k in back.tensors)
    artifacts.save(back, tmp_path / "two", readme="hello\n")
    assert list(snapshot(tmp_path / "one").values()) == list(snapshot(tmp_path / "two").values())


def test_saving_again_replaces_and_keeps_other_files(model, artifact_folder):
    (artifact_folder / "notes").mkdir()
    (artifact_folder / "notes" / "mine.txt").write_text("keep me")
    artifacts.save(tiny_artifact(model, seed=1), artifact_folder)
    assert torch.equal(
        artifacts.load(artifact_folder).tensors["layers.0.predictor.bias"],
        tiny_artifact(model, 1).tensors["layers.0.predictor.bias"],
    )
    assert (artifact_folder / "notes" / "mine.txt").read_text() == "keep me"
    assert (artifact_folder / "README.md").read_text() == "tiny\n"
    assert [p.name for p in artifact_folder.parent.iterdir()] == [artifact_folder.name]


def test_names_shapes_and_costs(model):
    artifact = tiny_artifact(model)
    shapes = artifacts.shapes(artifact.base_model, artifact.ranks)
    assert len(shapes) == 8 * LAYERS
    assert shapes["layers.2.predictor.w_out"] == (INTERMEDIATE, 8) and shapes["layers.0.compensator.w_out"] == (HIDDEN, 8)
    dense = 3 * HIDDEN * INTERMEDIATE
    flops = artifact.flops()
    assert flops["ffn"] == 0.5 and flops["predictor"] == 8 * (HIDDEN + INTERMEDIATE) / dense
    assert flops["compensator"] == 2 * HIDDEN * 8 / dense
    assert flops["total"] == pytest.approx(flops["ffn"] + flops["predictor"] + flops["compensator"])
    # The shares are what the parts themselves count.
    assert flops["predictor"] * dense == pytest.approx(artifact.predictor(0, torch.zeros(1)).macs_per_token())
    assert flops["compensator"] * dense == pytest.approx(artifact.compensator(0, 1, torch.zeros(1)).macs_per_token())
    assert artifact.bytes() == sum(4 * torch.Size(s).numel() for s in shapes.values())
    assert artifact.kept(0.25) == schedule.allocate(artifact.layer_importance, 0.25, INTERMEDIATE)


def test_weights_come_in_the_models_dtype(model):
    artifact = tiny_artifact(model)
    assert artifact.predictor(0, torch.zeros(1, dtype=torch.bfloat16)).w_in.dtype == torch.bfloat16
    assert artifact.compensator(0, 1, torch.zeros(1, dtype=torch.float64)).w_out.dtype == torch.float64
    assert tiny_artifact(model, ranks=(8, 0, 0)).compensator(0, 1, torch.zeros(1)) is None


def test_the_correction_is_scaled_by_the_share_that_is_skipped(model):
    artifact, like = tiny_artifact(model), torch.zeros(1)
    learned, x = artifact.kept()[0], torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    skipped = INTERMEDIATE - learned
    as_learned = artifact.compensator(0, learned, like)
    assert torch.equal(as_learned.w_out, artifact.tensors["layers.0.compensator.w_out"])
    assert torch.equal(as_learned.bias, artifact.tensors["layers.0.compensator.bias"])
    for part in (0.25, 0.5, 1.25):  # of what was skipped when it was learned
        kept = INTERMEDIATE - round(part * skipped)
        scale = (INTERMEDIATE - kept) / skipped
        torch.testing.assert_close(artifact.compensator(0, kept, like)(x), scale * as_learned(x))
    whole = PrefillConfig(0.0, PREFILL.block_size, PREFILL.dense_head, PREFILL.min_tokens, PREFILL.dense_tail)
    never_skipped = tiny_artifact(model, prefill=whole)  # no share to compare with: as it is
    assert torch.equal(never_skipped.compensator(0, 1, like).w_out, as_learned.w_out)


# name -> (what is done to a good folder, words that the sentence must have)
DAMAGES = {
    "no folder": (shutil.rmtree, "config.json is missing"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "truncated weights": (lambda f: cut(f / "weights.safetensors", 0.5), "truncated or damaged"),
    "header cut": (lambda f: cut(f / "weights.safetensors", 0.01), "truncated or damaged"),
    "empty weights": (lambda f: (f / "weights.safetensors").write_bytes(b""), "truncated or damaged"),
    "garbage weights": (lambda f: (f / "weights.safetensors").write_bytes(b"\xff" * 1000), "truncated or damaged"),
    "truncated config": (lambda f: cut(f / "config.json", 0.5), "cannot be read as JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\x80\x81"), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "unknown key": (lambda f: edit(f, lambda d: d.update(extra=1)), "unknown key.*extra"),
    "unknown prefill key": (lambda f: edit(f, lambda d: d["prefill"].update(tempo=1)), "prefill has unknown key.*tempo"),
    "unknown base key": (lambda f: edit(f, lambda d: d["base_model"].update(mood=1)), "base_model has unknown key.*mood"),
    "unknown rank": (lambda f: edit(f, lambda d: d["ranks"].update(extra=1)), "ranks has unknown key.*extra"),
    "missing key": (lambda f: edit(f, lambda d: d.pop("ranks")), "lacks ranks"),
    "no schema": (lambda f: edit(f, lambda d: d.pop("schema_version")), "schema_version"),
    "newer schema": (lambda f: edit(f, lambda d: d.update(schema_version=2)), "schema version 2.*upgrade fastfill"),
    "newer schema, other keys": (lambda f: edit(f, lambda d: d.update(schema_version=9, new=1)), "version 9.*upgrade"),
    "sparsity out of range": (lambda f: edit(f, lambda d: d["prefill"].update(sparsity=1.5)), "sparsity must lie in"),
    "size is a word": (lambda f: edit(f, lambda d: d["base_model"].update(layers="three")), "layers must be a whole number"),
    "rank is negative": (lambda f: edit(f, lambda d: d["ranks"].update(silu=-1)), "silu must be a whole number"),
    "too few importances": (lambda f: edit(f, lambda d: d["layer_importance"].pop()), "3 positive numbers"),
    "importance is NaN": (lambda f: edit(f, lambda d: d.update(layer_importance=[1, float("nan"), 1])), "3 positive numbers"),
    "record is a list": (lambda f: edit(f, lambda d: d.update(calibration=[1])), "calibration must be a JSON object"),
    "quality is a word": (lambda f: edit(f, lambda d: d.update(quality="good")), "quality must be a JSON object"),
    "NaN": (lambda f: edit_weights(f, lambda t: t["layers.1.predictor.bias"].fill_(float("nan"))), "predictor.bias holds NaN"),
    "one infinity": (lambda f: edit_weights(f, poke), "w_in holds NaN"),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({"layers.0.stats.input_rms": torch.ones(HIDDEN, dtype=torch.int32)})),
        "non-float",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("layers.0.predictor.w_in")),
        "does not fit.*layers.0.predictor.w_in",
    ),
    "extra tensor": (lambda f: edit_weights(f, lambda t: t.update(code=torch.ones(1))), "does not fit.*code"),
    "wrong shape": (lambda f: edit_weights(f, transpose), "does not fit.*layers.1.predictor.w_out"),
    "ranks of another": (lambda f: edit(f, lambda d: d["ranks"].update(predictor=9)), "does not fit"),
}


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def poke(tensors):
    tensors["layers.2.compensator.w_in"][3, 5] = float("inf")


def transpose(tensors):
    tensors["layers.1.predictor.w_out"] = tensors["layers.1.predictor.w_out"].T.contiguous()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artifact_is_refused_with_a_sentence(model, artifact_folder, name):
    damage, words = DAMAGES[name]
    damage(artifact_folder)
    with pytest.raises(UserError, match=words) as error:
        attach(model, artifact_folder)
    one_sentence(error)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_another_model_is_refused_with_a_sentence(model):
    with pytest.raises(UserError, match="same shapes, other weights") as error:
        tiny_artifact(model).check_partner(families.dissect(tiny_model(seed=1)))
    one_sentence(error)
    with pytest.raises(UserError, match=r"shapes \(32, 96, 3\) against \(32, 64, 3\)") as error:
        tiny_artifact(model).check_partner(families.dissect(tiny_model(intermediate_size=64)))
    one_sentence(error)
    tiny_artifact(model).check_partner(families.dissect(model))  # and its own is not


# --- failing writes -----------------------------------------------------------------------------------------------------


def full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def fail_on_rename(number):
    """A Path.rename that works but for the call with this number."""
    calls, rename = [], Path.rename

    def patched(self, target):
        calls.append(self)
        return full() if len(calls) == number else rename(self, target)

    return patched


FAILURES = {
    "weights": lambda patch: patch.setattr(artifacts, "save_file", full),
    "text": lambda patch: patch.setattr(Path, "write_text", full),
    "copy": lambda patch: patch.setattr(shutil, "copy2", full),
    "beside": lambda patch: patch.setattr(artifacts.tempfile, "mkdtemp", full),
    "first rename": lambda patch: patch.setattr(Path, "rename", fail_on_rename(1)),
    "second rename": lambda patch: patch.setattr(Path, "rename", fail_on_rename(2)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_write_leaves_the_old_artifact_and_nothing_else(model, artifact_folder, monkeypatch, name):
    (artifact_folder / "mine.txt").write_text("keep me")
    before = snapshot(artifact_folder.parent)
    with monkeypatch.context() as patch:
        FAILURES[name](patch)
        with pytest.raises(UserError, match=r"could not be written: No space left on device.*untouched") as error:
            artifacts.save(tiny_artifact(model, seed=1), artifact_folder, readme="new\n")
        one_sentence(error)
    assert snapshot(artifact_folder.parent) == before
    assert [p.name for p in artifact_folder.parent.iterdir()] == [artifact_folder.name]


def test_an_interrupt_between_the_renames_puts_the_old_one_back(model, artifact_folder, monkeypatch):
    before, rename = snapshot(artifact_folder.parent), Path.rename

    def interrupted(self, target):
        if Path(target) == artifact_folder and not self.name.endswith("-old"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            artifacts.save(tiny_artifact(model, seed=1), artifact_folder)
    assert snapshot(artifact_folder.parent) == before


def test_a_failing_first_write_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(UserError, match="could not be written"):
        artifacts.save(tiny_artifact(model), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused_and_kept(model, tmp_path):
    (tmp_path / "taken").write_text("a file of the user's")
    for target in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(UserError, match="could not be written") as error:
            artifacts.save(tiny_artifact(model), target)
        one_sentence(error)
    assert snapshot(tmp_path) == {"taken": b"a file of the user's"}


LIMITED = """
import resource, sys
from pathlib import Path
from fastfill import artifact
from fastfill.errors import UserError
kept = artifact.load(sys.argv[1])
kept.tensors = {k: v + 1 for k, v in kept.tensors.items()}
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    artifact.save(kept, sys.argv[1], readme="new")
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_disk_that_really_takes_no_more(artifact_folder, share):
    """The kernel refuses to let files grow beyond a limit: what a full disk does, without one."""
    before = snapshot(artifact_folder.parent)
    limit = int((artifact_folder / "weights.safetensors").stat().st_size * share)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(artifact_folder), str(limit)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout and "Traceback" not in done.stderr
    assert snapshot(artifact_folder.parent) == before
    assert [p.name for p in artifact_folder.parent.iterdir()] == [artifact_folder.name]


def test_the_artifacts_own_page(model):
    artifact = tiny_artifact(model)
    assert "Not measured yet" in artifacts.readme(artifact)
    artifact.quality = {"ppl_ratio": 1.234, "sources": ["long"]}
    artifact.calibration = {"sequences": 7, "documents": ["news.jsonl"], "tokens_distilled": 640, "seconds": 5.0}
    assert artifacts.documents(artifact) == "news.jsonl"
    many = {"documents": list("abcdef"), "document_rows": ["e#0", "a#0", "e#1"]}
    assert artifacts.documents(dataclasses.replace(artifact, calibration=many)) == "e, a, b, c, 2 more"
    page = artifacts.readme(artifact)
    assert "| ppl_ratio | 1.234 |" in page and "sources" not in page
    assert "7 sequences of text from news.jsonl; 640 tokens" in page
