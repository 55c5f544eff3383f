"""backup.control and pg_probackup.conf: the key = value files of a pg_probackup catalog.

Pure parsing; called by ``catalog``. Whatever the bytes, the only errors are PbkfsError.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from pbkfs.errors import FormatError
from pbkfs.pgdata import parse_lsn

ID_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MODES = ("FULL", "PAGE", "PTRACK", "DELTA")
STATUSES = frozenset(
    {"OK", "DONE", "CORRUPT", "ORPHAN", "RUNNING", "ERROR"}
    | {"MERGING", "MERGED", "DELETING", "DELETED"}
)

Version = tuple[int, int, int]

_TIME = re.compile(
    r"(\d{4})-(\d{2})-(\d{2}) (\d{2}):(\d{2}):(\d{2})(?:\.\d+)?\s*"
    r"(?:Z|(?P<sign>[+-])(?P<hours>\d{2})(?::?(?P<minutes>\d{2}))?(?::?\d{2})?)?",
    re.ASCII,
)
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:[^0-9].*)?", re.ASCII | re.DOTALL)
_INT = re.compile(r"[+-]?\d{1,20}", re.ASCII)


def parse_settings(data: bytes, origin: str) -> dict[str, str]:
    """Parse ``key = value`` lines; keys come out in lower case with dashes. The last one wins.

    Bytes that are not UTF-8 are kept as surrogate escapes. Raises FormatError naming the line.
    """
    if b"\0" in data:
        raise FormatError(f"{origin} is not a text file: it contains a NUL byte")
    settings: dict[str, str] = {}
    text = data.decode("utf-8", "surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, equals, rest = line.partition("=")
        key = re.sub(r"[_\s]", "-", key.strip().lower())
        if not equals or not key:
            raise FormatError(f"{origin} line {number} is not of the form key = value")
        settings[key] = _parse_value(rest.strip(), origin, number)
    return settings


def _parse_value(text: str, origin: str, number: int) -> str:
    if not text.startswith("'"):
        return text.split("#", 1)[0].rstrip()
    # A quote inside of quotes is doubled.
    match = re.match(r"'((?:[^']|'')*)'\s*(?:#.*)?$", text)
    if match is None:
        raise FormatError(f"{origin} line {number} has an unterminated quote")
    return match[1].replace("''", "'")


def parse_time(text: str) -> int:
    """Parse ``YYYY-MM-DD HH:MM:SS+TZ`` to seconds since the epoch. Raises ValueError."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a time: {text!r}")
    offset = datetime.timedelta()
    if match["sign"]:
        offset = datetime.timedelta(hours=int(match["hours"]), minutes=int(match["minutes"] or 0))
        if match["sign"] == "-":
            offset = -offset
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    moment = datetime.datetime(year, month, day, hour, minute, second, tzinfo=datetime.UTC)
    return int(moment.timestamp()) - int(offset.total_seconds())


def format_backup_id(start_time: int) -> str:
    """Backup id of a start time: base 36, most significant digit first, no padding."""
    digits = ""
    while start_time > 0:
        start_time, digit = divmod(start_time, 36)
        digits = ID_DIGITS[digit] + digits
    return digits or "0"


def parse_backup_id(text: str) -> int:
    """Start time of a backup id, upper or lower case. Raises ValueError."""
    if not re.fullmatch(r"[0-9A-Za-z]{1,12}", text, re.ASCII):
        raise ValueError(f"not a backup id: {text!r}")
    return int(text, 36)


@dataclass(frozen=True, slots=True)
class BackupControl:
    """The typed content of a backup.control; absent fields are None."""

    settings: dict[str, str]
    backup_id: str | None
    """Of ``start-time``: what parents are resolved by."""
    mode: str | None
    status: str
    """Upper case; "UNKNOWN" when absent or not one of STATUSES."""
    parent_id: str | None
    stream: bool
    from_replica: bool
    program_version: Version | None
    server_version: str | None
    block_size: int
    wal_block_size: int
    checksum_version: int
    tli: int
    start_lsn: int
    stop_lsn: int
    start_time: int | None
    end_time: int | None
    recovery_time: int | None
    merge_time: int | None
    content_crc: int
    """0: the list is not to be checked."""
    pgdata_bytes: int | None
    data_bytes: int | None
    wal_bytes: int | None
    external_dirs: tuple[str, ...]
    """As the user gave them; numbered from 1 in the order of their bytes."""


