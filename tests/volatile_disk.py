"""A disk with a write cache, which loses it with the power. A virtual machine's, over NBD.

What was written and not flushed is held in memory; a power cut keeps any part of it, at 4 KiB
grain, each piece in any of its versions. What was flushed is in the image. Served by a thread of
the test's process, to one client at a time. Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from pathlib import Path

GRAIN = 4096
_MOST_HELD = 64 << 20

_GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
_REPLY_MAGIC = 0x3E889045565A9
_OPT_GO = 7
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
# There are flags; flush; force unit access.
_FLAGS = 1 | 4 | 8
_REQUEST = struct.Struct(">IHHQQI")
_REQUEST_MAGIC, _SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FUA = 1
_EINVAL = 22


class VolatileDisk:
    """The disk in ``image``, for the one who connects to ``address``."""

    def __init__(self, image: Path, address: Path, chance: random.Random) -> None:
        self._image = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._image).st_size
        self._chance = chance
        self._held: dict[int, bytes] = {}
        self._frozen = threading.Event()
        self._freeze_after: int | None = None
        self._freeze_at = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(1)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def power_on(self) -> None:
        """Serve the next one who connects, until he goes away."""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def freeze(self, n: int, n_held: int) -> None:
        """Stop at the ``n``-th flush from now that finds ``n_held`` pieces or more to write."""
        self._frozen.clear()
        self._freeze_at = n_held
        self._freeze_after = n

    def wait_until_frozen(self, timeout_s: float) -> None:
        """Wait until it has stopped: there is most to lose now."""
        assert self._frozen.wait(timeout_s), "there was no such flush"

    def power_off(self, kept: float) -> tuple[int, int]:
        """Lose the power; the client has been killed before. ``kept``: about what part of the cache
        reached the disk. Returns how many pieces were held, and how many of these were lost."""
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive(), "the disk's client still runs"
        self._thread = None
        if self._failure is not None:
            raise self._failure
        n_held, n_lost = len(self._held), 0
        for number, piece in self._held.items():
            if self._chance.random() < kept:
                os.pwrite(self._image, piece, number * GRAIN)
            else:
                n_lost += 1
        self._held.clear()
        return n_held, n_lost

    def close(self) -> None:
        """End it; nobody is connected any more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._thread is not None:
            self._thread.join(60)
        os.close(self._image)

    # --- the cache --------------------------------------------------------------------------------

    def _write(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), GRAIN):
            number = (offset + start) // GRAIN
            older = self._held.get(number)
            if older is not None and self._chance.random() < 0.5:
                os.pwrite(self._image, older, number * GRAIN)
            self._held[number] = data[start : start + GRAIN]
        if len(self._held) * GRAIN > _MOST_HELD:
            for number in self._chance.sample(sorted(self._held), len(self._held) // 2):
                os.pwrite(self._image, self._held.pop(number), number * GRAIN)

    def _read(self, offset: int, length: int) -> bytes:
        data = bytearray(os.pread(self._image, length, offset))
        for start in range(0, length, GRAIN):
            piece = self._held.get((offset + start) // GRAIN)
            if piece is not None:
                data[start : start + GRAIN] = piece
        return bytes(data)

    def _flush(self) -> bool:
        """Write all that is held; returns whether the disk goes on."""
        if self._freeze_after is not None and len(self._held) >= self._freeze_at:
            self._freeze_after -= 1
            if self._freeze_after <= 0:
                self._freeze_after = None
                self._frozen.set()
                return False
        for number, piece in self._held.items():
            os.pwrite(self._image, piece, number * GRAIN)
        self._held.clear()
        return True

    # --- the protocol -----------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
            with client:
                try:
                    self._negotiate(client)
                    while self._answer(client):
                        pass
                    receive(client, 1 << 40)  # stopped: until the client is killed
                except (ConnectionError, EOFError):
                    pass  # the client was killed
        except BaseException as problem:
            self._failure = problem

    def _negotiate(self, client: socket.socket) -> None:
        client.sendall(_GREETING)
        receive(client, 4)
        while True:
            _, option, length = struct.unpack(">8sII", receive(client, 16))
            receive(client, length)
            if option == _OPT_GO:
                info = struct.pack(">HQH", _INFO_EXPORT, self._size, _FLAGS)
                client.sendall(_option_reply(option, _INFO, info))
                info = struct.pack(">HIII", _INFO_BLOCK_SIZE, GRAIN, GRAIN, 32 << 20)
                client.sendall(_option_reply(option, _INFO, info))
                client.sendall(_option_reply(option, _ACK))
                return
            client.sendall(_option_reply(option, _UNSUPPORTED))

    def _answer(self, client: socket.socket) -> bool:
        """Answer one request; returns whether more will come."""
        header = receive(client, _REQUEST.size)
        magic, flags, kind, cookie, offset, length = _REQUEST.unpack(header)
        assert magic == _REQUEST_MAGIC
        error, answer = 0, b""
        if kind == _READ:
            answer = self._read(offset, length)
        elif kind == _WRITE:
            assert offset % GRAIN == 0
            assert length % GRAIN == 0
            self._write(offset, receive(client, length))
            if flags & _FUA:
                for number in range(offset // GRAIN, (offset + length) // GRAIN):
                    if number in self._held:
                        os.pwrite(self._image, self._held.pop(number), number * GRAIN)
        elif kind == _FLUSH:
            if not self._flush():
                return False
        elif kind == _DISCONNECT:
            return False
        else:
            error = _EINVAL
        client.sendall(struct.pack(">IIQ", _SIMPLE_REPLY_MAGIC, error, cookie) + answer)
        return True


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data


def receive(client: socket.socket, length: int) -> bytes:
    """Read so many bytes. Raises EOFError."""
    parts = bytearray()
    while len(parts) < length:
        part = client.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
