"""The same file operations on different things: a plain directory, a mount, a Tree without a mount.

A driver takes paths as bytes relative to its root and raises OSError as the system calls do; none
follows a symbolic link at a path's end. ``OsDriver`` is the oracle on a plain directory, and the
driver of a real mount point. ``TreeDriver`` does what the kernel and fuse do around a ``Tree``: it
walks paths, counts lookups, keeps open files by inode, and copies up before a write.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from pbkfs.overlay.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, Attr, Tree

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16


@dataclass(frozen=True)
class Stat:
    """What stat(2) has to agree on. ``size`` is None for directories: it means nothing there."""

    kind: str
    mode: int
    nlink: int
    size: int | None
    mtime_ns: int
    ino: int


def _make_stat(mode: int, nlink: int, size: int, mtime_ns: int, ino: int) -> Stat:
    kind = {stat.S_IFDIR: "dir", stat.S_IFREG: "file", stat.S_IFLNK: "link"}[stat.S_IFMT(mode)]
    shown = None if kind == "dir" else size
    return Stat(kind, stat.S_IMODE(mode), nlink, shown, mtime_ns, ino)


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Driver(ABC):
    """A tree of files to work on. Handles are ints of the driver's own."""

    @abstractmethod
    def open(self, path: bytes, flags: int, mode: int = 0o600) -> int: ...
    @abstractmethod
    def close(self, handle: int) -> None: ...
    @abstractmethod
    def pread(self, handle: int, length: int, offset: int) -> bytes: ...
    @abstractmethod
    def pwrite(self, handle: int, data: bytes, offset: int) -> int: ...
    @abstractmethod
    def ftruncate(self, handle: int, size: int) -> None: ...
    @abstractmethod
    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None: ...
    @abstractmethod
    def fsync(self, handle: int) -> None: ...
    @abstractmethod
    def fstat(self, handle: int) -> Stat: ...
    @abstractmethod
    def stat(self, path: bytes) -> Stat: ...
    @abstractmethod
    def truncate(self, path: bytes, size: int) -> None: ...
    @abstractmethod
    def chmod(self, path: bytes, mode: int) -> None: ...
    @abstractmethod
    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None: ...
    @abstractmethod
    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None: ...
    @abstractmethod
    def link(self, existing: bytes, new: bytes) -> None: ...
    @abstractmethod
    def unlink(self, path: bytes) -> None: ...
    @abstractmethod
    def mkdir(self, path: bytes, mode: int) -> None: ...
    @abstractmethod
    def rmdir(self, path: bytes) -> None: ...
    @abstractmethod
    def symlink(self, target: bytes, path: bytes) -> None: ...
    @abstractmethod
    def readlink(self, path: bytes) -> bytes: ...
    @abstractmethod
    def listdir(self, path: bytes) -> list[bytes]: ...
    @abstractmethod
    def fsync_directory(self, path: bytes) -> None: ...

    def read_file(self, path: bytes) -> bytes:
        """Return all of a file."""
        handle = self.open(path, os.O_RDONLY)
        try:
            size = self.fstat(handle).size
            assert size is not None
            return self.pread(handle, size + 1, 0)
        finally:
            self.close(handle)


