"""Which process is the postmaster of a PGDATA: its identity, its pid file, signals to it.

A postmaster is pid + process start time + data directory. A pid file alone proves nothing: it is in
a copy of a live PGDATA, it stays after a crash, and its pid goes to the next process. So the word
of /proc counts, and the pid file only says where the server listens. Any thread.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import HostError

_PROGRAMS = ("postgres", "postmaster")


@dataclass(frozen=True, slots=True)
class PidFile:
    """What postmaster.pid says. Source: src/include/utils/pidfile.h. Empty where a line is missing:
    PostgreSQL writes the file line by line while it starts."""

    pid: int
    data_dir: str
    started_at: int
    port: int | None
    socket_dir: str
    listen_address: str
    status: str


@dataclass(frozen=True, slots=True)
class Postmaster:
    """One running server. ``start_ticks`` counts clock ticks since boot."""

    pid: int
    start_ticks: int
    data_dir: Path

    def is_alive(self) -> bool:
        """Return whether that very process still runs."""
        return _start_ticks(self.pid) == self.start_ticks

    def started_at(self) -> float:
        """Return when the process started, as seconds since the epoch."""
        uptime = self.start_ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + uptime

    def executable(self) -> Path | None:
        """Return the server's program, or None if it may not be seen."""
        try:
            return Path(os.readlink(f"/proc/{self.pid}/exe").removesuffix(" (deleted)"))
        except OSError:
            return None

    def arguments(self) -> list[str]:
        """Return its command line, of which the first word is the program."""
        return os.fsdecode(_read(f"/proc/{self.pid}/cmdline")).split("\0")

    def bindirs(self) -> list[Path]:
        """Return where the other programs of the installation may be, likeliest first."""
        command = Path(self.arguments()[0])
        program = self.executable()
        found = [command.parent] if command.is_absolute() else []
        return [*found, program.parent] if program else found

    def log_path(self) -> Path | None:
        """Return the file that the server's stderr goes to, or None if it is none."""
        try:
            target = os.readlink(f"/proc/{self.pid}/fd/2")
        except OSError:
            return None
        return Path(target) if target.startswith("/") and target != "/dev/null" else None

    def activity(self) -> str:
        """Return what the startup process is doing, or an empty string.

        Source: src/backend/access/transam/xlogrecovery.c sets ``startup recovering FILE``.
        """
        for pid in _children(self.pid):
            title = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")
            before, marker, rest = title.partition(": startup ")
            if marker and before.startswith(_PROGRAMS):
                return rest.strip() or "recovering"
        return ""

    def send_signal(self, signum: int) -> bool:
        """Signal the server; False if it is gone. Raises HostError where that is not allowed.

        The descriptor pins the process between the check and the signal.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.is_alive():
                return False
            signal.pidfd_send_signal(pidfd, signum)
        except ProcessLookupError:
            return False
        except PermissionError as error:
            raise HostError(
                f"not allowed to signal the server of {self.data_dir} (pid {self.pid})",
                hint="Run this as the server's user or as root.",
            ) from error
        finally:
            os.close(pidfd)
        return True

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait until the process is gone; False if it still runs after ``timeout_s``."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.is_alive():
                return True
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            return bool(poller.poll(max(0, int(timeout_s * 1000))))
        finally:
            os.close(pidfd)


def read_pid_file(data_dir: Path) -> PidFile | None:
    """Return what postmaster.pid says, or None if there is none that can be read."""
    try:
        text = (data_dir / "postmaster.pid").read_bytes().decode(errors="replace")
    except OSError:
        return None
    lines = text.split("\n") + [""] * 8
    try:
        # A negative pid is a standalone backend's. Source: miscinit.c, CreateLockFile.
        return PidFile(
            pid=abs(int(lines[0])),
            data_dir=lines[1],
            started_at=int(lines[2] or 0),
            port=int(lines[3]) if lines[3].isdigit() else None,
            socket_dir=lines[4],
            listen_address=lines[5].strip(),
            status=lines[7].strip(),
        )
    except ValueError:
        return None


def find_postmaster(data_dir: Path) -> Postmaster | None:
    """Return the running server of ``data_dir``, or None.

    By its pid file if that names it, else by a search through all processes: the pid file may have
    been removed, or lie on a mount whose worker died.
    """
    pid_file = read_pid_file(data_dir)
    if pid_file is not None:
        found = identify(pid_file.pid, data_dir)
        if found is not None:
            return found
    for pid in _all_pids():
        found = identify(pid, data_dir)
        if found is not None:
            return found
    return None


def identify(pid: int, data_dir: Path) -> Postmaster | None:
    """Return process ``pid`` as the postmaster of ``data_dir``, or None if it is not that."""
    ticks = _start_ticks(pid)
    if ticks is None or not _is_server_process(pid, data_dir):
        return None
    parent = _parent(pid)
    if parent is not None and _is_server_process(parent, data_dir):
        return None  # a backend
    if _has_lost_its_postmaster(pid):
        return None
    found = Postmaster(pid, ticks, data_dir)
    return found if found.is_alive() else None


def find_survivors(data_dir: Path) -> list[int]:
    """Return the pids of all PostgreSQL processes that work in ``data_dir``."""
    return [pid for pid in _all_pids() if _is_server_process(pid, data_dir)]


def running_data_dirs() -> list[Path]:
    """Return the data directories of all servers of this host that may be seen."""
    found = []
    for pid in _all_pids():
        try:
            program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
            if program in _PROGRAMS and _shares_namespace(pid):
                found.append(Path(os.readlink(f"/proc/{pid}/cwd")))
        except OSError:
            continue
    return list(dict.fromkeys(found))


def pid_is_used(pid: int) -> bool:
    """Return whether any process has this pid now, be it a dead one that nobody has waited for.

    PostgreSQL looks with kill(pid, 0), which finds those too.
    """
    return bool(_stat_fields(pid))


def ping(host: str, port: int, user: str, timeout_s: float = 5.0) -> str:
    """Ask a server whether it accepts connections: ``accepting``, ``rejecting`` or ``silent``.

    ``host`` is a socket directory if it begins with ``/``. Needs no password: what counts is which
    answer the startup packet gets. Source: src/interfaces/libpq/fe-connect.c, internal_ping.
    """
    parameters = b"user\0%b\0database\0postgres\0\0" % os.fsencode(user)
    packet = struct.pack("!II", 8 + len(parameters), 3 << 16) + parameters
    try:
        if host.startswith("/"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout_s)
            with connection:
                connection.connect(f"{host}/.s.PGSQL.{port}")
                return _exchange(connection, packet)
        with socket.create_connection((host, port), timeout_s) as connection:
            return _exchange(connection, packet)
    except OSError:
        return "silent"


def _exchange(connection: socket.socket, packet: bytes) -> str:
    connection.sendall(packet)
    answer = connection.recv(4096)
    if answer[:1] != b"E":
        return "accepting" if answer else "silent"
    # 57P03 cannot_connect_now: starting up, shutting down, in recovery without hot standby.
    return "rejecting" if b"\0C57P03\0" in b"\0" + answer[5:] else "accepting"


# --- /proc ------------------------------------------------------------------------------------


def _all_pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stat_fields(pid: int) -> list[bytes]:
    # Source: proc_pid_stat(5); the command in parentheses may hold anything.
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _start_ticks(pid: int) -> int | None:
    fields = _stat_fields(pid)
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def _parent(pid: int) -> int | None:
    fields = _stat_fields(pid)
    return int(fields[1]) if len(fields) > 1 else None


def _children(pid: int) -> list[int]:
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def _is_server_process(pid: int, data_dir: Path) -> bool:
    """Whether the process runs PostgreSQL in ``data_dir``: every one of them changes into it."""
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe")).removesuffix(" (deleted)")
        if program not in _PROGRAMS:
            return False
        directory = os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return False
    try:
        # Through /proc the kernel follows the link in the process's own mount namespace: a
        # container's directory of the same name is another one.
        return os.path.samestat(os.stat(f"/proc/{pid}/cwd"), os.stat(data_dir))
    except OSError:
        # A dead FUSE mount, or one that this user may not enter: only the names are left.
        return directory == str(data_dir) and _shares_namespace(pid)


def _shares_namespace(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False


def _has_lost_its_postmaster(pid: int) -> bool:
    """Whether the process is a backend that outlived its postmaster.

    A backend's title is ``postgres: …``, a postmaster's is its command line.
    """
    title = _read(f"/proc/{pid}/cmdline").split(b"\0")[0]
    return title.startswith(tuple(f"{name}:".encode() for name in _PROGRAMS))
