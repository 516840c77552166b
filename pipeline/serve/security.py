"""Who may talk to the server: only the browser tab that was given the token.

The server listens on 127.0.0.1, but every web page that the user visits can send requests there.
Such a page does not know the token, and cannot set the header it travels in without a permission
(CORS) that is never given. A page whose name was rebound to 127.0.0.1 would not need the
permission; it is told apart by the ``Host`` header. The token also keeps out other users of the
machine.
"""

import hmac
import json
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nnmosaic.pipeline.serve.errors import RefusedError

MAX_BODY = 2**20
"""Bytes of a request; a scribble of 10,000 points has some 600,000."""

HOSTS = ("127.0.0.1", "localhost")
"""Names under which the page may be asked for."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """Return a secret of 256 bits that fits into a URL."""
    return secrets.token_urlsafe(32)


class Guard:
    """ASGI middleware that checks host, token and size before anything reads a request."""

    def __init__(self, app: ASGIApp, *, token: str, max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the reason why not."""
        if scope["type"] != "http":
            return  # no other protocol is spoken here
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
        except RefusedError as refused:
            await _answer(refused, send)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, replay, add_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").rpartition(":")
        if (host[0] or host[2]) not in HOSTS:
            raise RefusedError(
                "This page answers only under the address that nnmosaic serve printed.",
                status=400,
                reason="host",
            )
        if _is_page(scope):
            return
        if not hmac.compare_digest(headers.get("authorization", "").encode(), self.expected):
            raise RefusedError(
                "The access token is missing or wrong. Open the address that nnmosaic serve "
                "printed last; the part after # is the token.",
                status=401,
                reason="token",
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read a body as far as it may go, whatever length it announces."""
        too_large = RefusedError(
            f"The request is larger than {self.max_body} bytes. Draw a shorter scribble.",
            status=413,
            reason="too_large",
        )
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced) > self.max_body:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def _is_page(scope: Scope) -> bool:
    """Return whether the page itself is asked for: a file of the package, the same for everyone."""
    is_file = scope["path"] == "/" or scope["path"].startswith("/static/")
    return is_file and scope["method"] in ("GET", "HEAD")


async def _answer(refused: RefusedError, send: Send) -> None:
    body = json.dumps(refused.content()).encode()
    headers = {**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body))}
    if refused.status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
