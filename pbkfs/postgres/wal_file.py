"""One WAL file out of an archive directory: raw, compressed or partial, whole or not at all.

The archive is pg_probackup's ``wal/INSTANCE`` or any directory that an archive_command copies to.
This file is itself the program of restore_command, run once a segment: so it imports nothing of
ours and little else. ``pbkfs wal-get`` is the same for the command line.

Exit codes are the contract of restore_command: 0 is done, 1 is not there, and above 125 recovery
stops. A damaged segment or an archive that cannot be read is the latter: taken for the end of the
archive, it would end recovery early and silently.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

NAME_BYTES = 64
NOT_THERE = 1
STOP_RECOVERY = 255

_SEGMENT = re.compile(r"[0-9A-F]{24}")
_FILE = re.compile(
    r"[0-9A-F]{24}(\.partial)?|[0-9A-F]{8}\.history|[0-9A-F]{24}\.[0-9A-F]{8}\.backup"
)
_SUFFIXES = ("", ".gz", ".gz.partial", ".partial")
_FEEDER_LIMIT_S = 60.0
_COPY_BYTES = 1 << 20
_MIN_SEGMENT_BYTES = 1 << 20
_MAX_SEGMENT_BYTES = 1 << 30
# Source: src/include/access/xlog_internal.h, XLogLongPageHeaderData: xlp_seg_size after a short
# header of 24 bytes and the system identifier; XLP_LONG_HEADER in xlp_info.
_LONG_HEADER_FLAG = 0x0002
_SEGMENT_SIZE_AT = 32
_HEAD_BYTES = 40


class ArchiveError(Exception):
    """The archive or a file of it cannot be read, or the file is damaged."""


def check_archive(archive: str) -> None:
    """Raise ArchiveError unless ``archive`` is a directory that can be listed."""
    try:
        with os.scandir(archive) as entries:
            next(entries, None)
    except OSError as error:
        raise ArchiveError(f"{archive}: {error.strerror}") from error


def open_source(archive: str, name: str) -> tuple[int, str] | None:
    """Open what holds WAL file ``name``; returns (descriptor, path), or None if nothing does.

    Order of the look-up: S, S.gz, S.gz.partial, S.partial (as pg_probackup archive-get). Raises
    ArchiveError.
    """
    if not _FILE.fullmatch(name):
        return None
    check_archive(archive)
    for suffix in _SUFFIXES if _SEGMENT.fullmatch(name) else ("",):
        source = os.path.join(archive, name + suffix)
        try:
            return os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), source
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArchiveError(f"{source}: {error.strerror}") from error
    return None


def ask_feeder(feeder: str, name: str) -> tuple[int, str] | None:
    """Do as ``open_source`` does, through the socket of a process that may read the archive."""
    import socket

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_FEEDER_LIMIT_S)
            connection.connect(feeder)
            connection.send(os.fsencode(name)[:NAME_BYTES] or b" ")
            answer, fds, _, _ = socket.recv_fds(connection, 8192, 1)
    except OSError as error:
        raise ArchiveError(f"no WAL feeder answers on {feeder}: {error}") from error
    said = os.fsdecode(answer[1:])
    if answer[:1] == b"+" and fds:
        return fds[0], said
    if answer[:1] == b"-":
        return None
    raise ArchiveError(said or f"the WAL feeder on {feeder} ended")


def fetch(found: tuple[int, str] | None, name: str, destination: str) -> bool:
    """Copy WAL file ``name`` from an open descriptor to ``destination``, at once or not at all.

    False if nothing was found. A partial segment is filled up with zeros. Raises ArchiveError.
    """
    if found is None:
        return False
    fd, source = found
    _copy(fd, source, destination, is_segment=_SEGMENT.fullmatch(name) is not None)
    return True


def _copy(fd: int, source: str, destination: str, *, is_segment: bool) -> None:
    """Unpack ``source`` to a temporary name beside ``destination``, check it, and rename it."""
    temporary = f"{destination}.pbkfs"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    is_partial = is_segment and source.endswith(".partial")
    try:
        with os.fdopen(fd, "rb") as raw:
            target = os.open(temporary, flags, 0o600)
            try:
                if is_segment and source.endswith((".gz", ".gz.partial")):
                    head, n_bytes = _unpack(raw, target, source, is_partial=is_partial)
                else:
                    head, n_bytes = _pump(raw.read, target)
                if is_segment:
                    size = _segment_size(source, head)
                    if n_bytes > size or (n_bytes < size and not is_partial):
                        raise ArchiveError(f"{source} has {n_bytes} bytes, a segment has {size}")
                    os.ftruncate(target, size)
            finally:
                os.close(target)
        os.rename(temporary, destination)
    except OSError as error:
        raise ArchiveError(f"cannot fetch {source}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _unpack(raw: BinaryIO, target: int, source: str, *, is_partial: bool) -> tuple[bytes, int]:
    import gzip
    import zlib

    ends: list[str] = []
    with gzip.GzipFile(fileobj=raw) as stream:

        def read(n_bytes: int) -> bytes:
            # Not read: it gives nothing of a piece in which the stream breaks off.
            try:
                return stream.read1(n_bytes)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                ends.append(str(error))
                return b""

        copied = _pump(read, target)
    # The writer of a partial segment died in the middle: what came before is good.
    if ends and not is_partial:
        raise ArchiveError(f"{source} is damaged: {ends[0]}")
    return copied


def _pump(read: Callable[[int], bytes], target: int) -> tuple[bytes, int]:
    """Copy everything; returns the first bytes and the number of bytes."""
    head, n_bytes = b"", 0
    while chunk := read(_COPY_BYTES):
        head += chunk[: _HEAD_BYTES - len(head)]
        n_bytes += len(chunk)
        if n_bytes > _MAX_SEGMENT_BYTES:
            raise OSError(errno.EFBIG, "larger than the largest WAL segment")
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
    return head, n_bytes


def _segment_size(source: str, head: bytes) -> int:
    """Return the size that the first page of a segment says. Raises ArchiveError."""
    size = int.from_bytes(head[_SEGMENT_SIZE_AT : _SEGMENT_SIZE_AT + 4], sys.byteorder)
    info = int.from_bytes(head[2:4], sys.byteorder)
    is_possible = _MIN_SEGMENT_BYTES <= size <= _MAX_SEGMENT_BYTES and size & (size - 1) == 0
    if len(head) < _HEAD_BYTES or not info & _LONG_HEADER_FLAG or not is_possible:
        raise ArchiveError(f"{source} is not a WAL segment: its first page has no valid header")
    return size


def run(archive: str, name: str, destination: str, *, has_feeder: bool = False) -> int:
    """Fetch ``name`` from an archive, or from the feeder at ``archive``; return the exit code."""
    try:
        found = ask_feeder(archive, name) if has_feeder else open_source(archive, name)
        return 0 if fetch(found, name, destination) else NOT_THERE
    except ArchiveError as error:
        print(f"pbkfs: error: {error}", file=sys.stderr)
        return STOP_RECOVERY


def main(arguments: list[str]) -> int:
    """Serve ``--archive DIR NAME DEST`` or ``--feeder SOCKET NAME DEST``.

    ``--archive DIR --check`` says whether the archive can be read.
    """
    if len(arguments) == 3 and arguments[0] == "--archive" and arguments[2] == "--check":
        try:
            check_archive(arguments[1])
        except ArchiveError as error:
            print(f"pbkfs: error: {error}", file=sys.stderr)
            return STOP_RECOVERY
        return 0
    if len(arguments) == 4 and arguments[0] in ("--archive", "--feeder"):
        return run(*arguments[1:], has_feeder=arguments[0] == "--feeder")
    print("pbkfs: error: usage: --archive DIR | --feeder SOCKET, NAME DEST", file=sys.stderr)
    return STOP_RECOVERY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
