"""``detach``: a diff that holds everything becomes a plain PGDATA, without a copy.

Synchronous, for the command line. The mount has ended by then; this process has the diff's lock and
opens the tree itself. ``DIFF/detach.json`` names the directory that is being made, before anything
is in it, so that an interrupted run can be told from somebody else's directory. Steps:

1. what is missing is hydrated,
2. ``TARGET.partial`` gets directories, links and a hard link to every object; all of it durable,
3. it is renamed to TARGET,
4. the superblock says that the diff was detached: from here on it can't be mounted any more,
5. the diff is deleted, or kept as it is.

Run again after a crash, it begins again at 2 (a partial tree is deleted first) or goes on at 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbkfs import durable
from pbkfs.errors import BusyError, DiffError, HostError, NotFoundError, UsageError
from pbkfs.mount import lock, mounts, wal, wipe
from pbkfs.mount.base import open_base
from pbkfs.mount.binding import Binding, read_binding
from pbkfs.mount.hydrating import HydrationStatus
from pbkfs.mount.request import reason
from pbkfs.mount.target import Target, find_target
from pbkfs.overlay.diff import WAL, Diff, live_path, open_layers
from pbkfs.overlay.layer import OBJECTS
from pbkfs.overlay.superblock import Superblock, read_superblock
from pbkfs.overlay.tree import Tree
from pbkfs.units import format_bytes

NAME = wipe.DETACH
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """``detach.json``: the directory in the making (its inode stays through the rename)."""

    target: str
    device: int
    inode: int

    def is_at(self, path: Path) -> bool:
        """Return whether the directory at ``path`` is the one on record."""
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == (self.device, self.inode)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be detached to where. ``mounted`` is None where nothing is mounted."""

    diff: Path
    target: Path
    mounted: Target | None
    bound: Binding
    record: Record | None
    is_linked: bool
    """TARGET is there already: an earlier run was interrupted, and only the end is left."""


def partial_of(target: Path) -> Path:
    """Return where the tree is made that becomes ``target``."""
    return target.with_name(f"{target.name}.partial")


def plan_detach(mountpoint: Path | None, diff: Path | None, to: Path | None) -> Plan:
    """Check everything that can be checked before anything is changed. Raises PbkfsError."""
    target = find_target(None if diff is not None else mountpoint, diff)
    path = target.diff
    with _host_errors(path):
        try:
            superblock = read_superblock(path)
        except FileNotFoundError:
            raise DiffError(
                f"directory {path} is no diff (no superblock.json)",
                hint="Name the mount point or the diff's own directory.",
            ) from None
        bound = read_binding(path)
        record = _read_record(path)
    if bound is None:
        raise DiffError(
            f"diff {path} was never mounted", hint="Mount it once; then it can be detached."
        )
    wanted = mounts.resolve(to) if to is not None else _default_target(target, bound, record)
    is_linked = superblock.detached_to is not None
    if record is not None and record.is_at(Path(record.target)):
        is_linked = True
    if is_linked:
        done = Path(superblock.detached_to or (record.target if record else ""))
        if to is not None and done != wanted:
            raise DiffError(
                f"diff {path} was detached to {done} already",
                hint=f"Use the PGDATA there, or finish with: pbkfs detach -d {path}",
            )
        return Plan(path, done, None, bound, record, True)
    is_mounted = target.entry is not None or target.has_worker()
    with _host_errors(path):
        mountpoint = target.mountpoint or Path(bound.mountpoint)
        _check_target(wanted, path, mountpoint, record, _device(path, superblock))
    return Plan(path, wanted, target if is_mounted else None, bound, record, False)


def _default_target(target: Target, bound: Binding, record: Record | None) -> Path:
    if record is not None:
        return Path(record.target)
    return target.mountpoint or Path(bound.mountpoint)


def _device(diff: Path, superblock: Superblock) -> int:
    """Return the device of the file system that the objects are on."""
    return os.stat(live_path(diff, superblock) / OBJECTS).st_dev


