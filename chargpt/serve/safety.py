"""Checks before a request is read: host, key, type and size; and headers for every answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chargpt.base.terminal import visible
from chargpt.serve.errors import ApiError
from chargpt.serve.metrics import Metrics
from chargpt.serve.settings import ServeSettings

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BODY_SECONDS = 30  # to send a body
_DRAINED = 2**25  # bytes of a body that is too long; a client that still sends sees no answer

log = logging.getLogger("chargpt.serve")


class Guard:
    """Refuses requests before their body is parsed, and adds `HEADERS` to answers.

    Args:
        app: the application behind it.
        settings: keys, hosts and limits.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check_head(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        if body is None:
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send_with_headers)

    def _check_head(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if not self._knows(headers.get("host", "")):
            message = "the Host header names another server: give --allow-host NAME to accept it"
            raise ApiError(403, message, code="unknown_host")
        key = self._settings.api_key
        if key and (path.startswith(("/v1", "/page/")) or path == "/metrics"):
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            given = given or headers.get("x-api-key", "")
            if not secrets.compare_digest(given.encode(), key.encode()):
                message = "the API key is wrong or missing: send Authorization: Bearer KEY"
                challenge = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body must be application/json: set Content-Type")

    def _knows(self, host: str) -> bool:
        """Return whether a Host header cannot come from a name that an attacker has rebound."""
        try:
            name = (urlsplit("//" + host).hostname or "").lower()
        except ValueError:
            return False
        if name == "localhost" or name in self._settings.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client has left."""
        body, size, limit = bytearray(), 0, self._settings.max_body
        length = Headers(scope=scope).get("content-length", "0")
        too_long = length.isdecimal() and int(length) > limit
        try:
            async with asyncio.timeout(2 if too_long else BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    too_long = too_long or size > limit
                    if too_long:
                        body.clear()
                    else:
                        body += chunk
                    if not message.get("more_body") or size > _DRAINED:
                        break
        except TimeoutError as error:
            if not too_long:
                raise ApiError(408, "the body did not arrive in time: send it again") from error
        if too_long:
            raise ApiError(
                413,
                f"the body is too long: send {limit} bytes or fewer",
                headers={"Connection": "close"},
            )
        return bytes(body)


class RequestLog:
    """Counts answers and writes a line for each, without texts and queries."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, write: bool) -> None:
        self._app, self._metrics, self._write = app, metrics, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client left before the answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = scope.get("route")
            self._metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()
            if self._write:
                ms = 1000 * (time.monotonic() - began)
                path = visible(scope["path"][:100])
                log.info("%s %s %d %.0f ms", scope["method"], path, status, ms)
