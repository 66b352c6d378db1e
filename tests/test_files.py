import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import one_sentence, snapshot, user_error

from fastfill import files
from fastfill.errors import LONGEST, UserError, printable, quoted

# --- what is read ---------------------------------------------------------------------------------------------------------


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text, words",
    [
        (nested(files.MAX_DEPTH + 1), "nested more than 64 deep"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested more than 64 deep"),
        (nested(100_000), "nested more than 64 deep"),
        ('{"a": 1' + "0" * files.MAX_DIGITS + "}", "whole number has 21 digits"),
        ("-" + "9" * 5000, "whole number has 5,001 digits"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' comes twice"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' comes twice"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[" + "[]," * files.MAX_VALUES + "1]", "2,000,000 values"),
        ("{", "line 1 column 2"),
        ("", "line 1 column 1"),
    ],
)
def test_a_document_beyond_the_limits_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        files.parse_json(text)


def test_a_document_within_the_limits_is_what_json_says():
    text = '{"a": [1, 2.5, -3e2, true, null, "x\\ud83d\\ude00"], "b": {"c": NESTED}, "d": 18446744073709551615}'
    text = text.replace("NESTED", nested(62))
    assert files.parse_json(text) == json.loads(text)
    assert files.parse_json(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)
    assert files.parse_json("-9223372036854775808") == -(2**63)


def test_what_is_no_regular_file_or_too_large_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "folder").mkdir()
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {"pipe": "not a regular file", "folder": "not a regular file", "sparse": "1,099,511,627,776 bytes"}
    places |= {"loop": "symbolic links", "nothing": "No such file", "pipe/x": "Not a directory", "x\0y": "null"}
    for name, words in places.items():
        with pytest.raises(UserError, match=words) as error:
            files.read_json(tmp_path / name, "mend it")
        assert one_sentence(error).endswith("; mend it.")
    with pytest.raises(UserError, match="not a regular file"):
        files.read_json("/dev/zero", "mend it")
    (tmp_path / "exact").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "exact", 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes, and 4 are the most"):
        files.read_bytes(tmp_path / "exact", 4)
    assert not [
        name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}").startswith(str(tmp_path))
    ]


def test_any_error_inside_the_boundary_is_a_sentence():
    for error in (KeyError("k"), RecursionError(), OverflowError("int too large"), TypeError("a\nb"), MemoryError()):
        with pytest.raises(UserError, match=r"^FILE is damaged \(") as caught, files.reading("FILE", "is damaged", "mend it"):
            raise error
        one_sentence(caught)
    with pytest.raises(KeyboardInterrupt), files.reading("FILE", "is damaged", "mend it"):
        raise KeyboardInterrupt


def test_a_message_is_one_printable_line_whatever_it_quotes():
    hostile = "\x1b[2J\x1b]0;owned\x07\r\n\x9b31m\u202e\udc80\x00"
    for text in (hostile, hostile * 1000, "x" * 100_000, "\n" * 5000):
        message = str(UserError(f"begin {text} end"))
        assert len(message) <= LONGEST and message.isprintable() and message.startswith("begin")
        assert printable(message, LONGEST) == message
    assert str(UserError("Grüße, 你好; mend it.")) == "Grüße, 你好; mend it."
    values = (10**5000, "x" * 10**6, list(range(10**5)), {"a" * 1000: ["b" * 1000] * 10}, [[[[[1]]]]], b"x" * 1000, 1.5, None)
    assert all(len(quoted(value)) < 300 and quoted(value).isprintable() for value in values)
    assert quoted("half") == "'half'" and quoted(12) == "12"


