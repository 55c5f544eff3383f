"""The one interface of an immutable base: a tree of files, and where their bytes are.

A base lists names and attributes; it never hands out file content. ``sources`` says, newest first,
which stored files hold the content of one file; the native half reads them. A new kind of base is
one new module with a subclass of ``Base``. Called by ``overlay`` (names, sources), ``mount``
(acquire, wal_seed, describe) and ``cli``. A base may be used by one thread at a time; descriptors
in sources stay valid until ``close``.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from pbkfs.pgdata import ControlFile

NO_LIMIT = 0xFFFFFFFF

# Where the content of tablespaces is shown; pg_tblspc/OID is a link to TABLESPACE_ROOT/OID.
# A relative link inside of the mount is what PostgreSQL accepts without any setting, and it can
# never lead to the original tablespace.
TABLESPACE_ROOT = b".tblspc"


class Kind(enum.Enum):
    """Type of a directory entry."""

    FILE = "f"
    DIR = "d"
    LINK = "l"


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """One name of a directory."""

    name: bytes
    kind: Kind
    mode: int
    """Permission bits only."""
    size: int
    """Bytes of a file, length of a link's target, 0 for a directory."""
    mtime_ns: int
    target: bytes | None = None
    """Of a symbolic link, else None."""


@dataclass(frozen=True, slots=True)
class RawSource:
    """A file's content as one plain file."""

    root_fd: int
    """Directory descriptor, owned by the base."""
    path: bytes
    """Relative to ``root_fd``; to be opened beneath it without following links."""
    size: int
    label: str
    """Name of the layer for log lines."""


@dataclass(frozen=True, slots=True)
class PageSource:
    """One layer of a pg_probackup chain for a data file: a stream of page records."""

    root_fd: int
    path: bytes
    stored_size: int
    label: str
    compress: int
    """0 none, 1 zlib, 2 pglz."""
    limit: int
    """Blocks at or above it are to be ignored: the minimum over this and all newer layers."""
    padded: bool
    """Payloads are padded to 8 bytes (pg_probackup before 2.4.0)."""
    old_zlib_8192: bool
    """A payload of exactly 8192 bytes may be compressed (pg_probackup before 2.0.23)."""
    headers: tuple[int, bytes, int, int, int, int] | None
    """(root_fd, path, offset, size, crc, n_headers) in page_header_map; None: walk the records."""


Source = RawSource | PageSource


class WalSeed(NamedTuple):
    """One file to be put into pg_wal that is not in the tree."""

    name: bytes
    open: Callable[[], BinaryIO]
    """Yields exactly ``size`` bytes, or raises FormatError while reading."""
    size: int


class Base(ABC):
    """An immutable tree of files.

    ``identity`` is a JSON object; two bases are the same if and only if theirs are equal.
    ``owner`` is (uid, gid) of what the base was made from. ``notes`` are sentences a user should
    see when the base is mounted: what is not shown, what is not guarded.
    """

    kind: str
    identity: dict[str, str | int | None]
    system_identifier: int | None
    pg_major: int | None
    control: ControlFile | None
    """Its ``pg_control``; None where there is no cluster."""
    owner: tuple[int, int]
    notes: list[str]

    @abstractmethod
    def scandir(self, path: bytes) -> Iterable[BaseEntry]:
        """List the directory ``path`` (b"" is the root) in no special order, hidden names left out.

        Raises NotFoundError when there is no such directory, FormatError or OSError when it cannot
        be read.
        """

    @abstractmethod
    def sources(self, path: bytes) -> tuple[Source, ...]:
        """Where the content of the file ``path`` is, newest first; empty means all zeros.

        Opens no file; reads record headers only when the file's size is not written anywhere.
        Raises NotFoundError, or FormatError when the base's metadata about this file is damaged.
        """

    def wal_seed(self) -> Iterable[WalSeed]:
        """Files that recovery needs in pg_wal beyond those of the tree.

        Raises NotFoundError naming the first one that is missing.
        """
        return ()

    @abstractmethod
    def describe(self) -> str:
        """One line for people: what this base is."""

    def acquire(self, pid: int) -> None:
        """Guard the base against removal on behalf of process ``pid``, where that is possible.

        Raises BusyError when somebody is rewriting the base.
        """
        del pid

    def release(self, pid: int) -> None:
        """Undo ``acquire``; never fails."""
        del pid

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        return
