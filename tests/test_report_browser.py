"""The report's page in a real browser: nothing is fetched, nothing overflows, keys and both colour schemes work.

Skipped where there is no browser, unless FASTFILL_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_documents as documents

from fastfill.lab import report
from fastfill.lab.report import draw, page

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TEXT_COLOURS = """[...document.querySelectorAll('body *')]
    .filter((e) => e.checkVisibility() && !/^(title|desc|script)$/i.test(e.tagName))
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => [e.tagName, getComputedStyle(e)[e instanceof SVGElement ? 'fill' : 'color']])"""
CUT_TEXT = """[...document.querySelectorAll('figure svg text')].filter((text) => {
    const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map((text) => text.textContent)"""
SIZES = (
    """[...document.querySelectorAll('figure svg')].map((svg) => svg.getBoundingClientRect()).map((b) => [b.width, b.height])"""
)
FILLS = """[...document.querySelectorAll('figure svg :is(path, use, rect, text)')].map((e) => getComputedStyle(e).fill)"""
NAMED = """[...document.querySelectorAll('[role=img]')].every((image) => image.getAttribute('aria-labelledby').split(' ')
    .every((id) => document.getElementById(id).textContent.trim()))"""
CAPTIONED = "[...document.querySelectorAll('table')].every((table) => table.caption && table.caption.textContent.trim())"


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """WCAG 2: black on white is 21, text needs 4.5."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    required = os.environ.get("FASTFILL_REQUIRE_BROWSER") == "1"
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        pytest.importorskip("matplotlib")
        sync_api = pytest.importorskip("playwright.sync_api")
        if program is None:
            pytest.skip("no chromium here")
    except pytest.skip.Exception as skipped:
        if required:
            pytest.fail(f"FASTFILL_REQUIRE_BROWSER=1, but: {skipped}")
        raise
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    (place / "all.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents.everything()))
    (place / "an-earlier-run-of-the-same-settings.json").write_text(json.dumps(documents.bench(gain=0.1)))  # long labels
    report.write([place], place / "report.html", place / "svg")
    return place


class Watched:
    """A page and everything it complained about or asked for."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: self.troubles.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def background(self) -> str:
        return self.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def rgb(scheme: int, name: str = "page") -> str:
    colour = draw.PALETTE[name][scheme]
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_page_in_a_browser(browser: Any, folder: Path, width: int, scheme: int) -> None:
    watched = Watched(browser, folder / "report.html", width, ("light", "dark")[scheme])
    it = watched.page
    assert watched.background() == rgb(scheme)
    it.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert it.evaluate("document.documentElement.scrollWidth") == width
    figures = it.locator("figure svg[role=img]")
    assert figures.count() == len(page.FIGURES) + 2  # where the time goes, of three benches
    assert all(w >= 300 and h >= 80 for w, h in it.evaluate(SIZES))
    assert it.evaluate(CUT_TEXT) == []
    fills = {fill for fill in it.evaluate(FILLS) if not fill.startswith("url")}
    assert fills <= {rgb(scheme, name) for name in draw.PALETTE} | {"none", "rgb(0, 0, 0)"}  # black: clip paths, not shown
    for tag, colour in it.evaluate(TEXT_COLOURS):
        channels = [int(value) for value in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        assert contrast("#" + bytes(channels).hex(), draw.PALETTE["page"][scheme]) >= 4.5, (tag, colour)
    assert it.evaluate(CAPTIONED) and it.evaluate(NAMED)
    assert watched.troubles == [] and watched.requests == [(folder / "report.html").as_uri()]
    it.close()


def test_keyboard(browser: Any, folder: Path) -> None:
    watched = Watched(browser, folder / "report.html", 800, "light")
    it = watched.page
    it.keyboard.press("Tab")
    focused = "document.activeElement"
    assert it.evaluate(f"{focused}.className") == "skip" and it.evaluate(f"{focused}.getBoundingClientRect().top") >= 0
    it.keyboard.press("Tab")
    assert it.evaluate(f"{focused}.id") == "theme"
    assert it.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    for key, scheme in (("Enter", 1), ("Space", 0), ("Enter", 1)):
        it.keyboard.press(key)
        assert watched.background() == rgb(scheme)
        assert it.evaluate(f"{focused}.getAttribute('aria-pressed')") == ("true" if scheme else "false")
        assert it.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == rgb(scheme, "ink")
    it.emulate_media(media="print")
    assert watched.background() == rgb(0)  # paper is white, whatever was chosen
    assert not it.locator("#theme").is_visible()
    assert watched.troubles == []
    it.close()


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_svg_files_follow_the_system(browser: Any, folder: Path, scheme: int) -> None:
    for file in sorted((folder / "svg").glob("*.svg"))[::4]:  # one way makes them all
        watched = Watched(browser, file, 800, ("light", "dark")[scheme])
        assert watched.page.evaluate("getComputedStyle(document.querySelector('svg > rect')).fill") == rgb(scheme)
        assert watched.page.evaluate("getComputedStyle(document.querySelector('text')).fill") == rgb(scheme, "ink")
        assert watched.troubles == [] and len(watched.requests) == 1
        watched.page.close()


def test_harmful_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    document = documents.peers()
    document["model"] = "x/<img src=http://example.org/x onerror=alert(1)>"
    for row in document["rows"]:
        row["method"] = "</title></svg><script>alert(2)</script>"
    (tmp_path / "peers.json").write_text(json.dumps(document))
    report.write([tmp_path / "peers.json"], tmp_path / "report.html")
    watched = Watched(browser, tmp_path / "report.html", 800, "light")
    assert watched.troubles == [] and len(watched.requests) == 1
    assert watched.page.locator("script").count() == 1 and watched.page.locator("img").count() == 0
    watched.page.close()
