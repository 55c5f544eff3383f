"""Who may work on a trunk or branch now: locks between threads, commands and the daemon.

One file, DATA/lock, and in it one byte a head: open file description locks (fcntl(2)), which end
with the process that has them, whatever way it ends. So an unfinished operation whose lock is free
is one that died. ``LAYERS`` is the byte that protects layers which nothing refers to yet: whoever
makes some holds it shared, whoever removes unused ones holds it alone.

Order: heads first, the source before the new one, then LAYERS.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from pbkfs.errors import BusyError

LAYERS = ""

_PAUSE_S = 0.01
_WAIT_S = 120.0


class Locks:
    """The locks of one DATA directory. Any thread: each use opens the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(
        self, key: str, *, what: str, shared: bool = False, wait_s: float = _WAIT_S
    ) -> Iterator[None]:
        """Hold the lock of a head's id or of LAYERS; ``what`` names it in the message.

        Raises BusyError if another operation has it for longer than ``wait_s``.
        """
        fd = self._open()
        try:
            deadline = time.monotonic() + wait_s
            while not _set(fd, key, fcntl.F_RDLCK if shared else fcntl.F_WRLCK):
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"another operation on {what} is under way",
                        hint="Wait until it has ended, then try again.",
                    )
                time.sleep(_PAUSE_S)
            try:
                yield
            finally:
                # A child that was forked meanwhile may have the description, so closing won't do.
                _set(fd, key, fcntl.F_UNLCK)
        finally:
            os.close(fd)

    def is_held(self, key: str) -> bool:
        """Return whether somebody has the lock now."""
        fd = self._open()
        try:
            return not _set(fd, key, fcntl.F_WRLCK)
        finally:
            os.close(fd)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _set(fd: int, key: str, kind: int) -> bool:
    """Set a lock of this kind; False if another one is in the way."""
    digest = hashlib.sha256(key.encode()).digest()[:7]
    offset = 1 + int.from_bytes(digest, "little") if key else 0
    # struct flock of 64-bit Linux. l_pid has to be 0. Source: fcntl(2).
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True
