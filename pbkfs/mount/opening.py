"""From a request to everything a worker needs, open and checked, before the fork.

``open_mount`` checks first and changes later: a refusal leaves the disk as it was, and a failure
after a new diff was made takes it away again (``OpenMount.abandon``). No thread is started here.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pbkfs.backup.base import Base
from pbkfs.errors import HostError, PbkfsError
from pbkfs.fuse.mounting import check_host
from pbkfs.mount import holders, keeping, lock, wipe
from pbkfs.mount.base import choose_address, open_base
from pbkfs.mount.binding import BaseAddress, Binding, read_binding
from pbkfs.mount.detaching import check_not_detached
from pbkfs.mount.lock import DiffLock
from pbkfs.mount.request import (
    MountPlace,
    MountRequest,
    check_base_options,
    check_diff,
    check_mountpoint,
    check_own_files,
    check_places,
    choose_allow_other,
    choose_owner,
    reason,
)
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.tree import Tree

logger = logging.getLogger(__name__)

# What a program's own mistake gives; anything else is the machine's answer.
_BUG_ERRNOS = (errno.EBADF, errno.EINVAL, errno.EFAULT, errno.ENOTSOCK)


@dataclass(slots=True)
class OpenMount:
    """A mount that is ready to be served. Belongs to one process at a time."""

    request: MountRequest
    place: MountPlace
    diff_path: Path
    address: BaseAddress
    owner: tuple[int, int]
    allow_other: bool
    is_new: bool
    bound: Binding | None
    lock: DiffLock
    base: Base
    diff: Diff
    sealed: list[Layer]
    tree: Tree
    log_pipe: int
    """The end that the worker reads the native half's log lines from; that writes to ``log_fd``."""
    log_fd: int
    warnings: list[tuple[str, str | None]]
    made: list[Path]
    _is_closed: bool = field(default=False, init=False)

    def close(self) -> None:
        """Close tree, diff and base; the lock stays. Raises OSError if the last sync fails."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.ExitStack() as stack:
            stack.callback(self.base.close)
            for layer in self.sealed:
                stack.callback(layer.close)
            stack.callback(self.diff.close)
            stack.callback(self.tree.close)

    def leave(self) -> None:
        """Close this process's copies of all descriptors but the lock's: another one serves.

        Else a layer would be locked for as long as this process lives, whoever writes to it.
        """
        self._is_closed = True
        self.tree.leave()
        self.base.close()
        for fd in (self.log_pipe, self.log_fd):
            os.close(fd)

    def abandon(self) -> None:
        """Close everything after a failure, and take a diff away that was made for this mount."""
        try:
            self.close()
        except OSError as error:
            logger.warning("closing diff %s failed: %s", self.diff_path, error)
        if self.is_new:
            wipe.wipe(self.diff_path)
            wipe.remove_made(self.made)
        else:
            self.lock.restore()
        self.lock.close()

    @property
    def name(self) -> str:
        """What is mounted, for messages."""
        return str(self.address)


def open_mount(request: MountRequest) -> OpenMount:
    """Check ``request`` and open all it names. Raises PbkfsError; then nothing has changed."""
    check_base_options(request)
    diff_path, is_reused = check_diff(request.diff)
    place = check_mountpoint(request.mountpoint, diff_path)
    bound = read_binding(diff_path) if is_reused else None
    if is_reused:
        check_not_detached(diff_path)
    address = choose_address(request, diff_path, bound, is_reused=is_reused)
    check_places(place.path, diff_path, address)
    check_own_files(request, place.path, address)
    check_host()
    if request.is_supervised:
        keeping.check_host()
    warnings: list[tuple[str, str | None]] = []
    if bound is not None and bound.mountpoint != str(place.path):
        warnings.append((f"diff {diff_path} was mounted on {bound.mountpoint} before", None))
    if place.dead is not None:
        users = holders.find_holders(place.dead.device, place.path)
        if users:
            said = f"the dead mount on {place.path} is still used by {holders.describe(users)}"
            warnings.append((said, "End these processes: they can't reach their files any more."))
    with contextlib.ExitStack() as undo:
        base = open_base(address, force=request.force, owner=request.owner)
        undo.callback(base.close)
        owner = choose_owner(request.owner, bound.owner if bound else None, base.owner)
        allow_other = choose_allow_other(request.allow_other, owner)
        if os.geteuid() == 0:
            is_asked = request.owner is not None
            warnings += _check_reach(owner, place.path, diff_path, is_asked=is_asked)
        with host_errors(diff_path):
            made = _make_directories(diff_path)
        undo.callback(wipe.remove_made, made)
        with host_errors(diff_path):
            diff_lock = lock.acquire(diff_path, force=request.force)
        undo.callback(diff_lock.close)
        is_new = not is_reused
        if is_new:
            undo.callback(wipe.wipe, diff_path)
        elif diff_lock.is_new:
            undo.callback((diff_path / lock.NAME).unlink)
        with host_errors(diff_path):
            diff = Diff.open(diff_path, base)
            undo.callback(diff.close)
            if request.is_supervised:
                keeping.check_layer(diff.live)
            sealed = open_layers(diff)
            for layer in sealed:
                undo.callback(layer.close)
            log_pipe, log_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, log_pipe)
            tree = Tree(
                base,
                diff,
                sealed,
                owner=owner,
                log_fd=log_fd,
                index_bytes=request.index_bytes,
                verifies_pages=request.verifies_pages,
            )
        undo.pop_all()
    return OpenMount(
        request=request,
        place=place,
        diff_path=diff_path,
        address=address,
        owner=owner,
        allow_other=allow_other,
        is_new=is_new,
        bound=bound,
        lock=diff_lock,
        base=base,
        diff=diff,
        sealed=sealed,
        tree=tree,
        log_pipe=log_pipe,
        log_fd=log_fd,
        warnings=warnings,
        made=made,
    )


def now() -> str:
    """Return the time as a binding holds it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def host_errors(diff: Path) -> Iterator[None]:
    """Turn what the file system of the diff refuses into one clear error."""
    try:
        yield
    except PbkfsError:
        raise
    except OSError as error:
        if error.errno is None or error.errno in _BUG_ERRNOS:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space on the diff's file system, then try again."
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
            hint = "A diff needs a directory that this user can write to."
        else:
            hint = "See the kernel's log (dmesg) about the disks under the diff and the base."
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        raise HostError(f"cannot set up diff {diff}: {reason(error)}{where}", hint=hint) from error


