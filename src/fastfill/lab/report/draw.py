"""The drawing sheet of all figures: matplotlib's SVG backend, with colours as CSS variables and text as text.

The same input gives the same bytes. Colours are drawn in the light scheme and then replaced by `var(--ff-NAME)`, so that one
figure serves both schemes; `css` defines the variables for a page, `standalone` for a file of its own.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple
from xml.etree import ElementTree

from fastfill.errors import UserError
from fastfill.lab.report.values import MISSING, text

WIDTH = 760  # of every figure, in its own units; font sizes are in the same
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
PALETTE = {  # name: (light, dark); text has a contrast of 4.5 with its page, marks of 3
    "page": ("#fefefe", "#10161d"),
    "ink": ("#1b2530", "#e6edf3"),
    "muted": ("#55606b", "#a3b0bd"),
    "grid": ("#d5dbe1", "#303b46"),
    "blue": ("#0b62a8", "#5ab0f2"),
    "orange": ("#b8400c", "#ff9a5c"),
    "green": ("#007a5c", "#34c99a"),
    "purple": ("#8a2f80", "#f7b7dc"),
    "ochre": ("#a88300", "#f0d35a"),
    "grey": ("#5d6874", "#9ba8b5"),
}
HEX = {name: light for name, (light, _) in PALETTE.items()}
SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
_drawing = threading.Lock()  # matplotlib's settings are global


class Style(NamedTuple):
    """How one series looks; no two share a marker, so that colour is never the only difference."""

    colour: str
    marker: str
    line: Any


STYLES = (
    Style("blue", "o", "-"),
    Style("orange", "s", "--"),
    Style("green", "^", "-."),
    Style("purple", "D", ":"),
    Style("ochre", "v", (0, (5, 1, 1, 1, 1, 1))),
    Style("grey", "X", (0, (3, 3))),
    Style("blue", "P", (0, (1, 2))),
    Style("orange", "*", (0, (6, 2))),
    Style("green", "<", (0, (2, 1))),
    Style("purple", ">", (0, (4, 1, 1, 1))),
)


def style(index: int) -> Style:
    return STYLES[index % len(STYLES)]


class Sheet:
    """A figure while it is drawn: `with Sheet(...) as sheet: sheet.axes(...)`, then `sheet.svg`.

    name: prefix of all ids, so that figures can share a page. title, description: what screen readers say.
    Raises UserError if matplotlib is missing.
    """

    def __init__(self, name: str, title: str, description: str, height: float):
        self.name, self.title, self.description, self.height = name, title, description, height
        self.svg = ""

    def __enter__(self) -> Sheet:
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UserError("Figures need matplotlib; install it with `pip install 'fastfill[report]'`.") from error
        with ExitStack() as stack:
            stack.enter_context(_drawing)
            stack.enter_context(matplotlib.rc_context())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # an empty axis; a letter without a glyph, for which the browser has a font
            matplotlib.rcdefaults()
            settings: Any = matplotlib.rcParams
            settings.update(_settings(self.name))
            self.figure = Figure(figsize=(WIDTH / 72, self.height / 72), dpi=72, layout="constrained")
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._open:
            if error is None:
                out = io.BytesIO()
                self.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
                self.svg = _finish(out.getvalue(), self)

    def axes(self, rows: int = 1, columns: int = 1, **options: Any) -> list[Any]:
        return list(self.figure.subplots(rows, columns, squeeze=False, **options).flat)

    def legend(self, axes: Any) -> None:
        """One legend below everything, each label once; in as many columns as fit, on as much more height as it needs."""
        entries: dict[str, Any] = {}
        for ax in axes:
            for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
                entries.setdefault(name, handle)
        if not entries:
            return
        columns = max(1, int((WIDTH - 24) / (max(map(len, entries)) * 7.5 + 72)))
        columns = -(-len(entries) // -(-len(entries) // columns))  # evenly filled
        more_rows = -(-len(entries) // columns) - 1
        self.figure.set_figheight((self.height + 22 * more_rows) / 72)
        handles, names = list(entries.values()), list(entries)
        self.figure.legend(handles, names, loc="outside lower left", ncols=columns, handlelength=3.2, columnspacing=1.4)


def label(value: Any, limit: int = 36) -> str:
    """Text from a file as a label; matplotlib would hide one that starts with an underscore."""
    return text(value, limit).lstrip("_") or MISSING


def ticks(axis: Any, places: list[float], names: Callable[[float], str] | list[str]) -> None:
    """Exactly these ticks, also on a logarithmic axis."""
    labels = names if isinstance(names, list) else [names(place) for place in places]
    axis.set_ticks(places, labels)
    axis.set_ticks([], minor=True)


def log_axis(axis: Any, values: Iterable[float], name: Callable[[float], str]) -> None:
    """A logarithmic axis with plain labels where the positive values spread, a linear one where they are close."""
    good = [float(value) for value in values if value > 0]
    if not good or max(good) / min(good) < 2.5:
        axis.set_major_formatter(lambda value, _: name(float(f"{value:.6g}")))
        return
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = min(good) / 1.15, max(good) * 1.15
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        places = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(places) <= 8:
            break
    ticks(axis, places[:: -(-len(places) // 8) or 1], name)


def dots(ax: Any, names: list[str], series: Sequence[tuple[str, list[float], list[tuple[float, float]]]]) -> None:
    """Rows from top to bottom, a mark per series. series: (label, value per row, interval per row or nothing)."""
    step = 0.22 if any(intervals for _, _, intervals in series) else 0.0
    for index, (name, values, intervals) in enumerate(series):
        at, look = [row + step * index for row in range(len(names))], style(index)
        ax.plot(values, at, linestyle="", marker=look.marker, color=HEX[look.colour], label=name, gid=f"series-{index}")
        if intervals:
            ax.hlines(at, *zip(*intervals, strict=True), color=HEX[look.colour], linewidth=1.6, gid=f"interval-{index}")
    ticks(ax.yaxis, [row + step * (len(series) - 1) / 2 for row in range(len(names))], [label(name, 48) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)


def as_percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def heat(ax: Any, values: Any, **options: Any) -> None:
    """values (rows, columns) from 0 (the page's colour) to 1 (the ink of heat maps)."""
    ax.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="none", aspect="auto", **options)
    ax.grid(False)


