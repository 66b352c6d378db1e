"""The guard of the page's server, in front of an application that tells what reached it."""

import asyncio

import pytest

from fastfill.lab.guard import DRAINED, Guard

HOST = (b"host", b"127.0.0.1:7860")
HEADERS = {"content-security-policy": "default-src 'self'"}


async def inner(scope, receive, send):
    message = await receive()
    about = [(b"access-control-allow-origin", b"*"), (b"Content-Security-Policy", b"default-src *"), (b"x-own", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": about})
    await send({"type": "http.response.body", "body": repr((scope["headers"], len(message["body"]))).encode()})


def ask(method, path, *headers, body=b"", pieces=1, kind="http"):
    """(status, headers, body, messages left unread) of one request."""
    known = {"names": ("127.0.0.1", "localhost"), "reads": ("/", "/static/", "/api/data"), "writes": ("/api/join",)}
    guard = Guard(inner, **known, most=1000, headers=HEADERS)
    size = -(-len(body) // pieces) or 1
    parts = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    waiting = [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    given = [HOST] if not any(name == b"host" for name, _ in headers) else []
    asyncio.run(guard({"type": kind, "method": method, "path": path, "headers": [*given, *headers]}, receive, send))
    if kind == "websocket":
        return sent
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"], len(waiting)


@pytest.mark.parametrize(
    "method, path", [("GET", "/"), ("HEAD", "/"), ("GET", "/static/js/a-b_1.js"), ("GET", "/api/data"), ("POST", "/api/join")]
)
def test_what_the_page_asks_for(method, path):
    own = [(b"origin", b"http://127.0.0.1:7860"), (b"sec-fetch-site", b"same-origin"), (b"sec-fetch-mode", b"cors")]
    for headers in [], own:
        status, about, _, _ = ask(method, path, *headers)
        assert status == 200 and about[b"x-own"] == b"1"
        assert about[b"content-security-policy"] == b"default-src 'self'"  # ours, not the inner one's
        assert b"access-control-allow-origin" not in about and b"Content-Security-Policy" not in about


GETS = [
    "/api/file=/etc/passwd",
    "/api/proxy=http://example.com",
    "/static/../api/upload",
    "/static/",
    "/static/%2e%2e/a",
    "/staticfile",
]
GETS += ["/api/data/", "/api/join", "/\nlog", ""]
OTHERS = [("POST", "/api/upload"), ("POST", "/"), ("POST", "/static/a"), ("PUT", "/"), ("OPTIONS", "/api/join")]


@pytest.mark.parametrize("method, path", [*(("GET", path) for path in GETS), *OTHERS])
def test_everything_else_is_closed(method, path):
    status, about, words, _ = ask(method, path)
    assert status == 404 and words == b"There is nothing here." and b"content-security-policy" in about


@pytest.mark.parametrize(
    "headers",
    [
        [(b"origin", b"http://evil.example")],
        [(b"origin", b"null")],
        [(b"origin", b"http://127.0.0.1:7861")],
        [(b"origin", b"http://localhost:7860")],  # the browser counts it as another one, too
        [(b"origin", b"https://127.0.0.1:7860")],
        [(b"origin", b"http://127.0.0.1:7860"), (b"origin", b"http://evil.example")],
        [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"no-cors")],
        [(b"sec-fetch-site", b"same-site"), (b"sec-fetch-mode", b"cors")],
        [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")],
    ],
    ids=str,
)
@pytest.mark.parametrize("method, path", [("POST", "/api/join"), ("GET", "/api/data")])
def test_other_pages_may_not_ask(method, path, headers):
    assert ask(method, path, *headers)[0] == 403


def test_a_link_to_the_page_may_stand_anywhere():
    link = [(b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")]
    assert ask("GET", "/", *link)[0] == 200
    assert ask("GET", "/", (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"cors"))[0] == 403


OURS = (b"127.0.0.1:7860", b"localhost", b"LOCALHOST:1")
NOT_OURS = (b"evil.example", b"127.0.0.1.evil.example", b"127.0.0.1:80@evil.example", b"127.0.0.1:", b"", b"[::1]:7860")


@pytest.mark.parametrize("host", OURS + NOT_OURS)
def test_names(host):
    assert ask("GET", "/", (b"host", host))[0] == (200 if host in OURS else 400)
    assert ask("GET", "/", (b"host", b"localhost"), (b"host", host))[0] == 400


@pytest.mark.parametrize("pieces", [1, 7])
def test_bodies_are_bounded_and_given_on_whole(pieces):
    status, _, words, _ = ask("POST", "/api/join", body=b"x" * 1000, pieces=pieces)
    assert status == 200 and words.endswith(b", 1000)")
    assert ask("POST", "/api/join", body=b"x" * 1001, pieces=pieces)[0] == 413


def test_a_refused_body_is_read_and_dropped():
    assert ask("POST", "/api/upload", body=b"x" * 10_000, pieces=10)[3] == 0
    assert DRAINED >= 1 << 26


def test_nobody_stands_before_the_server():
    words = ask("GET", "/", (b"x-forwarded-host", b"evil.example"), (b"x-forwarded-proto", b"https"), (b"forwarded", b"for=1"))[
        2
    ]
    assert b"evil" not in words and b"forwarded" not in words and b"127.0.0.1:7860" in words


def test_no_websockets():
    assert ask("GET", "/", kind="websocket") == [{"type": "websocket.close", "code": 1008}]
