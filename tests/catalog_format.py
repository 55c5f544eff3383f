"""The pg_probackup catalog format, writing side: numbers, list lines, page records, control files.

Pure functions and small classes for catalog_writer.py, which decides what a backup holds. Written
from a description of what pg_probackup 2.2 to 2.5 put on disk; any thread or process.
"""

from __future__ import annotations

import re
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

BLCKSZ = 8192
NO_PAGE = bytes(BLCKSZ)
TRUNCATED = -2  # compressed_size of a truncation marker

RELATION_DIRECTORY = re.compile(r"(base/\d+|global|pg_tblspc/\d+/PG_[^/]+/\d+)")
MAIN_FORK = re.compile(r"[1-9]\d{0,9}(\.[1-9]\d*)?")


# --- bytes and numbers ------------------------------------------------------------------------


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


def crc32c_reference(data: bytes | memoryview, crc: int = 0) -> int:
    """CRC-32C, a byte at a time: the oracle of the fast one, and what is used without it."""
    table = _CRC32C_TABLE
    crc ^= 0xFFFFFFFF
    for byte in bytes(data):
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


_CRC32C_TABLE = _crc32c_table()
try:
    from pbkfs._native import crc32c as crc32c
except ImportError:  # the writer is also run as a script, without the extension
    crc32c = crc32c_reference  # type: ignore[assignment]


def pglz_compress(page: bytes) -> bytes:
    """Compress with PostgreSQL's LZ77 variant, without a length header; greedy, slow, correct."""
    out = bytearray()
    seen: dict[bytes, int] = {}
    position, end = 0, len(page)
    while position < end:
        control_at = len(out)
        out.append(0)
        for bit in range(8):
            if position >= end:
                break
            key = page[position : position + 3]
            start = seen.get(key, -1) if len(key) == 3 else -1
            if start < 0 or position - start > 4095:
                seen[key] = position
                out.append(page[position])
                position += 1
                continue
            offset = position - start
            length, most = 3, min(273, end - position)
            while length < most and page[start + length] == page[position + length]:
                length += 1
            out[control_at] |= 1 << bit
            out.append(((offset & 0xF00) >> 4) | min(length - 3, 15))
            out.append(offset & 0xFF)
            if length >= 18:
                out.append(length - 18)
            for inside in range(position, min(position + length, end - 2)):
                seen[page[inside : inside + 3]] = inside
            position += length
    return bytes(out)


_FNV_PRIME = 16777619
_CHECKSUM_OFFSETS = (
    0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
    0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
    0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
    0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
)  # fmt: skip
_PAGE_WORDS = struct.Struct("<2048I")


def page_checksum(page: bytes, blkno: int) -> int:
    """PostgreSQL's data checksum of a page. Source: storage/checksum_impl.h, pg_checksum_page()."""
    words = _PAGE_WORDS.unpack(page[:8] + b"\0\0" + page[10:])
    sums = list(_CHECKSUM_OFFSETS)
    for start in range(0, 2048, 32):
        for lane in range(32):
            mixed = sums[lane] ^ words[start + lane]
            sums[lane] = ((mixed * _FNV_PRIME) & 0xFFFFFFFF) ^ (mixed >> 17)
    result = 0
    for value in sums:
        for _ in range(2):
            value = ((value * _FNV_PRIME) & 0xFFFFFFFF) ^ (value >> 17)
        result ^= value
    return (result ^ blkno) % 65535 + 1


