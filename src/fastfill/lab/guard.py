"""What the local page's server answers, and to whom: the few requests of its own page, and nobody else's.

Any web page can send requests to this machine from its user's browser, and a page framework has more endpoints than one page
uses (uploads, files, proxies). Plain ASGI; knows nothing of the page.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

DRAINED = 1 << 28  # bytes of a refused body that are read and dropped, so that the refusal arrives; then the line is cut
_PATH = re.compile(r"[\w./-]*", re.ASCII)


class Guard:
    """Passes on what `reads` (GET, HEAD) and `writes` (POST) list, from this machine's names and the page's own origin.

    names: that the server answers to. reads, writes: paths; one that ends in a slash stands for all below it. most: bytes of a
    body. headers: set on every response; the inner application can neither change them nor open the page to other origins.
    """

    def __init__(
        self,
        inner: App,
        *,
        names: tuple[str, ...],
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        most: int,
        headers: dict[str, str],
    ):
        self.inner, self.names, self.most = inner, names, most
        self.paths = {"GET": reads, "HEAD": reads, "POST": writes}
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.inner(scope, receive, send)
        if scope["type"] != "http":  # the page uses no WebSocket
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        refusal = self._refusal(scope)
        if refusal is None:
            body = await self._body(receive)
            refusal = (413, "The request is too large.") if body is None else None
        else:
            body = None
        if body is None:
            status, words = refusal or (400, "")
            await _drain(receive)
            return await _answer(send, status, words, self.headers)
        # Nobody stands before this server: who the request is for, it says itself.
        heard = [(name, value) for name, value in scope["headers"] if not name.startswith((b"x-forwarded", b"forwarded"))]
        await self.inner({**scope, "headers": heard}, _again(body, receive), self._closed(send))

    def _refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        given = {name: [v.decode("latin-1") for n, v in scope["headers"] if n == name] for name, _ in scope["headers"]}
        host = given.get(b"host", [])
        if len(host) != 1 or re.sub(r":\d{1,5}\Z", "", host[0]).lower() not in self.names:
            return 400, "The server answers on this machine and to its name only."
        method, path = scope["method"], scope["path"]
        allowed = self.paths.get(method)
        if allowed is None or not _PATH.fullmatch(path) or ".." in path or not any(_fits(path, one) for one in allowed):
            return 404, "There is nothing here."
        # A link to the page may stand anywhere; what the page asks for, the page alone may ask for.
        opened = method in ("GET", "HEAD") and path == "/" and given.get(b"sec-fetch-mode", ["navigate"]) == ["navigate"]
        foreign = any(site not in ("same-origin", "none") for site in given.get(b"sec-fetch-site", []))
        if (foreign and not opened) or any(
            origin.lower() != f"http://{host[0].lower()}" for origin in given.get(b"origin", [])
        ):
            return 403, "Only the page itself may ask for this."
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or None if there is more than there may be."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self.most:
                return None
            if not message.get("more_body"):
                return bytes(body)

    def _closed(self, send: Send) -> Send:
        own = {name for name, _ in self.headers}

        async def closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(n, v) for n, v in message.get("headers", []) if n.lower() not in own and not _opens(n)]
                message = {**message, "headers": [*kept, *self.headers]}
            await send(message)

        return closed


def _fits(path: str, allowed: str) -> bool:
    return (
        path.startswith(allowed) and len(path) > len(allowed) if allowed.endswith("/") and allowed != "/" else path == allowed
    )


def _opens(header: bytes) -> bool:
    return header.lower().startswith(b"access-control-")


def _again(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _drain(receive: Receive) -> None:
    left = DRAINED
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body"):
            return


async def _answer(send: Send, status: int, words: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = words.encode()
    about = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*about, *headers]})
    await send({"type": "http.response.body", "body": body})
