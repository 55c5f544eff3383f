"""Ending mounts and deleting diffs, from the outside: ``unmount`` and ``cleanup``.

Synchronous, for the command line. A worker is asked over its socket; only ``force`` goes further,
and only against the very process that the diff's lock names.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from pbkfs.errors import (
    BusyError,
    DiffError,
    HostError,
    NotFoundError,
    NotRunningError,
    TimedOutError,
    UsageError,
)
from pbkfs.mount import control, lock, mounts, standstill, wipe
from pbkfs.mount.binding import read_binding
from pbkfs.mount.mounts import MountEntry
from pbkfs.mount.owner import Owner, send_signal, wait_gone
from pbkfs.mount.request import SUPERBLOCK, reason
from pbkfs.mount.target import Target, find_target, state_of

_ASK_AGAIN_S = 1.0


def unmount(
    mountpoint: Path | None,
    diff: Path | None,
    *,
    force: bool = False,
    timeout_s: float | None = None,
    kill_after_s: float = 30.0,
) -> Target:
    """End a mount and wait until its diff is free again; returns what was ended.

    Without ``force`` a mount in use is left as it is (BusyError). With it, a worker that does not
    end in ``kill_after_s`` is killed, and the mount detached. Raises NotRunningError,
    TimedOutError (the unmount goes on), HostError (also where it is unmounted, but not durable).
    """
    target = find_target(mountpoint, diff)
    if target.entry is None and not target.has_worker():
        raise NotRunningError(
            f"diff {target.diff} is not mounted", hint="pbkfs list shows the mounts of this host."
        )
    state = state_of(target)
    if state == "alive":
        assert target.owner is not None
        if force:
            _force_worker(target, target.owner, kill_after_s)
        else:
            _ask_worker(target, target.owner, timeout_s)
    elif state == "unknown" and not force:
        _ask_unknown(target)
    _detach(target)
    if state == "alive" and not force:
        _check_end(target)
    return target


def _ask_worker(target: Target, owner: Owner, timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        is_asked = True
        try:
            control.call(target.diff, "unmount", timeout_s=_left(deadline))
        except NotRunningError:
            # A worker that has unmounted and is still syncing listens no more: wait for its end.
            # One that has died in this very moment is followed by another, which is to be asked.
            is_asked = False
        left = _left(deadline)
        pause = left if is_asked else min(_ASK_AGAIN_S, _ASK_AGAIN_S if left is None else left)
        if wait_gone(owner, pause):
            return
        if _left(deadline) == 0:
            raise TimedOutError(
                f"unmounting {owner.mountpoint} is still in progress (pid {owner.pid})",
                hint="It writes back what is not on disk yet; wait, or look into its log.",
            )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _check_end(target: Target) -> None:
    """Raise HostError if the worker could not make everything durable before it ended."""
    with contextlib.suppress(PermissionError):
        if target.owner is not None and lock.read_owner(target.diff) == target.owner:
            raise HostError(
                f"{target.owner.mountpoint} is unmounted, but its last changes may not be on disk",
                hint=f"See the end of {target.diff}/log/worker.log for why. The next mount shows "
                "what is there; a server on it recovers as after a crash.",
            )


def _ask_unknown(target: Target) -> None:
    """Unmount where the lock's record can't be read or names another machine."""
    try:
        control.call(target.diff, "unmount", timeout_s=None)
    except NotRunningError:
        raise BusyError(
            f"the owner of the mount on {target.mountpoint} is not known",
            hint="If no worker serves it any more: pbkfs unmount --force.",
        ) from None


def _force_worker(target: Target, owner: Owner, kill_after_s: float) -> None:
    try:
        control.call(target.diff, "unmount", timeout_s=kill_after_s, force=True)
    except (NotRunningError, TimedOutError):
        _signal(owner, signal.SIGTERM)
    if wait_gone(owner, kill_after_s):
        return
    _signal(owner, signal.SIGKILL)
    is_gone = wait_gone(owner, kill_after_s)
    # A keeper is gone at once, and its worker hangs perhaps.
    _abort(target)
    if not is_gone and not wait_gone(owner, kill_after_s):
        raise TimedOutError(
            f"worker {owner.pid} does not die, not even of SIGKILL",
            hint="It hangs in the kernel, perhaps on a disk; see its state in ps.",
        )


def _signal(owner: Owner, signum: int) -> None:
    try:
        send_signal(owner, signum)
    except PermissionError:
        raise HostError(
            f"worker {owner.pid} belongs to another user",
            hint="Run pbkfs as the user who mounted it, or as root.",
        ) from None


def _abort(target: Target) -> None:
    """Free a worker that waits in the kernel for its own answer."""
    from pbkfs.fuse.mounting import abort

    if target.entry is not None and _is_there(target.entry):
        abort(target.entry.mountpoint)


def _detach(target: Target) -> None:
    """Take away a mount that nobody serves."""
    from pbkfs.fuse.mounting import detach

    if target.entry is not None and _is_there(target.entry):
        standstill.let_go(target.entry.mountpoint)
        detach(target.entry.mountpoint)


def _is_there(entry: MountEntry) -> bool:
    there = mounts.find_mountpoint(entry.mountpoint)
    return there is not None and there.device == entry.device


def cleanup(diff: Path, *, force: bool = False) -> list[str]:
    """Delete a diff; returns the names in its directory that are not pbkfs's and were left.

    ``force`` takes a diff that another host did not give back, one without a superblock but with
    nothing foreign in it, and detaches a dead mount; a live owner on this host it does not
    override. Raises UsageError, NotFoundError, DiffError, BusyError, HostError.
    """
    path = mounts.resolve(diff)
    if path == Path("/"):
        raise UsageError("the root directory is no diff", hint="Name the diff's own directory.")
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        raise NotFoundError(
            f"diff {path} does not exist", hint="There is nothing to clean up."
        ) from None
    except NotADirectoryError:
        raise DiffError(f"diff {path} is not a directory", hint="Name a diff.") from None
    except OSError as error:
        raise HostError(
            f"cannot read diff {path}: {reason(error)}",
            hint="Run pbkfs as the user who made the diff.",
        ) from error
    if SUPERBLOCK not in names and not (force and names and wipe.is_ours(names)):
        raise DiffError(
            f"directory {path} is no diff (no {SUPERBLOCK})",
            hint="Nothing was deleted; name the diff's own directory.",
        )
    if not force and wipe.holds_layer(path):
        raise BusyError(
            f"diff {path} holds a sealed layer, which other diffs may lie upon",
            hint="If none does, delete it with --force.",
        )
    target = find_target(None, path)
    if target.entry is not None:
        if target.has_worker() or not force:
            raise BusyError(
                f"diff {path} is mounted on {target.entry.mountpoint}",
                hint=f"Unmount it first: pbkfs unmount -D {target.entry.mountpoint}",
            )
        _detach(target)
    diff_lock = lock.acquire(path, force=force)
    try:
        with contextlib.suppress(DiffError):
            bound = read_binding(path)
            if bound is not None and bound.made_directory:
                left = wipe.wipe(path)
                wipe.remove_made([path])
                return left
        return wipe.wipe(path)
    except OSError as error:
        raise HostError(
            f"cannot delete diff {path}: {reason(error)}",
            hint="Some of it may be deleted; run the command again as its owner.",
        ) from error
    finally:
        diff_lock.close()
