"""Holding a PostgreSQL server still for an instant: SIGSTOP to its processes, and SIGCONT.

Used by the worker around a seal, in a thread, so that the sealed state is that of one moment. A
process that was stopped is let go in any case: by ``end``, or by a timer that outlives whatever
hangs. Nothing here asks the mount itself: see ``pbkfs.aside`` for why.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import struct
import threading
import time
from pathlib import Path

from pbkfs.mount.owner import command_name

logger = logging.getLogger(__name__)

_PROGRAMS = ("postgres", "postmaster")
# For as long as a process may take from the signal to its stop: it ends its system call before.
_STOP_LIMIT_S = 2.0
_PAUSE_S = 0.001

# Source: linux/stat.h, struct statx; linux/fcntl.h.
_STATX_BYTES, _DEVICE_AT, _DEVICE = 256, 136, struct.Struct("=II")
_AT_STATX_DONT_SYNC, _AT_FDCWD = 0x4000, -100

_libc = ctypes.CDLL(None, use_errno=True)


class Standstill:
    """The server on the mount at ``mountpoint``, to be held for ``limit_s`` at most."""

    def __init__(self, mountpoint: Path, limit_s: float) -> None:
        self._mountpoint = mountpoint
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._stopped: dict[int, int] = {}
        self._began: float | None = None
        self._timer: threading.Timer | None = None
        self.held_s = 0.0

    def begin(self) -> str | None:
        """Stop all processes of the server; returns why that was not possible, or None.

        Nothing is stopped then. A mount without a server needs no standstill: that is fine too.
        """
        device = _device_of(self._mountpoint)
        self._began = time.monotonic()
        self._timer = threading.Timer(self._limit_s, self._expire)
        self._timer.daemon = True
        self._timer.start()
        try:
            if self._stop_all(device):
                return None
            reason = "its processes did not stop in time"
        except PermissionError:
            reason = "this worker may not signal its processes"
        self.end()
        return reason

    def end(self) -> bool:
        """Let all go on; returns whether they had stood still until now. Idempotent."""
        with self._lock:
            stopped, self._stopped = self._stopped, {}
            if self._timer is not None:
                self._timer.cancel()
            was_held = self._began is not None
            for pidfd in stopped.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                os.close(pidfd)
            if self._began is not None and stopped:
                self.held_s = time.monotonic() - self._began
            self._began = None
        return was_held

    def _expire(self) -> None:
        if self.end():
            logger.warning("the server was let go after %g s: too long", self._limit_s)

    def _stop_all(self, device: int) -> bool:
        """Stop until there is no new process; returns False if the time is up. PermissionError."""
        deadline = time.monotonic() + min(_STOP_LIMIT_S, self._limit_s)
        seen: set[int] = set()
        while time.monotonic() < deadline:
            new = [pid for pid in find_processes(device) if pid not in seen]
            if not new and all(_stands(pid) for pid in seen):
                return True
            # The postmaster first: it is the oldest, and makes the others.
            for pid in new:
                seen.add(pid)
                self._stop(pid)
            time.sleep(_PAUSE_S)
        return False

    def _stop(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        with self._lock:
            if self._began is None or _stands(pid):
                os.close(pidfd)  # time is up, or somebody else holds it
                return
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            except ProcessLookupError:
                os.close(pidfd)
                return
            except BaseException:
                os.close(pidfd)
                raise
            self._stopped[pid] = pidfd


def let_go(mountpoint: Path) -> None:
    """Let a server go on that a worker held when it died; where nobody took over, to its end."""
    try:
        pids = find_processes(_device_of(mountpoint))
    except OSError as error:
        logger.warning("no server on %s can be let go: %s", mountpoint, error.strerror)
        return
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue
        except OSError as error:
            logger.error("process %d can't be let go: %s", pid, error.strerror)


def find_processes(device: int) -> list[int]:
    """Return the processes of servers whose PGDATA is on the file system ``device``, oldest first.

    A server's processes all work in PGDATA. Source: src/backend/utils/init/miscinit.c
    (ChangeToDataDir).
    """
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or command_name(int(name)) not in _PROGRAMS:
            continue
        try:
            if _device_of(f"/proc/{name}/cwd") == device:
                found.append((_started(int(name)), int(name)))
        except OSError:
            continue
    return [pid for _, pid in sorted(found)]


def _device_of(path: str | Path) -> int:
    """Return the device of what ``path`` leads to; stat(2) might ask the file system. OSError."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = ctypes.c_int(_AT_STATX_DONT_SYNC)
    if _libc.statx(ctypes.c_int(_AT_FDCWD), os.fsencode(path), flags, ctypes.c_uint(0), found):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
    return os.makedev(*_DEVICE.unpack_from(found, _DEVICE_AT))


def _stat_fields(pid: int) -> list[bytes]:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _started(pid: int) -> int:
    # Source: proc_pid_stat(5), field 22.
    return int(_stat_fields(pid)[19])


def _stands(pid: int) -> bool:
    """Return whether a process is stopped, or has ended."""
    try:
        return _stat_fields(pid)[0] in (b"T", b"t", b"Z", b"X")
    except (OSError, IndexError):
        return True