def standalone(svg: str) -> str:
    """A figure as a file of its own, light or dark as the reader's system asks, on its own background."""
    rules = f"<style>{css(':root')}</style>"
    head, body = re.split(r"(?<=</desc>)", svg, maxsplit=1)
    return f'{head}{rules}<rect width="100%" height="100%" rx="8" style="fill: var(--ff-page)"/>{body}\n'


def css(light: str) -> str:
    """Rules that define the palette for a selector, with the dark one where the system asks for it."""
    return f"{light}{{{variables(0)}}}@media (prefers-color-scheme: dark){{{light}{{{variables(1)}}}}}"


def variables(scheme: int) -> str:
    """Declarations of the palette. scheme: 0 light, 1 dark."""
    return ";".join(f"--ff-{name}:{colours[scheme]}" for name, colours in PALETTE.items())


def _settings(name: str) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "path.simplify": False,
        "image.composite_image": False,
        "font.family": "DejaVu Sans",
        "font.size": 13,
        "text.color": HEX["ink"],
        "axes.titlesize": 13,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelcolor": HEX["ink"],
        "axes.edgecolor": HEX["muted"],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": HEX["grid"],
        "xtick.color": HEX["muted"],
        "ytick.color": HEX["muted"],
        "xtick.labelcolor": HEX["ink"],
        "ytick.labelcolor": HEX["ink"],
        "figure.facecolor": "none",
        "figure.constrained_layout.w_pad": 12 / 72,
        "figure.constrained_layout.h_pad": 10 / 72,
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 13,
        "lines.linewidth": 2,
        "lines.markersize": 7,
        "hatch.color": HEX["page"],
        "hatch.linewidth": 1.2,
    }


def _finish(raw: bytes, sheet: Sheet) -> str:
    """matplotlib's file -> one <svg> element for any page: named, themed, ids with the figure's prefix."""
    root = ElementTree.fromstring(raw)
    for child in list(root):
        if child.tag.endswith("metadata") or child.find(f"{{{SVG}}}style") is not None:
            root.remove(child)
    colours = {light: f"var(--ff-{name})" for name, light in HEX.items()}
    colours |= {"#000000": "var(--ff-ink)", "#ffffff": "var(--ff-page)"}
    pattern = re.compile("|".join(colours))
    masks = itertools.count()
    for parent in list(root.iter()):
        for index, element in enumerate(list(parent)):
            if element.tag == f"{{{SVG}}}image":
                parent[index] = _themed_image(element, f"mask-{next(masks)}")
    for element in root.iter():
        for key in ("fill", "stroke"):
            if element.get(key, "").startswith("#"):
                element.set("style", f"{key}: {element.attrib.pop(key)}; " + element.get("style", ""))
        for key, value in list(element.attrib.items()):
            if key == "style":
                value = pattern.sub(lambda match: colours[match[0]], value)
                value = re.sub(r"'DejaVu Sans'[^;]*", FONTS, value)
            elif key == "id":
                value = f"{sheet.name}-{value}"
            elif key == XLINK:
                del element.attrib[key]
                key, value = "href", re.sub("^#", f"#{sheet.name}-", value)
            element.set(key, re.sub(r"url\(#", f"url(#{sheet.name}-", value))
    box = root.get("viewBox", f"0 0 {WIDTH} {sheet.height:g}").split()
    root.attrib.clear()
    root.attrib |= {"viewBox": " ".join(box), "width": box[2], "height": box[3], "role": "img"}
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")  # instead of a rule for the whole page
    root.set("aria-labelledby", f"{sheet.name}-title {sheet.name}-desc")
    for place, (tag, words) in enumerate((("title", sheet.title), ("desc", sheet.description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{sheet.name}-{tag}"})
        element.text = text(words, 2000)
        root.insert(place, element)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")


def _themed_image(image: ElementTree.Element, name: str) -> ElementTree.Element:
    """A grey image as the mask of a rectangle: its white parts show the ink, its black ones the page."""
    place: dict[str, str] = {key: image.attrib.pop(key) for key in ("transform", "id") if key in image.attrib}
    box = {key: image.get(key, "0") for key in ("x", "y", "width", "height")}
    group = ElementTree.Element(f"{{{SVG}}}g", place)
    mask = ElementTree.SubElement(group, f"{{{SVG}}}mask", {"id": name, "maskUnits": "userSpaceOnUse", **box})
    mask.append(image)
    ElementTree.SubElement(group, f"{{{SVG}}}rect", {**box, "mask": f"url(#{name})", "style": "fill: var(--ff-ink)"})
    return group
