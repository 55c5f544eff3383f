"""The worker: the process that serves one mount, from its fork to its last fsync.

``run`` belongs to the main thread of the forked process (or of ``mount --console``). Order: log,
owner's record, store guard, ``pg_wal``, then trio, the kernel's mount, and only then threads.
While it serves, a failed request is an errno; nothing but an unmount ends the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pbkfs
from pbkfs.config import START_LIMIT_S
from pbkfs.errors import BusyError, PbkfsError
from pbkfs.mount import (
    binding,
    control,
    holders,
    mounts,
    privileges,
    process,
    statistics,
    wal,
)
from pbkfs.mount.binding import Binding
from pbkfs.mount.flattening import Restacker
from pbkfs.mount.hydrating import Hydrator
from pbkfs.mount.opening import OpenMount, host_errors, now
from pbkfs.mount.owner import host_name, this_process
from pbkfs.mount.report import ReportWriter, error_to_fields
from pbkfs.mount.request import reason
from pbkfs.mount.sealing import Sealer

if TYPE_CHECKING:
    import trio

    from pbkfs.fuse.session import Session
    from pbkfs.fuse.writeback import Writeback

logger = logging.getLogger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT)
# Their default is to end the process, and with it the mount under a server.
_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
native_logger = logging.getLogger("pbkfs.native")

# Source: native/src/log.c, pbk_log_failure(); overlay/objects.py, object_path().
_OBJECT = re.compile(r"file=[0-9a-f]{2}/([0-9a-f]+) block=\S+ layer=(\S+) ")

# What was not fsynced may be lost in a power cut; names and attributes are not lost for longer.
_SYNC_EVERY_S = 5.0
# How long the answer to "unmount" may take to get out after the mount is gone.
_LAST_REPLIES_S = 2.0


def run(opened: OpenMount, report: ReportWriter, *, is_console: bool) -> int:
    """Serve the mount until it is unmounted; returns the exit code.

    A failure before the mount point answers is reported, and a new diff taken away again.
    """
    worker = Worker(opened, report)
    # Until the log is set up, what goes wrong is for the report alone.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        log_fd = process.configure_log(opened.request.log, opened.diff_path, is_console=is_console)
        if not is_console:
            process.redirect(log_fd)
        # Not the log's own descriptor, which is closed when the log is rotated.
        faulthandler.enable(2)
        return worker.run()
    except BaseException as caught:
        error = _unwrap(caught)
        # A new diff goes away with its log, so the reader of the report gets the traceback.
        if isinstance(error, PbkfsError):
            logger.error("worker failed: %s", error.message)
        else:
            logger.critical("worker failed", exc_info=error)
        faulthandler.disable()
        with contextlib.suppress(OSError):
            if worker.was_ready:
                opened.close()
            else:
                opened.abandon()
        report.send("error", **error_to_fields(error))
        return error.exit_code if isinstance(error, PbkfsError) else 1
    finally:
        logging.shutdown()


def _unwrap(error: BaseException) -> BaseException:
    """Return the one exception inside of a nursery's group, or the group if there are several."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class Worker:
    """One mount being served. All methods run on the main thread."""

    def __init__(self, opened: OpenMount, report: ReportWriter) -> None:
        self.opened = opened
        self.report = report
        self.was_ready = False
        self.started_at = time.time()
        self.state = "starting"
        self._session: Session | None = None
        self._n_requests = 0
        self._log_rest = b""
        self._unmounting: trio.Lock | None = None
        self.hydrator = Hydrator(opened.tree, opened.diff_path)

    # --- start and end, synchronous -------------------------------------------------------------

    def run(self) -> int:
        """Start, serve and end. Raises what keeps it from serving."""
        opened = self.opened
        self.report.send("started", pid=os.getpid())
        with host_errors(opened.diff_path):
            opened.lock.write(this_process(str(opened.place.path)))
        logger.info(
            "pbkfs %s serves %s on %s, diff %s",
            pbkfs.__version__,
            opened.name,
            opened.place.path,
            opened.diff_path,
        )
        for message, _ in opened.warnings:
            logger.warning("%s", message)
        for note in opened.base.notes:
            logger.info("%s", note)
        process.raise_descriptor_limit()
        opened.base.acquire(os.getpid())
        try:
            with process.abort_on_signals(), host_errors(opened.diff_path):
                n_files = wal.move_out(opened.tree, opened.base, opened.diff_path, opened.owner)
                if n_files is not None:
                    logger.info("pg_wal is %s, %d files", opened.diff_path / "pg_wal", n_files)
                server = control.listen(opened.diff_path)
                # It takes its time, so while we can still be aborted.
                importlib.import_module("pbkfs.fuse.session")
                import trio

            with server:
                trio.run(self._serve, server)
            return self._end()
        finally:
            opened.base.release(os.getpid())

    def _clear_dead_mount(self) -> None:
        """Take the dead mount away; late, for an empty directory shows until we mount."""
        from pbkfs.fuse.mounting import detach

        logger.info("clearing the dead mount on %s", self.opened.place.path)
        detach(self.opened.place.path)

    def _end(self) -> int:
        """Make everything durable and give the diff back."""
        opened = self.opened
        opened.close()
        self._drain_log()
        try:
            self._write_binding("released")
        except OSError as error:
            # It only informs; the lock decides.
            logger.warning("cannot write the binding of %s: %s", opened.diff_path, reason(error))
        with contextlib.suppress(FileNotFoundError):
            (opened.diff_path / control.NAME).unlink()
        process.remove_pid_file(opened.request.pid_file)
        logger.info("unmounted %s", opened.place.path)
        opened.lock.clear()
        opened.lock.close()
        return 0

    def _write_binding(self, state: str) -> None:
        opened = self.opened
        bound = opened.bound
        moment = now()
        opened.bound = Binding(
            base=opened.address,
            mountpoint=str(opened.place.path),
            owner=opened.owner,
            created_at=bound.created_at if bound else moment,
            last_used_at=moment,
            pbkfs_version=pbkfs.__version__,
            pid=os.getpid() if state == "active" else None,
            host=host_name(),
            state="active" if state == "active" else "released",
            made_directory=bound.made_directory if bound else opened.diff_path in opened.made,
        )
        binding.write_binding(opened.diff_path, opened.bound)

    # --- serving, in trio -------------------------------------------------------------------------

    async def _serve(self, server: socket.socket) -> None:
        import trio

        from pbkfs.fuse.session import Session

        opened = self.opened
        self._unmounting = trio.Lock()
        self._session = session = Session(
            opened.tree,
            opened.place.path,
            allow_other=opened.allow_other,
            fsname=str(opened.diff_path),
            full_wait_s=opened.request.full_wait_s,
        )
        with trio.open_signal_receiver(*_ENDING, *_IGNORED) as signals:
            try:
                async with trio.open_nursery() as nursery:
                    if opened.place.dead is not None:
                        self._clear_dead_mount()
                    session.mount()
                    privileges.drop()  # before there are threads that would keep them
                    await nursery.start(session.serve)
                    nursery.start_soon(_guarded, control.serve, server, self._handlers())
                    nursery.start_soon(_guarded, self._pump_log)
                    nursery.start_soon(_guarded, self._keep_synced, session)
                    nursery.start_soon(_guarded, self.hydrator.serve)
                    nursery.start_soon(_guarded, self._obey_signals, signals)
                    process.write_pid_file(opened.request.pid_file)
                    with host_errors(opened.diff_path):
                        self._write_binding("active")
                    self.state = "serving"
                    self.was_ready = True
                    self.report.send("ok", pid=os.getpid(), mountpoint=str(opened.place.path))
                    self.report.close()
                    logger.info("ready")
                    if opened.request.hydrate is not None:
                        self.hydrator.start(opened.request.hydrate)
                    await session.wait_closed()
                    self.state = "ending"
                    with trio.move_on_after(_LAST_REPLIES_S):
                        while self._n_requests:
                            await trio.sleep(0.01)
                    nursery.cancel_scope.cancel()
            except BaseException:
                if not self.was_ready:
                    with contextlib.suppress(OSError, PbkfsError):
                        session.unmount(lazy=True)
                raise

    def _handlers(self) -> dict[str, control.Handler]:
        handlers: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "ping": self._on_ping,
            "stat": self._on_stat,
            "reset": self._on_reset,
            "unmount": self._on_unmount,
            "hydrate": self._on_hydrate,
            "hydration": self._on_hydration,
            "seal": self._on_seal,
            "restack": self._on_restack,
        }
        return {op: self._counted(handler) for op, handler in handlers.items()}

    def _counted(
        self, handler: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
    ) -> control.Handler:
        async def counted(request: dict[str, Any]) -> dict[str, Any]:
            self._n_requests += 1
            try:
                return await handler(request)
            finally:
                self._n_requests -= 1

        return counted

    async def _pump_log(self) -> None:
        """Log what the native half writes into its pipe."""
        import trio

        while True:
            await trio.lowlevel.wait_readable(self.opened.log_pipe)
            self._drain_log()

    def _drain_log(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.opened.log_pipe, 65536):
                *lines, self._log_rest = (self._log_rest + data).split(b"\n")
                for line in lines:
                    text = line.decode(errors="backslashreplace")
                    native_logger.error("%s%s", text, self._owner_of(text))

    def _owner_of(self, line: str) -> str:
        """Return which file it is, where the native half could only name an object."""
        found = _OBJECT.match(line)
        if found is None:
            return ""
        path = self.opened.tree.find_object(int(found[1], 16), is_live=found[2] == "diff")
        return f" (of {os.fsdecode(path)!r})" if path is not None else ""

    async def _keep_synced(self, session: Session) -> None:
        """Every few seconds make names durable, forget what nobody uses, bound what is dirty."""
        import trio

        tree = self.opened.tree
        while True:
            await trio.sleep(_SYNC_EVERY_S)
            try:
                tree.reap()
                session.bound_dirty()
                await trio.to_thread.run_sync(tree.sync)
            except OSError as error:
                logger.error("periodic sync of diff %s failed: %s", self.opened.diff_path, error)

    async def _obey_signals(self, signals: Any) -> None:
        async for signum in signals:
            name = signal.Signals(signum).name
            if signum in _IGNORED:
                logger.info("got %s, which does nothing", name)
                continue
            logger.info("got %s, unmounting", name)
            try:
                await self._unmount(is_forced=False)
            except PbkfsError as error:
                logger.error("not unmounted: %s", error.message)

    async def _unmount(self, *, is_forced: bool) -> None:
        """Unmount; the kernel's dirty pages come first. Raises BusyError if files are in use."""
        import trio

        assert self._session is not None
        assert self._unmounting is not None
        session, path = self._session, self.opened.place.path
        async with self._unmounting:
            if session.is_closed:
                return
            n_waiting = session.counters().get("waiting_for_space", 0)
            if n_waiting and not is_forced:
                raise BusyError(
                    f"{n_waiting} writes to {path} wait for space on the file system of "
                    f"{self.opened.diff_path}",
                    hint="Make room there; --force unmounts without them.",
                )
            try:
                if not n_waiting:
                    await trio.to_thread.run_sync(session.unmount)
                    return
            except BusyError:
                if not is_forced:
                    raise await trio.to_thread.run_sync(_busy_error, path) from None
            logger.warning("forced: detaching %s while it is in use", path)
            paths = self.opened.tree.paths_in_use()
            with trio.move_on_after(START_LIMIT_S):
                try:
                    await trio.to_thread.run_sync(
                        process.write_back, path, paths, abandon_on_cancel=True
                    )
                except OSError as error:
                    logger.error("not all of %s could be written back: %s", path, error)
            await trio.to_thread.run_sync(lambda: session.unmount(lazy=True))
            session.close()

    async def _on_ping(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "state": self.state,
            "version": pbkfs.__version__,
            "waiting_for_space": self.session_counters().get("waiting_for_space", 0),
        }

    async def _on_stat(self, request: dict[str, Any]) -> dict[str, Any]:
        found = await statistics.collect(self)
        if request.get("reset"):
            self._reset()
        return {"stat": dataclasses.asdict(found)}

    async def _on_reset(self, _request: dict[str, Any]) -> dict[str, Any]:
        self._reset()
        return {}

    def _reset(self) -> None:
        assert self._session is not None
        self.opened.tree.nodes.reset_counters()
        self._session.reset_counters()

    async def _on_unmount(self, request: dict[str, Any]) -> dict[str, Any]:
        await self._unmount(is_forced=bool(request.get("force")))
        return {"pid": os.getpid()}

    async def _on_hydrate(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("stop"):
            self.hydrator.stop()
        else:
            rate = request.get("rate")
            self.hydrator.start(None if rate is None else int(rate))
        return {"hydration": self.hydrator.fields()}

    async def _on_hydration(self, request: dict[str, Any]) -> dict[str, Any]:
        if request.get("look"):
            await self.hydrator.look()
        return {"hydration": self.hydrator.fields()}

    async def _on_seal(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        assert self._unmounting is not None
        async with self._unmounting:
            n_waiting = self.session_counters().get("waiting_for_space", 0)
            if n_waiting or self._session.is_closed:
                why = f"{n_waiting} writes wait for space" if n_waiting else "it is unmounted"
                raise BusyError(
                    f"diff {self.opened.diff_path} can't be sealed now: {why}",
                    hint="Make room on its file system first." if n_waiting else None,
                )
            opened = self.opened
            return await Sealer(
                opened.tree, opened.diff_path, opened.place.path, self.hydrator
            ).seal(request)

    async def _on_restack(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        assert self._unmounting is not None
        async with self._unmounting:
            opened = self.opened
            if self._session.is_closed:
                raise BusyError(f"diff {opened.diff_path} is being unmounted")
            restacker = Restacker(opened.tree, opened.diff_path, self.hydrator)
            return await restacker.restack(request)

    def writeback(self) -> Writeback:
        """Return what the kernel may hold back, and what is kept for it."""
        assert self._session is not None
        return self._session.writeback

    def session_counters(self) -> dict[str, int]:
        """Return the counters of the kernel's side."""
        return self._session.counters() if self._session is not None else {}


async def _guarded(task: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run a task beside the serving; the mount must not die of a bug in it."""
    try:
        await task(*args)
    except Exception:
        logger.exception("task %s ended by a bug; the mount goes on", task.__qualname__)


def _busy_error(path: Path) -> BusyError:
    entry = mounts.find_mountpoint(path)
    users = holders.find_holders(entry.device, path) if entry is not None else []
    return holders.busy_error(path, users)
