"""The journal's payloads: records of names and attributes, and the page records of a compaction.

Owns the encoding of everything that Python writes into a journal (ARCHITECTURE.md, "journal");
framing and appending belong to ``pbkfs._native.Journal``, which also writes page records while a
mount runs. Pure functions, called by ``tree`` (encode), ``replay`` (decode) and ``diff``
(compaction); any thread may.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pbkfs import _native
from pbkfs.errors import FormatError

MAGIC = b"PBKFSJNL"
VERSION = 1
HEADER_BYTES = 64
BLOCK_BYTES = 8192
NO_LIMIT = 0xFFFFFFFF
PAYLOAD_MAX = 16 << 20

# Name records have types from here on; below are SESSION and the page records.
FIRST_NAME_TYPE = 16

NAME_MAX = 255
PATH_MAX = 0xFFFF
# Source: symlink(2) and PATH_MAX of linux/limits.h, which counts the final NUL.
TARGET_MAX = 4095

_HEADER = struct.Struct("<8sII16s32x")
_FRAME = struct.Struct("<II")
_LENGTH = struct.Struct("<H")
_MKDIR = struct.Struct("<IIIq")
_OBJECT = struct.Struct("<Q")
_COPY_UP = struct.Struct("<QB")
_SYMLINK = struct.Struct("<IIq")
_FLAGS = struct.Struct("<I")
_ATTR = struct.Struct("<IIIIqq")
_PAGES = struct.Struct("<BQI")
_RUN = struct.Struct("<II")
_LIMIT = struct.Struct("<BQI")
_WHOLE = struct.Struct("<BQ")
_SYNCED = struct.Struct("<QQ")

_SESSION_TYPE, _PAGES_TYPE, _LIMIT_TYPE, _WHOLE_TYPE, _HYDRATED_TYPE = 1, 2, 4, 5, 6

# Length word and type of the records that are written behind a durable journal only. They are of
# one length.
_MARK_PAYLOAD_BYTES = 17
_MARK_HEADS = tuple(struct.pack("<IB", _MARK_PAYLOAD_BYTES, kind) for kind in (_SESSION_TYPE, 25))
_MARK_BYTES = _FRAME.size + _MARK_PAYLOAD_BYTES

# A PAGES frame of a compaction stays far below the 16 MiB a frame may have.
_RUNS_PER_FRAME = 65536

ATTR_MODE, ATTR_UID, ATTR_GID, ATTR_ATIME, ATTR_MTIME = 1, 2, 4, 8, 16
RENAME_EXCHANGE = 2


def _put_path(path: bytes) -> bytes:
    if len(path) > PATH_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return _LENGTH.pack(len(path)) + path


def _take(payload: bytes, offset: int) -> tuple[bytes, int]:
    (length,) = _LENGTH.unpack_from(payload, offset)
    end = offset + 2 + length
    if end > len(payload):
        raise ValueError("a path runs over the end of the record")
    return payload[offset + 2 : end], end


def _take_path(payload: bytes, offset: int) -> tuple[bytes, int]:
    path, end = _take(payload, offset)
    if path:
        if b"\0" in path:
            raise ValueError("NUL in a path")
        for name in path.split(b"/"):
            if name in (b"", b".", b"..") or len(name) > NAME_MAX:
                raise ValueError(f"bad name {name!r} in path {path!r}")
    return path, end


def _expect_end(payload: bytes, offset: int) -> None:
    if offset != len(payload):
        raise ValueError(f"{len(payload) - offset} bytes too many")


@dataclass(slots=True)
class Mkdir:
    """A new directory."""

    type_code: ClassVar[int] = 16
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    path: bytes

    def encode(self) -> bytes:
        head = _MKDIR.pack(self.mode, self.uid, self.gid, self.mtime_ns)
        return b"\x10" + head + _put_path(self.path)

    @classmethod
    def decode(cls, payload: bytes) -> Mkdir:
        path, end = _take_path(payload, 1 + _MKDIR.size)
        _expect_end(payload, end)
        mode, uid, gid, mtime_ns = _MKDIR.unpack_from(payload, 1)
        return cls(mode, uid, gid, mtime_ns, path)


@dataclass(slots=True)
class Create:
    """A new regular file; its attributes are those of its object."""

    type_code: ClassVar[int] = 17
    object_id: int
    path: bytes

    def encode(self) -> bytes:
        return b"\x11" + _OBJECT.pack(self.object_id) + _put_path(self.path)

    @classmethod
    def decode(cls, payload: bytes) -> Create:
        path, end = _take_path(payload, 1 + _OBJECT.size)
        _expect_end(payload, end)
        (object_id,) = _OBJECT.unpack_from(payload, 1)
        return cls(object_id, path)


@dataclass(slots=True)
class CopyUp:
    """A file of a lower layer got an object of its own."""

    type_code: ClassVar[int] = 18
    object_id: int
    is_mapped: bool
    path: bytes

    def encode(self) -> bytes:
        return b"\x12" + _COPY_UP.pack(self.object_id, self.is_mapped) + _put_path(self.path)

    @classmethod
    def decode(cls, payload: bytes) -> CopyUp:
        object_id, mapped = _COPY_UP.unpack_from(payload, 1)
        if mapped > 1:
            raise ValueError(f"copy-up of unknown kind {mapped}")
        path, end = _take_path(payload, 1 + _COPY_UP.size)
        _expect_end(payload, end)
        return cls(object_id, bool(mapped), path)


@dataclass(slots=True)
class Symlink:
    """A new symbolic link. The target is encoded like a path, but may be any bytes."""

    type_code: ClassVar[int] = 19
    uid: int
    gid: int
    mtime_ns: int
    path: bytes
    target: bytes

    def encode(self) -> bytes:
        head = _SYMLINK.pack(self.uid, self.gid, self.mtime_ns)
        return b"\x13" + head + _put_path(self.path) + _put_path(self.target)

    @classmethod
    def decode(cls, payload: bytes) -> Symlink:
        path, end = _take_path(payload, 1 + _SYMLINK.size)
        target, end = _take(payload, end)
        _expect_end(payload, end)
        uid, gid, mtime_ns = _SYMLINK.unpack_from(payload, 1)
        return cls(uid, gid, mtime_ns, path, target)


@dataclass(slots=True)
class Remove:
    """A name is gone: unlink or rmdir."""

    type_code: ClassVar[int] = 20
    path: bytes

    def encode(self) -> bytes:
        return b"\x14" + _put_path(self.path)

    @classmethod
    def decode(cls, payload: bytes) -> Remove:
        path, end = _take_path(payload, 1)
        _expect_end(payload, end)
        return cls(path)


@dataclass(slots=True)
class Rename:
    """One name takes the place of another, or (RENAME_EXCHANGE) the two change places."""

    type_code: ClassVar[int] = 21
    flags: int
    old: bytes
    new: bytes

    def encode(self) -> bytes:
        return b"\x15" + _FLAGS.pack(self.flags) + _put_path(self.old) + _put_path(self.new)

    @classmethod
    def decode(cls, payload: bytes) -> Rename:
        (flags,) = _FLAGS.unpack_from(payload, 1)
        if flags & ~RENAME_EXCHANGE:
            raise ValueError(f"rename with unknown flags {flags:#x}")
        old, end = _take_path(payload, 1 + _FLAGS.size)
        new, end = _take_path(payload, end)
        _expect_end(payload, end)
        return cls(flags, old, new)


@dataclass(slots=True)
class Link:
    """One more name for a file."""

    type_code: ClassVar[int] = 22
    existing: bytes
    new: bytes

    def encode(self) -> bytes:
        return b"\x16" + _put_path(self.existing) + _put_path(self.new)

    @classmethod
    def decode(cls, payload: bytes) -> Link:
        existing, end = _take_path(payload, 1)
        new, end = _take_path(payload, end)
        _expect_end(payload, end)
        return cls(existing, new)


@dataclass(slots=True)
class SetAttr:
    """Attributes of what has no object; ``mask`` says which of the values count."""

    type_code: ClassVar[int] = 23
    mask: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    path: bytes

    def encode(self) -> bytes:
        head = _ATTR.pack(self.mask, self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns)
        return b"\x17" + head + _put_path(self.path)

    @classmethod
    def decode(cls, payload: bytes) -> SetAttr:
        path, end = _take_path(payload, 1 + _ATTR.size)
        _expect_end(payload, end)
        mask, mode, uid, gid, atime_ns, mtime_ns = _ATTR.unpack_from(payload, 1)
        return cls(mask, mode, uid, gid, atime_ns, mtime_ns, path)


@dataclass(slots=True)
class WalOut:
    """The root's pg_wal is a symbolic link to DIFF/pg_wal, whatever it was before."""

    type_code: ClassVar[int] = 24

    def encode(self) -> bytes:
        return b"\x18"

    @classmethod
    def decode(cls, payload: bytes) -> WalOut:
        _expect_end(payload, 1)
        return cls()


