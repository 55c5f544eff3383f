"""What is mounted on this host, from the kernel's own list.

Nothing here touches a mount point unless it says so: a call into a mount whose worker hangs would
hang too. Any thread.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

FSTYPE = "fuse.pbkfs"
_ESCAPE = re.compile(rb"\\([0-7]{3})")
# Source: fs/proc_namespace.c, mangle: these are written as octal numbers.
_ESCAPED = re.compile(rb"[ \t\n\\#]")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo."""

    mountpoint: Path
    source: str
    fstype: str
    root: str
    device: str
    options: tuple[str, ...]


def parse_mountinfo(data: bytes) -> list[MountEntry]:
    """Return the entries in the order of mounting. Source: proc_pid_mountinfo(5)."""
    entries = []
    for line in data.splitlines():
        head, _, tail = line.partition(b" - ")
        left, right = head.split(b" "), tail.split(b" ")
        if len(left) < 6 or len(right) < 2:
            continue
        entries.append(
            MountEntry(
                mountpoint=Path(_decode(left[4])),
                source=_decode(right[1]),
                fstype=_decode(right[0]),
                root=_decode(left[3]),
                device=left[2].decode("ascii"),
                options=tuple(_decode(b",".join(right[2:])).split(",")),
            )
        )
    return entries


def _decode(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def read_mounts(path: Path | None = None) -> list[MountEntry]:
    """Return all mounts of the caller's mount namespace, or at least those that name ``path``.

    To parse a line costs a hundred times as much as to look whether a word is in it, which counts
    where there are hundreds of mounts and each of them is asked for.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        data = file.read()
    word = os.fsencode(path.name) if path is not None else b""
    if word and not _ESCAPED.search(word):
        data = b"\n".join(line for line in data.splitlines() if word in line)
    return parse_mountinfo(data)


def our_mounts(diff: Path | None = None) -> list[MountEntry]:
    """Return the mounts of pbkfs, or at least those of ``diff``; no bind mounts of their parts."""
    return [e for e in read_mounts(diff) if e.fstype == FSTYPE and e.root == "/"]


def find_mountpoint(mountpoint: Path) -> MountEntry | None:
    """Return what is mounted exactly on ``mountpoint`` (the topmost), whatever its type."""
    found = None
    for entry in read_mounts(mountpoint):
        if entry.mountpoint == mountpoint:
            found = entry
    return found


def find_diff(diff: Path) -> MountEntry | None:
    """Return the mount of ``diff``, dead or alive."""
    for entry in our_mounts(diff):
        if entry.source == str(diff):
            return entry
    return None


def endpoint_is_dead(mountpoint: Path) -> bool:
    """Return whether the mount answers ENOTCONN. Touches the mount: it may hang if that hangs."""
    try:
        # Not stat: the kernel keeps attributes for as long as the mount is listed.
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def resolve(path: Path) -> Path:
    """Return ``path`` absolute and without symbolic links, also if it ends in a dead mount."""
    return Path(os.path.realpath(path))
