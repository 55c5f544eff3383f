"""What is shown of trunks and branches, ready for a table, JSON or the REST interface. Pure."""

from __future__ import annotations

import datetime
import shlex
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from pbkfs.branch.engine import Size
from pbkfs.branch.store import Event, Head, parse_time


@dataclass(frozen=True, slots=True)
class Connection:
    """How to connect to a server. ``password`` is None where none is asked for or none is shown."""

    host: str
    port: int
    user: str
    database: str
    password: str | None = None

    @property
    def uri(self) -> str:
        """A connection URI, with the password if it is shown."""
        secret = "" if self.password is None else f":{quote(self.password, safe='')}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = quote(self.user, safe="")
        return f"postgresql://{user}{secret}@{host}:{self.port}/{quote(self.database, safe='')}"

    @property
    def psql(self) -> str:
        """A command for a shell."""
        return f"psql {shlex.quote(self.uri)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of JSON."""
        found: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "database": self.database,
            "uri": self.uri,
        }
        if self.password is not None:
            found |= {"password": self.password, "psql": self.psql}
        return found


@dataclass(frozen=True, slots=True)
class HeadView:
    """A trunk or a branch as it is shown."""

    head: Head
    status: str
    parent: str | None
    tags: list[str]
    size: Size
    connection: Connection | None
    depth: int = 0
    children: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its name."""
        return self.head.name

    def age_s(self) -> float:
        """Return how many seconds ago it was created."""
        return max(0.0, (_now() - parse_time(self.head.created_at)).total_seconds())

    def ttl_s(self) -> float | None:
        """Return how many seconds are left of its life, None if it has no end."""
        if self.head.expires_at is None:
            return None
        return (parse_time(self.head.expires_at) - _now()).total_seconds()

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of JSON."""
        head = self.head
        found: dict[str, Any] = {
            "id": head.id,
            "name": head.name,
            "kind": head.kind,
            "status": self.status,
            "parent": self.parent,
            "children": self.children,
            "created_at": head.created_at,
            "started_at": head.started_at,
            "expires_at": head.expires_at,
            "tags": self.tags,
            "pg_version": head.pg_version,
            "port": head.port or None,
            "database": head.pg_database,
            "auth": head.auth,
            "size_bytes": self.size.total_bytes,
            "own_bytes": self.size.own_bytes,
            "shared_bytes": self.size.shared_bytes,
            "connection": self.connection.to_json() if self.connection else None,
        }
        if head.kind == "trunk":
            found |= {"wal_level": head.wal_level, "source": head.source}
        else:
            found |= {
                "idle_stop_seconds": head.idle_stop_s,
                "asleep": head.is_asleep,
                "cpu_limit": head.cpu_limit,
                "memory_limit_bytes": head.memory_limit_bytes,
            }
        if head.error:
            found["error"] = head.error
        if self.notes:
            found["notes"] = self.notes
        return found


@dataclass(frozen=True, slots=True)
class Overview:
    """What ``pbkfs status`` and ``/health`` show."""

    version: str
    trunks_running: int
    trunks_total: int
    branches_running: int
    branches_stopped: int
    branches_total: int
    storage_used_bytes: int
    shared_bytes: int
    status: str = "healthy"
    uptime_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as an object of JSON."""
        found: dict[str, Any] = {
            "status": self.status,
            "version": self.version,
            "trunks_running": self.trunks_running,
            "trunks_total": self.trunks_total,
            "branches_running": self.branches_running,
            "branches_stopped": self.branches_stopped,
            "branches_total": self.branches_total,
            "storage_used_bytes": self.storage_used_bytes,
            "shared_bytes": self.shared_bytes,
        }
        if self.uptime_s is not None:
            found["uptime_seconds"] = int(self.uptime_s)
        return found


@dataclass(frozen=True, slots=True)
class Log:
    """The log of a head: what happened to it, and the end of its server's own log."""

    events: list[Event]
    lines: list[str]
    path: str


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
