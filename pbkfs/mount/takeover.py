"""A new worker in the place of one that has died, or was replaced: its begin.

``main`` is what the keeper starts. What the kernel knows is in the ledger, all else on the disk; so
this is a mount without its checks of places (the mount point must not be looked at before it is
served, by this very process) and without what only a first worker does. Until the kernel is asked
to send again, it changes the disk as a mount does, so each step may die and be done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pbkfs import durable
from pbkfs.errors import DiffError, PbkfsError
from pbkfs.mount.base import open_base
from pbkfs.mount.binding import BaseAddress, read_binding
from pbkfs.mount.keeping import EXIT_REFUSED, Link, Taken, end_with
from pbkfs.mount.lock import DiffLock
from pbkfs.mount.opening import OpenMount
from pbkfs.mount.request import LogOptions, MountPlace, MountRequest, reason
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.layer import sync_file_system
from pbkfs.overlay.ledger import Ledger, Numbers, read_ledger
from pbkfs.overlay.revival import decide
from pbkfs.overlay.tree import Tree

_SOCKET_FD = 3

# What the keeper's descriptors of directories of objects begin with: one for each file system.
OBJECTS_FD = "objects"


class RefusedError(PbkfsError):
    """Nobody can take over: the mount ends as if there were no keeper."""

    slug, exit_code = "takeover_refused", EXIT_REFUSED


def main() -> NoReturn:
    """Take over when the keeper says so; never returns."""
    code = 1
    try:
        os.set_inheritable(_SOCKET_FD, False)
        end_with(os.getppid())
        os.chdir("/")
        os.umask(0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        link = Link(socket.socket(fileno=_SOCKET_FD), os.getppid())
        worker = importlib.import_module("pbkfs.mount.worker")
        importlib.import_module("pbkfs.fuse.session")
        link.send("warm")
        message, fds = link.receive()
        code = worker.run_taken(Taken(link, fds, message["why"], int(message["takeovers"])))
    finally:
        sys.stdout.flush()
        os._exit(code)


# --- what the first worker writes down ------------------------------------------------------------


def describe(opened: OpenMount, mountpoint: Path) -> dict[str, object]:
    """Return how ``opened`` is served, for the ledger."""
    request = opened.request
    return {
        "diff": str(opened.diff_path),
        "session": opened.diff.live.session.hex(),
        "mountpoint": str(mountpoint),
        "base": dataclasses.asdict(opened.address),
        "owner": list(opened.owner),
        "allow_other": opened.allow_other,
        "index_bytes": request.index_bytes,
        "verifies_pages": request.verifies_pages,
        "full_wait_s": request.full_wait_s,
        "pid_file": None if request.pid_file is None else os.path.abspath(request.pid_file),
        "log": {
            "sink": request.log.sink,
            "path": None if request.log.path is None else os.path.abspath(request.log.path),
            "style": request.log.style,
            "debug": request.log.debug,
        },
        "hydrate": request.hydrate,
    }


def log_options(meta: Mapping[str, Any]) -> LogOptions:
    """Return where the worker of a mount logs to."""
    fields = dict(meta["log"])
    path = fields.pop("path")
    return LogOptions(path=None if path is None else Path(path), **fields)


# --- what the next one makes of it ----------------------------------------------------------------


def open_taken(numbers: Numbers, fds: Mapping[str, int]) -> tuple[OpenMount, Ledger]:
    """Open what the dead worker had open. Raises RefusedError, PbkfsError, OSError."""
    meta = numbers.meta
    diff_path = Path(meta["diff"])
    owner = (int(meta["owner"][0]), int(meta["owner"][1]))
    ledger = Ledger.resume(fds["ledger"], numbers)
    check_file_systems(ledger, [fd for name, fd in fds.items() if name.startswith(OBJECTS_FD)])
    address = BaseAddress(**meta["base"])
    base = open_base(address, force=True, owner=owner)
    # The dead one may have just replaced the superblock.
    durable.fsync_dir(diff_path, label="takeover:diff")
    diff = Diff.open(diff_path, base, session=bytes.fromhex(meta["session"]))
    decide(ledger, numbers, diff.live)
    sealed = open_layers(diff)
    log_pipe, log_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        tree = Tree(
            base,
            diff,
            sealed,
            owner=owner,
            log_fd=log_fd,
            index_bytes=meta["index_bytes"],
            verifies_pages=meta["verifies_pages"],
            numbers=numbers,
        )
    except DiffError as error:
        raise RefusedError(error.message) from error
    tree.keep_ledger(ledger, numbers.names.keys())
    place = MountPlace(Path(meta["mountpoint"]), dead=None)
    request = MountRequest(
        mountpoint=place.path,
        diff=diff_path,
        index_bytes=meta["index_bytes"],
        log=log_options(meta),
        pid_file=None if meta["pid_file"] is None else Path(meta["pid_file"]),
        hydrate=meta["hydrate"],
        full_wait_s=meta["full_wait_s"],
        verifies_pages=meta["verifies_pages"],
        is_supervised=True,
    )
    opened = OpenMount(
        request=request,
        place=place,
        diff_path=diff_path,
        address=address,
        owner=owner,
        allow_other=meta["allow_other"],
        is_new=False,
        bound=read_binding(diff_path),
        lock=DiffLock(diff_path, fds["lock"], None, is_new=False),
        base=base,
        diff=diff,
        sealed=sealed,
        tree=tree,
        log_pipe=log_pipe,
        log_fd=log_fd,
        warnings=[],
        made=[],
    )
    return opened, ledger


def read_numbers(fds: Mapping[str, int]) -> Numbers:
    """Return what the ledger says. Raises RefusedError."""
    try:
        numbers = read_ledger(fds["ledger"])
    except (PbkfsError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"the ledger of the mount can't be used: {error}") from error
    from pbkfs.fuse.session import init_answer

    if init_answer(numbers.init) != numbers.init_answer:
        raise RefusedError("the kernel was told something else than this version tells it")
    return numbers


def check_file_systems(ledger: Ledger, objects_fds: Sequence[int]) -> None:
    """Raise RefusedError if a file system below had a write error since the mount began.

    A worker remembers that a file's fsync failed, and this memory is lost; but these descriptors,
    which are as old as the mount, were never told of the error. They are told once (source:
    syncfs(2), Linux 5.8), so whoever dies while he asks has no successor. What takes its time is
    done before, through descriptors of this process.
    """
    for fd in objects_fds:
        with contextlib.suppress(OSError):
            young = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                sync_file_system(young)
            finally:
                os.close(young)
    with ledger.unusable():
        for fd in objects_fds:
            try:
                sync_file_system(fd)
            except OSError as error:
                raise RefusedError(
                    f"what was written to the diff may not be there: {reason(error)}"
                ) from error
