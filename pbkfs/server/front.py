"""The TCP front of a branch that is asleep: its first client wakes it.

A front listens where the branch's server would. A client that comes, and says something, is held
while the branch is started, and its bytes are then carried to the server and back until it ends;
whoever comes later is with the server itself. All of it belongs to trio's thread. Made and closed
by ``idle``.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from typing import TYPE_CHECKING

import trio

from pbkfs.branch.errors import UnknownHeadError, WrongStateError
from pbkfs.errors import PbkfsError
from pbkfs.postgres.network import open_listeners

if TYPE_CHECKING:
    from pbkfs.branch.store import Head
    from pbkfs.server.control import Control, Operation

# As long as a server waits for a client's first words. Source: authentication_timeout.
_SILENCE_S = 60.0
# Twice as many as a server takes by default. Each may be two of the daemon's descriptors.
_N_HELD = 200
_CHUNK_BYTES = 65536
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_ROOM_PAUSE_S = 0.1

# What a client may send first. Source: src/include/libpq/pqcomm.h.
_CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104
_LONGEST_FIRST = 10000

logger = logging.getLogger(__name__)


class Front:
    """What listens for one branch, and the clients that came through it."""

    def __init__(self, control: Control, nursery: trio.Nursery, head_id: str) -> None:
        self._control = control
        self._nursery = nursery
        self._head_id = head_id
        self._sockets: list[socket.socket] = []
        self._listeners: list[trio.socket.SocketType] = []
        self._waking: Operation | None = None
        self.n_clients = 0

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return bool(self._listeners)

    def open(self, port: int) -> None:
        """Listen on the branch's port. Raises BusyError."""
        addresses = self._control.settings.listen_addresses
        self._sockets = open_listeners(addresses, port)
        for each in self._sockets:
            listener = trio.socket.from_stdlib_socket(each)
            self._listeners.append(listener)
            self._nursery.start_soon(self._accept, listener)

    def close(self) -> None:
        """Listen no more; the clients that are there stay.

        Those that the kernel has let in already are taken first. One that comes in the microseconds
        in between is refused, as by a server that starts.
        """
        for each, listener in zip(self._sockets, self._listeners, strict=True):
            each.setblocking(False)
            while True:
                try:
                    client, _ = each.accept()
                except OSError:
                    break  # there is none
                self._take(trio.socket.from_stdlib_socket(client))
            listener.close()
        self._sockets, self._listeners = [], []

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        while True:
            try:
                client, _ = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                # Any other one is that of a client which is gone again. Source: accept(2).
                if error.errno in _NO_ROOM:
                    logger.warning("a client has to wait: %s", error.strerror)
                    await trio.sleep(_NO_ROOM_PAUSE_S)
                continue
            self._take(client)

    def _take(self, client: trio.socket.SocketType) -> None:
        if self.n_clients >= _N_HELD:
            client.close()
            return
        self.n_clients += 1
        self._nursery.start_soon(self._serve, client)

    async def _serve(self, client: trio.socket.SocketType) -> None:
        try:
            async with trio.SocketStream(client) as stream:
                await self._serve_stream(client, stream)
        except (trio.BrokenResourceError, OSError) as error:
            logger.debug("a client of a sleeping branch is gone: %s", error)
        except Exception:
            # One client must not end the daemon.
            logger.exception("a client of a sleeping branch was dropped")
        finally:
            self.n_clients -= 1

    async def _serve_stream(
        self, client: trio.socket.SocketType, stream: trio.SocketStream
    ) -> None:
        # One that only looks whether the port is open wakes nobody.
        word = b""
        with trio.move_on_after(_SILENCE_S):
            word = await client.recv(1, socket.MSG_PEEK)
        if not word:
            return
        try:
            port = await self._wake()
        except Exception as error:
            # It was logged where it happened.
            said = error.message if isinstance(error, PbkfsError) else "an unexpected failure"
            with trio.move_on_after(_SILENCE_S):
                await refuse(stream, f"the branch cannot be started: {said.splitlines()[0]}")
            return
        await self._carry(client, stream, port)

    async def _wake(self) -> int:
        """Start the branch, unless it runs; returns its port. Raises what the start fails with."""
        while True:
            head = await self._control.read(self._control.service.store.get, self._head_id)
            if head is None:
                raise UnknownHeadError("it does not exist any more")
            if head.status == "running":
                return head.port
            if not is_waiting(head) and head.status != "starting":
                raise WrongStateError(f"branch {head.name!r} is {head.status}")
            if self._waking is None or self._waking.ended.is_set():
                logger.info("branch %s: a client wakes it", head.name)
                self._waking = self._control.begin("start", {"name": head.name, "kind": "branch"})
            await self._waking.wait(float("inf"))

    async def _carry(
        self, client: trio.socket.SocketType, stream: trio.SocketStream, port: int
    ) -> None:
        """Carry bytes between a client and the server, at the address that the client chose."""
        host, _, *rest = client.getsockname()
        with trio.socket.socket(client.family, socket.SOCK_STREAM) as connection:
            try:
                await connection.connect((host, port, *rest))
            except OSError as error:
                await refuse(stream, f"the branch's server is gone again: {error.strerror}")
                return
            server = trio.SocketStream(connection)
            async with trio.open_nursery() as nursery:

                async def pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
                    try:
                        while data := await source.receive_some(_CHUNK_BYTES):
                            await target.send_all(data)
                        await target.send_eof()
                    except trio.BrokenResourceError:
                        nursery.cancel_scope.cancel()  # one of them is gone, and so is the other

                nursery.start_soon(pump, stream, server)
                nursery.start_soon(pump, server, stream)


def is_waiting(head: Head) -> bool:
    """Return whether a branch is asleep, and not so far awake that its server wants the port."""
    return head.is_asleep and (
        head.status in ("stopped", "error") or (head.status, head.operation) == ("starting", "wake")
    )


async def refuse(stream: trio.SocketStream, message: str) -> None:
    """Tell a client in PostgreSQL's words that it can't be let in.

    A client that asks for encryption first gets a no, and says then what it came for.
    Source: PostgreSQL's documentation, "Message Flow" and "Message Formats".
    """
    while True:
        head = await _receive(stream, 8)
        if head is None:
            return
        length, code = struct.unpack("!II", head)
        if not 8 <= length <= _LONGEST_FIRST or code == _CANCEL:
            return
        if await _receive(stream, length - 8) is None:
            return
        if code not in (_SSL, _GSS):
            break
        await stream.send_all(b"N")
    fields = [b"SFATAL", b"VFATAL", b"C57P03", b"M" + message.encode()]
    body = b"".join(field + b"\0" for field in fields) + b"\0"
    await stream.send_all(b"E" + struct.pack("!I", 4 + len(body)) + body)


async def _receive(stream: trio.SocketStream, n_bytes: int) -> bytes | None:
    found = b""
    while len(found) < n_bytes:
        data = await stream.receive_some(n_bytes - len(found))
        if not data:
            return None
        found += data
    return found