@dataclass(slots=True)
class Synced:
    """The journal was durable up to byte ``end``, and all objects below ``next_id`` were there."""

    type_code: ClassVar[int] = 25
    end: int
    next_id: int

    def encode(self) -> bytes:
        return b"\x19" + _SYNCED.pack(self.end, self.next_id)

    @classmethod
    def decode(cls, payload: bytes) -> Synced:
        _expect_end(payload, 1 + _SYNCED.size)
        return cls(*_SYNCED.unpack_from(payload, 1))


Record = Mkdir | Create | CopyUp | Symlink | Remove | Rename | Link | SetAttr | WalOut | Synced

_DECODERS: dict[int, Callable[[bytes], Record]] = {
    16: Mkdir.decode,
    17: Create.decode,
    18: CopyUp.decode,
    19: Symlink.decode,
    20: Remove.decode,
    21: Rename.decode,
    22: Link.decode,
    23: SetAttr.decode,
    24: WalOut.decode,
    25: Synced.decode,
}


def decode(payload: bytes) -> Record:
    """Return the name record in ``payload``. Raises FormatError."""
    try:
        decoder = _DECODERS[payload[0]]
    except (IndexError, KeyError):
        kind = payload[0] if payload else None
        raise FormatError(f"journal record of unknown type {kind}") from None
    try:
        return decoder(payload)
    except (struct.error, ValueError) as error:
        raise FormatError(f"malformed journal record of type {payload[0]}: {error}") from None


