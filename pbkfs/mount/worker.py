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
from pbkfs.errors import BusyError, HostError, PbkfsError
from pbkfs.mount import (
    binding,
    control,
    holders,
    keeping,
    mounts,
    privileges,
    process,
    standstill,
    statistics,
    takeover,
    wal,
)
from pbkfs.mount.binding import Binding
from pbkfs.mount.flattening import Restacker
from pbkfs.mount.hydrating import Hydrator
from pbkfs.mount.keeping import EXIT_REFUSED, Link, Taken
from pbkfs.mount.opening import OpenMount, host_errors, now
from pbkfs.mount.owner import host_name, this_process
from pbkfs.mount.report import ReportWriter, error_to_fields
from pbkfs.mount.request import reason
from pbkfs.mount.sealing import Sealer
from pbkfs.mount.write_errors import WriteErrors
from pbkfs.overlay import ledger as ledgers
from pbkfs.overlay.layer import OBJECTS
from pbkfs.overlay.ledger import Ledger

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
# The journal says up to where it was durable: what is damaged after that passes for a torn end.
_MARK_EVERY_S = 60.0
# How long the answer to "unmount" may take to get out after the mount is gone.
_LAST_REPLIES_S = 2.0


def run(
    opened: OpenMount, report: ReportWriter, *, is_console: bool, link: Link | None = None
) -> int:
    """Serve the mount until it is unmounted; returns the exit code.

    A failure before the mount point answers is reported, and a new diff taken away again. ``link``
    leads to the keeper, if there is one.
    """
    worker = Worker(opened, report, link)
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
        if worker.is_armed and not worker.is_ending:
            worker.fail(error)
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
        if worker.is_ending and link is not None:
            return EXIT_REFUSED
        return error.exit_code if isinstance(error, PbkfsError) else 1
    finally:
        logging.shutdown()


def run_taken(taken: Taken) -> int:
    """Serve the mount of a worker that has died until it is unmounted; returns the exit code."""
    logging.getLogger().addHandler(logging.NullHandler())
    worker: Worker | None = None
    try:
        numbers = takeover.read_numbers(taken.fds)
        options = takeover.log_options(numbers.meta)
        # A log that has become unwritable is no reason to end the mount.
        log_fd = process.configure_log(
            options, Path(numbers.meta["diff"]), is_console=False, is_needed=False
        )
        process.redirect(log_fd)
        faulthandler.enable(2)
        logger.warning("%s; this one takes over", taken.why)
        write_errors = WriteErrors()
        for fd in _objects_fds(taken):
            write_errors.watch_again(fd)
        opened, ledger = takeover.open_taken(numbers, taken.fds)
        worker = Worker(opened, ReportWriter(-1), taken.link)
        worker.take(taken, ledger, write_errors)
        worker.was_ready = True
        return worker.run()
    except BaseException as caught:
        error = _unwrap(caught)
        if isinstance(error, PbkfsError):
            logger.error("cannot take over: %s", error.message)
        else:
            logger.critical("worker failed", exc_info=error)
        is_over = worker is not None and worker.is_ending
        return EXIT_REFUSED if is_over or isinstance(error, takeover.RefusedError) else 1
    finally:
        logging.shutdown()


def _objects_fds(taken: Taken) -> list[int]:
    return [fd for name, fd in taken.fds.items() if name.startswith(takeover.OBJECTS_FD)]


