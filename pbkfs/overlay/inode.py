"""Inodes: what the tree keeps in memory of each file, directory and symbolic link.

Plain data with slots; owned by ``namespace``, changed by ``namespace``, ``replay`` and ``tree`` on
the thread that owns the tree, and never anywhere else. A cluster of 100,000 files has as many of
these, so there is no dict and no list in a file, and values that repeat (owner, times, the origin's
directory) are shared.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import NamedTuple

# Lookups of an inode that the kernel knows from before a takeover: they were not counted here.
PINNED = 1 << 60

# Attributes of a file whose newest sealed object was not asked for them yet.
NOT_LOADED = -1


@dataclass(slots=True)
class Attr:
    """What stat(2) says: ``mode`` with the type bits, ``size`` in bytes, ``blocks`` of 512."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    blocks: int


class Piece(NamedTuple):
    """An object that holds (a part of) a file: ``layer`` counts from the oldest sealed one."""

    layer: int
    object_id: int
    is_mapped: bool


class Dentry(NamedTuple):
    """A name of a file beyond its first one."""

    parent: Directory
    name: bytes
    cookie: int


class Inode:
    """Common to all kinds: number, attributes, lookups, and the first (mostly only) name.

    ``parent`` is None once the last name is gone. ``cookie`` is the position of the name in its
    directory, ``more`` are the other names. ``mode`` has the type bits.
    """

    __slots__ = (
        "atime_ns",
        "cookie",
        "ctime_ns",
        "gid",
        "ino",
        "mode",
        "more",
        "mtime_ns",
        "name",
        "nlookup",
        "parent",
        "uid",
    )

    def __init__(self, ino: int, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        self.ino = ino
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.atime_ns = self.mtime_ns = self.ctime_ns = mtime_ns
        self.nlookup = 0
        self.parent: Directory | None = None
        self.name = b""
        self.cookie = 0
        self.more: tuple[Dentry, ...] = ()

    @property
    def n_names(self) -> int:
        """How many names the inode has."""
        return 0 if self.parent is None else 1 + len(self.more)

    def find_cookie(self, parent: Directory, name: bytes) -> int:
        """Return the cookie of this name of the inode."""
        if self.parent is parent and self.name == name:
            return self.cookie
        for dentry in self.more:
            if dentry.parent is parent and dentry.name == name:
                return dentry.cookie
        raise KeyError(name)

    def move_cookie(self, parent: Directory, name: bytes, cookie: int) -> None:
        """Give this name of the inode another cookie."""
        if self.parent is parent and self.name == name:
            self.cookie = cookie
        self.more = tuple(
            dentry._replace(cookie=cookie)
            if dentry.parent is parent and dentry.name == name
            else dentry
            for dentry in self.more
        )


class File(Inode):
    """A regular file.

    ``pieces`` are its objects, newest first; the first one may be of the writable diff, and then
    attributes and size are that object's. The slots describe the version *below* the writable
    diff; ``size`` is NOT_LOADED if that version is a sealed object that was not asked yet.
    ``origin_dir`` and ``origin_name`` name the file of the base, where one counts.
    """

    __slots__ = ("base_size", "origin_dir", "origin_name", "pieces", "size")

    def __init__(self, ino: int, mode: int, uid: int, gid: int, mtime_ns: int, size: int) -> None:
        super().__init__(ino, stat.S_IFREG | mode, uid, gid, mtime_ns)
        self.size = self.base_size = size
        self.origin_dir: bytes | None = None
        self.origin_name = b""
        self.pieces: tuple[Piece, ...] = ()

    @property
    def origin(self) -> bytes | None:
        """The file's path in the base, or None."""
        if self.origin_dir is None:
            return None
        return join(self.origin_dir, self.origin_name)


class Directory(Inode):
    """A directory. ``children`` is None until the base's directory ``origin`` was listed.

    ``listing`` serves readers that are in the middle of the directory, see ``namespace``.
    """

    __slots__ = ("children", "listing", "n_directories", "origin")

    def __init__(self, ino: int, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        super().__init__(ino, stat.S_IFDIR | mode, uid, gid, mtime_ns)
        self.origin: bytes | None = None
        self.children: dict[bytes, Inode] | None = None
        self.n_directories = 0
        self.listing: tuple[list[int], list[bytes]] | None = None


class SymbolicLink(Inode):
    """A symbolic link; ``target`` None is the link to the diff's pg_wal, wherever the diff is."""

    __slots__ = ("target",)

    def __init__(self, ino: int, uid: int, gid: int, mtime_ns: int, target: bytes | None) -> None:
        super().__init__(ino, stat.S_IFLNK | 0o777, uid, gid, mtime_ns)
        self.target = target


def join(directory: bytes, name: bytes) -> bytes:
    """Return the path of ``name`` in ``directory``; the root is the empty path."""
    return directory + b"/" + name if directory else name
