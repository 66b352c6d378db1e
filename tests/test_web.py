"""The page: its pieces, its server, and the whole of it in a headless Chromium, on the tiny model.

Skipped where Gradio, Playwright or Chromium is missing; with FASTFILL_REQUIRE_BROWSER=1 that is an error.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LAYERS, one_sentence, tiny_artifact, tiny_model, tiny_text, tiny_tokenizer, user_error

import fastfill
from fastfill import artifact as artifacts
from fastfill import attach, cli
from fastfill.engines import transformers as engine
from fastfill.errors import UserError
from fastfill.lab import demo, picks

REQUIRED = os.environ.get("FASTFILL_REQUIRE_BROWSER") == "1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "matplotlib", "playwright") if importlib.util.find_spec(name) is None]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
needs_page = pytest.mark.skipif(bool({"gradio", "matplotlib"} & set(MISSING)) and not REQUIRED, reason="needs fastfill[web]")
needs_browser = pytest.mark.skipif(bool(MISSING or not CHROMIUM) and not REQUIRED, reason="needs Playwright and Chromium")

DOCUMENT, QUESTION, NEW = tiny_text(350), "w9 w10", 300  # an answer long enough to be stopped, or waited for
# The command itself, on the tiny model, with room for the answer.
SERVER = f"""
import sys
sys.path[:0] = {sys.path!r}
from conftest import tiny_model, tiny_tokenizer
from fastfill import cli, models
model = tiny_model(max_position_embeddings=2048)
models.load = lambda *_: models.LoadedModel(model, tiny_tokenizer(), "tiny")
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_missing_package_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "fastfill.lab.web", raising=False)
    monkeypatch.delattr(fastfill, "web", raising=False)
    assert cli.main(["demo", "--web"]) == 2
    assert capsys.readouterr().err == "fastfill: The page needs more packages; run: pip install 'fastfill[web]'.\n"


@needs_page
def test_what_is_shown_is_escaped():
    from fastfill.lab import web

    assert "<b>" not in web._status("<b>&", error=True) and "&lt;b&gt;&amp;" in web._status("<b>&")
    assert web._as_text("a/b_1.5 [x](y)\n<b>\x1b \u4e2d") == r"a\/b\_1\.5 \[x\]\(y\) \<b\>\\x1b " + "\u4e2d"


@needs_page
def test_the_maps_are_figures_with_words(model):
    from fastfill.lab import web

    with attach(model, tiny_artifact(model)) as attachment, picks.watch(attachment) as seen:
        ids = engine.encode(tiny_tokenizer(), tiny_text(45), chat=False)
        engine.generate(model, ids, 1)
        found = picks.summarize(attachment, seen, range(LAYERS))
    for figure in (web.all_layers_map(found), web.one_layer_map(found, 0)):
        assert 'role="img"' in figure and re.search(r"<title[^>]*>[^<]+</title>", figure) and "<figcaption>" in figure
    kept, overlap = found["kept"][2], found["overlap"][2]
    words = f"Layer 2: each block selects {kept} of 96 neurons, {overlap:.0%} of them also selected by the block before."
    assert words in web.one_layer_map(found, 2)


