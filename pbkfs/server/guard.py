"""What every request passes first: token, origin, size; and the count of what came of it.

Plain ASGI around the whole application. trio's thread.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from pbkfs.server import problems
from pbkfs.server.models import Problem
from pbkfs.server.numbers import Numbers

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/api/v1"
OPEN_PATHS = (f"{PREFIX}/health", "/readyz")

_MAX_BODY_BYTES = 1 << 20
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

logger = logging.getLogger(__name__)


class _TooLargeError(Exception):
    pass


class Guard:
    """The application with its guard. An empty token lets everybody in who gets to the socket."""

    def __init__(self, app: App, token: str, numbers: Numbers) -> None:
        self._app = app
        self._token = _digest(token.encode()) if token else None
        self._numbers = numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        n_received = 0

        async def measure() -> Message:
            nonlocal n_received
            message = await receive()
            n_received += len(message.get("body", b""))
            if n_received > _MAX_BODY_BYTES:
                raise _TooLargeError
            return message

        try:
            refusal = self._refuse(scope) or _refuse_size(scope)
            if refusal is not None:
                if refusal.status == 413:
                    await _drain(receive)
                await _answer(count, refusal)
                return
            await self._app(scope, measure, count)
        except _TooLargeError:
            if not status:
                await _answer(count, _too_large())
        except Exception:
            logger.exception("request %s %s failed", scope["method"], scope["path"])
            if not status:
                await _answer(count, problems.of_bug())
        finally:
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._numbers.requests[method, _route(scope), status] += 1

    def _refuse(self, scope: Scope) -> Problem | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._token is not None:
            if scope["path"] in OPEN_PATHS:
                return None
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Both sides are digests, so that neither length nor content shows in the time taken.
            is_right = hmac.compare_digest(_digest(given.strip()), self._token)
            if scheme.lower() == b"bearer" and is_right:
                return None
            return problems.of_status(
                401, "a bearer token is needed", "Authorization: Bearer TOKEN"
            )
        # Without a token, a web page in a browser of this host must not get to us: neither by a
        # request to another origin, nor by a name that it lets point to this host.
        origin = headers.get(b"origin")
        host = headers.get(b"host", b"").decode("latin-1")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            return problems.of_status(403, "a request of a web page of another origin")
        if host and not is_local_name(host):
            return problems.of_status(
                403, f"host {host!r} is not this host", "Use 127.0.0.1, localhost or the socket."
            )
        return None


def _refuse_size(scope: Scope) -> Problem | None:
    """Refuse a body that says itself that it is too large; else it is found out on the way."""
    for name, value in scope["headers"]:
        is_length = name.lower() == b"content-length" and value.isdigit()
        if is_length and (len(value) > 18 or int(value) > _MAX_BODY_BYTES):
            return _too_large()
    return None


async def _drain(receive: Receive) -> None:
    """Take in a body that is not too absurd, so that its sender gets to reading the answer."""
    n_received, more = 0, True
    while more and n_received < 8 * _MAX_BODY_BYTES:
        message = await receive()
        n_received += len(message.get("body", b""))
        more = message.get("more_body", False)


def _too_large() -> Problem:
    return problems.of_status(413, "the body is larger than 1 MiB")


def is_local_name(host: str) -> bool:
    """Tell whether a Host header names the loopback (or, on a socket, nothing that has dots)."""
    name = ""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.endswith(".localhost") or (name != "" and "." not in name)


def _route(scope: Scope) -> str:
    """Return the route of a request: not its path, of which there are too many."""
    found: str = getattr(scope.get("route"), "path", "none")
    is_below = scope["path"].startswith(f"{PREFIX}/") and not found.startswith(PREFIX)
    return PREFIX + found if is_below and found.startswith("/") else found


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


async def _answer(send: Send, problem: Problem) -> None:
    body = problems.encode(problem)
    fields = {**problems.headers(problem), "content-length": str(len(body))}
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
