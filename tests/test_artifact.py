import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, INTERMEDIATE, LAYERS, PREFILL, logits, one_sentence, snapshot, tiny_artifact, token_ids, user_error
from safetensors.torch import load_file, save_file

from fastfill import artifact as artifacts
from fastfill import attach, card, families, files, kernels, schedule
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
    torch_only = kernels.Kernel("torch")
    as_learned = artifact.compensator(0, learned, like)
    assert torch.equal(as_learned.w_out, artifact.tensors["layers.0.compensator.w_out"])
    assert torch.equal(as_learned.bias, artifact.tensors["layers.0.compensator.bias"])
    for part in (0.25, 0.5, 1.25):  # of what was skipped when it was learned
        kept = INTERMEDIATE - round(part * skipped)
        scale = (INTERMEDIATE - kept) / skipped
        torch.testing.assert_close(artifact.compensator(0, kept, like)(x, torch_only), scale * as_learned(x, torch_only))
    whole = PrefillConfig(0.0, PREFILL.block_size, PREFILL.dense_head, PREFILL.min_tokens, PREFILL.dense_tail)
    never_skipped = tiny_artifact(model, prefill=whole)  # no share to compare with: as it is
    assert torch.equal(never_skipped.compensator(0, 1, like).w_out, as_learned.w_out)


