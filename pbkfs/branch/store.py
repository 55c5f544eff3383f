"""The store: which trunks and branches there are, in SQLite (``schema.sql``).

The only module that knows SQL or sqlite3. One ``Store`` a process; any thread may use it, as each
transaction has the connection to itself. Transactions are short and synchronous, and durable when
they end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pbkfs.branch.errors import NameConflictError
from pbkfs.errors import FormatError, HostError

Kind = Literal["trunk", "branch"]
Status = Literal["creating", "starting", "running", "stopped", "error", "deleting"]

VERSION = 3
_SCHEMA = Path(__file__).with_name("schema.sql")
# Step i takes a store from version i to i + 1. The schema is always that of the newest version.
_MIGRATIONS: tuple[str, ...] = (
    """
    ALTER TABLE heads ADD COLUMN idle_stop_s REAL;
    ALTER TABLE heads ADD COLUMN is_asleep INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE heads ADD COLUMN cpu_limit REAL;
    ALTER TABLE heads ADD COLUMN memory_limit_bytes INTEGER;
    """,
)
_BUSY_S = 30.0


@dataclass(frozen=True, slots=True)
class Head:
    """A row of ``heads``; see the schema for what each column means."""

    id: str
    name: str
    kind: Kind
    parent_id: str | None
    status: Status
    engine: str
    pg_user: str
    pg_database: str
    auth: Literal["password", "trust"]
    created_at: str
    operation: str = ""
    pending_id: str = ""
    error: str = ""
    is_wanted: bool = True
    source: str = ""
    point_id: str = ""
    port: int = 0
    pg_version: str = ""
    bindir: str = ""
    wal_level: str = ""
    server_pid: int = 0
    server_ticks: int = 0
    started_at: str | None = None
    expires_at: str | None = None
    idle_stop_s: float | None = None
    is_asleep: bool = False
    cpu_limit: float | None = None
    memory_limit_bytes: int | None = None

    def is_expired(self, moment: str) -> bool:
        """Return whether its time to live is over at ``moment``."""
        return self.expires_at is not None and self.expires_at <= moment


@dataclass(frozen=True, slots=True)
class Point:
    """The newest branch point of a head; see the schema."""

    head_id: str
    point_id: str
    live_uuid: str
    lsn: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a head."""

    at: str
    name: str
    what: str
    detail: str


_COLUMNS = tuple(field.name for field in dataclasses.fields(Head))


