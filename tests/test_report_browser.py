"""The report's page in a real browser: nothing is fetched, keys and both colour schemes work.

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

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
NAMED = """[...document.querySelectorAll('[role=img]')].every((image) => image.getAttribute('aria-labelledby').split(' ')
    .every((id) => document.getElementById(id).textContent.trim()))"""
CAPTIONED = "[...document.querySelectorAll('table')].every((table) => table.caption && table.caption.textContent.trim())"


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
        started = playwright.chromium.launch(executable_path=program, args=FLAGS)
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

    def __init__(self, browser: Any, file: Path, scheme: str = "light"):
        self.page = browser.new_page(viewport={"width": 800, "height": 800}, color_scheme=scheme)
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


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_page_in_a_browser(browser: Any, folder: Path, scheme: int) -> None:
    watched = Watched(browser, folder / "report.html", ("light", "dark")[scheme])
    it = watched.page
    assert watched.background() == rgb(scheme)
    it.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    figures = it.locator("figure svg[role=img]")
    assert figures.count() == len(page.FIGURES) + 2  # where the time goes, of three benches
    assert it.evaluate(CAPTIONED) and it.evaluate(NAMED)
    assert watched.troubles == [] and watched.requests == [(folder / "report.html").as_uri()]
    it.close()


def test_keyboard(browser: Any, folder: Path) -> None:
    watched = Watched(browser, folder / "report.html")
    it = watched.page
    it.keyboard.press("Tab")
    focused = "document.activeElement"
    assert it.evaluate(f"{focused}.className") == "skip"
    it.keyboard.press("Tab")
    assert it.evaluate(f"{focused}.id") == "theme"
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