@needs_page
def test_the_port():
    from fastfill.lab import web

    with web.listen(0) as sock:
        host, port = sock.getsockname()
        assert host == "127.0.0.1" and port > 0
        with user_error(f"Port {port} cannot be used"):
            web.listen(port)
    for wrong in -1, 65536:
        with pytest.raises(UserError, match="--port must lie"):
            web.listen(wrong)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a running `fastfill demo --web`; ends it as Ctrl-C does, and looks at how it left."""
    folder = tmp_path_factory.mktemp("web")
    artifacts.save(tiny_artifact(tiny_model()), folder / "artifact")
    (folder / "document.txt").write_text(DOCUMENT)
    command = ["demo", "--web", "--port", "0", "--no-open", "--json", "--artifact", folder / "artifact"]
    command += ["--document", folder / "document.txt", "--question", QUESTION, "--max-new-tokens", NEW]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with (folder / "errors").open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    line = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line + (folder / "errors").read_text()
    yield found[0]
    server.send_signal(signal.SIGINT)
    rest = server.communicate(timeout=60)[0]
    assert server.returncode == 0 and (folder / "errors").read_text() == ""
    assert json.loads(rest.splitlines()[-1]) == {"url": found[0]}


def get(address, data=None, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(address, data=data, headers=headers), timeout=60)


@needs_page
def test_only_this_machine(address):
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(OSError):  # a server on all addresses would answer on every one of 127.0.0.0/8
        socket.create_connection(("127.0.0.2", port), timeout=10).close()
    with get(address) as page:
        assert "default-src 'self'" in page.headers["content-security-policy"] and page.status == 200
        assert "http" not in page.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError, match="400"):  # another site's name that was made to point here
        get(address, Host="example.com")


@needs_page
def test_the_guard_stands_before_the_server(address):
    """What it refuses, test_guard has in full."""
    for path in ("upload", "file=/etc/passwd", "api/0"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{address}/gradio_api/{path}")
    join = f"{address}/gradio_api/queue/join"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(join, data=b"{}", Origin="http://evil.example")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(f"{address}/config", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"})
    with pytest.raises(urllib.error.HTTPError, match="413"):
        get(join, data=b'"' + b"x" * (17 << 20) + b'"')


@needs_page
def test_questions_that_no_page_sends(address):
    """Odd types, a huge document: an answer each, and no traceback at the end (see `address`)."""
    with get(f"{address}/config") as answer:
        dependencies = json.load(answer)["dependencies"]
    index = next(found["id"] for found in dependencies if len(found["inputs"]) == 3)
    for number, values in enumerate([[None, None, 1], [5, ["x"], 1], ["w9 " * 200_000, "w9", 1]]):
        session = f"odd{number}"
        body = {"data": values, "fn_index": index, "session_hash": session}
        with get(f"{address}/gradio_api/queue/join", data=json.dumps(body).encode(), **{"Content-Type": "application/json"}):
            pass
        with get(f"{address}/gradio_api/queue/data?session_hash={session}") as stream:
            text = stream.read().decode()
        assert "process_completed" in text and "Traceback" not in text


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "FASTFILL_REQUIRE_BROWSER=1, and there is no Chromium"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS.split())
        yield running
        running.close()


@pytest.fixture
def tab(browser, address):
    """Opens the page; at the end there must have been no error in the console and no request to another host."""
    opened, trouble = [], []

    def request(asked):
        if not asked.url.startswith((f"{address}/", "data:", "blob:")):
            trouble.append(asked.url)

    def tab():
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", request)
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Compare").wait_for()
        opened.append(page)
        return page

    yield tab
    for page in opened:
        page.close()
    assert not trouble


def wait(page, words):
    page.wait_for_function("words => document.getElementById('status').innerText.includes(words)", arg=words, timeout=120_000)


def ready(page):
    """The run has ended, and the next may begin."""
    page.wait_for_function("() => !document.getElementById('go').disabled && document.getElementById('stop').disabled")


@needs_browser
def test_both_answers_times_and_the_map(tab):
    model, tokenizer = tiny_model(max_position_embeddings=2048), tiny_tokenizer()
    document, question = tiny_text(300, seed=3), "w11 w12"
    ids = demo.prompt(SimpleNamespace(shape=model.config, model=model, tokenizer=tokenizer), document, question, NEW)
    with attach(model, tiny_artifact(tiny_model())) as attachment:
        sparse = tokenizer.decode(engine.generate(model, ids, NEW), skip_special_tokens=True)
        with attachment.dense():
            dense = tokenizer.decode(engine.generate(model, ids, NEW), skip_special_tokens=True)
        sparse_tokens = ids.shape[1] // 8 * 8 - 8

    page = tab()
    assert page.get_by_label("Document").input_value() == DOCUMENT
    page.get_by_label("Document").fill(document)
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")  # by keyboard
    wait(page, "Decoding the dense answer.")
    page.wait_for_function("() => document.querySelector('#answer-dense textarea').value.length > 0")
    assert page.get_by_label("Dense answer").input_value() != dense  # it comes token by token
    assert not page.get_by_label("Sparse answer").input_value()
    wait(page, "Done.")
    ready(page)
    assert page.get_by_label("Dense answer").input_value() == dense
    assert page.get_by_label("Sparse answer").input_value() == sparse != dense
    times = [page.inner_text(f"#{kind}") for kind in ("dense", "sparse", "speedup", "tokens")]
    assert re.fullmatch(r"\d+\.\d{3} s", times[0]) and re.fullmatch(r"\d+\.\d{3} s", times[1])
    assert re.fullmatch(r"\d+\.\d\dx", times[2]) and times[3] == f"{sparse_tokens} / {ids.shape[1] - sparse_tokens}"

    page.wait_for_selector("#map-blocks svg[role=img]")
    assert page.locator("#map-layers svg[role=img]").is_visible()
    assert page.inner_text("#map-blocks figcaption").startswith("Layer 1: ")
    page.locator("#layer input[type=range]").press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#map-blocks figcaption').innerText.startsWith('Layer 2: ')")


@needs_browser
def test_what_goes_wrong_is_one_sentence_on_the_page(tab):
    page = tab()
    for document, words in (("  ", "paste one first"), (tiny_text(2500), "more than the 2,048 that the model holds")):
        page.get_by_label("Document").fill(document)
        page.get_by_role("button", name="Compare").click()
        wait(page, words)
        one_sentence(page.inner_text("#status"))
        ready(page)
    page.get_by_label("Document").fill(tiny_text(5))
    page.get_by_role("button", name="Compare").click()
    wait(page, "Both runs were dense")
    ready(page)
    assert not page.locator("#map").is_visible()


@needs_browser
def test_two_tabs_and_stop(tab):
    first, second = tab(), tab()
    first.get_by_role("button", name="Compare").click()
    wait(first, "Decoding")
    second.get_by_role("button", name="Compare").click()
    wait(second, "Waiting for the answer in another tab.")
    wait(first, "Done.")
    wait(second, "Decoding")
    second.get_by_role("button", name="Stop").click()
    wait(second, "Stopped.")
    ready(second)
    first.wait_for_selector("#map-blocks svg")
    assert not second.locator("#map").is_visible()
    assert second.inner_text("#dense") != "-" and second.inner_text("#speedup") == "-"
    second.get_by_role("button", name="Compare").click()
    wait(second, "Decoding")
    second.close()  # its run ends with it
    first.get_by_role("button", name="Compare").click()
    wait(first, "Done.")