def _make_directories(diff: Path) -> list[Path]:
    """Make the diff's directory, 0711, and its parents; returns what was made, innermost first."""
    made: list[Path] = []
    missing = []
    path = diff
    while not path.exists():
        missing.append(path)
        path = path.parent
    try:
        for path in reversed(missing):
            path.mkdir(mode=0o755)
            made.insert(0, path)
            if path == diff:
                # Whatever the umask: the server's user has to get to pg_wal.
                path.chmod(0o711)
    except OSError:
        wipe.remove_made(made)
        raise
    return made


def _check_reach(
    owner: tuple[int, int], mountpoint: Path, diff: Path, *, is_asked: bool
) -> list[tuple[str, str | None]]:
    """Return a warning for each place that the owner, who will run the server, can't get to."""
    warnings: list[tuple[str, str | None]] = []
    if owner[0] == 0:
        if not is_asked:
            said = "the files will belong to root, who can't run a server"
            warnings.append((said, "Give the server's user: --owner USER."))
        return warnings
    for name, path in (("mount point", mountpoint), ("diff", diff)):
        blocked = _first_closed(path, owner, is_included=path == diff)
        if blocked is not None:
            warnings.append(
                (
                    f"user {owner[0]} can't reach {name} {path}: {blocked} is closed to it",
                    f"PostgreSQL needs it: chmod o+x {blocked}, or use another place.",
                )
            )
    return warnings


def _first_closed(path: Path, owner: tuple[int, int], *, is_included: bool) -> Path | None:
    """Return the first directory on the way to ``path`` whose mode bits (no ACLs) stop ``owner``.

    ``is_included`` also looks at ``path`` itself, if it exists.
    """
    for parent in (*reversed(path.parents), *([path] if is_included else [])):
        try:
            found = os.stat(parent)
        except OSError:
            return None
        if found.st_uid == owner[0]:
            bit = 0o100
        elif found.st_gid == owner[1]:
            bit = 0o010
        else:
            bit = 0o001
        if not found.st_mode & bit:
            return parent
    return None
