"""Hands: a process without threads, forked early, that forks one process for each operation.

What mounts and starts servers has to fork, which a process with threads must not do; and an
operation that has its own process is not cut short by the end of the daemon. ``Hands.start`` is
called before the first thread and before the web framework is imported, so that what is forked
(a mount's worker among it) is small.

Protocol, JSON lines over a socket pair for each operation: the daemon sends ``{"operation",
"arguments"}``; it gets ``{"event": "say" | "begun" | "done" | "error", …}`` until ``done`` or
``error``. An end without either means that the process died.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pbkfs.branch.settings import Settings
from pbkfs.mount.report import error_to_fields, fields_to_error

if TYPE_CHECKING:
    import trio

Event = dict[str, Any]

_RECEIVE_BYTES = 65536

logger = logging.getLogger(__name__)


class HandsGoneError(Exception):
    """The process of an operation, or the one that forks them, died."""


class Hands:
    """The daemon's side. ``run`` belongs to trio's thread."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection

    @classmethod
    def start(cls, settings: Settings) -> Hands:
        """Fork the process that waits for operations; only in a process without threads."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                _serve(theirs, settings)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        return cls(pid, ours)

    def close(self) -> None:
        """Let the process end; operations under way go on to their own end."""
        self._connection.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    async def run(
        self, operation: str, arguments: dict[str, Any], on_event: Callable[[Event], None]
    ) -> Any:
        """Run an operation in a process of its own and return its result.

        Raises what it failed with, HandsGoneError if it died.
        """
        import trio

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with stream:
            try:
                socket.send_fds(self._connection, [b"+"], [theirs.fileno()])
            except OSError as error:
                raise HandsGoneError("the process that forks operations is gone") from error
            finally:
                theirs.close()
            request = {"operation": operation, "arguments": arguments}
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(json.dumps(request).encode() + b"\n")
            return await _follow(stream, operation, on_event)


async def _follow(
    stream: trio.SocketStream, operation: str, on_event: Callable[[Event], None]
) -> Any:
    import trio

    buffer = b""
    while True:
        try:
            data = await stream.receive_some(_RECEIVE_BYTES)
        except trio.BrokenResourceError:
            data = b""
        if not data:
            raise HandsGoneError(f"the process of operation {operation} died")
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            event: Event = json.loads(line)
            if event["event"] == "done":
                return event["result"]
            if event["event"] == "error":
                raise fields_to_error(event)
            on_event(event)


# --- the other side -----------------------------------------------------------------------------


def _serve(connection: socket.socket, settings: Settings) -> None:
    """Fork a process for each descriptor that comes, until the daemon is gone."""
    # In a session of its own: a terminal's Ctrl-C is the daemon's affair.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    _import_all()
    gc.collect()
    gc.freeze()
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        for fd in descriptors:
            if os.fork() == 0:
                code = 1
                try:
                    connection.close()
                    _work(fd, settings)
                    code = 0
                finally:
                    os._exit(code)
            os.close(fd)


def _import_all() -> None:
    """Import what operations need, so that their processes find it there."""
    import pbkfs.branch.service
    import pbkfs.mount.worker
    import pbkfs.server.operations  # noqa: F401


def _work(fd: int, settings: Settings) -> None:
    """Run one operation and report about it."""
    from pbkfs.server.operations import run_operation

    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report = _Report(fd)
    request = report.receive()
    if request is None:
        return
    try:
        result = run_operation(
            settings,
            request["operation"],
            request["arguments"],
            begun=lambda: report.send({"event": "begun"}),
            say=lambda text: report.send({"event": "say", "text": text}),
        )
        report.send({"event": "done", "result": result})
    except BaseException as error:
        report.send({"event": "error", **error_to_fields(error)})


class _Report:
    """An operation's end of the socket pair. That nobody listens any more is no failure."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def receive(self) -> dict[str, Any] | None:
        with self._socket.makefile("rb") as file:
            line = file.readline()
        if not line.endswith(b"\n"):
            return None
        request: dict[str, Any] = json.loads(line)
        return request

    def send(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(event).encode() + b"\n")
