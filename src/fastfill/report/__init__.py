"""Result files as one HTML page: `fastfill report`. matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastfill.errors import UserError


def write(names: Iterable[str | Path], out: str | Path, svg: str | Path | None = None) -> dict[str, Any]:
    """Read results and write the page to `out`, and each figure as NAME.svg into the folder `svg`.

    names: .json and .jsonl files, folders of them, artifact folders. Returns out, the figures' names, the titles of figures
    without data (`missing`), the files in `svg`, and the number of documents (`runs`).

    Raises UserError for files that are no results, if matplotlib is missing, or if something cannot be written.
    """
    from fastfill.report import draw, page, runs

    found = runs.read(names)
    drawn, missing = page.figures(found)
    files = {Path(svg) / f"{figure.name}.svg": draw.standalone(figure.svg) for figure in drawn} if svg is not None else {}
    for file, content in {**files, Path(out): page.html(found, drawn, missing)}.items():
        _write(file, content)
    return {
        "out": str(out),
        "figures": [figure.name for figure in drawn],
        "missing": missing,
        "svg": [str(file) for file in files],
        "runs": len(found),
    }


def _write(file: Path, content: str) -> None:
    """Beside it first, then renamed, so that a full disk leaves the old file whole."""
    beside = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, file)
        beside = None
    except OSError as error:
        raise UserError(f"{file} could not be written: {error.strerror}; name another place.") from error
    finally:
        if beside:
            os.unlink(beside)
