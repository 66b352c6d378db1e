"""Result files as one HTML page: `fastfill report`. matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastfill import files


def write(names: Iterable[str | Path], out: str | Path, svg: str | Path | None = None) -> dict[str, Any]:
    """Read results and write the page to `out`, and each figure as NAME.svg into the folder `svg`.

    names: .json and .jsonl files, folders of them, artifact folders. Returns out, the figures' names, the titles of figures
    without data (`missing`), the files in `svg`, and the number of documents (`runs`).

    Raises UserError for files that are no results, if matplotlib is missing, or if something cannot be written.
    """
    from fastfill.lab.report import draw, page, runs

    files.check_file(out)
    if svg is not None:
        files.check_file(Path(svg) / "figure.svg")
    found = runs.read(names)
    drawn, missing = page.figures(found)
    pictures = {Path(svg) / f"{figure.name}.svg": draw.standalone(figure.svg) for figure in drawn} if svg is not None else {}
    for file, content in {**pictures, Path(out): page.html(found, drawn, missing)}.items():
        files.write(file, content)
    return {
        "out": str(out),
        "figures": [figure.name for figure in drawn],
        "missing": missing,
        "svg": [str(file) for file in pictures],
        "runs": len(found),
    }
