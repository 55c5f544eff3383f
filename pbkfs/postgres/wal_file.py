"""One WAL file out of an archive directory: raw, compressed or partial, whole or not at all.

The archive is pg_probackup's ``wal/INSTANCE`` or any directory that an archive_command copies to.
Runs once a segment in a process of its own, so it imports only the standard library and that late.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_FILE = re.compile(
    r"[0-9A-F]{24}(\.partial)?|[0-9A-F]{8}\.history|[0-9A-F]{24}\.[0-9A-F]{8}\.backup"
)
_COPY_BYTES = 1 << 20
_MIN_SEGMENT_BYTES = 1 << 20
_MAX_SEGMENT_BYTES = 1 << 30
# Source: src/include/access/xlog_internal.h, XLogLongPageHeaderData: xlp_seg_size after a short
# header of 24 bytes and the system identifier; XLP_LONG_HEADER in xlp_info.
_LONG_HEADER_FLAG = 0x0002
_SEGMENT_SIZE_AT = 32


class ArchiveError(Exception):
    """The archive or a file of it cannot be read, or the file is damaged."""


def check_archive(archive: str) -> None:
    """Raise ArchiveError unless ``archive`` is a directory that can be listed."""
    try:
        with os.scandir(archive) as entries:
            next(entries, None)
    except OSError as error:
        raise ArchiveError(f"{archive}: {error.strerror}") from error


def fetch(archive: str, name: str, destination: str) -> bool:
    """Copy WAL file ``name`` to ``destination``, at once or not at all; False if it is not there.

    Order of the look-up: S, S.gz, S.gz.partial, S.partial (as pg_probackup archive-get). A partial
    segment is filled up with zeros. Raises ArchiveError.
    """
    if not _FILE.fullmatch(name):
        return False
    check_archive(archive)
    suffixes = [""]
    if _SEGMENT.match(name):
        suffixes.append(".gz")
    if _SEGMENT.fullmatch(name):
        suffixes += [".gz.partial", ".partial"]
    for suffix in suffixes:
        source = os.path.join(archive, name + suffix)
        try:
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArchiveError(f"{source}: {error.strerror}") from error
        is_segment = _SEGMENT.fullmatch(name) is not None
        is_partial = ".partial" in suffix
        _copy(fd, source, destination, ".gz" in suffix, is_segment, is_partial)
        return True
    return False


def _copy(
    fd: int, source: str, destination: str, is_compressed: bool, is_segment: bool, is_partial: bool
) -> None:
    temporary = f"{destination}.pbkfs"
    try:
        with os.fdopen(fd, "rb") as raw:
            target = os.open(
                temporary,
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
            )
            try:
                if is_compressed:
                    import gzip

                    with gzip.GzipFile(fileobj=raw) as stream:
                        head, n_bytes = _pump(stream.read, target)
                else:
                    head, n_bytes = _pump(raw.read, target)
                if is_segment:
                    _check_segment(target, source, head, n_bytes, is_partial)
            finally:
                os.close(target)
        os.rename(temporary, destination)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, (OSError, EOFError)) or type(error).__name__ == "error":
            # zlib.error: not imported for its name alone.
            said = getattr(error, "strerror", None) or error
            raise ArchiveError(f"cannot fetch {source}: {said}") from error
        raise


def _pump(read: Callable[[int], bytes], target: int) -> tuple[bytes, int]:
    """Copy everything; returns the first bytes and the number of bytes."""
    head, n_bytes = b"", 0
    while chunk := read(_COPY_BYTES):
        if n_bytes == 0:
            head = chunk[:40]
        n_bytes += len(chunk)
        if n_bytes > _MAX_SEGMENT_BYTES:
            raise OSError(0, "larger than the largest WAL segment")
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
    return head, n_bytes


def _check_segment(target: int, source: str, head: bytes, n_bytes: int, is_partial: bool) -> None:
    """Bring a segment to its full size, which its own first page says. Raises ArchiveError."""
    size = int.from_bytes(head[_SEGMENT_SIZE_AT : _SEGMENT_SIZE_AT + 4], sys.byteorder)
    info = int.from_bytes(head[2:4], sys.byteorder)
    is_sane = (
        len(head) == 40
        and info & _LONG_HEADER_FLAG
        and _MIN_SEGMENT_BYTES <= size <= _MAX_SEGMENT_BYTES
        and size & (size - 1) == 0
    )
    if not is_sane:
        raise ArchiveError(f"{source} is not a WAL segment: its first page has no valid header")
    if n_bytes > size or (n_bytes < size and not is_partial):
        raise ArchiveError(f"{source} has {n_bytes} bytes, and a segment has {size}")
    os.ftruncate(target, size)
