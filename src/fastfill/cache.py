"""Folders that are made once and kept: each is whole, or it is made again. Keys come from content, not from names and times.
Measurements of this machine, too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastfill import files
from fastfill.errors import UserError
from fastfill.progress import waiting

SEAL = "whole.json"  # written last: name and size of every other file


def cache_dir() -> Path:
    """Where converted models are kept: ``$FASTFILL_CACHE``, else ``~/.cache/fastfill``."""
    if given := os.environ.get("FASTFILL_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "fastfill"
    except RuntimeError as error:
        raise UserError("There is no home folder to keep converted models in; set FASTFILL_CACHE to a folder.") from error


def find(name: str) -> Path | None:
    """The folder `name` of the cache if it is there and whole. Writes nothing: a cache may be read-only."""
    target = cache_dir() / name
    return target if _whole(target) else None


def folder(name: str, make: Callable[[Path], None], size: int) -> Path:
    """The folder `name` of the cache. If it is not there or not whole, ``make(empty folder)`` fills a new one, of `size` bytes.

    Processes that need the same folder wait for the first. A kill leaves nothing that counts as whole, and the next call
    removes what is left. Raises UserError if the cache cannot be written or has no room, before `make` is called.
    """
    target = cache_dir() / name
    with _unwritable(), _locked(target):
        if find(name):  # another process was faster
            return target
        beside = _beside(target)
        _remove(beside)
        _remove_leftovers(target.parent)
        if (free := shutil.disk_usage(target.parent).free) < size:
            raise UserError(
                f"Converted models are kept in {target.parent}, which has {free / 1e9:.1f} GB left and needs {size / 1e9:.1f}; "
                "make room, or set FASTFILL_CACHE to another folder."
            )
        beside.mkdir()
        try:
            make(beside)
            _seal(beside)
            _remove(target)
            beside.rename(target)
        finally:
            _remove(beside)
    return target


def measured(name: str, measure: Callable[[], Any], is_one: Callable[[Any], bool]) -> Any:
    """What `measure` gives, as JSON has it; remembered under a name that says all it depends on. It is measured again where
    nothing is remembered, or what `is_one` does not know (it may raise KeyError and TypeError), or nothing can be written."""
    file = cache_dir() / "choices" / f"{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        if is_one(found := json.loads(file.read_text())):
            return found
    made = measure()
    with suppress(UserError):
        files.write(file, json.dumps(made))
    return made


def _whole(target: Path) -> bool:
    """Whether all files are there that were written, in full length."""
    try:
        sizes = json.loads((target / SEAL).read_text())
        return bool(sizes) and all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _seal(target: Path) -> None:
    """Bring the files to the disk, and write down what there is."""
    files = sorted(file for file in target.iterdir() if file.is_file())
    for file in files:
        file.chmod(target.stat().st_mode & 0o666)  # safetensors writes for the owner alone, the folder knows the umask
        _sync(file)
    (target / SEAL).write_text(json.dumps({file.name: file.stat().st_size for file in files}))
    _sync(target / SEAL)
    _sync(target)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _lock(target: Path, timeout: float = -1) -> FileLock:
    return FileLock(target.with_name(f".{target.name}.lock"), timeout=timeout)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(target)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with waiting(f"waiting for another process that unpacks {target.name}"):
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left: folders that were being filled and whose lock nobody holds."""
    for beside in parent.glob(".*.partial"):
        target = beside.with_name(beside.name.removeprefix(".").removesuffix(".partial"))
        try:
            with _lock(target, timeout=0):
                _remove(beside)
        except Timeout:
            pass


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _unwritable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(
            f"Converted models are kept in {cache_dir()}, which cannot be written ({why}); set FASTFILL_CACHE to a folder that "
            "can be."
        ) from error


def fingerprint(path: Path) -> str:
    """Hash of a file's content, in 16 hexadecimal digits. Remembered while the file is the same by all that its folder says."""
    known = cache_dir() / "known"
    before = _identity(path)
    try:
        remembered = (known / before).read_text()
        if len(remembered) == 16 and set(remembered) <= set("0123456789abcdef"):
            return remembered
    except (OSError, ValueError):
        pass
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    found = digest.hexdigest()[:16]
    if _identity(path) != before:
        raise UserError(f"{path.name} is being changed; try again when it is finished.")
    try:  # where nothing can be written, the file is read again the next time
        known.mkdir(parents=True, exist_ok=True)
        new = known / f".{before}.{os.getpid()}"
        new.write_text(found)
        new.replace(known / before)
    except OSError:
        pass
    return found


def _identity(path: Path) -> str:
    """Changes when a file does: unlike the time of the last write, the time of the last change cannot be set."""
    stat = path.stat()
    parts = (path.resolve(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
