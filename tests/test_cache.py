"""The cache of converted models: whole or not there, keyed by content, safe to kill and to share."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_sentence, snapshot
from gguf_tiny import write

from fastfill import cache, models
from fastfill.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gate(path):
    return models.load(str(path), "fp32").model.model.layers[0].mlp.gate_proj.weight


def make(path):
    (path / "a").write_text("whole")
    (path / "b").write_text("too")


def counted(times):
    def run(path):
        times.append(path)
        make(path)

    return run


def test_a_file_overwritten_in_place_is_read_again(tmp_path):
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    write(path)
    write(other, initializer_range=0.3)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    first = gate(path)
    path.write_bytes(other.read_bytes())
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert not torch.equal(first, gate(path))


def test_the_same_content_is_converted_once_and_its_hash_remembered(tmp_path, folder):
    write(tmp_path / "m.gguf")
    here = models.resolve(str(tmp_path / "m.gguf"))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "m.gguf", tmp_path / "elsewhere")
    before = snapshot(here)
    assert models.resolve(str(tmp_path / "elsewhere" / "m.gguf")) == here and snapshot(here) == before

    (remembered, _) = (folder / "known").iterdir()  # of two paths
    remembered.write_text("0" * 16)
    assert "0" * 16 in {cache.fingerprint(path / "m.gguf") for path in (tmp_path, tmp_path / "elsewhere")}


def test_a_remembered_hash_that_is_damaged_is_made_again(tmp_path, folder):
    (tmp_path / "m").write_bytes(b"content")
    found = cache.fingerprint(tmp_path / "m")
    (file,) = (folder / "known").iterdir()
    for damage in ("", "0123", "../../../../x/xx", "\x00" * 16):
        file.write_text(damage)
        assert cache.fingerprint(tmp_path / "m") == found == file.read_text()


@pytest.mark.parametrize("damage", ["empty", "short", "gone", "seal", "file", "link"])
def test_what_is_not_whole_is_made_again(folder, damage):
    times = []
    target = cache.folder("m", counted(times), 10)
    whole = snapshot(target)
    if damage == "short":
        (target / "a").write_text("who")
    elif damage == "gone":
        (target / "b").unlink()
    elif damage == "seal":
        (target / "whole.json").write_text("[" * 5)
    else:
        shutil.rmtree(target)
        {"empty": target.mkdir, "file": target.touch, "link": lambda: target.symlink_to("nowhere")}[damage]()
    assert cache.find("m") is None
    assert cache.folder("m", counted(times), 10) == target == cache.find("m")
    assert snapshot(target) == whole and len(times) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), UserError("no")])
def test_what_fails_leaves_nothing(folder, error):
    def fail(path):
        make(path)
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UserError) as raised:
        cache.folder("m", fail, 10)
    assert cache.find("m") is None and not list(folder.glob("*.partial")) and not (folder / "m").exists()
    if isinstance(error, OSError):
        assert "No space left" in one_sentence(raised) and str(folder) in str(raised.value)


CHILD = """
import sys, time
from pathlib import Path
from fastfill import cache
def make(path):
    (path / "a").write_text("whole")
    print("begun", flush=True)
    time.sleep(float(sys.argv[1]))
    (path / "b").write_text("too")
print(cache.folder("m", make, 10), flush=True)
"""


def child(seconds):
    source = Path(cache.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(seconds)], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_conversion_is_taken_for_nothing_and_cleaned(folder):
    process = child(600)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("*.partial")) and cache.find("m") is None
    cache.folder("other", make, 10)  # whoever comes next cleans
    assert not list(folder.glob("*.partial"))
    assert sorted(snapshot(cache.folder("m", make, 10))) == ["a", "b", "whole.json"]


def test_two_at_once_both_succeed_and_one_makes_it(folder):
    first = child(1)
    assert first.stdout.readline() == "begun\n"
    second = child(1)
    cache.folder("other", make, 10)  # a folder that is being filled is not cleaned away
    assert list(folder.glob(".m.partial"))
    outputs = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert outputs == [f"{folder / 'm'}\n"] * 2 and first.returncode == second.returncode == 0  # the second never began
    assert cache.find("m")


def test_a_cache_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        monkeypatch.setenv("FASTFILL_CACHE", str(tmp_path / place))
        with pytest.raises(UserError, match="FASTFILL_CACHE") as error:
            cache.folder("m", lambda _: pytest.fail("begun"), 10)
        assert str(tmp_path / place) in one_sentence(error)
    write(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="FASTFILL_CACHE") as error:
        models.load(str(tmp_path / "m.gguf"))
    assert "GGUF" not in one_sentence(error)


def test_too_little_room_is_found_before_the_work(folder):
    with pytest.raises(UserError, match="GB left") as error:
        cache.folder("m", lambda _: pytest.fail("begun"), 1 << 60)
    assert "FASTFILL_CACHE" in one_sentence(error)


def test_a_whole_folder_needs_no_writing(tmp_path, folder, monkeypatch):
    write(tmp_path / "m.gguf")
    models.resolve(str(tmp_path / "m.gguf"))
    shutil.rmtree(folder / "known")
    before = snapshot(folder)

    def fail(*_, **__):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "write_text", "touch", "chmod"):
        monkeypatch.setattr(Path, name, fail)
    models.load(str(tmp_path / "m.gguf"), "fp32")
    assert snapshot(folder) == before


def test_others_can_read_what_the_umask_lets_them(tmp_path):
    write(tmp_path / "m.gguf")
    old = os.umask(0o022)
    try:
        here = Path(models.resolve(str(tmp_path / "m.gguf")))
    finally:
        os.umask(old)
    assert stat.S_IMODE(here.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in here.iterdir()} == {0o644}
    assert json.loads((here / "whole.json").read_text()).keys() == {file.name for file in here.iterdir()} - {"whole.json"}


def test_no_bar_where_stderr_is_no_terminal(tmp_path, capfd):
    write(tmp_path / "m.gguf")
    capfd.readouterr()
    models.load(str(tmp_path / "m.gguf"), "fp32")
    assert capfd.readouterr() == ("", "")
