"""A server that runs: describe it, stop it, connect to it.

Called by the command line, in one thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import NotRunningError, PostgresError, TimedOutError
from pbkfs.postgres.account import Account
from pbkfs.postgres.binaries import Binaries, read_binaries
from pbkfs.postgres.cluster import Cluster, is_in_recovery
from pbkfs.postgres.launch import Started, default_logs
from pbkfs.postgres.network import (
    TRUSTING_HBA,
    Place,
    remove_run_directory,
    run_directory,
)
from pbkfs.postgres.postmaster import Postmaster, find_postmaster, find_survivors, read_pid_file

STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

_POLL_S = 0.05
# Children of a killed postmaster notice within this time that it is gone.
_SURVIVORS_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of a running server; None where this user may not ask it."""

    postmaster: Postmaster
    place: Place | None
    uri: str | None
    state: str
    is_in_recovery: bool | None
    is_paused: bool | None
    lsn: str | None
    version: str
    log: Path | None
    started_at: float


# --- stop -------------------------------------------------------------------------------------


def stop(data_dir: Path, owner: Account | None, mode: str, timeout_s: float) -> Postmaster:
    """Stop the server of ``data_dir`` and wait until its last process is gone.

    ``owner`` is None where PGDATA cannot be looked into (a dead mount). Raises NotRunningError,
    TimedOutError, HostError.
    """
    running = find_postmaster(data_dir)
    if running is None:
        raise NotRunningError(f"no server runs on {data_dir}")
    if running.send_signal(STOP_SIGNALS[mode]) and not running.wait_gone(timeout_s):
        raise TimedOutError(
            f"the server of {data_dir} (pid {running.pid}) does not stop within {timeout_s:g} s",
            hint="A smart stop waits for clients, and a fast one for its checkpoint; "
            "-m immediate stops at once, and the next start recovers.",
        )
    deadline = time.monotonic() + _SURVIVORS_LIMIT_S
    while find_survivors(data_dir) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if owner is not None:
        remove_run_directory(data_dir, owner)
    return running


# --- status -----------------------------------------------------------------------------------

_QUESTION = (
    "select pg_is_in_recovery(), "
    "case when pg_is_in_recovery() then pg_is_wal_replay_paused() else false end, "
    "case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end, "
    "current_setting('server_version')"
)


def read_status(cluster: Cluster, user: str = "postgres") -> Status | None:
    """Return what is known of the server of ``cluster``, or None if none runs."""
    running = find_postmaster(cluster.data_dir)
    if running is None:
        return None
    pid_file = read_pid_file(cluster.data_dir)
    place = None
    state = ""
    if pid_file is not None and pid_file.pid == running.pid:
        state = pid_file.status
        if pid_file.port and pid_file.socket_dir:
            place = Place(pid_file.port, pid_file.listen_address, Path(pid_file.socket_dir))
    binaries = _binaries_of(running)
    answer = _ask(cluster, place, binaries, user) if place and state != "starting" else None
    in_recovery: bool | None = is_in_recovery(cluster.data_dir)
    is_paused: bool | None = None
    lsn = None
    version = binaries.version if binaries else str(cluster.major)
    if answer is not None:
        in_recovery, is_paused = answer[0] == "t", answer[1] == "t"
        lsn, version = answer[2] or None, answer[3]
    return Status(
        running,
        place,
        place.uri(user, prefer_socket=_trusts_socket(cluster, running)) if place else None,
        state or "starting",
        in_recovery,
        is_paused,
        lsn,
        version,
        _find_log(cluster, running),
        running.started_at(),
    )


def _find_log(cluster: Cluster, running: Postmaster) -> Path | None:
    """Return the server's log: a default place if it is there, else what its descriptor is called.

    The name of a descriptor is that in the server's mount namespace.
    """
    for path in default_logs(cluster, run_directory(cluster.data_dir, cluster.owner)):
        with contextlib.suppress(OSError):
            if os.path.samefile(path, f"/proc/{running.pid}/fd/2"):
                return path.absolute()
    return running.log_path()


def _trusts_socket(cluster: Cluster, running: Postmaster) -> bool:
    """Whether the server was started with ``--trust-local``: its hba file is then ours."""
    path = run_directory(cluster.data_dir, cluster.owner) / TRUSTING_HBA
    return f"hba_file={path}" in running.arguments()


def _binaries_of(running: Postmaster) -> Binaries | None:
    """Return the installation which a server was started from, with psql if there is one."""
    found = [b for b in map(read_binaries, running.bindirs()) if b is not None]
    with_psql = [binaries for binaries in found if binaries.tool("psql")]
    return next(iter(with_psql or found), None)


def _ask(cluster: Cluster, place: Place, binaries: Binaries | None, user: str) -> list[str] | None:
    """Ask the server as its own user over the socket; None if it lets nobody in like that."""
    psql = binaries.tool("psql") if binaries else None
    if psql is None:
        return None
    address = ["-h", str(place.socket_dir), "-p", str(place.port), "-U", user, "-d", "postgres"]
    try:
        done = subprocess.run(
            [psql, "-XAtqw", "-F", "\t", *address, "-c", _QUESTION],
            cwd="/",
            env={**cluster.owner.environment(), "PGCONNECT_TIMEOUT": "5"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            check=False,
            **cluster.owner.popen_identity(),
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = os.fsdecode(done.stdout).strip("\n").split("\t")
    return fields if done.returncode == 0 and len(fields) == 4 else None


def exec_psql(started: Started, cluster: Cluster, user: str) -> None:
    """Become psql, connected to the server over its socket; returns only by raising."""
    psql = started.binaries.tool("psql")
    if psql is None or started.place is None:
        raise PostgresError(
            f"no psql in {started.binaries.bindir}", hint="Connect with another client."
        )
    environment = cluster.owner.environment()
    uri = started.place.uri(user, prefer_socket=True)
    cluster.owner.become()
    os.execve(psql, [str(psql), uri], environment)
