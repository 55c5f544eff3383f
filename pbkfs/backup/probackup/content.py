"""backup_content.control: the file list of a backup, read as bytes and never kept whole.

A list of a million files has 250 MB, and every member of a chain has its own. So opening one reads
it once in pieces (CRC, form of every line, names) and keeps an offset per file; a line is read and
parsed again when its file is first looked at. Called by ``layer``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pbkfs.errors import FormatError

# States of a name in one list. An absent one is MISSING.
MISSING, EMPTY, UNCHANGED, STORED, DIRECTORY, LINK = range(6)

COMPRESSION = {b"none": 0, b"zlib": 1, b"pglz": 2}

# The writer's buffer has 8 kB; the longest line we accept is generous to forks of the tool.
LINE_LIMIT = 64 << 10
PIECE = 1 << 20

# The order in which every known version writes the fields, with values in their usual range. What
# does not match (other order, unknown fields, odd numbers) is scanned by parse_line with the same
# result, ten times slower.
_USUAL_FIELDS = (
    ("path", rb'\{"path":"%s"', rb'[^"\n\0]+'),
    ("size", rb', ?"size":"%s"', rb"-1|[0-9]{1,18}"),
    ("mode", rb', ?"mode":"%s"', rb"[0-9]{1,5}"),
    ("is_datafile", rb', ?"is_datafile":"%s"', rb"[01]"),
    ("is_cfs", rb', ?"is_cfs":"%s"', rb"[01]"),
    ("crc", rb', ?"crc":"%s"', rb"[0-9]{1,10}"),
    ("compress_alg", rb', ?"compress_alg":"%s"', rb"none|zlib|pglz"),
    ("external_dir_num", rb'(?:, ?"external_dir_num":"%s")?', rb"[0-9]{1,9}"),
    ("dbOid", rb'(?:, ?"dbOid":"%s")?', rb"[0-9]{1,10}"),
    ("full_size", rb'(?:, ?"full_size":"%s")?', rb"[0-9]{1,18}"),
    ("segno", rb'(?:, ?"segno":"%s")?', rb"[0-9]{1,10}"),
    ("linked", rb'(?:, ?"linked":"%s")?', rb'[^"\n\0]*'),
    ("n_blocks", rb'(?:, ?"n_blocks":"%s")?', rb"[0-9]{1,9}"),
    ("n_headers", rb'(?:, ?"n_headers":"%s"', rb"[0-9]{1,9}"),
    ("hdr_crc", rb', ?"hdr_crc":"%s"', rb"[0-9]{1,9}|[1-3][0-9]{9}|4[01][0-9]{8}|42[0-8][0-9]{7}"),
    ("hdr_off", rb', ?"hdr_off":"%s"', rb"[0-9]{1,18}"),
    ("hdr_size", rb', ?"hdr_size":"%s")?\}', rb"[0-9]{1,10}"),
)


def _compile_line(fields: frozenset[str]) -> re.Pattern[bytes]:
    """Pattern of a usual line with a group for each of ``fields``."""
    return re.compile(
        b"^"
        + b"".join(
            form % ((b"(%s)" if name in fields else b"(?:%s)") % value)
            for name, form, value in _USUAL_FIELDS
        )
        + b"$",
        re.MULTILINE,
    )


_LINE = _compile_line(frozenset(name for name, _, _ in _USUAL_FIELDS) - {"dbOid", "segno"})
# One findall of this over a piece is what keeps opening a list of 100,000 files at 0.2 s.
_NAMES = _compile_line(
    frozenset({"path", "size", "mode", "is_cfs", "external_dir_num", "hdr_off", "hdr_size"})
)
_FIELD = re.compile(rb'\s*"([A-Za-z_]{1,64})"\s*:\s*"([^"\n\0]*)"\s*(,|\}\s*$)')
_INT = re.compile(rb"-?[0-9]{1,20}")
# An empty component, "." or "..": nothing of that kind may leave the tree. The second one finds it
# in many lines at once, which costs a tenth of one search a line.
_CLIMBING = re.compile(rb"(?:^|/)\.{0,2}(?:/|$)")
_CLIMBING_LINE = re.compile(rb'"path":"(?:[^"\n]*/)?\.{0,2}[/"]')
_LONG_NAME = re.compile(rb"[^/]{256}")
_LONGEST_PATH = 4000

_INT64_MAX = (1 << 63) - 1
# 16 TiB in one file of 8 kB blocks; larger numbers would not fit the native index.
_BLOCKS_MAX = (1 << 31) - 1


class Entry(NamedTuple):
    """One line of a list, parsed."""

    path: bytes
    size: int
    """Bytes stored; -1: unchanged since the parent."""
    mode: int
    is_datafile: bool
    is_cfs: bool
    crc: int
    compress: int
    external_dir_num: int
    full_size: int | None
    linked: bytes | None
    n_blocks: int | None
    n_headers: int
    hdr_crc: int
    hdr_off: int
    hdr_size: int

    @property
    def state(self) -> int:
        """State of the name in this list."""
        return _state(self.mode, self.size)


# What the first pass over a list keeps of a line: offset, path, state, is_cfs, external_dir_num,
# and the end of the file's headers in page_header_map (0 without). A bare tuple: making a named one
# would cost a tenth of the pass.
Name = tuple[int, bytes, int, bool, int, int]


def _state(mode: int, size: int) -> int:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        return DIRECTORY
    if kind == stat.S_IFLNK:
        return LINK
    if kind != stat.S_IFREG:
        raise ValueError(f"mode {mode} is of no type that a backup can have")
    if size == 0:
        return EMPTY
    return UNCHANGED if size == -1 else STORED


def _integer(fields: dict[bytes, bytes], name: bytes, default: int | None = None) -> int:
    text = fields.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"field {name.decode()} is missing")
        return default
    if not _INT.fullmatch(text):
        raise ValueError(f"field {name.decode()} is not a number: {text!r}")
    value = int(text)
    # Very old releases printed -1 as an unsigned number.
    return value if -_INT64_MAX <= value <= _INT64_MAX else -1


def _ranged(value: int, name: str, low: int, high: int) -> int:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}")
    return value


def _scan_fields(line: bytes) -> dict[bytes, bytes]:
    """Split a line into its fields. It looks like JSON, but its names are not escaped."""
    if not line.startswith(b"{"):
        raise ValueError("it does not begin with a brace")
    fields: dict[bytes, bytes] = {}
    position = 1
    while True:
        match = _FIELD.match(line, position)
        if match is None:
            raise ValueError(f"not a field at byte {position}")
        if match[1] in fields:
            raise ValueError(f"field {match[1].decode()} occurs twice")
        fields[match[1]] = match[2]
        position = match.end()
        if match[3] != b",":
            return fields


def _parse_fields(fields: dict[bytes, bytes]) -> Entry:
    path = fields.get(b"path")
    if not path:
        raise ValueError("it has no path")
    compress = COMPRESSION.get(fields.get(b"compress_alg", b"none"))
    if compress is None:
        raise ValueError(f"compress_alg {fields[b'compress_alg']!r} is not known")
    size = _ranged(_integer(fields, b"size"), "size", -1, _INT64_MAX)
    full_size = _integer(fields, b"full_size", -1)
    # Negative: written by a program whose counter was not set; the same as absent.
    n_blocks = _ranged(_integer(fields, b"n_blocks", -1), "n_blocks", -(1 << 63), _BLOCKS_MAX)
    mode = _ranged(_integer(fields, b"mode"), "mode", 0, 0o177777)
    return Entry(
        path=path,
        size=size,
        mode=mode,
        is_datafile=_integer(fields, b"is_datafile", 0) == 1,
        is_cfs=_integer(fields, b"is_cfs", 0) == 1,
        crc=_integer(fields, b"crc", 0),
        compress=compress,
        external_dir_num=_integer(fields, b"external_dir_num", 0),
        full_size=full_size if full_size >= 0 else None,
        linked=fields.get(b"linked"),
        n_blocks=n_blocks if n_blocks >= 0 else None,
        n_headers=_ranged(_integer(fields, b"n_headers", 0), "n_headers", 0, _BLOCKS_MAX),
        hdr_crc=_ranged(_integer(fields, b"hdr_crc", 0), "hdr_crc", 0, 0xFFFFFFFF),
        hdr_off=_integer(fields, b"hdr_off", 0),
        hdr_size=_ranged(_integer(fields, b"hdr_size", 0), "hdr_size", 0, _INT64_MAX),
    )


def _parse_match(match: re.Match[bytes]) -> Entry:
    (
        path, size, mode, is_datafile, is_cfs, crc, compress, external, full_size, linked,
        n_blocks, n_headers, hdr_crc, hdr_off, hdr_size,
    ) = match.groups()  # fmt: skip
    return Entry(
        path,
        int(size),
        int(mode),
        is_datafile == b"1",
        is_cfs == b"1",
        int(crc),
        COMPRESSION[compress],
        int(external) if external else 0,
        int(full_size) if full_size else None,
        linked,
        int(n_blocks) if n_blocks else None,
        int(n_headers) if n_headers else 0,
        int(hdr_crc) if hdr_crc else 0,
        int(hdr_off) if hdr_off else 0,
        int(hdr_size) if hdr_size else 0,
    )


def check_path(path: bytes) -> None:
    """Refuse a name that could leave the tree or that no file system holds. Raises ValueError."""
    if _CLIMBING.search(path):
        raise ValueError(f"name {os.fsdecode(path)!r} has an empty component, '.' or '..'")
    if len(path) > 255 and (len(path) > _LONGEST_PATH or _LONG_NAME.search(path)):
        raise ValueError(f"name of {len(path)} bytes is too long")


def parse_line(line: bytes) -> Entry:
    """Parse one line, without its line feed. Raises ValueError saying what is wrong with it."""
    if b"\0" in line:
        raise ValueError("it contains a NUL byte")
    match = _LINE.fullmatch(line)
    entry = _parse_fields(_scan_fields(line)) if match is None else _parse_match(match)
    check_path(entry.path)
    _state(entry.mode, entry.size)
    return entry


def _name(line: bytes, offset: int) -> Name:
    entry = parse_line(line)
    headers_end = entry.hdr_off + entry.hdr_size if entry.n_headers and entry.hdr_off >= 0 else 0
    return offset, entry.path, entry.state, entry.is_cfs, entry.external_dir_num, headers_end


def read_names(fd: int, origin: str, crc32c: Callable[[bytes, int], int]) -> Iterator[Name | int]:
    """Read a list from its beginning: yields a Name a line and at last the CRC of all bytes.

    Raises FormatError naming ``origin`` and the line for anything that is not a line of a list,
    OSError when reading fails.
    """
    states: dict[tuple[bytes, bytes], int] = {}
    crc = 0
    number = 0
    position = 0
    rest = b""
    while piece := os.pread(fd, PIECE, position + len(rest)):
        crc = crc32c(piece, crc)
        piece = rest + piece
        lines = piece.split(b"\n")
        rest = lines.pop()
        usual = _NAMES.findall(piece, 0, len(piece) - len(rest))
        if len(usual) != len(lines) or _CLIMBING_LINE.search(piece):
            for line in lines:
                number += 1
                try:
                    yield _name(line, position)
                except ValueError as error:
                    raise FormatError(f"{origin} line {number}: {error}") from error
                position += len(line) + 1
        else:
            for line, (path, size, mode, is_cfs, external, hdr_off, hdr_size) in zip(
                lines, usual, strict=True
            ):
                number += 1
                key = mode, size if size == b"0" or size == b"-1" else b"+"
                state = states.get(key)
                if state is None or len(path) > 255:
                    try:
                        state = states[key] = _state(int(mode), int(size))
                        check_path(path)
                    except ValueError as error:
                        raise FormatError(f"{origin} line {number}: {error}") from error
                yield (
                    position,
                    path,
                    state,
                    is_cfs == b"1",
                    int(external) if external else 0,
                    int(hdr_off) + int(hdr_size) if hdr_off else 0,
                )
                position += len(line) + 1
        if len(rest) > LINE_LIMIT:
            raise FormatError(f"{origin} line {number + 1} is too long")
    if rest:
        raise FormatError(f"{origin} ends in the middle of line {number + 1}")
    yield crc


def read_entry(fd: int, offset: int, path: bytes, origin: str) -> Entry:
    """Parse the line at ``offset``, which has to be that of ``path``.

    Raises FormatError when the list is no longer what it was, OSError.
    """
    size = 512
    while True:
        data = os.pread(fd, size, offset)
        end = data.find(b"\n")
        if end >= 0:
            break
        if len(data) < size or size > LINE_LIMIT:
            raise FormatError(f"{origin} changed while it was in use")
        size *= 4
    try:
        entry = parse_line(data[:end])
    except ValueError as error:
        raise FormatError(f"{origin} changed while it was in use: {error}") from error
    if entry.path != path:
        raise FormatError(f"{origin} changed while it was in use")
    return entry
