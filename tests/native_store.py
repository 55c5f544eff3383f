"""What the tests of the native half are made of: stored data files, a diff, and models of both.

Nothing in here reads through the native half: the models are what it is compared with.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import reference
from catalog_format import pglz_compress

from pbkfs import _native

BLCKSZ = 8192
NO_LIMIT = 0xFFFFFFFF
NONE, ZLIB, PGLZ = 0, 1, 2
SESSION = bytes(range(16))
NO_SESSION = bytes(16)
JOURNAL_HEADER = struct.pack("<8sII16s32x", b"PBKFSJNL", 1, 0, bytes(16))


def blocks_of(size: int) -> int:
    return -(-size // BLCKSZ)


@lru_cache(maxsize=4096)
def page(seed: int) -> bytes:
    """A page that is all zeros, one byte, incompressible, or a mixture, by the seed."""
    kind = seed % 4
    if kind == 0:
        return bytes(BLCKSZ)
    if kind == 1:
        return bytes([seed % 251]) * BLCKSZ
    if kind == 2:
        return random.Random(seed).randbytes(BLCKSZ)
    return (struct.pack("<Q", seed) * 512 + random.Random(seed).randbytes(512)).ljust(BLCKSZ, b"m")


@lru_cache(maxsize=4096)
def pack_page(content: bytes, compress: int) -> bytes:
    """The payload of a record; a page that does not get smaller stays as it is."""
    packed = content
    if compress == ZLIB:
        packed = zlib.compress(content, 1)
    elif compress == PGLZ:
        packed = pglz_compress(content)
    return packed if len(packed) < BLCKSZ else content


@dataclass
class Layer:
    """One backup's stored pages of a file."""

    pages: Mapping[int, bytes]
    compress: int = ZLIB
    limit: int = NO_LIMIT
    is_padded: bool = False
    has_headers: bool = True
    marker: int | None = None  # truncation marker; only without headers
    label: str = "SBOL94"
    positions: dict[int, int] = field(default_factory=dict)  # block -> of its record, once stored
    stored_size: int = 0

    def store(self, root: Path, name: str) -> tuple[Any, ...]:
        """Write it below ``root`` and return the source, but for the root's descriptor at [1]."""
        out = bytearray()
        entries = bytearray()
        for block, content in sorted(self.pages.items()):
            payload = pack_page(content, self.compress)
            self.positions[block] = len(out)
            entries += struct.pack("<QiiHxxxxxx", 0, block, len(out), 0)
            out += struct.pack("<Ii", block, len(payload)) + payload
            if self.is_padded:
                out += b"\xa5" * (-len(payload) % 8)
        if self.marker is not None:
            out += struct.pack("<Ii", self.marker, -2)
        entries += struct.pack("<QiiHxxxxxx", 0, 0, len(out), 0)
        self.stored_size = len(out)
        (root / name).write_bytes(out)
        headers = None
        if self.has_headers:
            # Not at the beginning, as other files' headers come first.
            packed = zlib.compress(entries, 1)
            (root / f"{name}.map").write_bytes(b"other" + packed + b"others")
            headers = (
                -1,
                f"{name}.map".encode(),
                5,
                len(packed),
                reference.crc32c(entries),
                len(self.pages),
            )
        return (
            "pages",
            -1,
            name.encode(),
            len(out),
            self.label,
            self.compress,
            self.limit,
            self.is_padded,
            False,
            headers,
        )


def bind(source: tuple[Any, ...], root_fd: int) -> tuple[Any, ...]:
    """Put the root's descriptor into a source."""
    bound = (source[0], root_fd, *source[2:])
    if source[0] == "pages" and source[9] is not None:
        bound = (*bound[:9], (root_fd, *source[9][1:]))
    return bound


