"""Which mount a command means: by its mount point, or by its diff.

Answers from the kernel's list and the diff's lock record; never calls into the mount, except to
tell a dead one when its owner is unknown. Any thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pbkfs.errors import NotFoundError, NotRunningError, UsageError
from pbkfs.mount import lock, mounts
from pbkfs.mount.mounts import MountEntry
from pbkfs.mount.owner import Owner

State = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Target:
    """A diff, the mount of it (None: not mounted), and the worker on record (None: unknown)."""

    diff: Path
    entry: MountEntry | None
    owner: Owner | None

    @property
    def mountpoint(self) -> Path | None:
        """Where it is mounted, if it is."""
        return self.entry.mountpoint if self.entry is not None else None

    def has_worker(self) -> bool:
        """Return whether the worker on record lives."""
        return self.owner is not None and self.owner.is_alive()


def find_target(mountpoint: Path | None, diff: Path | None) -> Target:
    """Return the target that ``-D`` or ``-d`` names.

    Raises UsageError if neither is given or they disagree, NotRunningError if nothing of pbkfs is
    mounted on ``mountpoint``, NotFoundError if ``diff`` does not exist.
    """
    if mountpoint is not None:
        path = mounts.resolve(mountpoint)
        entry = mounts.find_mountpoint(path)
        if entry is None or entry.fstype != mounts.FSTYPE:
            if diff is not None and (target := find_target(None, diff)).has_worker():
                return target
            what = f"a file system of type {entry.fstype}" if entry is not None else "nothing"
            raise NotRunningError(
                f"no backup is mounted on {path} ({what} is)",
                hint="pbkfs list shows the mounts of this host.",
            )
        if diff is not None and str(mounts.resolve(diff)) != entry.source:
            raise UsageError(
                f"{path} is the mount of diff {entry.source}, not of {mounts.resolve(diff)}",
                hint="Give the mount point or the diff, not both.",
            )
        return target_of(Path(entry.source), entry)
    if diff is None:
        raise UsageError(
            "neither a mount point nor a diff is given", hint="Name one: -D MOUNTPOINT or -d DIFF."
        )
    path = mounts.resolve(diff)
    if not path.is_dir():
        raise NotFoundError(
            f"diff {path} does not exist", hint="pbkfs list shows the diffs that are mounted."
        )
    return target_of(path, mounts.find_diff(path))


def state_of(target: Target) -> State:
    """Return whether the mount is served; asks the kernel only where no owner is on record."""
    if target.owner is not None and target.owner.is_here():
        return "alive" if target.owner.is_alive() else "dead"
    if target.entry is None:
        return "dead"
    return "dead" if mounts.endpoint_is_dead(target.entry.mountpoint) else "unknown"


def target_of(diff: Path, entry: MountEntry | None) -> Target:
    """Return ``diff`` with its mount and the worker on record, as far as the caller may read it."""
    try:
        owner = lock.read_owner(diff)
    except OSError:
        owner = None
    return Target(diff, entry, owner)