class OsDriver(Driver):
    """System calls below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = os.fsencode(root)

    def _at(self, path: bytes) -> bytes:
        return self._prefix + b"/" + path if path else self._prefix

    def open(self, path: bytes, flags: int, mode: int = 0o600) -> int:
        return os.open(self._at(path), flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def close(self, handle: int) -> None:
        os.close(handle)

    def pread(self, handle: int, length: int, offset: int) -> bytes:
        return os.pread(handle, length, offset)

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        return os.pwrite(handle, data, offset)

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        call = _libc.fallocate64
        done = call(handle, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length))
        if done != 0:
            raise fail(ctypes.get_errno())

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def fstat(self, handle: int) -> Stat:
        return self._stat(os.fstat(handle))

    def stat(self, path: bytes) -> Stat:
        return self._stat(os.lstat(self._at(path)))

    def _stat(self, found: os.stat_result) -> Stat:
        return _make_stat(
            found.st_mode, found.st_nlink, found.st_size, found.st_mtime_ns, found.st_ino
        )

    def truncate(self, path: bytes, size: int) -> None:
        os.truncate(self._at(path), size)

    def chmod(self, path: bytes, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self._at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        done = _libc.renameat2(_AT_FDCWD, self._at(old), _AT_FDCWD, self._at(new), flags)
        if done != 0:
            raise fail(ctypes.get_errno())

    def link(self, existing: bytes, new: bytes) -> None:
        os.link(self._at(existing), self._at(new), follow_symlinks=False)

    def unlink(self, path: bytes) -> None:
        os.unlink(self._at(path))

    def mkdir(self, path: bytes, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: bytes) -> None:
        os.rmdir(self._at(path))

    def symlink(self, target: bytes, path: bytes) -> None:
        os.symlink(target, self._at(path))

    def readlink(self, path: bytes) -> bytes:
        return os.readlink(self._at(path))

    def listdir(self, path: bytes) -> list[bytes]:
        return os.listdir(self._at(path))

    def fsync_directory(self, path: bytes) -> None:
        fd = os.open(self._at(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class TreeDriver(Driver):
    """A Tree, treated as the kernel treats it. Lookups are kept until ``forget_all``."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._lookups: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        self._next_handle = 1

    # --- what the kernel does -----------------------------------------------------------------

    def forget_all(self) -> None:
        """Take back the lookups that no open file holds, as the kernel does without memory."""
        for ino, n in self._lookups.items():
            self.tree.forget(ino, n)
        self._lookups.clear()

    def _keep(self, attr: Attr) -> Attr:
        self._lookups[attr.ino] = self._lookups.get(attr.ino, 0) + 1
        return attr

    def _lookup(self, parent: int, name: bytes) -> Attr:
        return self._keep(self.tree.lookup(parent, name))

    def _parent(self, path: bytes) -> tuple[int, bytes]:
        *parents, name = path.split(b"/")
        ino = Tree.ROOT
        for part in parents:
            attr = self._lookup(ino, part)
            if stat.S_ISLNK(attr.mode):
                raise fail(errno.ENOENT)  # all links in the tests lead nowhere
            if not stat.S_ISDIR(attr.mode):
                raise fail(errno.ENOTDIR)
            ino = attr.ino
        return ino, name

    def _find(self, path: bytes) -> Attr:
        if not path:
            return self.tree.getattr(Tree.ROOT)
        return self._lookup(*self._parent(path))

    def _umask(self) -> int:
        mask = os.umask(0)
        os.umask(mask)
        return mask

    # --- open files ---------------------------------------------------------------------------

    def open(self, path: bytes, flags: int, mode: int = 0o600) -> int:
        parent, name = self._parent(path)
        try:
            attr = self._lookup(parent, name)
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            owner = os.geteuid(), os.getegid()
            attr = self._keep(self.tree.create(parent, name, mode & ~self._umask(), *owner))
        else:
            if flags & os.O_CREAT and flags & os.O_EXCL:
                raise fail(errno.EEXIST)
            if stat.S_ISLNK(attr.mode):
                raise fail(errno.ELOOP)
            if stat.S_ISDIR(attr.mode):
                raise fail(errno.EISDIR)
            if flags & os.O_TRUNC:
                self.tree.setattr(attr.ino, size=0)
        self.tree.open(attr.ino)
        self.tree.remember(attr.ino)
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = attr.ino
        return handle

    def close(self, handle: int) -> None:
        self.tree.forget(self._handles.pop(handle), 1)

    def pread(self, handle: int, length: int, offset: int) -> bytes:
        return self.tree.nodes.read(self._handles[handle], offset, length)

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        ino = self._handles[handle]
        if not data:
            return 0
        try:
            return self.tree.nodes.write(ino, offset, data)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            self.tree.copy_up(ino)
            return self.tree.nodes.write(ino, offset, data)

    def ftruncate(self, handle: int, size: int) -> None:
        self.tree.setattr(self._handles[handle], size=size)

    def fallocate(self, handle: int, mode: int, offset: int, length: int) -> None:
        ino = self._handles[handle]
        if not self.tree.nodes.has_object(ino):
            self.tree.copy_up(ino)
        self.tree.nodes.fallocate(ino, mode, offset, length)

    def fsync(self, handle: int) -> None:
        self.tree.nodes.fsync(self._handles[handle], False)

    def fstat(self, handle: int) -> Stat:
        return self._stat(self.tree.getattr(self._handles[handle]))

    # --- paths --------------------------------------------------------------------------------

    def stat(self, path: bytes) -> Stat:
        return self._stat(self._find(path))

    def _stat(self, attr: Attr) -> Stat:
        return _make_stat(attr.mode, attr.nlink, attr.size, attr.mtime_ns, attr.ino)

    def truncate(self, path: bytes, size: int) -> None:
        attr = self._find(path)
        if stat.S_ISLNK(attr.mode):
            raise fail(errno.ENOENT)
        if stat.S_ISDIR(attr.mode):
            raise fail(errno.EISDIR)
        self.tree.setattr(attr.ino, size=size)

    def chmod(self, path: bytes, mode: int) -> None:
        attr = self._find(path)
        if stat.S_ISLNK(attr.mode):
            raise fail(errno.ENOENT)
        self.tree.setattr(attr.ino, mode=mode)

    def utime(self, path: bytes, atime_ns: int, mtime_ns: int) -> None:
        self.tree.setattr(self._find(path).ino, atime_ns=atime_ns, mtime_ns=mtime_ns)

    def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        if flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise fail(errno.EINVAL)
        old_place, new_place = self._parent(old), self._parent(new)
        self.tree.rename(*old_place, *new_place, flags)

    def link(self, existing: bytes, new: bytes) -> None:
        ino = self._find(existing).ino
        self._keep(self.tree.link(ino, *self._parent(new)))

    def unlink(self, path: bytes) -> None:
        self.tree.unlink(*self._parent(path))

    def mkdir(self, path: bytes, mode: int) -> None:
        owner = os.geteuid(), os.getegid()
        self._keep(self.tree.mkdir(*self._parent(path), mode & ~self._umask(), *owner))

    def rmdir(self, path: bytes) -> None:
        self.tree.rmdir(*self._parent(path))

    def symlink(self, target: bytes, path: bytes) -> None:
        if len(target) >= 4096:
            raise fail(errno.ENAMETOOLONG)  # the kernel looks at its arguments first
        owner = os.geteuid(), os.getegid()
        self._keep(self.tree.symlink(*self._parent(path), target, *owner))

    def readlink(self, path: bytes) -> bytes:
        return self.tree.readlink(self._find(path).ino)

    def listdir(self, path: bytes) -> list[bytes]:
        """Read a directory in small pieces, as the kernel does, coming back with the cookie."""
        ino = self._find(path).ino
        names: list[bytes] = []
        cookie = 0
        while True:
            found = 0
            for name, attr, next_cookie in self.tree.readdir(ino, cookie):
                if found == 2:
                    break
                found += 1
                self.tree.remember(attr.ino)
                self._keep(attr)
                names.append(name)
                cookie = next_cookie
            if not found:
                return names

    def fsync_directory(self, path: bytes) -> None:
        self.tree.fsyncdir(self._find(path).ino)
