"""Facts about the files of a PostgreSQL data directory: names, pages, LSNs, pg_control.

Pure functions over bytes; every layer above may call them from any thread. Nothing here opens a
file. PostgreSQL's own file names live in this module and nowhere else.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pbkfs.errors import FormatError, UnsupportedError

BLCKSZ = 8192
PAGE_HEADER_SIZE = 24
_PAGE_FIELDS = struct.Struct("<5H")

PG_VERSION = b"PG_VERSION"
PG_CONTROL = b"global/pg_control"
PG_WAL = b"pg_wal"
PG_TBLSPC = b"pg_tblspc"
BACKUP_LABEL = b"backup_label"
TABLESPACE_MAP = b"tablespace_map"
POSTMASTER_PID = b"postmaster.pid"

# Never shown in the root of a mount: the first two are read by recovery or by restore tools only
# and would lead a server to the original tablespaces, the others belong to another postmaster.
HIDDEN_IN_ROOT = frozenset({TABLESPACE_MAP, b"database_map", POSTMASTER_PID, b"postmaster.opts"})

# Source: src/common/relpath.c (GetRelationPath), src/backend/storage/file/reinit.c.
_RELATION_NAME = rb"(?:t[0-9]+_)?[0-9]{1,10}(?:_(?:fsm|vm|init))?(?:\.[1-9][0-9]*)?"
_RELATION_FILE = re.compile(
    rb"(?:base/[0-9]+|global|(?:.*/)?PG_[0-9.]+_[0-9]+/[0-9]+)/" + _RELATION_NAME, re.DOTALL
)


_VERIFIED_FILE = re.compile(
    rb"(?:base/[0-9]+|global|(?:.*/)?PG_[0-9.]+_[0-9]+/[0-9]+)"
    rb"/[0-9]{1,10}(?:_init)?(?:\.([1-9][0-9]*))?",
    re.DOTALL,
)


def is_relation_file(path: bytes) -> bool:
    """Tell whether ``path`` (relative to the data directory) names a file of a relation fork.

    Main, ``_fsm``, ``_vm`` and ``_init`` forks, their segments, and temporary relations count, in
    ``base/DB``, ``global`` and any directory ``PG_MAJOR_CATALOG/DB`` of a tablespace.
    """
    return _RELATION_FILE.fullmatch(path) is not None


def first_block_of(path: bytes, segment_blocks: int) -> int | None:
    """Return the number, in its fork, of the first block of a file of pages that a server verifies.

    None for other files, for ``_fsm`` and ``_vm``, whose damaged pages PostgreSQL takes for empty
    ones (RBM_ZERO_ON_ERROR), and for temporary relations, which it removes.
    """
    found = _VERIFIED_FILE.fullmatch(path)
    return int(found[1] or 0) * segment_blocks if found is not None else None


def is_page_new(page: bytes | memoryview) -> bool:
    """Tell whether a page is all zeros, which PostgreSQL treats as new. Its checksum is not set."""
    return not any(page)


def is_page_sane(page: bytes | memoryview) -> bool:
    """Tell whether the header of a page that is not new is possible.

    Source: src/backend/storage/page/bufpage.c (PageIsVerifiedExtended).
    """
    if len(page) != BLCKSZ:
        return False
    flags, lower, upper, special, size_version = _PAGE_FIELDS.unpack_from(page, 10)
    return bool(
        size_version & 0xFF00 == BLCKSZ
        and flags & ~0x0007 == 0
        and PAGE_HEADER_SIZE <= lower <= upper <= special <= BLCKSZ
        and special % 8 == 0
    )


# -- LSNs and WAL file names ----------------------------------------------------------------------

_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_WAL_SEGMENT = re.compile(r"[0-9A-F]{24}")
_WAL_FILE = re.compile(r"[0-9A-F]{24}(?:\.partial|\.[0-9A-F]{8}\.backup)?|[0-9A-F]{8}\.history")


def parse_lsn(text: str) -> int:
    """Parse ``X/Y`` (hexadecimal). Raises ValueError."""
    match = _LSN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not an LSN: {text!r}")
    return int(match[1], 16) << 32 | int(match[2], 16)


def format_lsn(lsn: int) -> str:
    """Format an LSN as PostgreSQL prints it, ``X/Y``."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def is_wal_segment_size(size_bytes: int) -> bool:
    """Tell whether ``size_bytes`` is a legal WAL segment size: a power of two, 1 MiB to 1 GiB.

    Source: src/include/access/xlog_internal.h (IsValidWalSegSize).
    """
    return 1 << 20 <= size_bytes <= 1 << 30 and size_bytes & (size_bytes - 1) == 0


def is_wal_segment_name(name: str) -> bool:
    """Tell whether ``name`` is the name of a complete WAL segment (24 hexadecimal digits)."""
    return _WAL_SEGMENT.fullmatch(name) is not None


def is_wal_file_name(name: str) -> bool:
    """Tell whether a restore_command may be asked for ``name``: segment, history, backup."""
    return _WAL_FILE.fullmatch(name) is not None


def wal_segment_name(tli: int, segno: int, segment_size: int) -> str:
    """Name of WAL segment number ``segno`` (= lsn // segment_size) on timeline ``tli``.

    Source: src/include/access/xlog_internal.h (XLogFileName).
    """
    per_id = (1 << 32) // segment_size
    return f"{tli:08X}{segno // per_id:08X}{segno % per_id:08X}"