# --- what is written ------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "page.html"
    files.write(file, "one")
    assert snapshot(tmp_path) == {"deep/page.html": b"one"}
    file.chmod(0o640)
    files.write(file, "two")
    assert snapshot(tmp_path) == {"deep/page.html": b"two"} and stat.S_IMODE(file.stat().st_mode) == 0o640

    def half(path):
        Path(path).write_text("ha")
        raise OSError(28, "No space left on device")

    with user_error(r"could not be written: No space left on device"):
        files.write(file, half)
    assert snapshot(tmp_path) == {"deep/page.html": b"two"} and os.listdir(file.parent) == ["page.html"]
    with pytest.raises(UserError, match="could not be written"):
        files.write(file, "lone \ud800 surrogate")
    assert snapshot(tmp_path) == {"deep/page.html": b"two"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_text("old")
    (tmp_path / "link").symlink_to("there/real")
    (tmp_path / "dangling").symlink_to("there/made")
    files.write(tmp_path / "link", "new")
    files.write(tmp_path / "dangling", "made")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert snapshot(tmp_path / "there") == {"real": b"new", "made": b"made"}
    assert sorted(os.listdir(tmp_path)) == ["dangling", "link", "there"]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null")):
        before = place.stat().st_mode
        for act in (lambda place: files.write(place, "x"), files.check_file):
            with user_error("no regular file of that name"):
                act(place)
        assert place.stat().st_mode == before


FOLDER = {"config": "new", "weights": lambda path: path.write_bytes(b"new")}


@pytest.fixture(params=["in one step", "in two"])
def exchange(request, monkeypatch):
    """Both ways to put a folder in the place of another."""
    if request.param == "in two":
        monkeypatch.setattr(files, "_renameat2", lambda *_: False)
    return request.param


@pytest.fixture
def target(tmp_path):
    """A folder with an old version and what a user put beside it."""
    folder = tmp_path / "place" / "artifact"
    (folder / "notes").mkdir(parents=True)
    for name in ("config", "weights", "mine", "notes/mine"):
        (folder / name).write_text(f"old {name}")
    (folder / "to-mine").symlink_to("notes/mine")
    return folder


def replaced(folder):
    new = {"config": b"new", "weights": b"new"}
    return snapshot(folder) == {**new, "mine": b"old mine", **dict.fromkeys(("notes/mine", "to-mine"), b"old notes/mine")}


def test_a_folder_is_exchanged_and_the_users_files_are_kept(target, exchange):
    target.chmod(0o750)
    inode = (target / "mine").stat().st_ino
    files.replace_folder(target, FOLDER)
    assert replaced(target) and (target / "to-mine").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert (target / "mine").stat().st_ino == inode  # not a copy, however large
    assert os.listdir(target.parent) == ["artifact"]


def test_a_folder_that_is_a_link_stays_one(target, tmp_path, exchange):
    (tmp_path / "link").symlink_to("place/artifact")
    (tmp_path / "dangling").symlink_to("place/new")
    files.replace_folder(tmp_path / "link", FOLDER)
    files.replace_folder(tmp_path / "dangling", FOLDER)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert replaced(target) and snapshot(target.parent / "new") == {"config": b"new", "weights": b"new"}
    assert sorted(os.listdir(target.parent)) == ["artifact", "new"]
    assert sorted(os.listdir(tmp_path)) == ["dangling", "link", "place"]


def test_without_hard_links_files_are_copied(target, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.replace_folder(target, FOLDER)
    assert replaced(target) and (target / "to-mine").is_symlink()


def test_a_failure_at_any_step_leaves_the_old_folder(target, exchange, monkeypatch):
    """Each call to the system fails once, in its turn: with an error, and with an interrupt."""
    before = snapshot(target)
    steps = [(files, name) for name in ("_put", "_keep_others", "_sync", "_exchange")] + [(Path, "rename"), (Path, "mkdir")]
    failed = 0
    for owner, name in steps:
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            for turn in range(3):
                real, calls = getattr(owner, name), []

                def patched(*args, real=real, calls=calls, turn=turn, error=error, **kwargs):
                    calls.append(args)
                    if len(calls) == turn + 1:
                        raise error
                    return real(*args, **kwargs)

                with monkeypatch.context() as patch:
                    patch.setattr(owner, name, patched)
                    try:
                        files.replace_folder(target, FOLDER)
                    except (UserError, KeyboardInterrupt):
                        failed += 1
                        # the last `_sync` comes after the exchange
                        assert snapshot(target) == before or (name == "_sync" and replaced(target)), (name, turn)
                assert os.listdir(target.parent) == ["artifact"], (name, turn)
                files.replace_folder(target, {"config": "old config", "weights": "old weights"})
    assert failed >= 18


@pytest.mark.skipif(not hasattr(files._libc(), "renameat2"), reason="this system cannot exchange two names at once")
def test_there_is_a_whole_folder_at_every_moment(target):
    seen, done = [], threading.Event()

    def look():
        while not done.is_set():
            seen.append(os.path.lexists(target))

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(30):
        files.replace_folder(target, FOLDER)
    done.set()
    watcher.join()
    assert len(seen) > 30 and all(seen)


KILLED = """
import os, sys
from pathlib import Path
from fastfill import files
step, target = sys.argv[1:]
def die(*_, **__):
    os._exit(9)
if step == "exchange":
    files._exchange = die
elif step == "between":
    files._renameat2 = lambda *_: False
    rename = Path.rename
    def patched(self, to):
        rename(self, to) if self == Path(target) else die()
    Path.rename = patched
elif step == "after":
    files.shutil.rmtree = die
elif step == "file":
    files.os.replace = die
    files.write(Path(target) / "config", "new")
files.replace_folder(target, {"config": "new", "weights": "new"})
"""


def python(code, *arguments, **more):
    env = {"PYTHONPATH": ":".join(sys.path), "PATH": os.environ["PATH"]}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=env, **more)


@pytest.mark.parametrize("step", ["exchange", "between", "after", "file"])
def test_a_killed_writer_leaves_what_the_next_one_mends(target, step):
    before = snapshot(target)
    assert python(KILLED, step, target).returncode == 9
    left = [*os.listdir(target.parent), *(os.listdir(target) if target.exists() else [])]
    assert any(name.startswith(".fastfill-") for name in left)
    if step == "file":
        files.check_file(target / "config")
    else:
        files.check_folder(target)  # a command that begins
    assert os.listdir(target.parent) == ["artifact"]
    assert snapshot(target) == (before | {"config": b"new", "weights": b"new"} if step == "after" else before)


def test_what_a_living_writer_is_at_is_left_alone(target):
    with files._workshop(target) as workshop:
        (workshop / "new").write_text("half")
        files.replace_folder(target, FOLDER)  # of this process
        code = "import sys; from fastfill import files; files.replace_folder(sys.argv[1], {'config': 'theirs'})"
        assert python(code, target).returncode == 0  # and of another
        assert (workshop / "new").read_text() == "half"
    assert (target / "config").read_text() == "theirs" and os.listdir(target.parent) == ["artifact"]


HELD = "import sys; from fastfill import files; held = files.hold(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    code = [sys.executable, "-c", HELD, str(tmp_path)]
    env = {"PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as other:
        assert other.stdout.readline() == "held\n"
        with user_error("another process is writing there"):
            files.hold(tmp_path)
        other.stdin.close()
        other.wait()
    mine, again = files.hold(tmp_path), files.hold(tmp_path)  # the end of the process was the end of its lock
    assert mine is again
    assert "another process is writing there" in python(HELD, tmp_path, input="").stderr
    del mine, again
    assert python(HELD, tmp_path, input="").stdout == "held\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place, words",
    [
        ("file", "there is a file of that name"),
        ("file/below", "Not a directory"),
        ("x" * 256, "File name too long"),
        ("/proc/artifact", "could not be written"),
        ("a\0b", "null byte"),
        ("\ud800", "could not be written"),
        ("/proc", "mount point"),
        ("here", "holds the folder you are in"),
        ("", "holds the folder you are in"),
        ("/", "holds the folder you are in"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_at_once(tmp_path, monkeypatch, place, words):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    place = place if place == "" else tmp_path / place
    for act in (files.check_folder, lambda place: files.replace_folder(place, FOLDER)):
        with user_error(words):
            act(place)
    if words not in ("there is a file of that name", "mount point", "holds the folder you are in"):
        for act in (files.check_file, lambda place: files.write(place, "text")):
            with user_error("could not be written"):
                act(place)
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_looking_leaves_no_trace(tmp_path, target):
    before = snapshot(tmp_path)
    for place in (target, tmp_path / "new", tmp_path / "a" / "b" / "c"):
        files.check_folder(place)
        files.check_file(place / "file")
    files.check_file(target / "config")
    assert snapshot(tmp_path) == before and os.listdir(tmp_path) == ["place"]
