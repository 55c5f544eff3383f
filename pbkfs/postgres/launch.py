"""One attempt to start a server: the child, its log, and the wait until it is ready.

The server is a child in a session of its own; it outlives the caller. Used by ``server`` only, in
one thread.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pbkfs.errors import HostError, PostgresError, TimedOutError
from pbkfs.postgres.account import Account
from pbkfs.postgres.binaries import Binaries
from pbkfs.postgres.cgroup import Cgroups
from pbkfs.postgres.cluster import MOUNT_IS_GONE, Cluster, is_in_recovery, mount_is_gone
from pbkfs.postgres.network import Place
from pbkfs.postgres.postmaster import Postmaster, identify, ping, read_pid_file
from pbkfs.postgres.recovery import Recovery, RecoveryTarget
from pbkfs.postgres.wal_feeder import WalFeeder

_POLL_S = 0.02
_TAIL_LINES = 20
_END_LIMIT_S = 5.0

# Source: src/backend/access/transam/xlogrecovery.c, recoveryPausesHere and ReadRecord. lc_messages
# is C for a server that pauses, because nothing but its log tells when it does.
_PAUSED = ("pausing at the end of recovery", "recovery has paused")
_TARGET_MISSED = "recovery ended before configured recovery target was reached"
_TARGET_TOO_EARLY = "requested recovery stop point is before consistent recovery point"


@dataclass(frozen=True, slots=True)
class StartOptions:
    """What the user may choose about a start; the defaults are the safe ones."""

    bindir: Path | None = None
    port: int | None = None
    listen_addresses: str = "127.0.0.1"
    socket_dir: Path | None = None
    shared_buffers: str | None = None
    settings: Sequence[tuple[str, str]] = ()
    arguments: Sequence[str] = ()
    trusts_socket: bool = False
    hba: str | None = None
    """The whole text of an hba file to use in the place of PGDATA's."""
    target: RecoveryTarget | None = None
    archive: Path | None = None
    log: Path | None = None
    user: str = "postgres"
    timeout_s: float = 300.0
    cgroup: Path | None = None
    """The group that the server is started in."""


@dataclass(frozen=True, slots=True)
class Started:
    """A server that came up. ``place`` is None for one that recovered and shut itself down."""

    postmaster: Postmaster | None
    place: Place | None
    uri: str | None
    log: Path
    binaries: Binaries
    is_paused: bool = False


def _say_nothing(text: str) -> None:
    """Drop ``text``."""
    del text


@dataclass(slots=True)
class Reporter:
    """Where a start tells what it does: notices once, progress again and again."""

    notice: Callable[[str], None] = field(default=_say_nothing)
    progress: Callable[[str], None] = field(default=_say_nothing)


# --- the log ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerLog:
    """The file that takes the server's stderr, open for appending."""

    path: Path
    fd: int

    def since(self, offset: int) -> list[str]:
        """Return the lines written after ``offset``."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace").splitlines()

    def size(self) -> int:
        """Return how long it is now."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Let go of the file; the server has its own descriptor."""
        os.close(self.fd)


def default_logs(cluster: Cluster, run_dir: Path) -> list[Path]:
    """Return where a server's log may be, if nobody named it: in the diff, or beside PGDATA."""
    if cluster.diff is not None:
        return [cluster.diff / "log" / "postgres.log", run_dir / "postgres.log"]
    beside = cluster.data_dir.parent / f"{cluster.data_dir.name}.postgres.log"
    return [beside, run_dir / "postgres.log"]


def open_log(cluster: Cluster, named: Path | None, run_dir: Path) -> ServerLog:
    """Open the server's log for appending: where it was named, or the first default that works."""
    candidates = default_logs(cluster, run_dir) if named is None else [named]
    problem: OSError | None = None
    for path in candidates:
        try:
            if path.parent.name == "log" and cluster.diff is not None:
                path.parent.mkdir(mode=0o700, exist_ok=True)
            return ServerLog(path.absolute(), _open_for(cluster.owner, path))
        except OSError as error:
            problem = error
    assert problem is not None
    raise HostError(
        f"cannot write the log {candidates[0]}: {problem.strerror}",
        hint="Name another file with --log.",
    )


def _open_for(owner: Account, path: Path) -> int:
    """Open a log; a new one is the server's user's, who may start the next server himself."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags, 0o600)
    if os.geteuid() == 0:
        os.fchown(fd, owner.uid, owner.gid)
    return fd


# --- launching and waiting --------------------------------------------------------------------


class PortTakenError(Exception):
    """Another process bound the port between our look and the server's bind."""


