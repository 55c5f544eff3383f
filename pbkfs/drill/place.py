"""The drill's own directory: a mount point and a diff that are made for one drill and thrown away.

The mount is made by a forked child, because what opens a mount must not outlive the fork of its
worker in any process that goes on. Tidying up trusts nothing that was remembered: it looks for the
child, the server, the mount and the diff, so it may come at any moment. No threads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pbkfs.config import DEFAULT_INDEX_BYTES
from pbkfs.drill.request import DrillRequest
from pbkfs.drill.signals import Signals
from pbkfs.errors import (
    BusyError,
    DiffError,
    HostError,
    NotFoundError,
    NotRunningError,
    TimedOutError,
    UsageError,
)
from pbkfs.mount import ending, launch, lock, mounts
from pbkfs.mount.opening import open_mount
from pbkfs.mount.owner import send_signal
from pbkfs.mount.report import ReportReader, ReportWriter, error_to_fields, fields_to_error
from pbkfs.mount.request import LogOptions, MountRequest
from pbkfs.postgres.account import Account
from pbkfs.postgres.network import remove_run_directory
from pbkfs.postgres.running import stop

_ATTEMPTS = 5
_PAUSE_S = 0.2
_MOUNTER_PAUSE_S = 0.02
_STOP_LIMIT_S = 60.0
_UNMOUNT_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """What was mounted: ``name`` for messages, and what the mount had to say."""

    name: str
    store: str | None
    instance: str | None
    backup_id: str | None
    notices: list[str]


class Place:
    """The directory of one drill. ``make``, ``mount``, and ``remove`` at any time after that."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pgdata = root / "pgdata"
        self.diff = root / "diff"
        self.server_user: Account | None = None
        self._mounter: int | None = None

    @classmethod
    def make(cls, request: DrillRequest) -> Place:
        """Make an empty one. Raises NotFoundError, UsageError, HostError."""
        parent = mounts.resolve(request.work_dir or Path(os.environ.get("TMPDIR") or "/var/tmp"))
        if not parent.is_dir():
            raise NotFoundError(
                f"work directory {parent} does not exist", hint="Name one with --work-dir."
            )
        for base in filter(None, (request.store, request.base_dir)):
            path = mounts.resolve(base)
            if path == parent or path in parent.parents:
                raise UsageError(
                    f"work directory {parent} lies inside of the backup's {path}",
                    hint="A backup is only read: name a directory elsewhere.",
                )
        try:
            place = cls(Path(tempfile.mkdtemp(prefix="pbkfs-drill-", dir=parent)))
            # The server's user has to pass; what is inside has its own modes.
            place.root.chmod(0o711)
            place.pgdata.mkdir(mode=0o755)
        except OSError as error:
            raise HostError(
                f"cannot make a directory in {parent}: {error.strerror}",
                hint="Name a directory that this user can write to with --work-dir.",
            ) from error
        return place

    # --- mounting -------------------------------------------------------------------------------

    def mount(self, request: DrillRequest, signals: Signals, timeout_s: float) -> Mounted:
        """Mount the backup and wait until it answers. Raises what a mount raises."""
        deadline = time.monotonic() + timeout_s
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self._mounter = os.fork()
        if self._mounter == 0:
            self._mount_as_child(request, signals, write_end, timeout_s)
        os.close(write_end)
        reader = ReportReader(read_end)
        try:
            message = reader.receive(deadline)
        except TimeoutError:
            raise TimedOutError(f"the mount was not ready after {timeout_s:g} s") from None
        finally:
            reader.close()
        if message is None:
            raise HostError(
                "the mount ended without a word",
                hint="The kernel's log may say why (dmesg): out of memory, or a crash.",
            )
        event = message.pop("event")
        if event == "error":
            raise fields_to_error(message)
        return Mounted(**message)

    def _mount_as_child(
        self, request: DrillRequest, signals: Signals, write_end: int, timeout_s: float
    ) -> None:
        """Mount, report and end; never returns."""
        report = ReportWriter(write_end)
        try:
            # The terminal's Ctrl-C is the drill's to act on.
            os.setsid()
            signals.release()
            foreign = launch.inherited_descriptors()
            opened = open_mount(
                MountRequest(
                    mountpoint=self.pgdata,
                    diff=self.diff,
                    index_bytes=DEFAULT_INDEX_BYTES,
                    store=request.store,
                    instance=request.instance,
                    backup_id=request.backup_id,
                    base_dir=request.base_dir,
                    owner=request.owner,
                    log=LogOptions(),
                )
            )
            launched = launch.start_worker(opened, foreign=foreign, wait=True, timeout_s=timeout_s)
            if launched.state != "ready":
                raise TimedOutError(f"the mount was not ready after {timeout_s:g} s")
            address = opened.address
            report.send(
                "mounted",
                name=opened.name,
                store=address.store,
                instance=address.instance,
                backup_id=address.backup_id,
                notices=[*(said for said, _ in opened.warnings), *opened.base.notes],
            )
        except BaseException as error:
            report.send("error", **error_to_fields(error))
        finally:
            # Without Python's own end: the tree that was opened is the worker's now.
            os._exit(0)

    def is_mounted(self) -> bool:
        """Return whether a file system is on the mount point, alive or not."""
        return mounts.find_mountpoint(self.pgdata) is not None

    def worker_warnings(self) -> list[str]:
        """Return the lines of the worker's log from WARNING up."""
        try:
            text = (self.diff / "log" / "worker.log").read_text(errors="replace")
        except OSError:
            return []
        bad = (" WARNING ", " ERROR ", " CRITICAL ")
        return [line for line in text.splitlines() if any(word in line for word in bad)]

    # --- the end --------------------------------------------------------------------------------

    def end_mounter(self) -> None:
        """Wait for the child that mounts; a mount that is still being made is called off."""
        if self._mounter is None:
            return
        while os.waitpid(self._mounter, os.WNOHANG) == (0, 0):
            with contextlib.suppress(OSError):
                owner = lock.read_owner(self.diff)
                if owner is not None and owner.is_alive():
                    send_signal(owner, signal.SIGTERM)
            time.sleep(_MOUNTER_PAUSE_S)
        self._mounter = None

    def remove(self) -> None:
        """End the server and the mount, and delete all of it. Raises PbkfsError naming the rest."""
        self.end_mounter()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._stop_server()
                self._unmount(is_forced=attempt == _ATTEMPTS)
                break
            except (BusyError, TimedOutError):
                # A server that was just being started shows itself a moment later.
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(_PAUSE_S)
        with contextlib.suppress(NotFoundError, DiffError):
            ending.cleanup(self.diff, force=True)
        if self.is_mounted():
            raise HostError(
                f"{self.pgdata} is still mounted", hint=f"pbkfs unmount --force -D {self.pgdata}"
            )
        try:
            shutil.rmtree(self.root)
        except OSError as error:
            raise HostError(
                f"cannot delete {self.root}: {error.strerror}", hint="Delete it by hand."
            ) from error

    def _stop_server(self) -> None:
        try:
            # What it would still write is thrown away.
            stop(self.pgdata, self.server_user, "immediate", _STOP_LIMIT_S)
        except NotRunningError:
            if self.server_user is not None:
                remove_run_directory(self.pgdata, self.server_user)

    def _unmount(self, *, is_forced: bool) -> None:
        try:
            ending.unmount(self.pgdata, self.diff, force=is_forced, timeout_s=_UNMOUNT_LIMIT_S)
        except (NotRunningError, NotFoundError):
            return
        except HostError:
            # Unmounted, and not all of it durable: nobody will miss it.
            if self.is_mounted():
                raise
