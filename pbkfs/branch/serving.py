"""The server of a head: start it on the head's mount, ask it, stop it.

Nothing here knows how the PGDATA came about. Called by ``lifecycle``; blocking.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pbkfs import durable
from pbkfs.branch.layout import Layout
from pbkfs.branch.settings import Settings
from pbkfs.branch.store import Head
from pbkfs.errors import (
    BusyError,
    HostError,
    NotRunningError,
    PbkfsError,
    PostgresError,
    TimedOutError,
)
from pbkfs.postgres.binaries import read_binaries
from pbkfs.postgres.cgroup import Cgroups, Limits
from pbkfs.postgres.cluster import Cluster, open_cluster
from pbkfs.postgres.launch import Reporter, StartOptions
from pbkfs.postgres.network import port_is_free
from pbkfs.postgres.postmaster import Postmaster, find_postmaster, read_pid_file
from pbkfs.postgres.query import make_scram_secret, quote_identifier, run_query
from pbkfs.postgres.running import stop
from pbkfs.postgres.server import start

_STOP_LIMIT_S = 120.0
_KILL_LIMIT_S = 10.0

# The socket lies in a directory of the server's user, 0700. md5 takes both kinds of stored
# passwords, so that the roles of the original can still log in; ours is always a SCRAM one.
_LOCAL = "local all all trust\nlocal replication all trust\n"
_HBA = {
    "password": "host all {user} all scram-sha-256\nhost all all all md5\n"
    "host replication all all md5\n",
    "trust": "host all all all trust\nhost replication all all trust\n",
}


# Our own question is a client, too. Sessions are counted since the last reset of statistics.
_ACTIVITY = """
SELECT count(*) FILTER (WHERE pid <> pg_backend_pid()),
       (SELECT coalesce(sum(sessions), 0) FROM pg_stat_database)
