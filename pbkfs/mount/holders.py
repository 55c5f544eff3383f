"""Which processes keep a mount busy: open files, working directories, mapped files.

Used to explain EBUSY. A process that may not be inspected is left out. Any thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import BusyError
from pbkfs.mount.owner import command_name


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses files of a mount."""

    pid: int
    command: str
    is_postmaster: bool


def find_holders(device: str, mountpoint: Path) -> list[Holder]:
    """Return the processes that use the mount with device number ``device`` (``major:minor``).

    Works on the numbers and link texts in /proc only, so it never calls into the mount.
    """
    prefix = str(mountpoint)
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and _holds(int(name), device, prefix):
            pid = int(name)
            command = command_name(pid)
            found.append(Holder(pid, command, _is_postmaster(pid, command, prefix)))
    return sorted(found, key=lambda holder: (not holder.is_postmaster, holder.pid))


def describe(holders: list[Holder], limit: int = 8) -> str:
    """Return ``pid 12 (bash), pid 13 (psql)`` and how many more."""
    text = ", ".join(f"pid {holder.pid} ({holder.command})" for holder in holders[:limit])
    more = len(holders) - limit
    return text + (f" and {more} more" if more > 0 else "")


def _holds(pid: int, device: str, prefix: str) -> bool:
    base = f"/proc/{pid}"
    try:
        links = [f"{base}/cwd", f"{base}/root", f"{base}/exe"]
        links += [f"{base}/fd/{fd}" for fd in os.listdir(f"{base}/fd")]
    except OSError:
        return False
    for link in links:
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == prefix or target.startswith(prefix + "/"):
            return True
    return _maps(pid, device)


def _maps(pid: int, device: str) -> bool:
    # Source: proc_pid_maps(5); the device is in hexadecimal, two digits at least.
    major, minor = (int(part) for part in device.split(":"))
    wanted = f"{major:02x}:{minor:02x}".encode()
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return any(line.split(maxsplit=5)[3] == wanted for line in file)
    except (OSError, IndexError):
        return False


def _is_postmaster(pid: int, command: str, prefix: str) -> bool:
    if command not in ("postgres", "postmaster"):
        return False
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            parent = int(file.read().rpartition(b")")[2].split()[1])
        in_data_directory = os.readlink(f"/proc/{pid}/cwd") == prefix
    except (OSError, IndexError, ValueError):
        return False
    return in_data_directory and command_name(parent) not in ("postgres", "postmaster")


def busy_error(mountpoint: Path, users: list[Holder]) -> BusyError:
    """Return the error that explains why ``mountpoint`` can't be unmounted."""
    who = f": in use by {describe(users)}" if users else ""
    if any(user.is_postmaster for user in users):
        hint = f"Stop its PostgreSQL first: pbkfs stop -D {mountpoint}"
    elif users:
        hint = "End these processes, or let them leave the directory; --force takes it from them."
    else:
        hint = "Another user's process or another mount below it uses it; root can see which."
    return BusyError(f"mount point {mountpoint} is busy{who}", hint=hint)
