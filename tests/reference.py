"""A plain, slow composer of pg_probackup backups: the oracle of the fast ones.

Written from the description of the format only, and sharing no code with the package: it reads
every record of every layer from its own 8-byte header (never a header map), keeps whole files in
memory and inflates pglz in Python. Used by the tests of bases (paths, sizes, sources) and of the
native index (bytes).
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

BLCKSZ = 8192
NO_LIMIT = 0xFFFFFFFF
HEADER = struct.Struct("<Ii")
TRUNCATED = -2


class Damage(Exception):  # noqa: N818 - not an error of the tests
    """Bytes of a backup are not what the format says."""


# --- routines that the extension has too --------------------------------------------------------


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_CRC32C = _crc32c_table()


def crc32c(data: bytes | memoryview, crc: int = 0) -> int:
    """CRC-32C, one byte at a time."""
    crc ^= 0xFFFFFFFF
    for byte in bytes(data):
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def pglz_decompress(data: bytes, raw_size: int) -> bytes:
    """PostgreSQL's LZ77 variant without a length header. Raises Damage."""
    out = bytearray()
    position, end = 0, len(data)
    while position < end and len(out) < raw_size:
        control = data[position]
        position += 1
        for bit in range(8):
            if position >= end or len(out) >= raw_size:
                break
            if not control >> bit & 1:
                out.append(data[position])
                position += 1
                continue
            if position + 2 > end:
                raise Damage("a match ends after the input")
            length = (data[position] & 0x0F) + 3
            offset = (data[position] & 0xF0) << 4 | data[position + 1]
            position += 2
            if length == 18:
                if position >= end:
                    raise Damage("a match ends after the input")
                length += data[position]
                position += 1
            if offset == 0 or offset > len(out):
                raise Damage("a match begins before the output")
            length = min(length, raw_size - len(out))
            start = len(out) - offset
            if offset >= length:
                out += out[start : start + length]
            else:
                pattern = bytes(out[start:])
                out += (pattern * (length // offset + 1))[:length]
    if len(out) != raw_size or position != end:
        raise Damage(f"{len(out)} bytes came out of {position} of {end}")
    return bytes(out)


@lru_cache(maxsize=16384)
def unpack_page(payload: bytes, compress: int, *, old_zlib_8192: bool = False) -> bytes:
    """One page of its payload; ``compress`` is 0 none, 1 zlib, 2 pglz. Raises Damage."""
    if len(payload) == BLCKSZ:
        if not (old_zlib_8192 and compress == 1 and payload[0] == 0x78 and not _is_sane(payload)):
            return payload
    elif compress == 0:
        raise Damage(f"an uncompressed page of {len(payload)} bytes")
    if compress == 2:
        return pglz_decompress(payload, BLCKSZ)
    inflater = zlib.decompressobj()
    try:
        page = inflater.decompress(payload, BLCKSZ + 1)
    except zlib.error as error:
        raise Damage(str(error)) from error
    if len(page) != BLCKSZ or not inflater.eof or inflater.unused_data:
        raise Damage(f"a page inflates to {len(page)} bytes")
    return page


def _is_sane(page: bytes) -> bool:
    flags, lower, upper, special, size_version = struct.unpack_from("<5H", page, 10)
    return (
        size_version & 0xFF00 == BLCKSZ and flags < 8 and 24 <= lower <= upper <= special <= BLCKSZ
    )


def records(data: bytes, *, is_padded: bool) -> Iterator[tuple[int, int, bytes]]:
    """Every record of a stored data file: (block, compressed size, payload). Raises Damage."""
    position = 0
    last = -1
    while position < len(data):
        if position + HEADER.size > len(data):
            raise Damage("the file ends inside of a header")
        block, size = HEADER.unpack_from(data, position)
        position += HEADER.size
        if size == TRUNCATED:
            yield block, size, b""
            return
        if not 0 < size <= BLCKSZ or block <= last:
            raise Damage(f"record of block {block} with size {size} after block {last}")
        if position + size > len(data):
            raise Damage("the file ends inside of a page")
        yield block, size, data[position : position + size]
        last = block
        position += (size + 7) & ~7 if is_padded else size


def _read_beneath(root_fd: int, path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root_fd)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def scan_pages(
    root_fd: int, path: bytes, stored_size: int, padded: bool
) -> tuple[int, int, int | None]:
    """(pages stored, highest block + 1, truncation marker); OSError for a malformed file."""
    n_pages, end, marker = 0, 0, None
    try:
        data = _read_beneath(root_fd, path)
        if len(data) < stored_size:
            raise Damage("the file is shorter than listed")
        for block, size, _ in records(data[:stored_size], is_padded=padded):
            if size == TRUNCATED:
                marker = block
            else:
                n_pages, end = n_pages + 1, block + 1
    except Damage as error:
        raise OSError(5, str(error)) from error
    return n_pages, end, marker


# --- what a base says about one file, read without the native half --------------------------------


def read_sources(sources: Sequence[Any], size: int) -> bytes:
    """Content of a file from the sources of a base (newest first). Raises Damage, OSError."""
    pages: dict[int, bytes] = {}
    lowered = NO_LIMIT
    for source in sources:
        data = _read_beneath(source.root_fd, source.path)
        if not hasattr(source, "compress"):
            assert len(sources) == 1
            if len(data) < source.size:
                raise Damage("the file is shorter than listed")
            return data[: source.size]
        if len(data) != source.stored_size:
            raise Damage("the file is not as long as listed")
        limit = min(source.limit, lowered)
        if source.headers is not None:
            _check_headers(source, data)
        for block, length, payload in records(data, is_padded=source.padded):
            if length == TRUNCATED:
                lowered = min(lowered, block)
            elif block < limit and block not in pages:
                pages[block] = unpack_page(
                    payload, source.compress, old_zlib_8192=source.old_zlib_8192
                )
    return b"".join(pages.get(block, bytes(BLCKSZ)) for block in range(-(-size // BLCKSZ)))[:size]


def _check_headers(source: Any, data: bytes) -> None:
    root_fd, path, offset, size, crc, n_headers = source.headers
    plain = zlib.decompress(_read_beneath(root_fd, path)[offset : offset + size])
    if crc32c(plain) != crc or len(plain) != 24 * (n_headers + 1):
        raise Damage("the header map does not match")
    position = 0
    for number, (block, length, _) in enumerate(records(data, is_padded=False)):
        if struct.unpack_from("<ii", plain, 24 * number + 8) != (block, position):
            raise Damage("the header map does not match the file")
        position += HEADER.size + length
    if struct.unpack_from("<i", plain, 24 * n_headers + 12) != (position,):
        raise Damage("the header map does not match the file")


# --- a backup, straight from the catalog ----------------------------------------------------------

_FIELD = re.compile(rb'"(\w+)":"([^"]*)"')
COMPRESSION = {b"none": 0, b"zlib": 1, b"pglz": 2}


@dataclass
class Composed:
    """One entry of a composed tree."""

    kind: str  # f, d or l
    mode: int
    content: bytes = b""


class Backup:
    """One backup directory, wholly in memory but for its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.control = {}
        for line in (path / "backup.control").read_text().splitlines():
            key, equals, value = line.partition(" = ")
            if equals and not key.startswith("#"):
                self.control[key] = value.strip("'")
        major, minor, patch = self.control["program-version"].split(".")
        self.version = int(major) * 10000 + int(minor) * 100 + int(patch)
        self.entries: dict[tuple[bytes, int], dict[bytes, bytes]] = {}
        for raw in (path / "backup_content.control").read_bytes().splitlines():
            fields = dict(_FIELD.findall(raw))
            self.entries[fields[b"path"], int(fields.get(b"external_dir_num", b"0"))] = fields

    def stored(self, path: bytes) -> bytes:
        return Path(
            os.fsdecode(os.path.join(os.fsencode(self.path), b"database", path))
        ).read_bytes()


class Catalog:
    """One instance of a store."""

    def __init__(self, store: Path, instance: str) -> None:
        self.root = store / "backups" / instance

    def chain(self, backup_id: str) -> list[Backup]:
        """Destination first."""
        chain = [Backup(self.root / backup_id)]
        while "parent-backup-id" in chain[-1].control:
            chain.append(Backup(self.root / chain[-1].control["parent-backup-id"]))
        return chain

    def compose(self, backup_id: str) -> Iterator[tuple[bytes, Composed]]:
        """Every entry of PGDATA, tablespaces below pg_tblspc, with its content. Raises Damage."""
        chain = self.chain(backup_id)
        for (path, external), fields in chain[0].entries.items():
            if external or path in (b"tablespace_map", b"database_map"):
                continue
            mode = int(fields[b"mode"])
            if mode & 0o170000 == 0o040000:
                yield path, Composed("d", mode & 0o7777)
            elif fields[b"is_datafile"] == b"1" and fields[b"is_cfs"] == b"0":
                yield path, Composed("f", mode & 0o7777, self._data_file(chain, path))
            else:
                yield path, Composed("f", mode & 0o7777, self._plain_file(chain, path))

    @staticmethod
    def _plain_file(chain: list[Backup], path: bytes) -> bytes:
        for backup in chain:
            fields = backup.entries.get((path, 0))
            if fields is None:
                break
            if int(fields[b"size"]) >= 0:
                return backup.stored(path) if int(fields[b"size"]) else b""
        raise Damage(f"{path!r} is stored nowhere")

    @staticmethod
    def _data_file(chain: list[Backup], path: bytes) -> bytes:
        pages: dict[int, bytes] = {}
        limit = NO_LIMIT
        n_blocks = None
        for position, backup in enumerate(chain):
            fields = backup.entries.get((path, 0))
            if fields is None:
                break
            size = int(fields[b"size"])
            if b"n_blocks" in fields:
                limit = min(limit, int(fields[b"n_blocks"]))
                if position == 0:
                    n_blocks = int(fields[b"n_blocks"])
            if size == 0:
                break
            if size < 0:
                continue
            data = backup.stored(path)
            if len(data) != size:
                raise Damage(f"{path!r} has {len(data)} bytes instead of {size}")
            compress = COMPRESSION[fields[b"compress_alg"]]
            for block, length, payload in records(data, is_padded=backup.version < 20400):
                if length == TRUNCATED:
                    limit = min(limit, block)
                elif block < limit and block not in pages:
                    pages[block] = unpack_page(
                        payload, compress, old_zlib_8192=backup.version < 20023
                    )
        if n_blocks is None:
            n_blocks = max(pages, default=-1) + 1
        return b"".join(pages.get(block, bytes(BLCKSZ)) for block in range(n_blocks))
