"""What a user asks of a drill. Made by the command line, read by all of ``drill``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import NotFoundError, UsageError
from pbkfs.postgres.recovery import RecoveryTarget

_NAME = re.compile(r"\s*([A-Za-z_][\w .-]*?)\s*:\s+(?=\S)")
_NAME_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class SqlCheck:
    """One check of the user's: psql has to run ``text`` without an error.

    No row of it may be just false or null; if ``needs_row``, there has to be one.
    """

    name: str
    text: str
    needs_row: bool


@dataclass(frozen=True, slots=True)
class DrillRequest:
    """The arguments of a drill; the base is named as for a mount."""

    store: Path | None = None
    instance: str | None = None
    backup_id: str | None = None
    base_dir: Path | None = None
    owner: tuple[int, int] | None = None
    work_dir: Path | None = None
    """Where the drill makes its own directory; None: $TMPDIR, or /var/tmp."""
    target: RecoveryTarget | None = None
    archive: Path | None = None
    """Directory of archived WAL; None: the store's own, if a target needs one."""
    bindir: Path | None = None
    shared_buffers: str | None = None
    settings: Sequence[tuple[str, str]] = ()
    user: str = "postgres"
    database: str = "postgres"
    sql_checks: Sequence[SqlCheck] = ()
    runs_amcheck: bool = True
    runs_checksums: bool = True
    n_jobs: int = 1
    timeout_s: float = 86400.0
    is_kept: bool = False


def parse_sql_check(text: str) -> SqlCheck:
    """Return the check of ``SELECT …`` or ``NAME: SELECT …``; its name is else the SQL itself.

    No SQL begins with words and a colon. Raises UsageError.
    """
    match = _NAME.match(text)
    name, sql = (match[1], text[match.end() :]) if match else (" ".join(text.split()), text)
    if not sql.strip(" \t\r\n;"):
        raise UsageError(
            "an SQL check is empty", hint="Write it like --sql 'select count(*) > 0 from orders'."
        )
    if len(name) > _NAME_CHARACTERS:
        name = name[: _NAME_CHARACTERS - 1] + "…"
    return SqlCheck(name, sql, needs_row=True)


def read_sql_file(path: Path) -> SqlCheck:
    """Return the check of a file of SQL, which has the file's name. Raises NotFoundError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise NotFoundError(
            f"cannot read the SQL file {path}: {reason}", hint="Name a file of SQL for psql."
        ) from error
    return SqlCheck(path.name, text, needs_row=False)
