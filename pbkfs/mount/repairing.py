"""``pbkfs check --repair``: what a crash left in a diff is settled, as the next mount would.

Called by ``cli`` in its own process, on the diff's exclusive lock. Nothing is guessed: a diff with
an error of any kind is left as it is, because what looks left over may then be somebody's data
whose record is the damage. What has no name of ours is never touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pbkfs import durable
from pbkfs.backup.base import Base
from pbkfs.errors import DiffError
from pbkfs.mount import lock
from pbkfs.mount.base import open_base
from pbkfs.mount.binding import read_binding
from pbkfs.mount.detaching import check_not_detached
from pbkfs.mount.opening import host_errors
from pbkfs.overlay.check import Finding, Report, check_diff
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.tree import Tree

logger = logging.getLogger(__name__)

# Source: durable.replace_file(); these are the files of a diff that it replaces.
_TEMPORARY = re.compile(r"\.(?:(?:superblock|binding|detach)\.json|journal)\.[0-9a-f]+\.tmp")
_HALF_COPIED_WAL = "pg_wal.new"


@dataclass(frozen=True, slots=True)
class Repair:
    """What was done. ``report`` is that of a check afterwards, or before if nothing was."""

    done: list[Finding]
    report: Report
    was_refused: bool
    """Whether the diff is damaged, and nothing was changed."""


def repair(path: Path) -> Repair:
    """Settle what a crash left in the diff at ``path``.

    Raises BusyError if it is in use, DiffError if its base is not known, and what opening the base
    raises; nothing has changed then. HostError where a step fails: the next mount goes on from
    there, as after a crash.
    """
    check_not_detached(path)
    bound = read_binding(path)
    if bound is None:
        raise DiffError(
            f"the base of diff {path} is not known: binding.json is missing",
            hint="Mount it with its base named; that repairs the same.",
        )
    with contextlib.ExitStack() as stack:
        base = open_base(bound.base, force=True, owner=bound.owner)
        stack.callback(base.close)
        diff_lock = lock.acquire(path)
        stack.callback(diff_lock.close)
        before = check_diff(path, base)
        if not before.is_clean or (not before.findings and diff_lock.previous is None):
            return Repair([], before, was_refused=not before.is_clean)
        with host_errors(path):
            if before.findings:
                base.acquire(os.getpid())
                stack.callback(base.release, os.getpid())
                _settle(path, base, bound.owner)
                _remove_leftovers(path)
            diff_lock.clear()
        after = check_diff(path, base)
        done = [found for found in before.findings if found not in after.findings]
        return Repair(done, after, was_refused=False)


def _settle(path: Path, base: Base, owner: tuple[int, int]) -> None:
    """Open the diff to write to it, which recovers it, and end that well."""
    with contextlib.ExitStack() as stack:
        diff = Diff.open(path, base)
        stack.callback(diff.close)
        sealed = open_layers(diff)
        for layer in sealed:
            stack.callback(layer.close)
        Tree(base, diff, sealed, owner=owner, log_fd=-1).close()


def _remove_leftovers(path: Path) -> None:
    removed = False
    for entry in os.scandir(path):
        if entry.name == _HALF_COPIED_WAL and entry.is_dir(follow_symlinks=False):
            durable.on_step("repair:wal:remove")
            shutil.rmtree(entry.path)  # copies; the tree's own pg_wal is in force
        elif _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            durable.on_step("repair:temporary:unlink")
            os.unlink(entry.path)
        else:
            continue
        removed = True
    if removed:
        durable.fsync_dir(path, label="repair")
