"""``DIFF/lock``: at most one worker has a diff, on this host and on others.

The kernel's flock says whether an owner lives; the record in the file says who it is. A worker
that ends well empties the record, so a record without a lock is a crash. Taken by ``mount`` before
the fork and inherited by the worker; ``cleanup`` and ``unmount`` take it too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pbkfs import durable
from pbkfs.errors import BusyError, DiffError, HostError
from pbkfs.mount.owner import Owner, parse_owner

NAME = "lock"

# Other commands hold the lock for an instant to see whether it is free.
_ATTEMPTS = 10
_PAUSE_S = 0.05


class DiffLock:
    """The lock of one diff, held for as long as the object (or a child's copy of it) is open."""

    def __init__(self, diff: Path, fd: int, previous: Owner | None, *, is_new: bool) -> None:
        self.diff = diff
        self.previous = previous
        self.is_new = is_new
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor that holds the lock."""
        return self._fd

    def write(self, owner: Owner) -> None:
        """Record the owner; durable, because another host may read it after our power cut."""
        data = owner.to_json()
        # In place, as a full disk may not give a block back that was let go of.
        durable.on_step("lock:write")
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))
        durable.fsync_fd(self._fd, label="lock")

    def restore(self) -> None:
        """Put back what was recorded before, after a mount that failed."""
        if self.previous is not None:
            self.write(self.previous)
        else:
            self.clear()

    def clear(self) -> None:
        """Say that the owner ended well."""
        durable.on_step("lock:clear")
        os.ftruncate(self._fd, 0)
        durable.fsync_fd(self._fd, label="lock")

    def close(self) -> None:
        """Give this process's copy back; the lock ends with the last copy."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def acquire(diff: Path, *, force: bool = False) -> DiffLock:
    """Take the lock of an existing directory ``diff``.

    Raises BusyError if a live worker has it, or if another host had it and did not give it back
    (``force`` takes it then), HostError where the directory cannot be written.
    """
    path = diff / NAME
    is_new = not path.exists()
    fd = _open(path)
    try:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == _ATTEMPTS:
                    raise _in_use(diff, parse_owner(os.pread(fd, 4096, 0))) from None
                time.sleep(_PAUSE_S)
        if not _is_same(fd, path):
            raise BusyError(
                f"diff {diff} was removed by another process meanwhile",
                hint="Run the command again.",
            )
        previous = parse_owner(os.pread(fd, 4096, 0))
        if previous is not None and not previous.is_here() and not force:
            raise BusyError(
                f"diff {diff} was last used by host {previous.host} (pid {previous.pid}), "
                "which did not give it back",
                hint=f"Unmount it on {previous.host}; if that host is gone for good, use --force.",
            )
    except BaseException:
        os.close(fd)
        raise
    return DiffLock(diff, fd, previous, is_new=is_new)


def read_owner(diff: Path) -> Owner | None:
    """Return who last recorded itself as the owner; None if nobody, or it ended well.

    Raises PermissionError if the caller may not read it.
    """
    try:
        with open(diff / NAME, "rb") as file:
            return parse_owner(file.read(4096))
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_held(diff: Path) -> bool:
    """Return whether some process holds the lock now. Raises PermissionError."""
    try:
        fd = os.open(diff / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def hold_off(diff: Path) -> Iterator[None]:
    """Keep every worker away from ``diff`` for a while, without writing to it.

    Raises BusyError if one has it, PermissionError.
    """
    try:
        fd = os.open(diff / NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield  # nobody ever mounted it
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(diff, parse_owner(os.pread(fd, 4096, 0))) from None
        yield
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DiffError(
                f"lock of diff {path.parent} is a symbolic link",
                hint="This is not a diff made by pbkfs.",
            ) from None
        raise HostError(
            f"cannot write to diff {path.parent}: {(error.strerror or str(error)).lower()}",
            hint="A diff needs a directory that this user can write to, with space left.",
        ) from error


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _in_use(diff: Path, owner: Owner | None) -> BusyError:
    if owner is None:
        return BusyError(
            f"diff {diff} is in use by another pbkfs process",
            hint="Wait for that command to end.",
        )
    return BusyError(
        f"diff {diff} is in use by pid {owner.pid} on host {owner.host}, "
        f"mounted on {owner.mountpoint}",
        hint=f"Unmount it first: pbkfs unmount -D {owner.mountpoint}",
    )
