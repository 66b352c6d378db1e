"""`fastfill` as a process, as a shell sees it: streams that are closed, full or of another encoding; Ctrl-C; environments."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import tiny_artifact, tiny_model

from fastfill import artifact as artifacts
from fastfill import kernels

LINE_OF_CODE = "import os, sys; os.close({number}); os.execv(sys.executable, [sys.executable, '-m', 'fastfill', *sys.argv[1:]])"


def environment(**changes):
    found = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **changes}
    return {name: value for name, value in found.items() if value is not None}


def command(*arguments, closed=None, stdin=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE, **changes):
    begin = ["-m", "fastfill"] if closed is None else ["-c", LINE_OF_CODE.format(number=closed)]
    return subprocess.run(
        [sys.executable, *begin, *map(str, arguments)],
        input=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment(**changes),
        preexec_fn=hear_interrupts,
    )


def hear_interrupts():
    """What a shell runs in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def refused(done, code=2):
    """One sentence on stderr, and the exit code."""
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code and len(lines) == 1 and lines[0].startswith("fastfill: "), done.stderr.decode()
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("process") / "artifact"
    artifacts.save(tiny_artifact(tiny_model()), folder)
    return folder


def test_a_closed_stdin(folder, tmp_path):
    done = command("generate", "default", "--artifact", folder, "--prompt-file", "-", closed=0)
    assert "Standard input is closed" in refused(done)
    assert command("inspect", folder, "--json", closed=0).returncode == 0


def test_stdin_that_is_no_text(folder):
    arguments = ["generate", "default", "--artifact", folder, "--prompt-file", "-"]
    for locale in ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}):
        done = command(*arguments, stdin=b"caf\xe9 " * 400, **locale)
        assert "Standard input cannot be read: it is not UTF-8" in refused(done)


def test_a_closed_stdout_is_told_before_anything_is_done(folder):
    assert "Standard output is closed" in refused(command("inspect", folder, closed=1))


def test_a_closed_stderr_leaves_stdout_alone(folder, tmp_path):
    good = command("inspect", folder, "--json", closed=2)
    assert good.returncode == 0 and json.loads(good.stdout.splitlines()[-1])["sparsity"] == 0.5
    bad = command("inspect", tmp_path / "none", closed=2)
    assert (bad.returncode, bad.stdout) == (2, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("what", ["inspect", "--json", "--help"])
def test_a_full_disk_behind_stdout(folder, what):
    arguments = {"inspect": ["inspect", folder], "--json": ["inspect", folder, "--json"], "--help": ["--help"]}[what]
    with open("/dev/full", "wb") as full:
        assert "Standard output cannot be used: No space left on device." in refused(command(*arguments, stdout=full))
        if what == "inspect":
            assert command("inspect", "/none", stderr=full).returncode == 2


def test_a_reader_that_is_gone(folder):
    reader, writer = os.pipe()
    os.close(reader)
    done = command("inspect", folder, "--json", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_our_characters(folder, encoding):
    chinese = folder.with_name("\u4e2d")
    if not chinese.is_symlink():
        chinese.symlink_to(folder)
    done = command("inspect", chinese, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    out = done.stdout.decode(encoding)
    assert out.count("#") > 10 and "/\\u4e2d: artifact for" in out


# Ctrl-C while torch is imported, where the interrupt may come out as any error.
INTERRUPTED_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10**6):
        pass
except KeyboardInterrupt:
    {then}
"""


@pytest.mark.parametrize(
    "then", ["raise", "raise ImportError('cannot import name x')", "raise SystemError('no exception set')"]
)
def test_ctrl_c_during_an_import(folder, tmp_path, then):
    (tmp_path / "torch.py").write_text(INTERRUPTED_IMPORT.format(then=then))
    done = command("inspect", folder, PYTHONPATH=":".join([str(tmp_path), *filter(None, sys.path)]))
    assert refused(done, 130) == "fastfill: interrupted."


def test_an_ignored_ctrl_c_stays_ignored(folder, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise OSError(5, 'went on')")
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-m", "fastfill", "inspect", str(folder)],
        capture_output=True,
        env=environment(PYTHONPATH=":".join([str(tmp_path), *filter(None, sys.path)])),
    )
    assert "went on" in refused(done)


@pytest.mark.parametrize(
    "changes",
    [
        *({"WORLD_SIZE": size} for size in ("many", "-2", "9" * 5000, "2")),
        {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
    ],
    ids=str,
)
def test_an_environment_of_processes_that_makes_no_sense(monkeypatch, changes):
    from fastfill.calibration import team
    from fastfill.errors import UserError

    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"The environment variable .* is .*, not .* unset WORLD_SIZE"):
        team.launched()


@pytest.mark.parametrize("value, expected", [(None, False), ("", False), ("1", False)])
def test_an_environment_of_one_process(monkeypatch, value, expected):
    from fastfill.calibration import team

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert team.launched() is expected


@pytest.mark.skipif(not kernels.cpu.usable(), reason=kernels.cpu.status())
def test_an_instruction_set_that_does_not_exist():
    assert "FASTFILL_ISA=mmx cannot run here" in refused(command("env", FASTFILL_ISA="mmx"))