def _unwrap(error: BaseException) -> BaseException:
    """Return the one exception inside of a nursery's group, or the group if there are several."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


class Worker:
    """One mount being served. All methods run on the main thread."""

    def __init__(self, opened: OpenMount, report: ReportWriter, link: Link | None = None) -> None:
        self.opened = opened
        self.report = report
        self.link = link
        self.ledger: Ledger | None = None
        self.taken: Taken | None = None
        self._objects_fd = -1
        self._devices: set[int] = set()
        self._write_errors = WriteErrors()
        self.is_armed = False
        self.is_ending = False
        """It is unmounted; what fails now is not to be tried again by somebody who forgot why."""
        # The process that has the mount for as long as it lasts.
        self.owner_pid = os.getpid() if link is None else link.pid
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
        self.report.send("started", pid=self.owner_pid)
        if self.taken is not None:
            return self._run_taken(self.taken)
        with host_errors(opened.diff_path):
            opened.lock.write(this_process(str(opened.place.path), self.owner_pid))
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
        opened.base.acquire(self.owner_pid)
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
            opened.base.release(self.owner_pid)

    def _run_taken(self, taken: Taken) -> int:
        """Serve on. What fails leaves the mount to the next one, so only its end gives it back."""
        import trio

        process.raise_descriptor_limit()
        server = socket.socket(fileno=os.dup(taken.fds["control"]))
        with server:
            trio.run(self._serve, server)
        code = self._end()
        self.opened.base.release(self.owner_pid)
        return code

    def _clear_dead_mount(self) -> None:
        """Take the dead mount away; late, for an empty directory shows until we mount."""
        from pbkfs.fuse.mounting import detach

        logger.info("clearing the dead mount on %s", self.opened.place.path)
        standstill.let_go(self.opened.place.path)
        detach(self.opened.place.path)

    def _end(self) -> int:
        """Make everything durable and give the diff back."""
        self.is_ending = True
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
        process.remove_pid_file(opened.request.pid_file, self.owner_pid)
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
            pid=self.owner_pid if state == "active" else None,
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
            is_supervised=self.link is not None,
        )
        with trio.open_signal_receiver(*_ENDING, *_IGNORED) as signals:
            try:
                async with trio.open_nursery() as nursery:
                    if self.taken is not None:
                        self._take_over(session, self.taken)
                    else:
                        if opened.place.dead is not None:
                            self._clear_dead_mount()
                        self._begin_ledger()
                        session.mount()
                    privileges.drop()  # before there are threads that would keep them
                    await nursery.start(session.serve)
                    nursery.start_soon(_guarded, control.serve, server, self._handlers())
                    nursery.start_soon(_guarded, self._pump_log)
                    nursery.start_soon(_guarded, self._keep_synced, session)
                    nursery.start_soon(_guarded, self.hydrator.serve)
                    nursery.start_soon(_guarded, self._obey_signals, signals)
                    if self.taken is None:
                        process.write_pid_file(opened.request.pid_file, self.owner_pid)
                        with host_errors(opened.diff_path):
                            self._write_binding("active")
                    self.state = "serving"
                    self._tell_keeper(session, server)
                    self.was_ready = True
                    self.report.send("ok", pid=self.owner_pid, mountpoint=str(opened.place.path))
                    self.report.close()
                    logger.info("ready")
                    if self.taken is not None:
                        nursery.start_soon(_guarded, self._repair, session)
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

    # --- surviving this process -------------------------------------------------------------------

    def take(self, taken: Taken, ledger: Ledger, write_errors: WriteErrors) -> None:
        """Be the one who takes over, by what the keeper has kept."""
        self.taken, self.ledger, self._write_errors = taken, ledger, write_errors
        # A younger descriptor would not know of older errors: see takeover.
        self._devices = {os.fstat(fd).st_dev for fd in _objects_fds(taken)}

    def _begin_ledger(self) -> None:
        """Write down from now on what another worker would need."""
        if self.link is None:
            return
        opened = self.opened
        with host_errors(opened.diff_path):
            # Before anything is written: a younger descriptor would not know of older errors.
            objects = opened.diff.live.path / OBJECTS
            self._write_errors.watch(objects)
            self._objects_fd = os.open(objects, os.O_RDONLY | os.O_CLOEXEC)
            self.ledger = Ledger.make()
            opened.tree.keep_ledger(self.ledger)

    def _tell_keeper(self, session: Session, server: socket.socket) -> None:
        """Let the keeper know that this worker serves, and how another one could.

        Raises HostError, OSError.
        """
        if self.link is None or self.ledger is None:
            return
        if self.taken is not None:
            self.link.send("serving")
            self.is_armed = True
            return
        from pbkfs.fuse.session import init_answer

        opened = self.opened
        if not session.can_resend():
            raise HostError(
                f"the mount on {session.mountpoint} can't be supervised: the kernel does not send "
                "requests again",
                hint="Leave --supervised out.",
            )
        self.ledger.note(**takeover.describe(opened, session.mountpoint))
        self.ledger.note_init(session.init_request, init_answer(session.init_request))
        if not self.ledger.is_usable:
            return
        fds = {
            "fuse": session.fuse_fd,
            "ledger": self.ledger.fd,
            "lock": opened.lock.fileno(),
            "control": server.fileno(),
            takeover.OBJECTS_FD: self._objects_fd,
        }
        self._devices.add(os.fstat(self._objects_fd).st_dev)
        self.link.send("armed", fds, keeping.command(), **self._keeper_log())
        os.close(self._objects_fd)
        self.is_armed = True
        session.fail_with(self.fail)

    def _keeper_log(self) -> dict[str, str]:
        options = self.opened.request.log
        if options.sink != "file":
            return {}
        path = options.path or self.opened.diff_path / "log" / "worker.log"
        return {"log": os.path.abspath(path), "style": options.style}

    def fail(self, error: BaseException) -> None:
        """End at once, without an answer to anybody: another worker takes over."""
        logger.critical("worker failed", exc_info=error)
        logging.shutdown()
        os._exit(1)

    def _take_over(self, session: Session, taken: Taken) -> None:
        assert self.ledger is not None
        session.fail_with(self.fail)
        session.take_over(taken.fds["fuse"], self.ledger.init)

    async def _repair(self, session: Session) -> None:
        """Do again what the dead worker may have left half done outside of the tree."""
        import trio

        from pbkfs.fuse import tablespaces

        assert self.ledger is not None
        for ino in tablespaces.find_listings(self.opened.tree):
            session.invalidate(ino)
        try:
            # The readers of a backup are there by the keeper's process; that stays true.
            await trio.to_thread.run_sync(self.opened.base.acquire, self.owner_pid)
        except (PbkfsError, OSError) as error:
            logger.warning("the base is not guarded any more: %s", error)
        if self.ledger.meta.get("holds_server"):
            await trio.to_thread.run_sync(standstill.let_go, session.mountpoint)
            self.ledger.note(holds_server=False)

    def _note_hold(self, is_held: bool) -> None:
        if self.ledger is not None:
            self.ledger.note(holds_server=is_held)

    def _note_layer(self, path: Path) -> None:
        """Give the keeper a descriptor of the file system of a new live layer: see takeover.

        Raises OSError.
        """
        if self.link is None or not self.is_armed or self.ledger is None:
            return
        self._write_errors.watch(path / OBJECTS)
        fd = os.open(path / OBJECTS, os.O_RDONLY | os.O_CLOEXEC)
        try:
            device = os.fstat(fd).st_dev
            if not keeping.tells_errors(fd):
                self.ledger.give_up(f"the file system of {path} does not tell of write errors")
            elif device not in self._devices:
                self.link.send("added", {f"{takeover.OBJECTS_FD}-{device}": fd})
                self._devices.add(device)
        finally:
            os.close(fd)

    async def _forget_unknown(self, session: Session) -> None:
        """Let go of what lost its name and the kernel does not know any more.

        After a takeover nobody has counted how often it was looked up.
        """
        import trio

        tree = self.opened.tree
        for ino in tree.take_doubtful():
            try:
                is_known = await trio.to_thread.run_sync(session.is_known, ino)
            except OSError as error:
                logger.warning("the kernel does not say whether it has an inode: %s", reason(error))
                return
            if not is_known:
                tree.abandon(ino)

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
            "upgrade": self._on_upgrade,
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
        mark_at = 0.0
        while True:
            await trio.sleep(_SYNC_EVERY_S)
            try:
                if self.taken is not None:
                    await self._forget_unknown(session)
                if self.ledger is not None:
                    self.ledger.tidy()
                tree.reap()
                session.bound_dirty()
                moment = tree.now()
                await trio.to_thread.run_sync(tree.sync)
                if time.monotonic() >= mark_at:
                    tree.mark(moment)
                    mark_at = time.monotonic() + _MARK_EVERY_S
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
                    await trio.to_thread.run_sync(session.write_back, paths, abandon_on_cancel=True)
                except OSError as error:
                    logger.error("not all of %s could be written back: %s", path, error)
            await trio.to_thread.run_sync(lambda: session.unmount(lazy=True))
            if self.is_armed and self.link is not None:
                # Its copy of the connection would let users wait for what nobody serves any more.
                self.link.send("over")
            session.close()

    async def _on_ping(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "state": self.state,
            "version": pbkfs.__version__,
            "owner": self.owner_pid,
            "n_takeovers": 0 if self.taken is None else self.taken.n_takeovers,
            "init": "" if self.ledger is None else self.ledger.init.hex(),
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
            rate = None
        else:
            rate = request.get("rate")
            self.hydrator.start(None if rate is None else int(rate))
            rate = 0 if rate is None else int(rate)
        if self.ledger is not None:
            self.ledger.note(hydrate=rate)
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
            sealer = Sealer(
                opened.tree,
                opened.diff_path,
                opened.place.path,
                self.hydrator,
                self._session.write_back,
                self._note_hold,
                self._note_layer,
            )
            return await sealer.seal(request)

    async def _on_restack(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        assert self._unmounting is not None
        async with self._unmounting:
            opened = self.opened
            if self._session.is_closed:
                raise BusyError(f"diff {opened.diff_path} is being unmounted")
            restacker = Restacker(opened.tree, opened.diff_path, self.hydrator)
            return await restacker.restack(request)

    async def _on_upgrade(self, request: dict[str, Any]) -> dict[str, Any]:
        import trio

        self._check_upgrade(request)
        # Not the keeper's descriptors: who takes over asks those, and then it is too late.
        found = await trio.to_thread.run_sync(self._write_errors.ask)
        if found is not None:
            raise HostError(
                f"the mount on {self.opened.place.path} can't be taken over: {found}",
                hint="Unmount it, and mount it again: the mount ends if its worker does, too.",
            )
        # That may have taken long.
        link = self._check_upgrade(request)
        link.send("replace", command=[str(part) for part in request["command"]])
        return {"pid": os.getpid()}

    def _check_upgrade(self, request: dict[str, Any]) -> Link:
        """Return the link to the keeper. Raises HostError, BusyError where nobody can take over."""
        assert self._session is not None
        assert self._unmounting is not None
        path = self.opened.place.path
        if self.link is None or not self.is_armed or self.ledger is None:
            raise HostError(
                f"the mount on {path} is not supervised",
                hint="Unmount it, and mount it again, with --supervised if that is to be possible.",
            )
        fits = int(request["ledger_version"]) == ledgers.VERSION
        fits = fits and request["init_answer"] == self.ledger.init_answer.hex()
        if not fits or not self.ledger.is_usable:
            raise HostError(
                f"the mount on {path} can't be taken over by that version",
                hint="Unmount it, and mount it again.",
            )
        if self._unmounting.locked() or self._session.is_closed:
            raise BusyError(
                f"the mount on {path} is being sealed, folded or unmounted",
                hint="Try again when that is done.",
            )
        return self.link

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
