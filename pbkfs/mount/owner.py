"""Who owns a diff: a process named so that it cannot be mistaken for another one.

A bare pid is no owner, because the kernel gives it to the next process. An owner is host + boot +
pid + start time. Pure reads of /proc; any thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import select
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Owner:
    """One process on one host. ``start_ticks`` counts clock ticks since boot."""

    host: str
    machine_id: str
    boot_id: str
    pid: int
    start_ticks: int
    mountpoint: str
    uid: int

    def to_json(self) -> bytes:
        """Return the record as one line."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    def is_here(self) -> bool:
        """Return whether the owner ran on this machine (perhaps before a reboot)."""
        if self.boot_id == boot_id():
            return True
        if self.machine_id and machine_id():
            return self.machine_id == machine_id()
        return self.host == host_name()

    def is_alive(self) -> bool:
        """Return whether that very process runs on this host now."""
        return self.boot_id == boot_id() and start_ticks(self.pid) == self.start_ticks


def parse_owner(data: bytes) -> Owner | None:
    """Return the owner in ``data``, or None if there is none or it is unreadable."""
    try:
        fields = json.loads(data)
        return Owner(
            host=str(fields["host"]),
            machine_id=str(fields["machine_id"]),
            boot_id=str(fields["boot_id"]),
            pid=int(fields["pid"]),
            start_ticks=int(fields["start_ticks"]),
            mountpoint=str(fields["mountpoint"]),
            uid=int(fields["uid"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def this_process(mountpoint: str, pid: int | None = None) -> Owner:
    """Return the calling process, or ``pid`` of the same user, as an owner."""
    pid = pid or os.getpid()
    ticks = start_ticks(pid)
    assert ticks is not None
    return Owner(
        host=host_name(),
        machine_id=machine_id(),
        boot_id=boot_id(),
        pid=pid,
        start_ticks=ticks,
        mountpoint=mountpoint,
        uid=os.geteuid(),
    )


def host_name() -> str:
    """Return this host's name."""
    return platform.node()


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Return the id of the running kernel's boot."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@lru_cache(maxsize=1)
def machine_id() -> str:
    """Return the installation's id, or an empty string where there is none."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def start_ticks(pid: int) -> int | None:
    """Return when process ``pid`` started, or None if it does not run (a zombie does not).

    Source: proc_pid_stat(5), fields 3 and 22; the command in parentheses may hold anything.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def command_name(pid: int) -> str:
    """Return the name of process ``pid``'s command, or ``?``."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def wait_gone(owner: Owner, timeout_s: float | None) -> bool:
    """Wait until the owner's process is gone; False if it still runs after ``timeout_s``."""
    try:
        pidfd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return True
    try:
        if not owner.is_alive():
            return True
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))))
    finally:
        os.close(pidfd)


def send_signal(owner: Owner, signum: int) -> bool:
    """Signal the owner's process if it is still that process; False if it is gone.

    The descriptor pins the process between the check and the signal. Raises PermissionError.
    """
    import signal

    try:
        pidfd = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return False
    try:
        if not owner.is_alive():
            return False
        signal.pidfd_send_signal(pidfd, signum)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
