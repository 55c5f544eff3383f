"""Copying what a recovery needs out of a pg_wal that is written to.

The segments from some redo point on, of all timelines, and the history files. A copied segment
holds the pages that belong to it and a hole for the rest: PostgreSQL finds the end of WAL there, as
after a power cut. What lies before the redo point in its segment is a hole, too, but for the first
page, which PostgreSQL looks at whenever it opens a segment (xlogreader.c, ReadPageInternal).
``advance`` may be called several times: the last one decides which moment it is, those before only
take work away from it. Used by ``sealing``, in any thread, one at a time.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pbkfs import durable
from pbkfs.pgdata import is_wal_file_name, is_wal_segment_name, parse_wal_segment_name

# Source: src/include/access/xlog_internal.h, XLogPageHeaderData: magic, info, tli, pageaddr.
_PAGE_HEADER = struct.Struct("<HHIQ")
# The high byte of XLOG_PAGE_MAGIC, of all releases since 9.3.
_MAGIC = 0xD0

# A file that was written to less than this before it was copied may have been changed again without
# another time of modification: the clock of a file system ticks every few milliseconds.
_SETTLED_NS = 1_000_000_000

_NOT_HERE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_DIRECTORIES = ("archive_status", "summaries")


@dataclass(frozen=True, slots=True)
class WalStart:
    """Where recovery begins: the LSN, and the sizes of a segment and of a page in bytes."""

    lsn: int
    segment_bytes: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class _Copied:
    inode: int
    mtime_ns: int
    began_ns: int
    n_bytes: int

    def is_of(self, found: os.stat_result) -> bool:
        """Whether the file is as it was when it was copied."""
        return (self.inode, self.mtime_ns) == (
            found.st_ino,
            found.st_mtime_ns,
        ) and self.mtime_ns < self.began_ns - _SETTLED_NS


class WalCopy:
    """Copies from the directory ``source`` to the new directory ``target``."""

    def __init__(self, source: Path, target: Path) -> None:
        """Make ``target``. Raises OSError."""
        self._source = source
        self._target = target
        self._copied: dict[str, _Copied] = {}
        self._make_directory(source, target)
        for name in _DIRECTORIES:
            if (source / name).is_dir():
                self._make_directory(source / name, target / name)

    @property
    def n_bytes(self) -> int:
        """How many bytes the copy has, holes not counted."""
        return sum(copied.n_bytes for copied in self._copied.values())

    def advance(self, start: WalStart) -> None:
        """Copy what is there now and was not, or has changed since. Raises OSError."""
        first = start.lsn // start.segment_bytes
        wanted = set()
        for name in sorted(os.listdir(self._source)):
            is_segment = is_wal_segment_name(name)
            if is_segment and parse_wal_segment_name(name, start.segment_bytes)[1] < first:
                continue
            if is_segment or (is_wal_file_name(name) and name.endswith(".history")):
                wanted.add(name)
                # One that goes away is not needed: recovery begins behind it.
                with suppress(FileNotFoundError):
                    self._copy(name, start if is_segment else None)
        for name in self._copied.keys() - wanted:
            self._drop(name)

    def sync(self) -> None:
        """Make the copy durable, but for its name. Raises OSError."""
        for name in sorted(self._copied):
            fd = os.open(self._target / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                durable.fsync_fd(fd, label="seal:wal:file")
            finally:
                os.close(fd)
        for directory, _, _ in os.walk(self._target):
            durable.fsync_dir(directory, label="seal:wal")

    def _copy(self, name: str, start: WalStart | None) -> None:
        fd = os.open(self._source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            before = self._copied.get(name)
            if before is not None and before.is_of(found):
                return
            began_ns = time.time_ns()
            ranges = [(0, found.st_size)]
            if start is not None:
                ranges = _find_valid(fd, name, start)
                if not ranges:
                    self._drop(name)
                    return
            n_bytes = sum(end - begin for begin, end in ranges)
            self._copied[name] = _Copied(found.st_ino, found.st_mtime_ns, began_ns, n_bytes)
            durable.on_step("seal:wal:copy")
            new = os.open(self._target / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                for begin, end in ranges:
                    copy_bytes(fd, new, begin, end)
                os.ftruncate(new, ranges[-1][1])
                os.ftruncate(new, found.st_size)
                _give(new, found)
            finally:
                os.close(new)
        finally:
            os.close(fd)

    def _drop(self, name: str) -> None:
        self._copied.pop(name, None)
        (self._target / name).unlink(missing_ok=True)

    def _make_directory(self, source: Path, target: Path) -> None:
        os.mkdir(target, 0o700)
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _give(fd, os.stat(source))
        finally:
            os.close(fd)


def _find_valid(fd: int, name: str, start: WalStart) -> list[tuple[int, int]]:
    """Return (begin, end) of what recovery needs of a segment: pages that were written for it.

    What follows them is zeros, or what a recycled segment held before. In the segment where
    recovery begins that is its first page, and the pages from there on: what lies between may be a
    hole already, if the segment is such a copy itself.
    """
    _, segno = parse_wal_segment_name(name, start.segment_bytes)
    page, offset = start.page_bytes, 0
    if segno == start.lsn // start.segment_bytes:
        offset = start.lsn % start.segment_bytes // page * page
    address = segno * start.segment_bytes

    def is_valid(at: int) -> bool:
        header = os.pread(fd, _PAGE_HEADER.size, at)
        if at >= start.segment_bytes or len(header) < _PAGE_HEADER.size:
            return False
        magic, _, _, page_address = _PAGE_HEADER.unpack(header)
        return bool(magic >> 8 & 0xFE == _MAGIC and page_address == address + at)

    if not is_valid(0):
        return []
    begin = end = max(page, offset)
    while is_valid(end):
        end += page
    return [(0, end)] if begin == page else [(0, page), (begin, end)]


def copy_bytes(source: int, target: int, begin: int, end: int) -> None:
    """Copy what lies at the offsets from ``begin`` up to ``end``."""
    at = begin
    while at < end:
        try:
            n = os.copy_file_range(source, target, end - at, at, at)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            n = 0
        if n == 0:
            break
        at += n
    # Where the kernel can't.
    while at < end and (data := os.pread(source, min(1 << 20, end - at), at)):
        at += os.pwrite(target, data, at)


def _give(fd: int, like: os.stat_result) -> None:
    """Give a new file or directory the owner and the mode of another one."""
    if os.geteuid() == 0:
        os.fchown(fd, like.st_uid, like.st_gid)
    os.fchmod(fd, like.st_mode & 0o777)