# --- header, frames, page records ----------------------------------------------------------------


def encode_header(uuid_bytes: bytes) -> bytes:
    """Return the first 64 bytes of the journal of the diff with this uuid."""
    return _HEADER.pack(MAGIC, VERSION, 0, uuid_bytes)


def check_header(header: bytes, uuid_bytes: bytes) -> None:
    """Raise FormatError unless ``header`` begins a journal of the diff with this uuid."""
    if len(header) < HEADER_BYTES:
        raise FormatError(f"journal has only {len(header)} bytes")
    magic, version, _, owner = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise FormatError(f"journal begins with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise FormatError(f"journal has version {version}, this program reads {VERSION}")
    if owner != uuid_bytes:
        raise FormatError("journal belongs to another diff")


def encode_frame(payload: bytes) -> bytes:
    """Return ``payload`` as a frame; used where a whole journal is written anew."""
    length = struct.pack("<I", len(payload))
    return _FRAME.pack(_native.crc32c(length + payload), len(payload)) + payload


def find_frames(data: bytes) -> Iterator[bytes]:
    """Yield the payloads of the frames at the start of ``data``, up to one that does not check."""
    at = 0
    while at + _FRAME.size <= len(data):
        crc, length = _FRAME.unpack_from(data, at)
        end = at + _FRAME.size + length
        if not 0 < length <= PAYLOAD_MAX or end > len(data):
            return
        if _native.crc32c(memoryview(data)[at + 4 : end]) != crc:
            return
        yield data[at + _FRAME.size : end]
        at = end


def is_damaged(tail: bytes, start: int) -> bool:
    """Return whether ``tail``, which begins at byte ``start`` with a bad frame, was durable once.

    A SESSION record is written only behind a journal that is durable up to there, and a SYNCED one
    says up to where. If ``tail`` has one that speaks of its own begin, it was damaged later; else
    it is the torn end of what was never synced.
    """
    for head in _MARK_HEADS:
        at = tail.find(head)
        while at >= 0:
            frame = tail[at - 4 : at - 4 + _MARK_BYTES] if at >= 4 else b""
            payload = next(find_frames(frame), None)
            if payload is not None and (
                payload[0] == _SESSION_TYPE or Synced.decode(payload).end > start
            ):
                return True
            at = tail.find(head, at + 1)
    return False


def encode_session(session: bytes) -> bytes:
    """Return the record that what follows is of this session: 16 bytes that name it."""
    return bytes([_SESSION_TYPE]) + session


def encode_end(end: int, next_id: int, session: bytes) -> list[bytes]:
    """Return what a journal of ``end`` bytes ends with when its session ends well."""
    return [Synced(end, next_id).encode(), encode_session(session)]


END_BYTES = 2 * _MARK_BYTES


def is_end(last: bytes, start: int) -> bool:
    """Return whether the last END_BYTES of a journal, from byte ``start`` on, are that."""
    payloads = list(find_frames(last))
    return (
        len(last) == END_BYTES
        and len(payloads) == 2
        and payloads[0][0] == Synced.type_code
        and Synced.decode(payloads[0]).end == start
        and payloads[1][0] == _SESSION_TYPE
    )


def encode_pages(object_id: int, bitmap: bytes) -> Iterator[bytes]:
    """Yield PAGES records for all bits of ``bitmap``; their pages have to be durable already."""
    return _encode_ranges(_PAGES_TYPE, object_id, bitmap)


def encode_hydrated(object_id: int, bitmap: bytes) -> Iterator[bytes]:
    """Yield HYDRATED records for all bits of ``bitmap``; the same."""
    return _encode_ranges(_HYDRATED_TYPE, object_id, bitmap)


def _encode_ranges(kind: int, object_id: int, bitmap: bytes) -> Iterator[bytes]:
    runs = list(find_runs(bitmap))
    for i in range(0, len(runs), _RUNS_PER_FRAME):
        part = runs[i : i + _RUNS_PER_FRAME]
        head = _PAGES.pack(kind, object_id, len(part))
        yield head + b"".join(_RUN.pack(first, count) for first, count in part)


def encode_limit(object_id: int, limit: int) -> bytes:
    """Return the record that no block at or above ``limit`` comes from below the object."""
    return _LIMIT.pack(_LIMIT_TYPE, object_id, limit)


def encode_whole(object_id: int) -> bytes:
    """Return the record that every block of the object is valid and durable."""
    return _WHOLE.pack(_WHOLE_TYPE, object_id)


def encode_map(
    object_id: int, changed: bytes, limit: int, is_whole: bool, hydrated: bytes
) -> Iterator[bytes]:
    """Yield the records of all that is known of the blocks of a mapped object; all durable."""
    if is_whole:
        yield encode_whole(object_id)
    yield from encode_pages(object_id, changed)
    yield from encode_hydrated(object_id, hydrated)
    if limit != NO_LIMIT:
        yield encode_limit(object_id, limit)


def find_runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first block, count) for the runs of set bits, lowest bit of the first byte first."""
    first = -1
    for index, byte in enumerate(bitmap):
        if byte == 0 and first < 0:
            continue
        if byte == 0xFF and first >= 0:
            continue
        for bit in range(8):
            if byte >> bit & 1:
                if first < 0:
                    first = index * 8 + bit
            elif first >= 0:
                yield first, index * 8 + bit - first
                first = -1
    if first >= 0:
        yield first, len(bitmap) * 8 - first


def drop_pairs(payloads: Sequence[bytes]) -> list[bytes]:
    """Return the name records without files that came and went: CREATE P … REMOVE P.

    A pair goes if nothing between the two names P and nothing there could have moved it: then no
    other record depends on the file, and the replay ends in the same tree. A rename of anything
    but a file known to be one may move whatever lies below it, so it ends all open pairs.
    """
    keep: list[bytes | None] = list(payloads)
    created_at: dict[bytes, int] = {}
    for index, payload in enumerate(payloads):
        record = decode(payload)
        match record:
            case Create():
                created_at[record.path] = index
            case Remove():
                begin = created_at.pop(record.path, None)
                if begin is not None:
                    keep[begin] = keep[index] = None
            case Rename():
                source = created_at.pop(record.old, None)
                target = created_at.pop(record.new, None)
                if source is None or (record.flags & RENAME_EXCHANGE and target is None):
                    created_at.clear()
            case Link():
                created_at.pop(record.existing, None)
            case WalOut():
                created_at.clear()
            case Mkdir() | CopyUp() | Symlink() | SetAttr():
                created_at.pop(record.path, None)
            case Synced():
                pass
    return [payload for payload in keep if payload is not None]


def count_frame_bytes(payloads: Iterable[bytes]) -> int:
    """Return how many bytes of a journal these payloads take."""
    return sum(len(payload) + _FRAME.size for payload in payloads)