# name -> (what is done to a good folder, words that the sentence must have)
DAMAGES = {
    "no folder": (shutil.rmtree, "config.json is missing"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "truncated weights": (lambda f: cut(f / "weights.safetensors", 0.5), "truncated or damaged"),
    "header cut": (lambda f: cut(f / "weights.safetensors", 0.01), "truncated or damaged"),
    "truncated config": (lambda f: cut(f / "config.json", 0.5), "cannot be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "unknown key": (lambda f: edit(f, lambda d: d.update(extra=1)), "unknown key.*extra"),
    "unknown prefill key": (lambda f: edit(f, lambda d: d["prefill"].update(tempo=1)), "prefill has unknown key.*tempo"),
    "unknown base key": (lambda f: edit(f, lambda d: d["base_model"].update(mood=1)), "base_model has unknown key.*mood"),
    "unknown rank": (lambda f: edit(f, lambda d: d["ranks"].update(extra=1)), "ranks has unknown key.*extra"),
    "missing key": (lambda f: edit(f, lambda d: d.pop("ranks")), "lacks ranks"),
    "no schema": (lambda f: edit(f, lambda d: d.pop("schema_version")), "schema_version"),
    "newer schema": (lambda f: edit(f, lambda d: d.update(schema_version=4, new=1)), "schema version 4.*upgrade fastfill"),
    "sparsity out of range": (lambda f: edit(f, lambda d: d["prefill"].update(sparsity=1.5)), "sparsity must lie in"),
    "too few importances": (lambda f: edit(f, lambda d: d["layer_importance"].pop()), "3 positive numbers"),
    "importance is NaN": (lambda f: edit(f, lambda d: d.update(layer_importance=[1, float("nan"), 1])), "3 positive numbers"),
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


def set_in(*path, value):
    """A change of one field of config.json; the path's last name is the field."""

    def change(document):
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return lambda folder: edit(folder, change)


LONG = "x" * 100_000
FIELDS = [  # (path, a value that it must not have, words)
    (("schema_version",), True, "schema_version"),
    (("schema_version",), 0, "schema_version"),
    (("base_model", "hidden_size"), 2**40, "hidden_size must be a whole number of at most"),
    (("base_model", "layers"), 10**9, "layers must be a whole number of at most"),
    (("base_model", "layers"), "three", "layers must be a whole number"),
    (("base_model", "name"), "a\x1b[2Jb", "name must be one line"),
    (("base_model", "name"), LONG, "name must be one line"),
    (("base_model", "model_type"), None, "model_type must be one line"),
    (("base_model", "fingerprint"), ["x"], "fingerprint must be one line"),
    (("prefill", "sparsity"), "0.5", "prefill: sparsity must lie in"),
    (("prefill", "block_size"), 2.5, "prefill: block_size must be a whole number"),
    (("prefill", "block_size"), 2**30, "prefill: block_size must be a whole number of at most"),
    (("prefill", "dense_tail"), [LONG] * 10, "prefill: dense_tail must be a whole number"),
    (("prefill",), [], "prefill must be a JSON object"),
    (("prefill",), {}, "not what was saved"),
    (("prefill", LONG), 1, "prefill has unknown key"),
    (("ranks", "predictor"), HIDDEN + 1, "predictor must be a whole number of at most 32"),
    (("ranks", "silu"), -1, "silu must be a whole number"),
    (("layer_importance", 0), 10**18, "checksums|not what was saved"),
    (("layer_importance", 0), True, "3 positive numbers"),
    (("layer_importance", 0), 1e300, "3 positive numbers"),
    (("layer_importance",), {"0": 1}, "3 positive numbers"),
    (("calibration", "documents"), "a.txt", "documents must be a list of texts"),
    (("calibration", "document_rows"), [3], "document_rows must be a list of texts"),
    (("calibration", "sequences"), "many", "sequences must be a whole number"),
    (("calibration",), [1], "calibration must be a JSON object"),
    (("calibration", "seconds"), None, "seconds must be a number"),
    (("quality",), "good", "quality must be a JSON object"),
    (("quality", "documents"), -1, "documents must be a whole number"),
    (("quality", "predictor"), "\x1b]0;x\x07", "predictor must be one line"),
    (("quality", "curve"), [1], "must be a JSON object"),
    (("quality", "curve"), [{"from": 0, "to": 8}], "nll_dense must be a number"),
    (("checksums", "settings"), 1, "settings must be one line"),
    (("checksums", "tensors"), {"a": 1}, "must be one line"),
]


def pipe(folder):
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")


DAMAGES |= {f"{'.'.join(map(str, path))[:40]} = {value!r:.20}": (set_in(*path, value=value), w) for path, value, w in FIELDS}
DAMAGES |= {
    "deep nesting": (lambda f: (f / "config.json").write_text("[" * 1000 + "]" * 1000), "cannot be read as JSON .it is nested"),
    "weights are a pipe": (pipe, "not a regular file"),
    "weights of a terabyte": (lambda f: os.truncate(f / "weights.safetensors", 1 << 40), "it has 1,099,511,627,776 bytes"),
    "sizes that no memory holds": (
        lambda f: (edit(f, huge), os.truncate(f / "weights.safetensors", 1 << 43)),
        "it has 8,796,093,022,208 bytes",
    ),
}
for kind in (torch.float8_e4m3fn, torch.complex64, torch.int64):
    DAMAGES[f"weights in {kind}"] = (
        lambda f, kind=kind: edit_weights(f, lambda t: t.update({k: v.to(kind) for k, v in t.items()})),
        "non-float or too narrow",
    )
for key in PREFILL.__dict__:
    DAMAGES[f"without prefill.{key}"] = (lambda f, k=key: edit(f, lambda d: d["prefill"].pop(k)), "not what was saved")
for group, known in (("base_model", artifacts.schema.BASE_KEYS), ("ranks", {"silu"})):
    for key in sorted(known):
        DAMAGES[f"without {group}.{key}"] = (lambda f, g=group, k=key: edit(f, lambda d: d[g].pop(k)), f"{group} lacks {key}")


def huge(document):
    document["base_model"].update(hidden_size=2**24, intermediate_size=2**24, layers=3)


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
    assert len(one_sentence(error)) < 400 and str(error.value).isprintable()
    assert all("forward" not in module.__dict__ for module in model.modules())


# --- damage that can only be seen by comparing ----------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_wherever_it_matters(artifact_folder):
    file, rng = artifact_folder / "weights.safetensors", random.Random(0)
    good, expected = file.read_bytes(), artifacts.load(artifact_folder).tensors
    begin = 8 + int.from_bytes(good[:8], "little")
    places = [(rng.randrange(begin), rng.randrange(8)) for _ in range(100)]
    places += [(rng.randrange(begin, len(good)), rng.randrange(8)) for _ in range(100)]
    refused = 0
    for place, bit in places:
        changed = bytearray(good)
        changed[place] ^= 1 << bit
        file.write_bytes(changed)
        try:
            found = artifacts.load(artifact_folder).tensors
        except UserError as error:
            one_sentence(error)
            refused += 1
        else:
            assert place < begin  # a blank of the header, say
            assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert refused > 150


def test_tensors_that_changed_places_are_refused(artifact_folder):
    def change(tensors):
        for name in ("predictor.bias", "compensator.w_in"):
            a, b = f"layers.0.{name}", f"layers.1.{name}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_weights(artifact_folder, change)
    with user_error(r"layers\.0\.compensator\.w_in is not what was saved \(4 tensors\)"):
        artifacts.load(artifact_folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["prefill"].update(sparsity=0.25),  # valid, but the compensators are for another one
        lambda d: d["prefill"].update(block_size=16),
        lambda d: d["ranks"].update(linear=3, silu=5),  # the same shapes
        lambda d: d["layer_importance"].reverse(),
    ],
)
def test_settings_that_were_changed_by_hand_are_refused(artifact_folder, change):
    edit(artifact_folder, change)
    with user_error(r"not what was saved: prefill, ranks, layer_importance belong to the weights"):
        artifacts.load(artifact_folder)


def test_an_artifact_older_than_a_setting_has_its_default(model, artifact_folder):
    def older(document):
        del document["prefill"]["dense_tail"]
        document["checksums"]["settings"] = artifacts.schema.settings_checksum(document)

    edit(artifact_folder, older)
    artifact = artifacts.load(artifact_folder)
    assert artifact.prefill == dataclasses.replace(PREFILL, dense_tail=PrefillConfig().dense_tail) != PREFILL
    with attach(model, artifact_folder) as attachment:
        assert attachment.config == artifact.prefill
    artifacts.record(artifact, artifact_folder, {"ppl_ratio": 1.5})  # which compares it with the folder's
    artifacts.save(artifacts.load(artifact_folder), artifact_folder)
    assert artifacts.load(artifact_folder).prefill == artifact.prefill


def test_what_changes_no_result_may_change(artifact_folder):
    before = artifacts.load(artifact_folder)
    edit(artifact_folder, lambda d: (d["base_model"].update(name="[/bold] :dog:"), d["quality"].update(x=1)))
    text = (artifact_folder / "config.json").read_text()
    (artifact_folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(json.loads(text), indent=7).encode())
    after = artifacts.load(artifact_folder)
    assert after.base_model["name"] == "[/bold] :dog:" and after.quality == {"x": 1}
    assert after.kept() == before.kept() and all(torch.equal(after.tensors[k], before.tensors[k]) for k in before.tensors)


def test_an_artifact_of_before_checksums_loads_with_a_note_and_recording_gives_them(artifact_folder, caplog):
    sums = artifacts.load(artifact_folder).checksums
    assert not caplog.records
    edit(artifact_folder, lambda d: d.pop("checksums"))
    old = artifacts.load(artifact_folder)
    (note,) = caplog.messages
    assert "has no checksums" in note and str(artifact_folder) in note
    artifacts.record(old, artifact_folder, {})
    caplog.clear()
    assert artifacts.load(artifact_folder).checksums == sums and not caplog.records


def test_what_is_not_finite_in_records_is_null(model, tmp_path, artifact_folder):
    artifact = tiny_artifact(model)
    artifact.quality = {"ppl_sparse": float("inf"), "curve": [], "own": [float("nan"), (1, 2)]}
    artifact.calibration = {"loss_last": float("nan")}
    artifacts.save(artifact, tmp_path / "a")
    text = (tmp_path / "a" / "config.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    back = artifacts.load(tmp_path / "a")
    assert back.quality == {"ppl_sparse": None, "curve": [], "own": [None, [1, 2]]} and back.calibration == {"loss_last": None}
    edit(artifact_folder, lambda d: d.update(quality={"ppl_sparse": float("inf")}))  # as older versions wrote it
    assert artifacts.load(artifact_folder).quality == {"ppl_sparse": None}


def test_a_file_overwritten_in_place_changes_nothing_that_was_loaded(model, artifact_folder):
    artifact, file = artifacts.load(artifact_folder), artifact_folder / "weights.safetensors"
    expected = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    with attach(model, artifact_folder):
        ids = token_ids(1, 64)
        before = logits(model, ids)
        with file.open("r+b") as stream:
            stream.write(bytes(file.stat().st_size))
        assert torch.equal(logits(model, ids), before)
        os.truncate(file, 0)
        assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(artifact.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["predictor.w_out", "compensator.bias", "stats.importance"])
@pytest.mark.parametrize("value, dtype", [(1e5, torch.float16), (3.4e38, torch.bfloat16), (-1e5, torch.float16)])
def test_a_weight_that_overflows_in_the_models_dtype_is_refused(model, name, value, dtype):
    artifact, like = tiny_artifact(model), torch.zeros(1, dtype=dtype)

    def take():
        artifact.predictor(1, like)
        artifact.compensator(1, artifact.kept()[1], like)
        artifact.statistics(1, like)

    artifact.tensors[f"layers.1.{name}"].view(-1)[3] = 60000.0
    take()
    artifact.tensors[f"layers.1.{name}"].view(-1)[3] = value
    with user_error(rf"layers\.1\.{name} does not fit into torch\.{str(dtype)[6:]}.*bf16 or fp32"):
        take()


def test_a_correction_that_overflows_when_it_is_scaled_is_refused(model):
    artifact, like = tiny_artifact(model), torch.zeros(1, dtype=torch.float16)
    artifact.tensors["layers.0.compensator.bias"][0] = 60000.0
    artifact.compensator(0, artifact.kept()[0], like)
    with pytest.raises(UserError, match=r"layer 0's compensator, scaled does not fit"):
        artifact.compensator(0, 1, like)


# --- failing writes -----------------------------------------------------------------------------------------------------


def full(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def no_copies(patch):
    patch.setattr(os, "link", full)
    patch.setattr(shutil, "copy2", full)


FAILURES = {
    "weights": lambda patch: patch.setattr(artifacts, "save_file", full),
    "text": lambda patch: patch.setattr(files, "_put", full),
    "copy": no_copies,
    "beside": lambda patch: patch.setattr(files.tempfile, "mkdtemp", full),
    "exchange": lambda patch: patch.setattr(files, "_exchange", full),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_write_leaves_the_old_artifact_and_nothing_else(model, artifact_folder, monkeypatch, name):
    (artifact_folder / "mine.txt").write_text("keep me")
    before = snapshot(artifact_folder.parent)
    with monkeypatch.context() as patch:
        FAILURES[name](patch)
        with user_error(r"could not be written: No space left on device.*untouched"):
            artifacts.save(tiny_artifact(model, seed=1), artifact_folder, readme="new\n")
    assert snapshot(artifact_folder.parent) == before
    assert [p.name for p in artifact_folder.parent.iterdir()] == [artifact_folder.name]


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


def test_a_disk_that_really_takes_no_more(artifact_folder):
    """The kernel refuses to let files grow beyond a limit: what a full disk does, without one."""
    before = snapshot(artifact_folder.parent)
    limit = int((artifact_folder / "weights.safetensors").stat().st_size * 0.9)
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
    assert "Not measured yet" in artifact.card()
    artifact.quality = {"ppl_ratio": 1.234, "sources": ["long"]}
    artifact.calibration = {"sequences": 7, "documents": ["news.jsonl"], "tokens_distilled": 640, "seconds": 5.0}
    assert card.documents(artifact.calibration) == "news.jsonl"
    many = {"documents": list("abcdef"), "document_rows": ["e#0", "a#0", "e#1"]}
    assert card.documents(many) == "e, a, b, c, 2 more"
    page = artifact.card()
    assert "| ppl_ratio | 1.234 |" in page and "sources" not in page
    assert "7 sequences of text from news.jsonl; 640 tokens" in page


def spoil(name, value=None):
    def change(artifact):
        if value is None:
            artifact.tensors.pop(name)
        else:
            artifact.tensors[name] = value(artifact.tensors[name])

    return change


SPOILED = {
    "NaN": (spoil("layers.0.predictor.w_in", lambda t: t * float("nan")), "holds NaN"),
    "infinite": (spoil("layers.2.stats.importance", lambda t: t / 0), "holds NaN or infinite"),
    "narrow": (spoil("layers.0.predictor.w_in", lambda t: t.to(torch.float8_e4m3fn)), "too narrow"),
    "misshapen": (spoil("layers.0.predictor.bias", lambda t: t[1:]), "does not fit"),
    "missing": (spoil("layers.0.predictor.bias"), "does not fit"),
    "importance": (lambda a: a.layer_importance.append(1.0), "3 positive numbers"),
    "importance is NaN": (lambda a: a.layer_importance.__setitem__(0, float("nan")), "not JSON compliant"),
    "rank": (lambda a: a.ranks.update(predictor=0), "ranks.predictor"),
    "record": (lambda a: a.calibration.update(documents="a.txt"), "documents must be a list"),
    "no JSON": (lambda a: a.calibration.update(config={"x": object()}), "not JSON serializable"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_would_not_load_never_replaces_what_does(model, artifact_folder, tmp_path, name):
    change, words = SPOILED[name]
    artifact, before = tiny_artifact(model, seed=1), snapshot(tmp_path)
    change(artifact)
    for folder in (artifact_folder, tmp_path / "new"):
        with user_error(f"is not written, and what was there is untouched.*{words}"):
            artifacts.save(artifact, folder)
    assert snapshot(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_name_is_made_fit_to_be_shown(model):
    base = artifacts.describe_model(families.dissect(model), "a\x1b[2J\n" + "x" * 1000)
    artifacts.schema._check_base(base, "here")
    assert base["name"].startswith(r"a\x1b[2J x") and len(base["name"]) == 200
    artifact = tiny_artifact(model)
    artifact.calibration = {"documents": ["a\x1b]0;x\x07", "\ud800.txt"]}  # names of files may have anything
    assert card.documents(artifact.calibration) == r"a\x1b]0;x\x07, \ud800.txt" and artifact.card().isprintable() is False
    assert "\x1b" not in artifact.card()


# --- recording ------------------------------------------------------------------------------------------------------------


def test_recording_changes_the_quality_and_nothing_else(artifact_folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("artifact")
    weights, before = artifact_folder / "weights.safetensors", json.loads((artifact_folder / "config.json").read_text())
    inode = weights.stat().st_ino
    monkeypatch.chdir(artifact_folder)  # also where one is
    for folder in (tmp_path / "link", Path(".")):
        artifact = artifacts.load(folder)
        artifacts.record(artifact, folder, {"ppl_ratio": 1.5, "kl": float("nan")})
        after = json.loads((artifact_folder / "config.json").read_text())
        assert after.pop("quality") == {"ppl_ratio": 1.5, "kl": None} == artifact.quality
        assert after == {key: value for key, value in before.items() if key != "quality"}
        assert weights.stat().st_ino == inode and (tmp_path / "link").is_symlink()
        assert "| ppl_ratio | 1.5 |" in (artifact_folder / "README.md").read_text()
        artifacts.load(folder)
    assert sorted(p.name for p in artifact_folder.iterdir()) == ["README.md", "config.json", "weights.safetensors"]


def test_a_measurement_is_not_recorded_in_another_artifact(model, artifact_folder):
    artifact = artifacts.load(artifact_folder)
    artifacts.save(tiny_artifact(model, seed=1), artifact_folder)  # a calibration ended meanwhile
    before = snapshot(artifact_folder)
    with user_error("holds another artifact by now"):
        artifacts.record(artifact, artifact_folder, {"ppl_ratio": 1.5})
    assert snapshot(artifact_folder) == before
