"""A record of everything that processes do to one directory tree, made with a preloaded library.

``Recorder`` compiles ``iotrace.c`` and gives the environment that makes a process log; tests add
marks of their own to the same log, so that what was promised to a client stands in one order with
what was done on disk. ``read_events`` reads the log back.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import TESTS

_RECORD = struct.Struct("<IBBHHHIIIQQQ")


@dataclass(slots=True)
class Event:
    """One line of the log; which fields mean something depends on ``kind``, see iotrace.c."""

    kind: str
    flag: int
    mode: int
    uid: int
    gid: int
    ino: int
    a: int
    b: int
    old: str
    new: str
    data: bytes


class Recorder:
    """Logs what happens below ``root``, which need not exist yet."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root = root
        # Many small writes: better in memory.
        memory = Path("/dev/shm")
        self.log = (memory if os.access(memory, os.W_OK) else place) / f"pbkfs-trace-{os.getpid()}"
        self.log.write_bytes(b"")
        self.log.chmod(0o666)
        self._library = place / "iotrace.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O2", "-o", self._library, TESTS / "iotrace.c", "-ldl"],
            check=True,
        )
        self._library.chmod(0o755)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Processes that are started inside log what they do, and so do their children."""
        variables = {
            "LD_PRELOAD": str(self._library),
            "PBKFS_TRACE_ROOT": str(self.root),
            "PBKFS_TRACE_LOG": str(self.log),
        }
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]

    def mark(self, kind: str, number: int = 0) -> None:
        """Put a mark into the log: ``kind`` is a lower-case letter."""
        record = _RECORD.pack(_RECORD.size, ord(kind), 0, 0, 0, 0, 0, 0, 0, 0, number, 0)
        fd = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, record) == len(record)
        finally:
            os.close(fd)

    def events(self) -> list[Event]:
        """Return all that was logged, with paths relative to the root."""
        return list(_read_events(self.log.read_bytes(), str(self.root)))

    def close(self) -> None:
        """Remove the log."""
        self.log.unlink()


def _read_events(log: bytes, root: str) -> Iterator[Event]:
    at = 0
    while at < len(log):
        total, kind, flag, n_old, n_new, _, mode, uid, gid, ino, a, b = _RECORD.unpack_from(log, at)
        old = at + _RECORD.size
        new = old + n_old
        data = new + n_new
        yield Event(
            chr(kind), flag, mode, uid, gid, ino, a, b,
            os.fsdecode(log[old:new]).removeprefix(root).strip("/"),
            os.fsdecode(log[new:data]).removeprefix(root).strip("/"),
            log[data : at + total],
        )  # fmt: skip
        at += total