FROM pg_stat_activity WHERE backend_type IN ('client backend', 'walsender')
"""


@dataclass(frozen=True, slots=True)
class Activity:
    """Who uses a server: clients now, beside us, and sessions so far, with ours."""

    n_clients: int
    n_sessions: int


@dataclass(frozen=True, slots=True)
class Served:
    """A server that came up."""

    postmaster: Postmaster
    port: int
    version: str
    bindir: str


class Serving:
    """Servers on the mounts of one DATA directory."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        self._layout = layout
        self._settings = settings
        self.cgroups = Cgroups()

    def cluster(self, head: Head) -> Cluster:
        """Return the mounted PGDATA of a head. Raises PbkfsError."""
        return open_cluster(self._layout.mount(head.id), self._layout.head(head.id))

    def is_port_free(self, port: int) -> bool:
        """Return whether a server could listen on ``port`` now."""
        return port_is_free(self._settings.listen_addresses, port)

    def start(self, head: Head, say: Callable[[str], None]) -> Served:
        """Start the server of a mounted head on its port and wait until it answers.

        Raises BusyError where the port was taken meanwhile, PostgresError, TimedOutError.
        """
        user = '"' + head.pg_user.replace('"', '""') + '"'
        settings = [("cluster_name", f"pbkfs {head.name}")]
        if head.wal_level:
            settings.append(("wal_level", head.wal_level))
        cluster = self.cluster(head)
        options = StartOptions(
            bindir=Path(head.bindir) if head.bindir else self._preferred_bindir(cluster.major),
            port=head.port,
            listen_addresses=self._settings.listen_addresses,
            settings=settings,
            hba=_LOCAL + _HBA[head.auth].format(user=user),
            user=head.pg_user,
            cgroup=self.cgroups.make(head.id, Limits(head.cpu_limit, head.memory_limit_bytes)),
        )
        started = start(cluster, options, Reporter(say, lambda _: None))
        assert started.postmaster is not None
        assert started.place is not None
        return Served(
            started.postmaster,
            started.place.port,
            started.binaries.version,
            str(started.binaries.bindir),
        )

    def _preferred_bindir(self, major: int) -> Path | None:
        """Return the programs that the settings name, if they are of this major."""
        bindir = self._settings.pg_bin_dir
        found = read_binaries(bindir) if bindir is not None else None
        return bindir if found is not None and found.major == major else None

    def find(self, head: Head) -> Postmaster | None:
        """Return the running server of a head: by what the store knows, else by a search."""
        if head.server_pid:
            known = Postmaster(head.server_pid, head.server_ticks, self._layout.mount(head.id))
            if known.is_alive():
                return known
        return find_postmaster(self._layout.mount(head.id))

    def is_running(self, head: Head) -> bool:
        """Return whether the very server that the store knows of runs."""
        return (
            bool(head.server_pid)
            and Postmaster(
                head.server_pid, head.server_ticks, self._layout.mount(head.id)
            ).is_alive()
        )

    def ask(self, head: Head, sql: str, *, timeout_s: float = 60.0) -> list[list[str | None]]:
        """Run SQL as the head's user over the trusted socket. Raises PostgresError, TimedOutError,
        NotRunningError."""
        data_dir = self._layout.mount(head.id)
        pid_file = read_pid_file(data_dir)
        if pid_file is None or pid_file.port is None:
            runs = "runs, but its postmaster.pid can't be read" if self.find(head) else "is gone"
            raise NotRunningError(f"the server of {head.kind} {head.name!r} {runs}")
        return run_query(
            Path(pid_file.socket_dir), pid_file.port, sql, user=head.pg_user, timeout_s=timeout_s
        )

    def activity(self, head: Head, *, timeout_s: float = 5.0) -> Activity:
        """Return who uses the running server of a head. Raises as ``ask`` does."""
        ((n_clients, n_sessions),) = self.ask(head, _ACTIVITY, timeout_s=timeout_s)
        return Activity(int(n_clients or 0), int(float(n_sessions or 0)))

    def stop(self, head: Head, mode: str = "fast") -> None:
        """Stop the server of a head if it runs; a fast stop that takes too long is made immediate.

        Raises TimedOutError, HostError.
        """
        data_dir = self._layout.mount(head.id)
        owner = None
        with contextlib.suppress(PbkfsError, OSError):
            owner = self.cluster(head).owner
        with contextlib.suppress(NotRunningError):
            if mode != "immediate":
                try:
                    stop(data_dir, owner, mode, _STOP_LIMIT_S)
                except TimedOutError:
                    mode = "immediate"
            if mode == "immediate":
                stop(data_dir, owner, mode, _KILL_LIMIT_S)
        # Also that of a server that ended by itself. In use, it stays.
        self.cgroups.remove(head.id)

    def remove_slots(self, head: Head) -> list[str]:
        """Remove the replication slots in the data of a head that is mounted; returns their names.

        No server may run on it. A copy of a physical slot keeps WAL for ever, as the one who would
        fetch it does so from the original, and one of a logical slot can't be used.
        Source: src/backend/replication/slot.c. Raises HostError.
        """
        place = self._layout.mount(head.id) / "pg_replslot"
        try:
            found = sorted(path for path in place.iterdir() if path.is_dir())
            for path in found:
                shutil.rmtree(path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HostError(
                f"cannot remove {error.filename}: {(error.strerror or str(error)).lower()}"
            ) from error
        return [path.name for path in found]

    # --- passwords ------------------------------------------------------------------------------

    def make_password(self, head: Head) -> None:
        """Give a head a random password; the server is told by ``set_password``. Raises OSError."""
        path = self._layout.secret(head.id)
        if head.auth == "password" and not path.exists():
            durable.replace_file(path, secrets.token_urlsafe(18).encode() + b"\n", label="secret")

    def password(self, head: Head) -> str | None:
        """Return the password of a head; None if it trusts everybody. Raises OSError."""
        if head.auth == "trust":
            return None
        return self._layout.secret(head.id).read_text(encoding="ascii").strip()

    def set_password(self, head: Head) -> None:
        """Tell the running server of a head its password. Raises PostgresError."""
        password = self.password(head)
        if password is None:
            return
        role = quote_identifier(head.pg_user)
        try:
            self.ask(head, f"ALTER ROLE {role} PASSWORD '{make_scram_secret(password)}'")
        except PostgresError as error:
            raise PostgresError(
                f"cannot set the password of role {head.pg_user!r}: {error.message}",
                hint="Name a superuser of the cluster with PBKFS_DEFAULT_PG_USER.",
            ) from error

    def forget_password(self, head: Head) -> None:
        """Remove the password of a head that is gone."""
        path = self._layout.secret(head.id)
        for leftover in (path, *path.parent.glob(f".{path.name}.*.tmp")):
            leftover.unlink(missing_ok=True)


def free_of_holders(unmount: Callable[[], None], limit_s: float = 5.0) -> None:
    """Call ``unmount`` again and again while it says busy.

    The last processes of a server that ended may take a moment to let go of their directory.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return unmount()
        except BusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)