def _integer(settings: dict[str, str], key: str, default: int | None, origin: str) -> int | None:
    text = settings.get(key)
    if text is None or not text:
        return default
    if not _INT.fullmatch(text):
        raise FormatError(f"{origin}: {key} = {text!r} is not a number")
    return int(text)


def _required(value: int | None) -> int:
    assert value is not None
    return value


def _time(settings: dict[str, str], key: str, origin: str) -> int | None:
    text = settings.get(key)
    if not text:
        return None
    try:
        return parse_time(text)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{origin}: {key} = {text!r} is not a time") from error


def _boolean(settings: dict[str, str], key: str, origin: str) -> bool:
    text = settings.get(key, "false").lower()
    if text in ("true", "t", "on", "yes", "1"):
        return True
    if text in ("false", "f", "off", "no", "0", ""):
        return False
    raise FormatError(f"{origin}: {key} = {text!r} is neither true nor false")


def _timeline(settings: dict[str, str], origin: str) -> int:
    tli = _required(_integer(settings, "timelineid", 0, origin))
    if not 0 <= tli <= 0xFFFFFFFF:
        raise FormatError(f"{origin}: timelineid = {tli} is not a timeline")
    return tli


def _lsn(settings: dict[str, str], key: str, origin: str) -> int:
    text = settings.get(key, "0/0")
    try:
        return parse_lsn(text)
    except ValueError as error:
        raise FormatError(f"{origin}: {key} = {text!r} is not an LSN") from error


def parse_version(text: str) -> Version:
    """Parse ``a.b.c``. Raises ValueError."""
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    return int(match[1]), int(match[2]), int(match[3] or 0)


def _mode(settings: dict[str, str], origin: str) -> str | None:
    text = settings.get("backup-mode", "").upper()
    if not text:
        return None
    for mode in MODES:
        if mode.startswith(text):
            return mode
    raise FormatError(f"{origin}: backup-mode = {text!r} is not known")


def parse_control(data: bytes, origin: str) -> BackupControl:
    """Parse a backup.control. Raises FormatError naming the file, the key and the value."""
    settings = parse_settings(data, origin)
    version = None
    if settings.get("program-version"):
        try:
            version = parse_version(settings["program-version"])
        except ValueError as error:
            raise FormatError(
                f"{origin}: program-version = {settings['program-version']!r} is not a version"
            ) from error
    status = settings.get("status", "").upper()
    start_time = _time(settings, "start-time", origin)
    if start_time is not None and start_time < 0:
        raise FormatError(f"{origin}: start-time = {settings['start-time']!r} is before 1970")
    external = settings.get("external-dirs", "")
    return BackupControl(
        settings=settings,
        backup_id=None if start_time is None else format_backup_id(start_time),
        mode=_mode(settings, origin),
        status=status if status in STATUSES else "UNKNOWN",
        parent_id=settings.get("parent-backup-id", "").upper() or None,
        stream=_boolean(settings, "stream", origin),
        from_replica=_boolean(settings, "from-replica", origin),
        program_version=version,
        server_version=settings.get("server-version") or None,
        block_size=_required(_integer(settings, "block-size", 8192, origin)),
        wal_block_size=_required(_integer(settings, "xlog-block-size", 8192, origin)),
        checksum_version=_required(_integer(settings, "checksum-version", 0, origin)),
        tli=_timeline(settings, origin),
        start_lsn=_lsn(settings, "start-lsn", origin),
        stop_lsn=_lsn(settings, "stop-lsn", origin),
        start_time=start_time,
        end_time=_time(settings, "end-time", origin),
        recovery_time=_time(settings, "recovery-time", origin),
        merge_time=_time(settings, "merge-time", origin),
        content_crc=_required(_integer(settings, "content-crc", 0, origin)),
        pgdata_bytes=_integer(settings, "pgdata-bytes", None, origin),
        data_bytes=_integer(settings, "data-bytes", None, origin),
        wal_bytes=_integer(settings, "wal-bytes", None, origin),
        external_dirs=tuple(part for part in external.split(":") if part),
    )
