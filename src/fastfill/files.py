"""Files: what others wrote is read as data, within limits; what we write is whole or not there at all.

`reading` and `writing` turn whatever goes wrong into a sentence with the file's name. Nothing here needs torch.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastfill.errors import UserError, quoted, reason

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

MAX_JSON = 64 << 20  # bytes of one document; a calibration on a million rows names them in 40 MB
MAX_VALUES = 2_000_000  # of one document: an empty list takes 3 bytes of a file and 64 of memory
MAX_DEPTH = 64
MAX_DIGITS = 20  # of a whole number: 64 bits and a sign
WAIT_S = 60.0  # for another process that is saving to the same place

Content = str | Callable[[Path], None]  # text, or what writes the file of that name


# --- reading --------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(what: Any, words: str, advice: str) -> Iterator[None]:
    """Inside, any error becomes a UserError: `{what} {words} ({why}); {advice}.` Libraries raise many kinds of them."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {words} ({reason(error)}); {advice}.") from error


def read_bytes(file: str | Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError or ValueError; never waits for a pipe."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, and {most:,} are the most")
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read(found.st_size + 1)
    finally:
        os.close(descriptor)
    if len(content) > found.st_size:
        raise ValueError("it grows while it is read")
    return content


def parse_json(content: bytes | str) -> Any:
    """A JSON document, within limits of size, depth and digits; a key may not come twice. Raises ValueError with the reason."""
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError("it is not UTF-8 text") from error
    if len(content) > MAX_JSON or content.count(",") + content.count("[") + content.count("{") > MAX_VALUES:
        raise ValueError(f"it is larger than {MAX_JSON >> 20} MB or {MAX_VALUES:,} values")
    try:
        document = json.loads(content, parse_int=_integer, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    _check_depth(document)
    return document


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(digits):,} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {quoted(twice)} comes twice")
    return found


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        level = [value for value in level if isinstance(value, (dict, list))]
        if not level:
            return
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def read_json(file: str | Path, advice: str, words: str = "cannot be read as JSON") -> Any:
    """A JSON file. Raises UserError that ends in the advice."""
    with reading(file, words, advice):
        return parse_json(read_bytes(file, MAX_JSON))