def format_time(moment: datetime.datetime) -> str:
    """Return a time as the store has it: UTC, to the millisecond."""
    moment = moment.astimezone(datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def parse_time(text: str) -> datetime.datetime:
    """Return the time that ``format_time`` wrote."""
    return datetime.datetime.fromisoformat(text)


def now() -> str:
    """Return the present time as the store has it."""
    return format_time(datetime.datetime.now(datetime.UTC))


class Store:
    """The store at ``path``; made if there is none. Raises HostError, FormatError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        try:
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                os.chmod(path, 0o600)
                self._db.row_factory = sqlite3.Row
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA foreign_keys = ON")
                self._migrate()
            except BaseException:
                self._db.close()
                raise
        except sqlite3.DatabaseError as error:
            raise _explain(path, error) from error

    def close(self) -> None:
        """Close the connection. In a forked child it does nothing: SQLite forbids it there."""
        if os.getpid() == self._pid:
            self._db.close()

    def _migrate(self) -> None:
        if self._version() == VERSION:
            return
        with self.transaction() as tx:
            found = self._version()
            if found > VERSION:
                raise FormatError(
                    f"the store {self.path} has version {found}, this program knows {VERSION}",
                    hint="Use the version of pbkfs that made it.",
                )
            if found == 0:
                tx.script(_SCHEMA.read_text(encoding="utf-8"))
            else:
                for step in _MIGRATIONS[found - 1 :]:
                    tx.script(step)
            tx.script(f"PRAGMA user_version = {VERSION};")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def changes(self) -> int:
        """Return a number that is another one once another connection has changed the store."""
        with self._mutex:
            try:
                return int(self._db.execute("PRAGMA data_version").fetchone()[0])
            except sqlite3.DatabaseError as error:
                raise _explain(self.path, error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Begin a transaction that may write; commits at the end, rolls back on an exception."""
        with self._mutex:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield Transaction(self._db)
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise _explain(self.path, error) from error

    # --- single reads and writes ----------------------------------------------------------------

    def heads(self, kind: Kind | None = None) -> list[Head]:
        """Return all heads, or those of a kind, oldest first."""
        with self.transaction() as tx:
            return tx.heads(kind)

    def find(self, name: str) -> Head | None:
        """Return the head of this name, or None."""
        with self.transaction() as tx:
            return tx.find(name)

    def get(self, head_id: str) -> Head | None:
        """Return the head with this id, or None."""
        with self.transaction() as tx:
            return tx.get(head_id)

    def update(self, head_id: str, **values: Any) -> None:
        """Change columns of a head."""
        with self.transaction() as tx:
            tx.update(head_id, **values)

    def record(self, head: Head, what: str, detail: str = "") -> None:
        """Write an event of a head down."""
        with self.transaction() as tx:
            tx.record(head, what, detail)


class Transaction:
    """What can be done in one transaction."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def script(self, text: str) -> None:
        """Run statements one by one; ``executescript`` would commit first."""
        statement = ""
        for line in text.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                self._db.execute(statement)
                statement = ""

    # --- heads ----------------------------------------------------------------------------------

    def heads(self, kind: Kind | None = None) -> list[Head]:
        """Return all heads, or those of a kind, oldest first."""
        where, values = ("WHERE kind = ?", (kind,)) if kind else ("", ())
        return self._select(f"{where} ORDER BY created_at, rowid", values)

    def find(self, name: str) -> Head | None:
        """Return the head of this name, or None."""
        return next(iter(self._select("WHERE name = ?", (name,))), None)

    def check_name_is_free(self, name: str) -> None:
        """Raise NameConflictError if a trunk or branch has this name."""
        other = self.find(name)
        if other is not None:
            raise NameConflictError(f"a {other.kind} named {name!r} exists already")

    def get(self, head_id: str) -> Head | None:
        """Return the head with this id, or None."""
        return next(iter(self._select("WHERE id = ?", (head_id,))), None)

    def children(self, head_id: str) -> list[Head]:
        """Return what was branched from a head, oldest first."""
        return self._select("WHERE parent_id = ? ORDER BY created_at, rowid", (head_id,))

    def depth(self, head: Head) -> int:
        """Return how many heads are above this one: 0 for a trunk."""
        (depth,) = self._db.execute(
            """
            WITH RECURSIVE above (id, parent_id) AS (
                SELECT id, parent_id FROM heads WHERE id = ?
                UNION ALL
                SELECT h.id, h.parent_id FROM heads h JOIN above a ON h.id = a.parent_id
            )
            SELECT count(*) - 1 FROM above
            """,
            (head.id,),
        ).fetchone()
        return int(depth)

    def insert(self, head: Head, tags: Sequence[str] = ()) -> None:
        """Add a head with its tags."""
        marks = ", ".join("?" * len(_COLUMNS))
        values = [getattr(head, name) for name in _COLUMNS]
        self._db.execute(f"INSERT INTO heads ({', '.join(_COLUMNS)}) VALUES ({marks})", values)
        self.add_tags(head.id, tags)

    def update(self, head_id: str, **values: Any) -> None:
        """Change columns of a head."""
        assert values.keys() <= set(_COLUMNS), values
        assignments = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(
            f"UPDATE heads SET {assignments} WHERE id = ?", (*values.values(), head_id)
        )

    def set_stopped(self, head_id: str, **values: Any) -> None:
        """Note that a head has no server and nothing under way; and what else changes with it."""
        self.update(
            head_id,
            status="stopped",
            operation="",
            error="",
            server_pid=0,
            server_ticks=0,
            **values,
        )

    def delete(self, head_id: str) -> None:
        """Remove a head, its port, tags and point."""
        self._db.execute("DELETE FROM heads WHERE id = ?", (head_id,))

    def _select(self, rest: str, values: Sequence[object] = ()) -> list[Head]:
        rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM heads {rest}", values)
        return [_to_head(row) for row in rows]

    # --- ports, tags, points, events ------------------------------------------------------------

    def ports(self) -> dict[int, str]:
        """Return the ports that are taken, and by which head."""
        rows = self._db.execute("SELECT port, head_id FROM ports ORDER BY port")
        return {int(port): str(head_id) for port, head_id in rows}

    def take_port(self, port: int, head_id: str) -> None:
        """Give a free port to a head, in the place of the one it had."""
        self.release_port(head_id)
        self._db.execute("INSERT INTO ports (port, head_id) VALUES (?, ?)", (port, head_id))
        self.update(head_id, port=port)

    def release_port(self, head_id: str) -> None:
        """Take the port from a head; the head remembers it."""
        self._db.execute("DELETE FROM ports WHERE head_id = ?", (head_id,))

    def tags(self) -> dict[str, list[str]]:
        """Return the tags of all heads that have any, sorted, by the head's id."""
        found: dict[str, list[str]] = {}
        for head_id, tag in self._db.execute("SELECT head_id, tag FROM tags ORDER BY tag"):
            found.setdefault(head_id, []).append(tag)
        return found

    def add_tags(self, head_id: str, tags: Sequence[str]) -> None:
        """Add tags; those that it has already stay."""
        self._db.executemany(
            "INSERT OR IGNORE INTO tags (head_id, tag) VALUES (?, ?)", [(head_id, t) for t in tags]
        )

    def remove_tags(self, head_id: str, tags: Sequence[str]) -> None:
        """Remove tags; those that it has not are no error."""
        self._db.executemany(
            "DELETE FROM tags WHERE head_id = ? AND tag = ?", [(head_id, t) for t in tags]
        )

    def point(self, head_id: str) -> Point | None:
        """Return the newest branch point of a head, or None."""
        row = self._db.execute(
            "SELECT head_id, point_id, live_uuid, lsn, created_at FROM points WHERE head_id = ?",
            (head_id,),
        ).fetchone()
        return Point(*row) if row else None

    def set_point(self, point: Point) -> None:
        """Replace the newest branch point of a head."""
        self._db.execute(
            "INSERT OR REPLACE INTO points (head_id, point_id, live_uuid, lsn, created_at) "
            "VALUES (?, ?, ?, ?, ?)",
            (point.head_id, point.point_id, point.live_uuid, point.lsn, point.created_at),
        )

    def remove_point(self, head_id: str) -> None:
        """Forget the newest branch point of a head."""
        self._db.execute("DELETE FROM points WHERE head_id = ?", (head_id,))

    def point_ids(self) -> set[str]:
        """Return all branch points that a head was made from or has as its newest."""
        rows = self._db.execute(
            "SELECT point_id FROM points UNION SELECT point_id FROM heads WHERE point_id <> ''"
        )
        return {str(row[0]) for row in rows}

    def record(self, head: Head, what: str, detail: str = "") -> None:
        """Write an event down."""
        self._db.execute(
            "INSERT INTO events (at, head_id, name, what, detail) VALUES (?, ?, ?, ?, ?)",
            (now(), head.id, head.name, what, detail),
        )

    def events(self, head_id: str, limit: int = 100) -> list[Event]:
        """Return the newest events of a head, oldest first."""
        rows = self._db.execute(
            "SELECT at, name, what, detail FROM events WHERE head_id = ? ORDER BY id DESC LIMIT ?",
            (head_id, limit),
        ).fetchall()
        return [Event(*row) for row in reversed(rows)]


def _to_head(row: sqlite3.Row) -> Head:
    values = dict(zip(_COLUMNS, row, strict=True))
    for name in ("is_wanted", "is_asleep"):
        values[name] = bool(values[name])
    return Head(**values)


def _explain(path: Path, error: sqlite3.Error) -> HostError | FormatError:
    said = str(error)
    if isinstance(error, sqlite3.OperationalError):
        return HostError(
            f"cannot use the store {path}: {said}",
            hint="Check that this user may write there, and that the disk is not full.",
        )
    return FormatError(
        f"the store {path} is damaged: {said}", hint="Put metadata.db back from a copy."
    )
