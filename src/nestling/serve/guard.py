"""Who may come in, and with how much: before anything is read or parsed."""

import hmac
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nestling.serve.protocol import Failure


class Guard:
    """Refuses foreign host names, missing keys (compared in constant time), bodies that are too large, and more than
    `at_once` requests that are being read or answered."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, hosts: tuple[str, ...] | None, body_bytes: int, at_once: int
    ) -> None:
        self.app, self.hosts, self.body_bytes, self.at_once = app, hosts, body_bytes, at_once
        self.inside = 0
        self.key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.inside += 1
        try:
            await self._let_in(scope, receive, send)
        finally:
            self.inside -= 1

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            body = await self._read(receive)
        except Failure as failure:
            await _refuse(failure, send)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        before, colon, port = host.rpartition(":")
        name = before if colon and port.isdigit() else host
        if self.hosts is not None and name not in self.hosts:
            raise Failure(403, f"this server is called {' or '.join(self.hosts)}, not {name[:80]!r}")
        if (
            self.key is not None
            and scope["path"] != "/health"
            and not _is(headers.get(b"authorization", b""), self.key)
        ):
            raise Failure(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key")
        if self.inside > self.at_once:
            raise Failure(503, f"{self.at_once} requests are open; try again in a moment", "overloaded")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client went before it had come."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.body_bytes:
                raise self._too_large()
        return body

    def _too_large(self) -> Failure:
        return Failure(413, f"the request is larger than this server's limit of {self.body_bytes:,} bytes")


def _is(given: bytes, key: bytes) -> bool:
    scheme, _, told = given.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(told.strip(), key)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body at once, then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(failure: Failure, send: Send) -> None:
    body = json.dumps(failure.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if failure.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