def compose(layers: Sequence[Layer], size: int) -> bytes:
    """What the layers (newest first) make of a file, by the rule of the format's description."""
    found: dict[int, bytes] = {}
    limit = NO_LIMIT
    for layer in layers:
        limit = min(limit, layer.limit)
        for block, content in layer.pages.items():
            if block < limit:
                found.setdefault(block, content)
        if layer.marker is not None:
            limit = min(limit, layer.marker)
    return b"".join(found.get(b, bytes(BLCKSZ)) for b in range(blocks_of(size)))[:size]


def bits_of(blocks: Sequence[int] | set[int], n_words: int = 0) -> bytes:
    """A bitmap as little-endian 64-bit words."""
    value = sum(1 << block for block in set(blocks))
    words = max(n_words, -(-value.bit_length() // 64))
    return value.to_bytes(words * 8, "little")


def blocks_in(bitmap: bytes) -> set[int]:
    value = int.from_bytes(bitmap, "little")
    return {b for b in range(value.bit_length()) if value >> b & 1}


def pages_record(object_id: int, blocks: set[int], kind: int = 2) -> bytes:
    ranges = b"".join(struct.pack("<II", b, 1) for b in sorted(blocks))
    return struct.pack("<BQI", kind, object_id, len(blocks)) + ranges


class Place:
    """A directory with a store and a diff in it, and the native objects above them."""

    def __init__(self, **options: Any) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="pbkfs-native-"))
        (self.root / "store").mkdir()
        (self.root / "objects").mkdir()
        (self.root / "journal").write_bytes(JOURNAL_HEADER)
        self.root_fd = os.open(self.root / "store", os.O_RDONLY | os.O_DIRECTORY)
        self.objects_fd = os.open(self.root / "objects", os.O_RDONLY | os.O_DIRECTORY)
        self.journal_fd = os.open(self.root / "journal", os.O_RDWR)
        self.log_read, self.log_write = os.pipe()
        os.set_blocking(self.log_read, False)
        self.journal = _native.Journal(self.journal_fd, len(JOURNAL_HEADER))
        self.journal.append(b"\x01" + SESSION)
        self._options = options
        self.nodes = self._new_nodes()

    def _new_nodes(self) -> _native.Nodes:
        return _native.Nodes(self.journal, self.objects_fd, self.log_write, **self._options)

    def close(self) -> None:
        self.nodes.close()
        del self.nodes
        for fd in (
            self.root_fd,
            self.objects_fd,
            self.journal_fd,
            self.log_read,
            self.log_write,
        ):
            os.close(fd)
        shutil.rmtree(self.root)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def store(self, layers: Sequence[Layer], name: str = "1259") -> list[Any]:
        """Store the layers; returns the sources."""
        return [
            bind(layer.store(self.root / "store", f"{name}-{i}"), self.root_fd)
            for i, layer in enumerate(layers)
        ]

    def store_raw(self, content: bytes, name: str = "plain") -> list[Any]:
        (self.root / "store" / name).write_bytes(content)
        return [("raw", self.root_fd, name.encode(), len(content), "base")]

    def object_path(self, object_id: int) -> Path:
        return self.root / "objects" / f"{object_id & 255:02x}" / f"{object_id:x}"

    def make_object(self, object_id: int, content: bytes | int) -> None:
        """An object with this content, or an empty one of this size."""
        path = self.object_path(object_id)
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            if isinstance(content, int):
                file.truncate(content)
            else:
                file.write(content)

    def attach(self, ino: int, object_id: int, size: int, **changes: Any) -> None:
        """Copy up: make the object and attach it."""
        self.make_object(object_id, size)
        arguments: dict[str, Any] = {
            "bitmap": None,
            "limit": NO_LIMIT,
            "mapped": True,
            "fresh": True,
        }
        self.nodes.attach(ino, object_id, **(arguments | changes))

    def scan(self, session: bytes = NO_SESSION) -> dict[int, tuple[bytes, int, bool, bytes]]:
        return _native.scan_journal(self.journal_fd, session)[2]

    def lines(self) -> list[str]:
        """The failure lines since the last call."""
        try:
            return os.read(self.log_read, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []
