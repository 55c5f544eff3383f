"""Catalogs made by hand, line by line: damage, odd versions, attacks, whatever no real one shows.

``Store`` writes just enough of an instance for a base to open it; every control key, list line and
stored byte can be given. ``catalog_writer`` is for catalogs of whole clusters.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from reference import BLCKSZ, crc32c

SYSTEM_IDENTIFIER = 7000000000000000001
FIRST_START = 1_700_000_000
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def backup_id(start_time: int) -> str:
    """Base 36."""
    text = ""
    while start_time:
        start_time, digit = divmod(start_time, 36)
        text = DIGITS[digit] + text
    return text


def control_file(
    *, version: int = 1300, wal_segment_size: int = 1 << 20, block_size: int = BLCKSZ
) -> bytes:
    """A global/pg_control with a right CRC. Source: catalog/pg_control.h (ControlFileData)."""
    data = bytearray(BLCKSZ)
    struct.pack_into("<QIIi", data, 0, SYSTEM_IDENTIFIER, version, 202107181, 6)
    struct.pack_into("<Q", data, 32, 0x1000028)
    struct.pack_into("<QI", data, 40, 0x1000028, 1)
    struct.pack_into("<d4I", data, 208, 1234567.0, block_size, 131072, block_size, wal_segment_size)
    struct.pack_into("<I", data, 252, 1)
    crc_at = 292 if version >= 1800 else 288
    struct.pack_into("<I", data, crc_at, crc32c(bytes(data[:crc_at])))
    return bytes(data)


def page(fill: int) -> bytes:
    """A page with a sane header, told apart by ``fill``."""
    header = struct.pack("<IIHHHHHI", 0, 1, 0, 0, 24, BLCKSZ, BLCKSZ, 0)[:24]
    header = bytearray(header.ljust(24, b"\0"))
    struct.pack_into("<5H", header, 10, 0, 24, BLCKSZ, BLCKSZ, BLCKSZ | 4)
    return bytes(header) + bytes([fill & 0xFF]) * (BLCKSZ - 24)


def page_stream(
    pages: dict[int, bytes], *, compress: str = "none", is_padded: bool = False
) -> bytes:
    """A stored data file; a value of None-like b"" is a truncation marker at that block."""
    out = b""
    for block, content in pages.items():
        if not content:
            out += struct.pack("<Ii", block, -2)
            continue
        payload = zlib.compress(content) if compress == "zlib" else content
        out += struct.pack("<Ii", block, len(payload)) + payload
        if is_padded:
            out += b"\xa5" * (-len(payload) % 8)
    return out


def line(path: str | bytes, size: int = 0, **fields: object) -> bytes:
    """One line of a list in the order of the real writer; ``mode`` 0100600 unless given."""
    raw = path if isinstance(path, bytes) else path.encode()
    values: dict[str, object] = {
        "size": size, "mode": 0o100600, "is_datafile": 0, "is_cfs": 0, "crc": 0,
        "compress_alg": "none", "external_dir_num": 0, "dbOid": 0, **fields,
    }  # fmt: skip
    text = ", ".join(f'"{name}":"{value}"' for name, value in values.items())
    return b'{"path":"' + raw + b'", ' + text.encode() + b"}\n"


def directory_line(path: str | bytes, mode: int = 0o40700) -> bytes:
    return line(path, mode=mode)


DIRECTORIES = ("base", "base/5", "global", "pg_wal", "pg_tblspc")


class Store:
    """A catalog under construction."""

    def __init__(self, root: Path, instance: str = "main") -> None:
        self.root = root
        self.instance = instance
        self.path = root / "backups" / instance
        self.path.mkdir(parents=True)
        self.archive = root / "wal" / instance
        self.archive.mkdir(parents=True)
        self._n = 0

    def conf(self, text: str) -> None:
        (self.path / "pg_probackup.conf").write_text(text)

    def add(
        self,
        *lines: bytes,
        mode: str = "FULL",
        parent: str | None = None,
        files: dict[str, bytes] | None = None,
        header_map: bytes | None = b"",
        is_complete: bool = True,
        raw_list: bytes | None = None,
        name: str | None = None,
        **control: object,
    ) -> str:
        """Write one backup; returns its id. ``files`` are stored below ``database``.

        With ``is_complete`` the list and the files get what every backup has.
        """
        self._n += 1
        start = FIRST_START + 60 * self._n
        identifier = backup_id(start)
        root = self.path / (name or identifier)
        database = root / "database"
        database.mkdir(parents=True)
        content = [*lines]
        stored = dict(files or {})
        if is_complete:
            content += [directory_line(path) for path in DIRECTORIES]
            content += [line("PG_VERSION", 3), line("global/pg_control", BLCKSZ)]
            stored.setdefault("PG_VERSION", b"15\n")
            stored.setdefault("global/pg_control", control_file())
        raw = b"".join(content) if raw_list is None else raw_list
        (root / "backup_content.control").write_bytes(raw)
        for path, data in stored.items():
            target = database / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        if header_map is not None:
            (root / "page_header_map").write_bytes(header_map)
        values: dict[str, object] = {
            "backup-mode": mode, "stream": "true", "compress-alg": "none", "block-size": BLCKSZ,
            "xlog-block-size": BLCKSZ, "checksum-version": 1, "program-version": "2.5.16",
            "server-version": 15, "timelineid": 1, "start-lsn": "0/1000028",
            "stop-lsn": "0/1000168", "start-time": format_time(start),
            "end-time": format_time(start + 10), "status": "OK", "content-crc": crc32c(raw),
        }  # fmt: skip
        if parent is not None:
            values["parent-backup-id"] = f"'{parent}'"
        values.update({key.replace("_", "-"): value for key, value in control.items()})
        write_control(root, values)
        return identifier


def write_control(root: Path, values: dict[str, object]) -> None:
    """Write a backup.control; a value of None leaves the key out."""
    text = "#Configuration\n" + "".join(
        f"{key} = {value}\n" for key, value in values.items() if value is not None
    )
    (root / "backup.control").write_text(text)


def format_time(seconds: int) -> str:
    import datetime

    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"'{moment:%Y-%m-%d %H:%M:%S}+00'"


def header_map_entry(
    pages: Sequence[tuple[int, int]], stored_size: int
) -> tuple[bytes, dict[str, int]]:
    """One stream of a page_header_map for (block, position): (bytes, fields of the line)."""
    plain = b"".join(struct.pack("<QiiH6x", 0, block, pos, 0) for block, pos in pages)
    plain += struct.pack("<QiiH6x", 0, 0, stored_size, 0)
    packed = zlib.compress(plain, 1)
    return packed, {
        "n_headers": len(pages), "hdr_crc": crc32c(plain), "hdr_off": 0, "hdr_size": len(packed),
    }  # fmt: skip
