"""``DIFF/objects``: one plain file per changed file, named by number.

Owns the numbering, the making and the removal of objects, and their attributes; their bytes belong
to the native half. Used on the thread that owns the tree, except ``fill`` and ``sync_fresh``, which
any thread may call. An object appears under its name complete (a temporary name and a rename), so
a crash never leaves one with a wrong owner or mode.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pbkfs import durable

# The directories HH are made this many at a time: one fsync of objects/ serves a whole batch, and
# a small diff does not pay (1 MiB on ext4) for all 256 of them.
_DIRECTORY_BATCH = 16

_TMP_SUFFIX = ".tmp"
_OPEN_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def object_path(object_id: int) -> str:
    """Return an object's path relative to ``objects``."""
    return f"{object_id & 255:02x}/{object_id:x}"


class ObjectStore:
    """The objects of one diff, seen through a descriptor of its directory ``objects``."""

    def __init__(self, fd: int) -> None:
        """``fd`` is owned by the store from now on."""
        self.fd = fd
        self.next_id = 1
        self._directories: set[int] = set()
        self._fresh: deque[int] = deque()
        self._sync_lock = threading.Lock()

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- looking ----------------------------------------------------------------------------

    def scan(self, *, leftovers: list[str] | None = None) -> set[int]:
        """Return the ids of all objects; collects paths of half-made ones in ``leftovers``.

        Files that can't be ours are left alone and not reported. Raises OSError.
        """
        ids: set[int] = set()
        for entry in sorted(os.listdir(self.fd)):
            number = _parse_hex(entry, width=2)
            if number is None or number > 255:
                continue
            try:
                fd = os.open(entry, _OPEN_DIRECTORY, dir_fd=self.fd)
            except NotADirectoryError:
                continue
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
            self._directories.add(number)
            for name in names:
                object_id = _parse_hex(name)
                if object_id is not None and object_id & 255 == number:
                    ids.add(object_id)
                elif name.endswith(_TMP_SUFFIX) and leftovers is not None:
                    leftovers.append(f"{entry}/{name}")
        return ids

    def stat(self, object_id: int) -> os.stat_result:
        """Return the object's attributes. Raises OSError; a missing object is EIO."""
        try:
            result = os.stat(object_path(object_id), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            raise self._broken(object_id, "is missing") from None
        if not stat.S_ISREG(result.st_mode):
            raise self._broken(object_id, "is no regular file")
        return result

    def _broken(self, object_id: int, what: str) -> OSError:
        return OSError(errno.EIO, f"object {object_path(object_id)} {what}")

    # --- making and removing ----------------------------------------------------------------

    def make(self, mode: int, uid: int, gid: int) -> int:
        """Make an empty object; returns its id. Not durable yet. Raises OSError, leaves nothing."""
        object_id = self.reserve()
        with self._new(object_id, label="create") as (tmp, fd):
            _give(fd, mode, uid, gid)
            self._publish(object_id, tmp, label="create")
        self._fresh.append(object_id & 255)
        return object_id

    def make_filled(
        self,
        fill: Callable[[int], None],
        *,
        attributes: tuple[int, int, int],
        times_ns: tuple[int, int],
    ) -> int:
        """Make an object whose content ``fill(fd)`` writes; returns its id.

        Object and directory entry are durable on return. ``attributes`` are mode, uid and gid,
        ``times_ns`` atime and mtime. Raises what ``fill`` raises and OSError; leaves nothing then.
        """
        object_id = self.reserve()
        self.fill(object_id, fill, attributes=attributes, times_ns=times_ns)
        return object_id

    def reserve(self) -> int:
        """Return the id of an object that is going to be made. Raises OSError."""
        object_id = self.next_id
        self._ensure_directory(object_id & 255)
        self.next_id += 1
        return object_id

    def fill(
        self,
        object_id: int,
        fill: Callable[[int], None],
        *,
        attributes: tuple[int, int, int],
        times_ns: tuple[int, int],
    ) -> None:
        """Make the object of a reserved id, as ``make_filled`` does. Any thread may call."""
        with self._new(object_id, label="copy_up") as (tmp, fd):
            fill(fd)
            _give(fd, *attributes)
            os.utime(fd, ns=times_ns)
            durable.fsync_fd(fd, label="copy_up:object")
            self._publish(object_id, tmp, label="copy_up")
            try:
                self._fsync_directory(object_id & 255, label="copy_up:directory")
            except BaseException:
                self.remove(object_id)
                raise

    @contextmanager
    def _new(self, object_id: int, *, label: str) -> Iterator[tuple[str, int]]:
        tmp = object_path(object_id) + _TMP_SUFFIX
        durable.on_step(f"{label}:object:create")
        fd = os.open(tmp, _OPEN_NEW, 0o600, dir_fd=self.fd)
        try:
            yield tmp, fd
        except BaseException:
            self._unlink(tmp)
            raise
        finally:
            os.close(fd)

    def _publish(self, object_id: int, tmp: str, *, label: str) -> None:
        durable.on_step(f"{label}:object:rename")
        os.rename(tmp, object_path(object_id), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def _ensure_directory(self, number: int) -> None:
        if number in self._directories:
            return
        first = number - number % _DIRECTORY_BATCH
        for each in range(first, first + _DIRECTORY_BATCH):
            if each not in self._directories:
                durable.on_step("objects:directory:mkdir")
                # It exists if an earlier attempt's fsync failed.
                with suppress(FileExistsError):
                    os.mkdir(f"{each:02x}", 0o700, dir_fd=self.fd)
        durable.fsync_fd(self.fd, label="objects:directory")
        self._directories.update(range(first, first + _DIRECTORY_BATCH))

    def remove(self, object_id: int) -> None:
        """Unlink an object; one that is gone is fine.

        The record that took its last name away is durable, or that of its making is not, so that
        it was never fsynced: see the rules of "journal" in ARCHITECTURE.md.
        """
        durable.on_step("reap:object:unlink")
        self._unlink(object_path(object_id))

    def remove_leftover(self, path: str) -> None:
        """Unlink a half-made object found by ``scan``."""
        self._unlink(path)

    def _unlink(self, path: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self.fd)

    def recreate(self, object_id: int, mode: int, uid: int, gid: int) -> None:
        """Make an empty object in the place of one that a power cut took. Raises OSError."""
        self._ensure_directory(object_id & 255)
        tmp = object_path(object_id) + _TMP_SUFFIX
        fd = os.open(tmp, _OPEN_NEW, 0o600, dir_fd=self.fd)
        try:
            _give(fd, mode, uid, gid)
            self._publish(object_id, tmp, label="recover")
        finally:
            os.close(fd)
        self._fresh.append(object_id & 255)

    # --- attributes -------------------------------------------------------------------------

    @contextmanager
    def pinned(self, object_id: int) -> Iterator[str]:
        """Yield a path through which this very object can be changed, never a link's target.

        An O_PATH descriptor needs no permission on the object, so a file of mode 0 can be given
        another mode by an unprivileged worker too.
        """
        fd = os.open(
            object_path(object_id), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd
        )
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._broken(object_id, "is no regular file")
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    # --- durability -------------------------------------------------------------------------

    def fsync_object(self, object_id: int, *, label: str) -> None:
        """Make an object's bytes and size durable. Raises OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(object_path(object_id), flags, dir_fd=self.fd)
        except PermissionError:
            # Its mode keeps its own owner out, who is no root.
            with self.pinned(object_id) as path:
                mode = stat.S_IMODE(os.stat(path).st_mode)
                os.chmod(path, mode | stat.S_IRUSR)
                try:
                    fd = os.open(object_path(object_id), flags, dir_fd=self.fd)
                finally:
                    os.chmod(path, mode)
        try:
            durable.fsync_fd(fd, label=label)
        finally:
            os.close(fd)

    def fsync_directories(self, *, label: str) -> None:
        """Make the entries of all objects durable. Raises OSError."""
        for number in sorted(self._directories):
            self._fsync_directory(number, label=label)
        durable.fsync_fd(self.fd, label=label)

    def sync_fresh(self) -> None:
        """Make the directory entries of new objects durable. Any thread may call. Raises OSError.

        Callers wait for each other: an entry that another one is about to fsync is not durable.
        """
        with self._sync_lock:
            numbers: set[int] = set()
            while self._fresh:
                numbers.add(self._fresh.popleft())
            done: set[int] = set()
            try:
                for number in sorted(numbers):
                    self._fsync_directory(number, label="sync:objects")
                    done.add(number)
            finally:
                self._fresh.extend(numbers - done)

    def _fsync_directory(self, number: int, *, label: str) -> None:
        fd = os.open(f"{number:02x}", _OPEN_DIRECTORY, dir_fd=self.fd)
        try:
            durable.fsync_fd(fd, label=label)
        finally:
            os.close(fd)


def _give(fd: int, mode: int, uid: int, gid: int) -> None:
    """Set owner and mode; a change of owner clears set-id bits, so the mode comes second."""
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (uid, gid):
        os.fchown(fd, uid, gid)
    if stat.S_IMODE(now.st_mode) != mode:
        os.fchmod(fd, mode)


def _parse_hex(name: str, *, width: int | None = None) -> int | None:
    if not name or len(name) > 16 or (width is not None and len(name) != width):
        return None
    if not all(c in "0123456789abcdef" for c in name):
        return None
    number = int(name, 16)
    if width is None and f"{number:x}" != name:
        return None
    return number
