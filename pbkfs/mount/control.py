"""The control socket of a worker: ``DIFF/control.sock``, JSON lines, one request and one reply.

``{"op": "ping"}`` is answered by ``{"ok": true, …}`` or ``{"ok": false, "error": {…}}``. The server
half runs as a trio task in the worker; the client half is synchronous and belongs to the command
line. Only root and the worker's own user are answered (SO_PEERCRED), whatever the file's mode.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pbkfs.errors import (
    HostError,
    NotFoundError,
    NotRunningError,
    PbkfsError,
    TimedOutError,
    UsageError,
)
from pbkfs.mount.report import error_to_fields, fields_to_error

if TYPE_CHECKING:
    import trio

NAME = "control.sock"
_MAX_LINE_BYTES = 1 << 20
_IDLE_LIMIT_S = 60

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """Answers one request; raises PbkfsError for a refusal."""

    async def __call__(self, request: dict[str, Any]) -> dict[str, Any]: ...


# --- server: in the worker ----------------------------------------------------------------------


def listen(diff: Path) -> socket.socket:
    """Bind the socket, 0600, in place of a dead one. The caller has the diff's lock."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _directory(diff) as directory:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(NAME, dir_fd=directory)
            before = os.umask(0o177)
            try:
                server.bind(_address(directory))
            finally:
                os.umask(before)
        server.listen(16)
    except BaseException:
        server.close()
        raise
    return server


async def serve(server: socket.socket, handlers: dict[str, Handler]) -> None:
    """Answer requests until cancelled. A handler's bug is logged and answered, never fatal."""
    import trio

    async def serve_stream(stream: trio.SocketStream) -> None:
        await _serve_stream(stream, handlers)

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))
    await trio.serve_listeners(serve_stream, [listener])


async def _serve_stream(stream: trio.SocketStream, handlers: dict[str, Handler]) -> None:
    import trio

    try:
        async with stream:
            uid = _peer_uid(stream.socket)
            if uid not in (0, os.geteuid()):
                logger.warning("control request of user %d refused", uid)
                return
            while line := await _receive_line(stream):
                reply = await _answer(line, handlers)
                await stream.send_all(json.dumps(reply).encode() + b"\n")
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return  # the client went away


async def _receive_line(stream: trio.SocketStream) -> bytes:
    import trio

    buffer = b""
    with trio.move_on_after(_IDLE_LIMIT_S):
        while b"\n" not in buffer:
            data = await stream.receive_some(65536)
            if not data or len(buffer) > _MAX_LINE_BYTES:
                return b""
            buffer += data
        return buffer.partition(b"\n")[0]
    return b""


async def _answer(line: bytes, handlers: dict[str, Handler]) -> dict[str, Any]:
    try:
        request = json.loads(line)
        handler = handlers.get(request["op"])
    except (ValueError, TypeError, KeyError):
        request, handler = {}, None
    try:
        if handler is None:
            raise UsageError("control request is not understood")
        return {"ok": True, **await handler(request)}
    except PbkfsError as error:
        return {"ok": False, "error": error_to_fields(error)}
    except Exception as error:
        logger.exception("control request %s failed", request.get("op"))
        return {"ok": False, "error": error_to_fields(error)}


def _peer_uid(peer: Any) -> int:
    # Source: unix(7), SO_PEERCRED; struct ucred is pid, uid, gid.
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", data)[1])


# --- client: in the command line ----------------------------------------------------------------


def call(
    diff: Path, op: str, *, timeout_s: float | None = 10.0, **arguments: object
) -> dict[str, Any]:
    """Ask the worker of ``diff`` and return its answer.

    Raises NotRunningError where no worker listens, TimedOutError where it does not answer, and
    whatever PbkfsError the worker answered with.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with client:
        client.settimeout(timeout_s)
        try:
            with _directory(diff) as directory:
                client.connect(_address(directory))
            client.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            data = b""
            while not data.endswith(b"\n"):
                chunk = client.recv(65536)
                if not chunk:
                    break
                data += chunk
        except TimeoutError:
            raise TimedOutError(
                f"the worker of diff {diff} did not answer within {timeout_s:g} s",
                hint=f"Its log may say why: {diff / 'log' / 'worker.log'}",
            ) from None
        except PermissionError:
            raise HostError(
                f"the worker of diff {diff} belongs to another user",
                hint="Run pbkfs as the user who mounted it, or as root.",
            ) from None
        except NotADirectoryError:
            raise NotFoundError(
                f"diff {diff} does not exist", hint="pbkfs list shows the mounts of this host."
            ) from None
        except OSError:
            data = b""
    if not data:
        raise NotRunningError(
            f"no worker serves diff {diff}", hint="pbkfs list shows the mounts of this host."
        )
    reply: dict[str, Any] = json.loads(data)
    if reply.pop("ok", False):
        return reply
    raise fields_to_error(reply["error"])


@contextlib.contextmanager
def _directory(diff: Path) -> Iterator[int]:
    fd = os.open(diff, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _address(directory: int) -> str:
    # A socket's address holds 107 bytes; a diff's path may be longer. Source: unix(7).
    return f"/proc/self/fd/{directory}/{NAME}"