def parse_wal_segment_name(name: str, segment_size: int) -> tuple[int, int]:
    """Return (timeline, segment number) of a WAL segment's name. Raises ValueError."""
    if not is_wal_segment_name(name):
        raise ValueError(f"not the name of a WAL segment: {name!r}")
    per_id = (1 << 32) // segment_size
    return int(name[:8], 16), int(name[8:16], 16) * per_id + int(name[16:], 16)


def timeline_history_name(tli: int) -> str:
    """Name of the history file of timeline ``tli``."""
    return f"{tli:08X}.history"


def parse_timeline_history(text: str) -> list[tuple[int, int]]:
    """Parse a timeline history file: [(parent timeline, LSN where it was left)], oldest first.

    Source: src/backend/access/transam/timeline.c (readTimeLineHistory). Raises ValueError.
    """
    history = []
    for line in text.splitlines():
        words = line.split("#", 1)[0].split()
        if words:
            if len(words) < 2:
                raise ValueError(f"not a line of a timeline history: {line!r}")
            history.append((int(words[0]), parse_lsn(words[1])))
    return history


# -- pg_control -----------------------------------------------------------------------------------

# pg_control_version: offsets of checkPointCopy, blcksz, data_checksum_version, crc.
# Source: src/include/catalog/pg_control.h of each release (ControlFileData, 64-bit layout).
_CONTROL_LAYOUT = {
    1002: (48, 216, 252, 288),  # 10
    1100: (40, 208, 244, 280),  # 11
    1201: (40, 216, 252, 288),  # 12
    1300: (40, 216, 252, 288),  # 13 to 16
    1700: (40, 216, 252, 288),  # 17
    1800: (40, 216, 252, 292),  # 18: default_char_signedness before the nonce
}


@dataclass(frozen=True, slots=True)
class ControlFile:
    """What pbkfs needs of ``global/pg_control``."""

    system_identifier: int
    pg_control_version: int
    catalog_version: int
    state: int
    checkpoint_lsn: int
    redo_lsn: int
    tli: int
    block_size: int
    relation_segment_blocks: int
    wal_block_size: int
    wal_segment_size: int
    data_checksum_version: int
    crc: int


def read_control_file(
    data: bytes, crc32c: Callable[[bytes], int] | None = None, *, origin: str = "global/pg_control"
) -> ControlFile:
    """Parse ``global/pg_control``.

    ``crc32c`` checks the file's own CRC when given. Raises FormatError for a damaged file and
    UnsupportedError for the layout of a release that is not known.
    """
    if len(data) < 40:
        raise FormatError(f"{origin} has only {len(data)} bytes")
    system_identifier, version, catalog_version, state = struct.unpack_from("<QIIi", data, 0)
    layout = _CONTROL_LAYOUT.get(version)
    if layout is None:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in _CONTROL_LAYOUT:
            raise UnsupportedError(
                f"{origin} was written on a machine of the other byte order",
                hint="Use a machine with the byte order of the server that was backed up.",
            )
        raise UnsupportedError(
            f"{origin} has version {version}, which is not known",
            hint="PostgreSQL 10 to 18 are supported.",
        )
    checkpoint_at, blcksz_at, checksum_at, crc_at = layout
    if len(data) < crc_at + 4:
        raise FormatError(f"{origin} has only {len(data)} bytes")
    (crc,) = struct.unpack_from("<I", data, crc_at)
    if crc32c is not None and crc32c(data[:crc_at]) != crc:
        raise FormatError(f"{origin} does not match its own crc {crc:08x}")
    (checkpoint_lsn,) = struct.unpack_from("<Q", data, 32)
    redo_lsn, tli = struct.unpack_from("<QI", data, checkpoint_at)
    # The double before blcksz is there to detect exactly this: fields at other offsets.
    if struct.unpack_from("<d", data, blcksz_at - 8) != (1234567.0,):
        raise FormatError(f"{origin} does not have the layout of its version {version}")
    block_size, segment_blocks, wal_block_size, wal_segment_size = struct.unpack_from(
        "<4I", data, blcksz_at
    )
    (checksum_version,) = struct.unpack_from("<I", data, checksum_at)
    if not is_wal_segment_size(wal_segment_size):
        raise FormatError(f"{origin} has an impossible WAL segment size {wal_segment_size}")
    return ControlFile(
        system_identifier=system_identifier,
        pg_control_version=version,
        catalog_version=catalog_version,
        state=state,
        checkpoint_lsn=checkpoint_lsn,
        redo_lsn=redo_lsn,
        tli=tli,
        block_size=block_size,
        relation_segment_blocks=segment_blocks,
        wal_block_size=wal_block_size,
        wal_segment_size=wal_segment_size,
        data_checksum_version=checksum_version,
        crc=crc,
    )


def parse_major(text: str) -> int:
    """Parse PG_VERSION or pg_probackup's server-version: ``15`` is 15, ``9.6`` is 9.

    Raises ValueError.
    """
    match = re.fullmatch(r"([0-9]{1,3})(?:\.[0-9]{1,3})*", text.strip())
    if match is None:
        raise ValueError(f"not a PostgreSQL version: {text!r}")
    return int(match[1])


def parse_tablespace_map(data: bytes) -> dict[bytes, bytes]:
    """Parse ``tablespace_map``: oid -> original path.

    Lines that do not begin with an oid and a blank are left out: the file is never obeyed, only
    used to tell what is missing. Source: src/backend/access/transam/xlogrecovery.c
    (read_tablespace_map).
    """
    tablespaces: dict[bytes, bytes] = {}
    for match in re.finditer(rb"(?:^|\n)([0-9]+) ((?:[^\\\n\r]|\\[\s\S])*)", data):
        tablespaces[match[1]] = re.sub(rb"\\([\s\S])", rb"\1", match[2])
    return tablespaces