# --- writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(target: str | Path, advice: str) -> Iterator[None]:
    """Inside, any error becomes a UserError: `{target} could not be written: {why}{advice}`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{target} could not be written: {reason(error)}{advice}") from error


def write(file: str | Path, content: Content, advice: str = "; name another place.") -> None:
    """Write a file beside `file` and move it there, so that a failure at any moment leaves the old one whole. A link stays a
    link: the file it names is written. Raises UserError if that cannot be done."""
    with writing(file, advice):
        file = Path(os.path.realpath(file))
        file.parent.mkdir(parents=True, exist_ok=True)
        with _workshop(file) as workshop:
            _check_kind(file, stat.S_ISREG, "there is no regular file of that name, but something else")
            made = workshop / "new"
            _put(made, content)
            if file.exists():
                shutil.copymode(file, made)
            os.replace(made, file)
        _sync(file.parent)


def replace_folder(target: str | Path, files: dict[str, Content]) -> None:
    """Write a folder beside `target` and exchange the two, so that a failure at any moment leaves the old one whole. Other
    files in it are kept; a link stays a link. Raises UserError if that cannot be done."""
    with writing(target, ". What was there before is untouched."):
        target = Path(os.path.realpath(target))
        _check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        held = hold(target, WAIT_S) if target.exists() else None
        with _workshop(target) as workshop:
            new = workshop / "new"
            new.mkdir()
            for name, content in files.items():
                _put(new / name, content)
            if target.is_dir():
                _keep_others(target, new, set(files))
                shutil.copymode(target, new)
            _sync(new)
            _exchange(new, target, workshop / "old")
        _sync(target.parent)
        del held


def check_folder(target: str | Path) -> None:
    """Raise UserError unless `replace_folder` can write there: to be known before the hours, not after. Leaves no trace."""
    with writing(target, "; name another place."):
        target = Path(os.path.realpath(target))
        _check_place(target)
        _try(target)


def check_file(file: str | Path) -> None:
    """The same for `write`."""
    with writing(file, "; name another place."):
        file = Path(os.path.realpath(file))
        _check_kind(file, stat.S_ISREG, "there is no regular file of that name, but something else")
        _try(file)


def _check_place(target: Path) -> None:
    _check_kind(target, stat.S_ISDIR, "there is a file of that name")
    if target in (here := Path(os.path.realpath(os.curdir)), *here.parents):
        raise UserError(f"{target} holds the folder you are in and cannot be replaced; name a folder of its own.")
    if os.path.ismount(target):
        raise UserError(f"{target} is a mount point and cannot be replaced; name a folder inside it.")


def _check_kind(target: Path, kind: Callable[[int], bool], words: str) -> None:
    with suppress(FileNotFoundError):
        if not kind(target.stat().st_mode):
            raise ValueError(words)


def _try(target: Path) -> None:
    place = target
    while not place.parent.exists():  # folders on the way will be made
        place = place.parent
    with _workshop(place) as workshop:
        (workshop / target.relative_to(place.parent)).mkdir(parents=True)


def _put(file: Path, content: Content) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        if isinstance(content, str):
            stream.write(content)
    if not isinstance(content, str):
        mode = file.stat().st_mode  # what the umask says; safetensors makes files that other users cannot read
        content(file)
        file.chmod(mode)
    _sync(file)


def _sync(path: Path) -> None:
    """What a power cut must not take: before a name points to it, and after."""
    with suppress(PermissionError):  # a folder on Windows; one that may be written and not be read
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
                raise
        finally:
            os.close(descriptor)


def _keep_others(old: Path, new: Path, replaced: set[str]) -> None:
    for item in old.iterdir():
        if item.name in replaced:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, new / item.name)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under another name: costs nothing, however large. A copy where the file system has no such links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, target: Path, aside: Path) -> None:
    """Put `new` in the place of `target`. Where the system cannot exchange two names at once, the old folder is `aside` for a
    moment, inside the workshop, from where the next writer takes it back if this process dies just then."""
    if not target.exists():
        new.rename(target)
    elif not _renameat2(new, target):
        try:
            target.rename(aside)
            new.rename(target)
        except BaseException:  # an interrupt too
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None


def _renameat2(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux). False where the system or the file system cannot."""
    function = getattr(_libc(), "renameat2", None)
    if function is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, gone afterwards. Its lock says that somebody works in it; those of killed processes,
    which nobody holds, are cleared away, and what they had put aside is put back."""
    mark = f".fastfill-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"
    for name in os.listdir(target.parent):
        if name.startswith(mark):
            _clear(target.parent / name, target)
    made, lock = None, None
    while made is None:
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=mark))
        try:
            lock = _Lock(made)
        except (BlockingIOError, FileNotFoundError):  # another process took it for a leftover just now
            made = None
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        del lock


def _clear(leftover: Path, target: Path) -> None:
    with suppress(OSError):
        lock = _Lock(leftover)
        if not lock.locked:
            return  # nobody can tell
        if (leftover / "old").exists() and not os.path.lexists(target):
            (leftover / "old").rename(target)
        shutil.rmtree(leftover, ignore_errors=True)


# --- one writer at a time -------------------------------------------------------------------------------------------------


class _Lock:
    """An exclusive lock on a folder, for as long as this object or the process lives. It leaves no file behind.

    locked: False on file systems that have no locks. Raises BlockingIOError if it is taken, OSError if there is no such folder.
    """

    def __init__(self, folder: Path):
        descriptor = os.open(folder, os.O_RDONLY)
        self.locked = True
        weakref.finalize(self, os.close, descriptor)
        found = os.fstat(descriptor)
        self.key = found.st_dev, found.st_ino
        try:
            if fcntl is None:
                raise OSError(errno.ENOTSUP, "no locks")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            self.locked = False
        now = os.stat(folder)
        if (now.st_dev, now.st_ino) != self.key:
            raise BlockingIOError(errno.EWOULDBLOCK, "another folder was put there just now", str(folder))


_HELD: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()


def hold(folder: Path, wait_s: float = 0.0) -> object:
    """Keep other processes from holding this folder while the returned object lives; within a process several may.

    Raises UserError if another process holds it and does not let go in `wait_s` seconds.
    """
    end = time.monotonic() + wait_s
    while True:
        found = os.stat(folder)
        if (mine := _HELD.get((found.st_dev, found.st_ino))) is not None:
            return mine
        try:
            lock = _Lock(folder)
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"{folder} is in use: another process is writing there; wait until it is done, or stop it."
                ) from error
            time.sleep(0.05)
        else:
            _HELD[lock.key] = lock
            return lock
