import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import snapshot, user_error

from fastfill.calibration.checkpoint import Checkpoint
from fastfill.config import CalibrationConfig
from fastfill.errors import UserError

SETTINGS = {"text": "abc", "config": {"steps": 3}}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 4)}


@pytest.fixture
def folder(tmp_path):
    """An unfinished calibration."""
    made = Checkpoint(tmp_path / "out", SETTINGS, resume=False)
    made.put_tensors("layer-0", TENSORS)
    made.put_tensors("layer-1", {name: tensor + 1 for name, tensor in TENSORS.items()})
    made.put_json("importance", [1.0, 0.1 + 0.2, float("nan")])
    made.put_json("seconds", 1.5)
    return made.folder


def resume(folder, settings=SETTINGS):
    return Checkpoint(folder.with_name("out"), settings, resume=True)


def read_all(checkpoint):
    return [checkpoint.tensors(f"layer-{i}") for i in range(2)], checkpoint.json("importance"), checkpoint.json("seconds")


def test_what_was_put_is_found(folder):
    for checkpoint in (resume(folder), Checkpoint(folder.with_name("out"), SETTINGS, resume=False, write=False)):
        layers, importance, seconds = read_all(checkpoint)
        for found, more in zip(layers, (0, 1), strict=True):
            assert found.keys() == TENSORS.keys()
            assert all(found[k].dtype == t.dtype and torch.equal(found[k], t + more) for k, t in TENSORS.items())
        assert importance[:2] == [1.0, 0.1 + 0.2] and importance[2] != importance[2] and seconds == 1.5
        assert checkpoint.tensors("layer-2") is None and checkpoint.json("other") is None
    assert sorted(os.listdir(folder)) == sorted(
        ["settings.json", "layer-0.safetensors", "layer-1.safetensors", "importance.json", "seconds.json"]
    )


# What a power cut, a full disk or a hand leaves: of the file's bytes.
DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "the last byte lost": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[:-8] + bytes(8),
    "a flipped bit": lambda content: content[:-12] + bytes([content[-12] ^ 1]) + content[-11:],
    "other content": lambda content: b'{"a": 1}',
    "too deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("name", ["settings.json", "importance.json", "seconds.json", "layer-1.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_refused(folder, name, damage):
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    before = snapshot(folder)
    with user_error(rf"{name} is damaged \(.*delete .*to start anew"):
        read_all(resume(folder))
    assert snapshot(folder) == before
    (folder / name).unlink()
    if name != "settings.json":
        read_all(resume(folder))  # the rest is good


@pytest.mark.parametrize("one, other", [("layer-0.safetensors", "layer-1.safetensors"), ("importance.json", "seconds.json")])
def test_a_file_in_the_place_of_another_is_refused(folder, one, other):
    (folder / one).write_bytes((folder / other).read_bytes())
    with pytest.raises(UserError, match=rf"{one} is damaged \(its checksum is another"):
        read_all(resume(folder))


def test_a_file_of_another_calibration_is_refused(folder, tmp_path):
    other = Checkpoint(tmp_path / "other", {**SETTINGS, "text": "xyz"}, resume=False)
    other.put_tensors("layer-0", TENSORS)
    other.put_json("importance", [1.0])
    for name in ("layer-0.safetensors", "importance.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes((other.folder / name).read_bytes())
        with pytest.raises(UserError, match=rf"{name} is damaged \(its checksum is another"):
            read_all(resume(folder))
        (folder / name).write_bytes(before)


def test_a_checkpoint_older_than_a_setting_is_resumed_where_that_has_its_default(folder):
    """As one of before the field `seed`: what it holds is found, and goes on under its own checksums."""
    newer = {**SETTINGS, "config": {**SETTINGS["config"], "seed": CalibrationConfig().seed}}
    resume(folder, newer).put_json("seconds", 2.5)
    for checkpoint in (resume(folder, newer), Checkpoint(folder.with_name("out"), newer, resume=False, write=False)):
        assert read_all(checkpoint)[2] == 2.5
    newer["config"]["seed"] += 1
    with pytest.raises(UserError, match=r"has other settings \(config\)"):
        resume(folder, newer)
    with pytest.raises(UserError, match=r"has other settings \(config\)"):
        resume(folder, {**SETTINGS, "config": {}})


def test_parts_without_settings_are_refused(folder):
    (folder / "settings.json").unlink()
    with user_error(r"has no settings\.json and cannot be resumed"):
        resume(folder)


def test_a_checkpoint_that_was_killed_at_its_very_begin_is_resumed(tmp_path):
    (tmp_path / "out.checkpoint" / ".fastfill-abc").mkdir(parents=True)
    assert resume(tmp_path / "out.checkpoint").json("seconds") is None


def test_two_calibrations_do_not_write_to_one_place(folder):
    code = (
        "import sys, pathlib, json; from fastfill.calibration.checkpoint import Checkpoint\n"
        "Checkpoint(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), resume=True)"
    )
    command = [sys.executable, "-c", code, str(folder.with_name("out")), json.dumps(SETTINGS)]
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    mine = resume(folder)
    refused = subprocess.run(command, capture_output=True, text=True, env=env)
    assert refused.returncode == 1 and "another process is writing there" in refused.stderr
    del mine
    assert subprocess.run(command, capture_output=True, env=env).returncode == 0


def test_the_place_of_the_artifact_is_looked_at_first(tmp_path):
    (tmp_path / "out").write_text("a file of the user's")
    with pytest.raises(UserError, match="there is a file of that name"):
        Checkpoint(tmp_path / "out", SETTINGS, resume=False)
    assert snapshot(tmp_path) == {"out": b"a file of the user's"}