def format_lsn(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def parse_lsn(text: str) -> int:
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def format_id(start: datetime) -> str:
    """The backup's id: its start in seconds, in base 36."""
    number, text = int(start.timestamp()), ""
    while number:
        number, digit = divmod(number, 36)
        text = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[digit] + text
    return text


def parse_version(text: str) -> tuple[int, int, int]:
    major, minor, patch = map(int, text.split("."))
    return major, minor, patch


def wal_name(tli: int, lsn: int, segment_size: int) -> str:
    number = lsn // segment_size
    per_log = (1 << 32) // segment_size
    return f"{tli:08X}{number // per_log:08X}{number % per_log:08X}"


# --- what a state of a cluster says of itself ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class ControlFile:
    """What the writer needs of global/pg_control.

    The part before ``floatFormat`` differs between majors, the part after it does not, so the
    constant 1234567.0 is searched for. Source: catalog/pg_control.h, ControlFileData.
    """

    system_identifier: int
    catalog_version: int
    checkpoint: int
    redo: int
    tli: int
    next_xid: int
    wal_segment_size: int
    checksum_version: int
    blocks_per_segment: int
    crc: int

    @classmethod
    def parse(cls, raw: bytes) -> ControlFile:
        pivot = raw.index(struct.pack("<d", 1234567.0))
        version = struct.unpack_from("<I", raw, 8)[0]
        blocks_per_segment, wal_segment_size = struct.unpack_from("<I4xI", raw, pivot + 12)
        return cls(
            system_identifier=struct.unpack_from("<Q", raw, 0)[0],
            catalog_version=struct.unpack_from("<I", raw, 12)[0],
            checkpoint=struct.unpack_from("<Q", raw, 32)[0],
            redo=struct.unpack_from("<Q", raw, 40)[0],
            tli=struct.unpack_from("<I", raw, 48)[0],
            next_xid=struct.unpack_from("<I", raw, 64)[0],
            wal_segment_size=wal_segment_size,
            checksum_version=struct.unpack_from("<I", raw, pivot + 44)[0],
            blocks_per_segment=blocks_per_segment,
            # PostgreSQL 18 has default_char_signedness between the checksum version and the nonce.
            crc=struct.unpack_from("<I", raw, pivot + (84 if version >= 1800 else 80))[0],
        )


def is_main_fork(path: str) -> bool:
    directory, _, name = path.rpartition("/")
    return bool(RELATION_DIRECTORY.fullmatch(directory) and MAIN_FORK.fullmatch(name))


def database_oid(path: str) -> int:
    parts = path.split("/")
    if parts[0] == "base" and len(parts) > 1:
        return int(parts[1]) if parts[1].isdigit() else 0
    if parts[0] == "pg_tblspc" and len(parts) > 3:
        return int(parts[3]) if parts[3].isdigit() else 0
    return 0


def segment_number(path: str) -> int:
    return int(path.rpartition(".")[2]) if "." in path.rpartition("/")[2] else 0


# --- one entry of the list ----------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """One line of backup_content.control."""

    path: str
    mode: int
    size: int = 0
    is_datafile: bool = False
    crc: int = 0
    compress: str = "none"
    full_size: int = 0
    n_blocks: int = 0
    n_headers: int = 0
    hdr_crc: int = 0
    hdr_off: int = 0
    hdr_size: int = 0

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def format(self, version: tuple[int, int, int]) -> str:
        line = (
            f'{{"path":"{self.path}", "size":"{self.size}", "mode":"{self.mode}", '
            f'"is_datafile":"{int(self.is_datafile)}", "is_cfs":"0", "crc":"{self.crc}", '
            f'"compress_alg":"{self.compress}", "external_dir_num":"0", '
            f'"dbOid":"{database_oid(self.path)}"'
        )
        if version >= (2, 5, 0) and self.full_size and self.full_size != self.size:
            line += f',"full_size":"{self.full_size}"'
        if self.is_datafile:
            line += f',"segno":"{segment_number(self.path)}"'
        if self.n_blocks:
            line += f',"n_blocks":"{self.n_blocks}"'
        if self.n_headers and version >= (2, 4, 0):
            line += (
                f',"n_headers":"{self.n_headers}","hdr_crc":"{self.hdr_crc}",'
                f'"hdr_off":"{self.hdr_off}","hdr_size":"{self.hdr_size}"'
            )
        return line + "}\n"


# --- data files: the page stream ----------------------------------------------------------------

HEADER = struct.Struct("<Ii")
MAP_ENTRY = struct.Struct("<QiiHxxxxxx")


class PageStream:
    """Collects the records of one data file and the entries of the header map."""

    def __init__(
        self, write: Callable[[bytes], object], compress: str, level: int, is_padded: bool
    ) -> None:
        self._write = write
        self._compress = compress
        self._level = level
        self._is_padded = is_padded
        self._pending: list[bytes] = []
        self._headers: list[bytes] = []
        self.size = 0
        self.crc = 0
        self.n_pages = 0

    def add(self, block: int, page: bytes, checksum: int | None = None) -> None:
        """Append one page; ``checksum`` is for the header map, pd_checksum when not given."""
        payload = page
        if self._compress != "none":
            if self._compress == "zlib":
                packed = zlib.compress(page, self._level)
            else:
                packed = pglz_compress(page)
            if len(packed) < BLCKSZ:
                payload = packed
        high, low, pd_checksum = struct.unpack_from("<IIH", page)
        if checksum is None:
            checksum = pd_checksum
        self._headers.append(MAP_ENTRY.pack(high << 32 | low, block, self.size, checksum))
        self._pending.append(HEADER.pack(block, len(payload)))
        self._pending.append(payload)
        self.size += 8 + len(payload)
        if self._is_padded and len(payload) % 8:
            padding = 8 - len(payload) % 8
            self._pending.append(b"\xa5" * padding)  # pg_probackup leaves garbage there
            self.size += padding
        self.n_pages += 1
        if len(self._pending) >= 512:
            self.flush()

    def truncate(self, n_blocks: int) -> None:
        """Append a truncation marker (before 2.3.0)."""
        self._pending.append(HEADER.pack(n_blocks, TRUNCATED))
        self.size += 8

    def flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self.crc = crc32c(data, self.crc)
        self._write(data)

    def header_map(self) -> tuple[bytes, int]:
        """Return the compressed headers and the CRC of the uncompressed ones."""
        plain = b"".join(self._headers) + MAP_ENTRY.pack(0, 0, self.size, 0)
        return zlib.compress(plain, 1), crc32c(plain, 0)


_HEADINGS = {
    "backup-mode": "#Configuration\n",
    "block-size": "\n#Compatibility\n",
    "timelineid": "\n#Result backup info\n",
}
_QUOTED = ("-time", "-id", "conninfo", "external-dirs", "note")


def format_control(values: dict[str, object]) -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, datetime):
            value = value.strftime("%Y-%m-%d %H:%M:%S+00")
        elif isinstance(value, bool):
            value = str(value).lower()
        text = str(value)
        if key.endswith(_QUOTED):
            text = "'" + text.replace("'", "''") + "'"
        lines.append(f"{_HEADINGS.get(key, '')}{key} = {text}\n")
    return "".join(lines)