class Launch:
    """The child that becomes the server, until it is ready. ``begin``, then ``wait``."""

    def __init__(
        self,
        cluster: Cluster,
        binaries: Binaries,
        log: ServerLog,
        recovery: Recovery | None,
        feeder: WalFeeder | None,
        options: StartOptions,
    ) -> None:
        self._cluster = cluster
        self._binaries = binaries
        self._log = log
        self._recovery = recovery
        self._feeder = feeder
        self._options = options

    def begin(self, arguments: Sequence[str], place: Place) -> None:
        """Run the server with ``arguments``, which say that it listens at ``place``."""
        self._place = place
        self._offset = self._log.size()
        with Cgroups().entered(self._options.cgroup):
            self._child = subprocess.Popen(
                [self._binaries.postgres, "-D", self._cluster.data_dir, *arguments],
                cwd="/",
                env=self._cluster.owner.environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._log.fd,
                stderr=self._log.fd,
                start_new_session=True,
                umask=0o077,
                **self._cluster.owner.popen_identity(),
            )
        if self._feeder is not None:
            self._feeder.serve(self._child.pid)

    def wait(self, reporter: Reporter) -> Started:
        """Wait until the server is ready, paused at its target, or ended."""
        deadline = time.monotonic() + self._options.timeout_s
        while True:
            ended = self._wait_child()
            if ended is not None:
                return self._ended(ended)
            if self._is_ready() and self._accepts_connections():
                return self._started()
            self._report(reporter)
            self._check_mount()
            if time.monotonic() >= deadline:
                raise TimedOutError(
                    f"the server of {self._cluster.data_dir} is not ready after "
                    f"{self._options.timeout_s:g} s; it goes on (pid {self._child.pid}, "
                    f"log {self._log.path})",
                    hint="pbkfs status shows when it is ready; pbkfs stop ends it.",
                )

    def _check_mount(self) -> None:
        """Raise NotRunningError, without a server, if the mount that it lies on has died.

        A server whose files are gone does not always end.
        """
        try:
            os.statvfs(self._cluster.data_dir)
        except OSError as error:
            if error.errno not in MOUNT_IS_GONE:
                return
            self._child.send_signal(signal.SIGQUIT)
            try:
                self._child.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            raise mount_is_gone(self._cluster.data_dir) from error

    def _accepts_connections(self) -> bool:
        socket_dir, port = str(self._place.socket_dir), self._place.port
        return ping(socket_dir, port, self._options.user) == "accepting"

    def _wait_child(self) -> int | None:
        try:
            return self._child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            return None

    def _status(self) -> str:
        pid_file = read_pid_file(self._cluster.data_dir)
        # Until the server has written its own, the file may be an earlier one's.
        return pid_file.status if pid_file and pid_file.pid == self._child.pid else ""

    def _is_ready(self) -> bool:
        # Source: postmaster.c writes "ready" as soon as it accepts connections, which a server that
        # recovers does long before its target.
        if self._status() != "ready":
            return False
        return self._recovery is None or self._is_promoted() or self._is_paused()

    def _is_promoted(self) -> bool:
        data_dir = self._cluster.data_dir
        if is_in_recovery(data_dir) is not False:
            return False
        # pg_control says it an instant before the startup process lets writers in, and ends.
        postmaster = identify(self._child.pid, data_dir)
        return postmaster is not None and not postmaster.activity()

    def _is_paused(self) -> bool:
        recovery = self._recovery
        if recovery is None or recovery.target.action != "pause":
            return False
        return any(mark in line for line in self._log.since(self._offset) for mark in _PAUSED)

    def _report(self, reporter: Reporter) -> None:
        postmaster = identify(self._child.pid, self._cluster.data_dir)
        activity = postmaster.activity() if postmaster else ""
        reporter.progress(activity or "starting")

    def _started(self) -> Started:
        postmaster = identify(self._child.pid, self._cluster.data_dir)
        if postmaster is None:
            return self._ended(self._child.wait())
        # The server outlives us; Popen must neither wait for it nor warn about it.
        self._child.returncode = 0
        return Started(
            postmaster,
            self._place,
            self._place.uri(self._options.user, prefer_socket=self._options.trusts_socket),
            self._log.path,
            self._binaries,
            self._recovery is not None and is_in_recovery(self._cluster.data_dir) is True,
        )

    def _ended(self, code: int) -> Started:
        recovery = self._recovery
        lines = self._log.since(self._offset)
        if code == 0 and recovery is not None and recovery.target.action == "shutdown":
            return Started(None, None, None, self._log.path, self._binaries)
        if any(_is_port_complaint(line) for line in lines):
            raise PortTakenError
        hint = f"The whole log is {self._log.path}."
        if any(_TARGET_MISSED in line for line in lines):
            hint = (
                "The archive ends before the recovery target, or the target is before the end of "
                "the backup. Start again with another target, or with --recovery-target latest "
                f"to take all that there is. {hint}"
            )
        elif any(_TARGET_TOO_EARLY in line for line in lines):
            hint = (
                "The target is before the end of the backup: name a later one, or mount an older "
                f"backup. {hint}"
            )
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        tail = "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
        raise PostgresError(
            f"the server of {self._cluster.data_dir} did not come up: {how}; the end of its log:\n"
            f"{tail or '  (nothing)'}",
            hint=hint,
        )


def _is_port_complaint(line: str) -> bool:
    # Source: src/backend/libpq/pqcomm.c; strerror(EADDRINUSE) in the C locale and in others.
    return os.strerror(errno.EADDRINUSE) in line or "Address already in use" in line