def _check_target(
    target: Path, diff: Path, mountpoint: Path, record: Record | None, device: int
) -> None:
    """Raise UsageError, NotFoundError or HostError unless PGDATA can be put at ``target``.

    ``device`` is that of the objects.
    """
    parent = target.parent
    for what, place in (("diff", diff), ("mount point", mountpoint)):
        if place in target.parents or (target == place and what == "diff"):
            raise UsageError(
                f"target {target} lies inside of the {what} {place}",
                hint="Name a directory beside it.",
            )
    if target != mountpoint and os.path.lexists(target):
        raise UsageError(
            f"target {target} exists already", hint="Name a directory that does not exist."
        )
    if not parent.is_dir():
        raise NotFoundError(
            f"directory {parent} does not exist", hint=f"Make it first: mkdir -p {parent}"
        )
    partial = partial_of(target)
    if os.path.lexists(partial) and not _is_ours(partial, record):
        raise UsageError(
            f"{partial} exists already, and is not of an interrupted detach",
            hint="Move it away, or name another target: --to DIR.",
        )
    others = [part for part in (diff / WAL,) if part.exists() and os.stat(part).st_dev != device]
    if others or os.stat(parent).st_dev != device:
        where = others[0] if others else target
        raise HostError(
            f"{where} is on another file system than the objects of diff {diff}",
            hint="Detaching copies nothing; name a target beside the diff: --to DIR.",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise HostError(
            f"cannot write to {parent}: permission denied",
            hint="The target is made by a rename, so its parent has to be writable.",
        )


def _is_ours(partial: Path, record: Record | None) -> bool:
    if record is not None and record.is_at(partial):
        return True
    # Made, and interrupted before it was recorded; rmdir takes no more than that.
    return partial.is_dir() and not partial.is_symlink() and not os.listdir(partial)


def finish_detach(
    plan: Plan,
    *,
    may_hydrate: bool,
    is_kept: bool,
    show: Callable[[HydrationStatus], None],
) -> list[str]:
    """Make PGDATA out of a diff that is not mounted (any more); see the module.

    ``show`` gets the progress of a hydration. Returns names in the diff's directory that are not
    pbkfs's and were left. Raises PbkfsError; the target does not exist then, or is complete.
    """
    diff_lock = lock.acquire(plan.diff)
    try:
        with _host_errors(plan.diff):
            if not plan.is_linked:
                _link(plan, may_hydrate=may_hydrate, show=show)
            superblock = read_superblock(plan.diff)
            if superblock.detached_to is None:
                _mark(plan, superblock)
            durable.on_step("detach:cleanup")
            if is_kept:
                return []
            left = wipe.wipe(plan.diff, keeps_layer=wipe.holds_layer(plan.diff))
            if plan.bound.made_directory:
                wipe.remove_made([plan.diff])
            return left
    finally:
        diff_lock.close()


def _mark(plan: Plan, superblock: Superblock) -> None:
    marked = dataclasses.replace(superblock, detached_to=str(plan.target))
    marked.write(plan.diff, label="detach:superblock")


def _link(plan: Plan, *, may_hydrate: bool, show: Callable[[HydrationStatus], None]) -> None:
    if os.path.lexists(plan.target):
        _check_empty(plan.target, _device(plan.diff, read_superblock(plan.diff)))
    with contextlib.ExitStack() as stack:
        base = open_base(plan.bound.base, force=True, owner=plan.bound.owner)
        stack.callback(base.close)
        base.acquire(os.getpid())
        stack.callback(base.release, os.getpid())
        diff = Diff.open(plan.diff, base)
        tree = Tree(base, diff, open_layers(diff), owner=plan.bound.owner, log_fd=-1)
        stack.callback(tree.close)
        wal.move_out(tree, base, plan.diff, plan.bound.owner)
        _hydrate(tree, plan.diff, may_hydrate=may_hydrate, show=show)
        partial = partial_of(plan.target)
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        durable.on_step("detach:mkdir")
        os.mkdir(partial, 0o700)
        found = os.lstat(partial)
        _write_record(plan.diff, Record(str(plan.target), found.st_dev, found.st_ino))
        tree.link_out(partial)
        # Objects, links and directories: they are all on the diff's file system.
        diff.live.sync_file_system()
        durable.on_step("detach:rename")
    # The tree is closed: what it had to record is recorded.
    try:
        os.rename(partial, plan.target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise BusyError(
                f"target {plan.target} is in use: {reason(error)}",
                hint=f"Free it, then run: pbkfs detach -d {plan.diff}",
            ) from error
        raise
    durable.fsync_dir(plan.target.parent, label="detach:rename")


def _check_empty(target: Path, device: int) -> None:
    """Look at the mount point again, now that nothing hides it."""
    if os.listdir(target):
        raise UsageError(
            f"target {target} is not empty", hint="Name a directory that does not exist: --to DIR."
        )
    if os.lstat(target).st_dev != device:
        raise HostError(
            f"target {target} is on another file system than the diff",
            hint="Detaching copies nothing; name a target beside the diff: --to DIR.",
        )


def _hydrate(
    tree: Tree, diff: Path, *, may_hydrate: bool, show: Callable[[HydrationStatus], None]
) -> None:
    hydration = tree.hydration
    for _ in hydration.survey():
        pass

    def status(state: Any) -> HydrationStatus:
        return HydrationStatus(
            state=state,
            files_done=hydration.n_files_done,
            files_total=hydration.n_files,
            bytes_done=hydration.n_bytes_done,
            bytes_total=hydration.n_bytes,
        )

    if hydration.n_files_done == hydration.n_files:
        return
    if not may_hydrate:
        raise missing_error(diff, status("stopped"))
    while (step := hydration.next_step(_PIECE_BYTES)) is not None:
        step.run()
        hydration.finish(step)
        show(status("running"))
    if hydration.failed:
        first = sorted(hydration.failed.values())[0].decode(errors="backslashreplace")
        raise HostError(
            f"{len(hydration.failed)} files of diff {diff} can't be read from below, the first is "
            f"{first}",
            hint="Check the backup; the diff is as it was and can be mounted.",
        )
    show(status("done"))


def missing_error(diff: Path, found: HydrationStatus) -> BusyError:
    """Return the error that says how much is not in the diff yet."""
    n_bytes = found.bytes_total - found.bytes_done
    n_files = found.files_total - found.files_done
    return BusyError(
        f"diff {diff} still needs {format_bytes(n_bytes)} in {n_files} files from its base",
        hint="Leave --no-hydrate out, or run pbkfs hydrate before.",
    )


def check_not_detached(diff: Path) -> None:
    """Raise DiffError if the objects of ``diff`` are the files of a PGDATA by now."""
    record = _read_record(diff)
    if record is not None and record.is_at(Path(record.target)):
        raise DiffError(
            f"diff {diff} was detached to {record.target}",
            hint=f"Use the PGDATA there; finish with: pbkfs detach -d {diff}",
        )


# --- the record -----------------------------------------------------------------------------------


def _read_record(diff: Path) -> Record | None:
    try:
        return Record(**json.loads((diff / NAME).read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise DiffError(
            f"{diff / NAME} is unreadable",
            hint="If no detach of this diff was interrupted, remove that file.",
        ) from None


def _write_record(diff: Path, record: Record) -> None:
    data = json.dumps(dataclasses.asdict(record), indent=2).encode() + b"\n"
    durable.replace_file(diff / NAME, data, label="detach:record")


@contextlib.contextmanager
def _host_errors(diff: Path) -> Any:
    try:
        yield
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space on the diff's file system, then try again."
        elif error.errno in (errno.EACCES, errno.EPERM):
            hint = "Run pbkfs as the user who mounted the diff, or as root."
        else:
            hint = "Nothing is lost; when the cause is gone, run the command again."
        raise HostError(f"cannot detach diff {diff}: {reason(error)}{where}", hint=hint) from error
