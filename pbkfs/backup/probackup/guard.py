"""pg_probackup's own locks, so that a mounted chain is not merged or deleted under its reader.

A reader's pid stands in ``backup_ro.pid``, one a line; who changes that file, or rewrites the
backup, first creates ``backup.pid`` with its own pid. Pids of processes that are gone do not count.
A store that cannot be written cannot be guarded; that is said, not failed. Called by
``probackup.base`` for each member of a chain; belongs to one thread.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pbkfs.errors import BusyError

EXCLUSIVE = "backup.pid"
SHARED = "backup_ro.pid"
_SHARED_NEW = "backup_ro.pid_tmp"

# pg_probackup holds backup.pid for an instant to add a reader, and for long to merge or delete.
EXCLUSIVE_WAIT_S = 5.0
# A lock file without a pid is being written just now, or its writer died before it wrote.
EMPTY_WAIT_S = 1.0
_POLL_S = 0.05

_NOT_WRITABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT})


def is_alive(pid: int) -> bool:
    """Tell whether a process of that number exists on this host."""
    if not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parse_pids(data: bytes) -> list[int]:
    return [int(line) for line in data.split() if line.isdigit() and len(line) < 11]


def _read(dir_fd: int, name: str) -> bytes | None:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, 1 << 16)
    finally:
        os.close(fd)


def _write(dir_fd: int, name: str, data: bytes, flags: int) -> None:
    fd = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=dir_fd
    )
    try:
        if os.geteuid() == 0:
            # Else the owner's pg_probackup could not read its own lock file.
            owner = os.fstat(dir_fd)
            os.fchown(fd, owner.st_uid, owner.st_gid)
        os.write(fd, data)
    finally:
        os.close(fd)


@contextmanager
def _exclusive(dir_fd: int, label: str, pid: int) -> Iterator[None]:
    """Hold backup.pid. Raises BusyError when a living process keeps it, OSError."""
    deadline = time.monotonic() + EXCLUSIVE_WAIT_S
    empty_until = time.monotonic() + EMPTY_WAIT_S
    while True:
        try:
            _write(dir_fd, EXCLUSIVE, b"%d\n" % pid, os.O_EXCL)
            break
        except FileExistsError:
            pass
        pids = _parse_pids(_read(dir_fd, EXCLUSIVE) or b"")
        is_held = any(is_alive(holder) and holder != pid for holder in pids)
        if not is_held and (pids or time.monotonic() >= empty_until):
            with suppress(FileNotFoundError):
                os.unlink(EXCLUSIVE, dir_fd=dir_fd)
            continue
        if is_held and time.monotonic() >= deadline:
            raise BusyError(
                f"backup {label} is locked by process {pids[0]} ({EXCLUSIVE})",
                hint="pg_probackup merges, deletes or validates it; try again when that is done.",
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(EXCLUSIVE, dir_fd=dir_fd)


@contextmanager
def _same_mtime(dir_fd: int) -> Iterator[None]:
    """Give the directory its time back: a mount leaves nothing changed in a store."""
    before = os.fstat(dir_fd)
    try:
        yield
    finally:
        with suppress(OSError):
            os.utime(dir_fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace_readers(dir_fd: int, label: str, pid: int, *, is_added: bool) -> None:
    with _same_mtime(dir_fd), _exclusive(dir_fd, label, pid):
        old = _read(dir_fd, SHARED)
        readers = [
            reader
            for reader in dict.fromkeys(_parse_pids(old or b""))
            if reader != pid and is_alive(reader)
        ]
        if is_added:
            readers.append(pid)
        if not readers:
            if old is not None:
                os.unlink(SHARED, dir_fd=dir_fd)
            return
        try:
            data = b"".join(b"%d\n" % reader for reader in readers)
            _write(dir_fd, _SHARED_NEW, data, os.O_TRUNC)
            os.rename(_SHARED_NEW, SHARED, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except OSError:
            with suppress(OSError):
                os.unlink(_SHARED_NEW, dir_fd=dir_fd)
            raise


def add_reader(dir_fd: int, label: str, pid: int) -> OSError | None:
    """Add ``pid`` to the readers of the backup in ``dir_fd``.

    Returns why the store cannot be written, if so. Raises BusyError when the backup is being
    rewritten.
    """
    try:
        _replace_readers(dir_fd, label, pid, is_added=True)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        holders = _parse_pids(_read_quietly(dir_fd, EXCLUSIVE))
        for holder in holders:
            if holder != pid and is_alive(holder):
                raise BusyError(
                    f"backup {label} is locked by process {holder} ({EXCLUSIVE})",
                    hint="pg_probackup works on it; try again when that is done.",
                ) from error
        return error
    return None


def _read_quietly(dir_fd: int, name: str) -> bytes:
    try:
        return _read(dir_fd, name) or b""
    except OSError:
        return b""


def remove_reader(dir_fd: int, label: str, pid: int) -> None:
    """Take ``pid`` out again; a failure leaves a line that the next reader drops."""
    with suppress(OSError, BusyError):
        _replace_readers(dir_fd, label, pid, is_added=False)
