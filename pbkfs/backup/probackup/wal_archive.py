"""The WAL archive of an instance: ``STORE/wal/INSTANCE``, raw, gzipped or partial segments.

Called by ``probackup.base`` to seed pg_wal of an ARCHIVE backup, and by ``cli`` for the server's
restore_command. Opens files of the archive read-only and follows no link in it; a reader may be
used by one thread.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pbkfs.backup.base import WalSeed
from pbkfs.errors import FormatError, HostError, NotFoundError
from pbkfs.pgdata import (
    is_wal_file_name,
    is_wal_segment_name,
    is_wal_segment_size,
    parse_timeline_history,
    timeline_history_name,
    wal_segment_name,
)

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# pg_probackup.conf of very old releases does not name it.
DEFAULT_SEGMENT_SIZE = 16 << 20
# History files have one line a timeline; the limit keeps a hostile archive from filling the memory.
HISTORY_LIMIT = 1 << 20

# What may hold a wanted segment, in this order. Temporary *.part files never do.
_SEGMENT_SUFFIXES = ("", ".gz", ".gz.partial", ".partial")


class _Segment(io.RawIOBase):
    """The bytes of one segment, exactly ``size``: unpacked, and padded if it is a partial one."""

    def __init__(
        self, stored: io.BufferedReader, path: Path, size: int, *, is_partial: bool, is_packed: bool
    ) -> None:
        super().__init__()
        # A GzipFile does not close the file that it was given.
        self._stored = stored
        self._file: gzip.GzipFile | io.BufferedReader = stored
        if is_packed:
            self._file = gzip.GzipFile(fileobj=stored, mode="rb")
        self._origin = path
        self._left = size
        self._size = size
        self._is_partial = is_partial

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._stored.close()
        super().close()

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        if not view:
            return 0
        try:
            # One byte more than the segment has tells a file that is too long. read1, because an
            # error would throw away what read had gathered before it.
            data = self._file.read1(max(1, min(len(view), self._left)))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if self._is_partial:
                # Its writer died in the middle of a gzip member: what came before is good.
                data = b""
            else:
                raise FormatError(f"{self._origin} is damaged: {error}") from error
        if not data:
            if self._left and not self._is_partial:
                raise FormatError(
                    f"{self._origin} has only {self._size - self._left} of {self._size} bytes"
                )
            n_zeros = min(len(view), self._left)
            view[:n_zeros] = bytes(n_zeros)
            self._left -= n_zeros
            return n_zeros
        if not self._left:
            raise FormatError(f"{self._origin} is longer than a segment of {self._size} bytes")
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)


class WalArchive:
    """Files of one instance's WAL archive by name."""

    def __init__(self, path: Path, segment_size: int) -> None:
        """``segment_size`` in bytes. Raises FormatError for an impossible one."""
        if not is_wal_segment_size(segment_size):
            raise FormatError(f"{segment_size} is not a WAL segment size")
        self.path = path
        self.segment_size = segment_size

    def fetch(self, name: str) -> WalSeed:
        """Find a segment, timeline history or backup history file.

        Raises NotFoundError when the archive does not have it; the server takes that as the end.
        """
        if not is_wal_file_name(name):
            raise NotFoundError(f"{name!r} is not the name of a WAL file")
        if not is_wal_segment_name(name):
            path = self.path / name
            status = self._stat(path)
            if status is None:
                raise self._missing(name)
            size = status.st_size
            return WalSeed(name.encode(), lambda: _open_file(path), size)
        for suffix in _SEGMENT_SUFFIXES:
            path = self.path / (name + suffix)
            if self._stat(path) is not None:
                return WalSeed(name.encode(), self._opener(path), self.segment_size)
        raise self._missing(name)

    def _missing(self, name: str) -> NotFoundError:
        if not self.path.is_dir():
            return NotFoundError(f"the WAL archive {self.path} does not exist")
        return NotFoundError(f"the WAL archive {self.path} has no {name}")

    def _stat(self, path: Path) -> os.stat_result | None:
        try:
            status = os.stat(path, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}") from error
        # A link or a directory of that name is not a file of the archive.
        return status if (status.st_mode & 0o170000) == 0o100000 else None

    def _opener(self, path: Path) -> Callable[[], BinaryIO]:
        is_partial = path.name.endswith(".partial")
        is_packed = ".gz" in path.name

        def open_segment() -> BinaryIO:
            return io.BufferedReader(
                _Segment(
                    _open_file(path),
                    path,
                    self.segment_size,
                    is_partial=is_partial,
                    is_packed=is_packed,
                ),
                1 << 20,
            )

        return open_segment

    def history(self, tli: int) -> list[tuple[int, int]]:
        """Ancestors of a timeline: [(timeline, LSN where it was left)], oldest first.

        Empty when there is no history file. Raises FormatError for a damaged one.
        """
        try:
            seed = self.fetch(timeline_history_name(tli))
        except NotFoundError:
            return []
        with seed.open() as file:
            data = file.read(HISTORY_LIMIT)
        try:
            return parse_timeline_history(data.decode("utf-8", "replace"))
        except ValueError as error:
            raise FormatError(f"{self.path / seed.name.decode()}: {error}") from error

    def range(self, tli: int, start_lsn: int, stop_lsn: int) -> Iterator[WalSeed]:
        """Everything that recovery from ``start_lsn`` to ``stop_lsn`` on ``tli`` reads, in order.

        A segment that the timeline does not have is looked for on the ancestors that it came from,
        as the server does. Raises NotFoundError naming the first missing one.
        """
        history = self.history(tli) if tli > 1 else []
        if tli > 1:
            for number in [*(ancestor for ancestor, _ in history if ancestor > 1), tli]:
                try:
                    yield self.fetch(timeline_history_name(number))
                except NotFoundError:
                    continue
        first = start_lsn // self.segment_size
        # A backup that stops at a boundary stops at the end of the segment before it.
        last = max(first, (stop_lsn - 1) // self.segment_size)
        for segno in range(first, last + 1):
            yield self._find_segment(tli, segno, history)

    def _find_segment(self, tli: int, segno: int, history: list[tuple[int, int]]) -> WalSeed:
        wanted = wal_segment_name(tli, segno, self.segment_size)
        candidates = [wanted]
        for ancestor, left_at in reversed(history):
            if segno * self.segment_size < left_at:
                candidates.append(wal_segment_name(ancestor, segno, self.segment_size))
        for name in candidates:
            try:
                return self.fetch(name)
            except NotFoundError:
                continue
        raise NotFoundError(
            f"the WAL archive {self.path} has no {wanted}, which the backup needs",
            hint="Without it PostgreSQL cannot recover this backup; take another one.",
        )


def _open_file(path: Path) -> io.BufferedReader:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist any more") from error
    except OSError as error:
        raise HostError(f"cannot open {path}: {error.strerror}") from error
    return os.fdopen(fd, "rb")


def parse_segment_size(settings: dict[str, str]) -> int | None:
    """``xlog-seg-size`` of a pg_probackup.conf in bytes; None when absent or not understood.

    Values may carry a unit in what some versions print.
    """
    text = settings.get("xlog-seg-size", "")
    units = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = units.get(text[len(digits) :].strip().lower())
    if unit is None or not digits.isascii() or not digits.isdigit() or len(digits) > 12:
        return None
    size = int(digits) * unit
    return size if is_wal_segment_size(size) else None


def open_archive(store: Path, instance: str) -> WalArchive:
    """Open an instance's archive, with the segment size of its pg_probackup.conf.

    Raises NotFoundError when store or instance do not exist.
    """
    from pbkfs.backup.probackup.catalog import Instance

    opened = Instance(store, instance)
    size = parse_segment_size(opened.settings()) or DEFAULT_SEGMENT_SIZE
    return WalArchive(opened.archive_path, size)
