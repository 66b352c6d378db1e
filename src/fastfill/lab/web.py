"""The demo as a local page: paste a document and a question, and watch the dense and the sparse answer side by side.

Needs the extra `web`. Nothing leaves the machine, and nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
import os
import re
import socket
import string
import sys
import threading
import traceback
import webbrowser
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from fastfill.errors import UserError, reason
from fastfill.lab import demo
from fastfill.lab.guard import Guard
from fastfill.lab.report import draw, layers
from fastfill.lab.side_by_side import Comparison, Run, State
from fastfill.terminal import text_of

for name in [name for name in os.environ if name.startswith("GRADIO_")]:
    del os.environ[name]  # they open files, other hosts and more endpoints; this page is configured here
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # and with it the look for a newer version
try:
    import gradio as gr
    import matplotlib  # noqa: F401
    import uvicorn
    from fastapi import FastAPI
except ImportError as error:
    raise UserError("The page needs more packages; run: pip install 'fastfill[web]'.") from error

HOST = "127.0.0.1"
API = "/gradio_api"
# What the page asks for; a new version of Gradio that asks for more fails the tests in the browser.
READS = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/static/", "/assets/", "/svelte/"),
    *(API + path for path in ("/info", "/startup-events", "/theme.css", "/heartbeat/", "/queue/data")),
)
WRITES = tuple(API + path for path in ("/queue/join", "/run/predict", "/cancel", "/reset"))
BODY_BYTES = 16 << 20  # of a request: JSON of a document that is refused in words if the model cannot hold it
CONNECTIONS = 64  # at once; a tab has two that stay, and up to six while it loads
SESSIONS = 32  # whose last result is kept for the map's slider
SERVER: dict[str, Any] = {
    "log_level": "critical",
    "timeout_graceful_shutdown": 1,
    "limit_concurrency": CONNECTIONS,
    "proxy_headers": False,
    "server_header": False,
    "ws": "none",
}
# Gradio's page has scripts of its own inline; whatever it does, the browser asks no other host.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"


def times(state: State | None) -> str:
    """TTFTs, speed-up and tokens as HTML."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    dense, sparse, tokens = None, None, "-"
    if state:
        dense, sparse = state.ttft_dense_s, state.ttft_sparse_s
        if sparse is not None and (state.picks or state.status.startswith("Done")):
            tokens = f"{state.sparse_tokens:,} / {state.prompt_tokens - state.sparse_tokens:,}"
    cells = [
        ("dense", "Dense TTFT", seconds(dense)),
        ("sparse", "Sparse TTFT", seconds(sparse)),
        ("speedup", "Speed-up", f"{dense / sparse:.2f}x" if dense and sparse else "-"),
        ("tokens", "Tokens prefilled sparsely / densely", tokens),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd id='{key}'>{value}</dd></div>" for key, name, value in cells) + "</dl>"


def all_layers_map(found: dict[str, Any]) -> str:
    """Layers x neurons in bins, from a picks document, as HTML."""
    return _figure(layers.picks(found, name="all-layers"), layers.picks_caption(found))


def one_layer_map(found: dict[str, Any], layer: int) -> str:
    """Blocks x neurons of one layer, from a picks document that has its map, as HTML."""
    one = {**found, "maps": [entry for entry in found["maps"] if entry["layer"] == layer]}
    overlap, always, never = (found[key][layer] for key in ("overlap", "always", "never"))
    again = "" if overlap is None else f", {overlap:.0%} of them also selected by the block before"
    return _figure(
        layers.maps(one, name="one-layer"),
        f"Layer {layer}: each block selects {found['kept'][layer]:,} of {found['neurons']:,} neurons{again}. "
        f"Every block selects {always:.0%} of the neurons, none selects {never:.0%}.",
    )


def _figure(svg: str, caption: str) -> str:
    """A narrow screen scrolls the figure sideways instead of making its text too small to read."""
    return f"<figure><div tabindex='0'>{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


STYLE = f"""
:root {{ {draw.variables(0)} }}
.dark {{ {draw.variables(1)} }}
.gradio-container {{ max-width: 1100px !important; margin: 0 auto !important; }}
.gradio-container .html-container {{ padding: 0 !important; }}
#status {{ min-height: 1.5em; }}
#status p {{ margin: 0; }}
#status .error {{ color: var(--ff-orange); font-weight: 600; }}
#times dl {{ display: flex; flex-wrap: wrap; gap: 0.75rem 2.5rem; margin: 0; }}
#times dt {{ color: var(--ff-muted); }}
#times dd {{ margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }}
.map figure {{ margin: 0; }}
.map div[tabindex] {{ overflow-x: auto; contain: inline-size; }}
.map svg {{ width: 100%; min-width: 600px; height: auto; }}
"""
# Screen readers follow the status line; Gradio has no setting for it.
SCRIPT = "() => { const line = document.getElementById('status'); line.setAttribute('role', 'status'); }"


def page(comparison: Comparison, document: str, question: str) -> Any:
    """The page as gradio.Blocks."""
    runs: dict[str | None, Run] = {}
    config = comparison.engine.config
    last = len(comparison.engine.cost.kept) - 1

    with gr.Blocks(title="fastfill", analytics_enabled=False) as blocks:
        gr.Markdown(
            f"# fastfill\n**{_as_text(comparison.engine.name)}**: a document is prefilled densely, and with "
            f"{config.sparsity:.0%} of the FFN neurons skipped in blocks of {config.block_size} tokens "
            f"({comparison.engine.choices['kernel']} kernel). Both runs share this machine's cores, so the "
            "dense one goes first and the sparse one follows."
        )
        text = gr.Textbox(document, label="Document", lines=10, max_lines=10, elem_id="document")
        ask = gr.Textbox(question, label="Question", elem_id="question")
        with gr.Row():
            go = gr.Button("Compare", variant="primary", elem_id="go")
            stop = gr.Button("Stop", interactive=False, elem_id="stop")
        status = gr.HTML(_status("Ready."), elem_id="status")
        numbers = gr.HTML(times(None), elem_id="times")
        gr.Markdown("TTFT: time to first token, one run of each after a warm-up. `fastfill bench` takes medians of several.")
        with gr.Row():
            dense = gr.Textbox(label="Dense answer", lines=4, interactive=False, min_width=300, elem_id="answer-dense")
            sparse = gr.Textbox(label="Sparse answer", lines=4, interactive=False, min_width=300, elem_id="answer-sparse")
        found = gr.State()
        with gr.Column(visible=False, elem_id="map") as maps:
            gr.Markdown("## Neurons of the sparse run")
            all_layers = gr.HTML(elem_classes="map", elem_id="map-layers")
            layer = gr.Slider(0, last, value=(last + 1) // 2, step=1, label="Layer", elem_id="layer")
            one_layer = gr.HTML(elem_classes="map", elem_id="map-blocks")

        def respond(document: str, question: str, layer: float, request: gr.Request) -> Iterator[dict[Any, Any]]:
            yield {go: gr.Button(interactive=False), stop: gr.Button(interactive=True), maps: gr.Column(visible=False)}
            message, shown = "", None
            try:
                run = runs[request.session_hash] = comparison.ask(document or "", question or "")
                for shown in run.states():
                    yield {
                        status: _status(shown.status),
                        numbers: times(shown),
                        dense: shown.dense,
                        sparse: shown.sparse,
                    }
            except UserError as error:
                message = str(error)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                message = f"The run failed: {reason(error)} (the terminal has the details)."
            finally:
                runs.pop(request.session_hash, None)
            changes: dict[Any, Any] = {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
            if message:
                changes[status] = _status(message, error=True)
            if shown and shown.picks:
                changes |= {found: shown.picks, maps: gr.Column(visible=True)}
                changes |= {all_layers: all_layers_map(shown.picks), one_layer: one_layer_map(shown.picks, int(layer))}
            yield changes

        def end(request: gr.Request) -> None:
            run = runs.get(request.session_hash)
            if run:
                run.stop()

        outputs = [go, stop, status, numbers, dense, sparse, maps, found, all_layers, one_layer]
        gr.on(
            [go.click, ask.submit],
            respond,
            [text, ask, layer],
            outputs,
            concurrency_limit=None,  # Comparison has the queue, and says on the page that one waits
            show_progress="hidden",
            trigger_mode="once",
            api_visibility="private",
        )
        stop.click(end, queue=False, show_progress="hidden", api_visibility="private")
        layer.change(
            lambda found, layer: one_layer_map(found, int(layer)) if found else "",
            [found, layer],
            one_layer,
            show_progress="hidden",
            trigger_mode="always_last",
            api_visibility="private",
        )
        blocks.unload(end)  # the tab was closed
    return blocks


def _as_text(name: str) -> str:
    """A name, for Markdown."""
    return re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", text_of(name).replace("\n", " "))


def _status(sentence: str, error: bool = False) -> str:
    return f"<p{' class=error' if error else ''}>{html.escape(sentence)}</p>"


# --- the server ---------------------------------------------------------------------------------------------------------


def listen(port: int) -> socket.socket:
    """Take the port on 127.0.0.1 (0: any free one). Raises UserError if it is in use."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port must lie between 0 and 65535, not {port}.")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((HOST, port))
        sock.listen()
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise UserError(f"Port {port} cannot be used ({reason}); give another with --port, 0 for any free one.") from error
    return sock


def application(blocks: Any) -> Any:
    """The page as an ASGI application that answers this machine's browser on behalf of the page only; see `guard`."""
    blocks.state_session_capacity = SESSIONS
    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    font = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # of the system: nothing to load
    gr.mount_gradio_app(
        inner,
        blocks,
        "/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Default(font=font, font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]),
        css=STYLE,
        js=SCRIPT,
    )

    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
    headers["cross-origin-resource-policy"] = "same-origin"
    return Guard(inner, names=(HOST, "localhost"), reads=READS, writes=WRITES, most=BODY_BYTES, headers=headers)


def serve(comparison: Comparison, sock: socket.socket, document: str | None, question: str | None, browser: bool) -> str:
    """Serve the page until Ctrl-C; closes the socket and the comparison. Returns its address."""
    address = f"http://{HOST}:{sock.getsockname()[1]}"
    try:
        app = application(page(comparison, *demo.fill_in(document, question)))
        server = uvicorn.Server(uvicorn.Config(app, **SERVER))
        print(f"The page is at {address}, on this machine only. Ctrl-C ends it.", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # it may block
        with suppress(KeyboardInterrupt):  # uvicorn shuts down, then passes it on
            server.run(sockets=[sock])
    finally:
        comparison.close()
        sock.close()
    return address
