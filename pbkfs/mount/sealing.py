"""Sealing a diff: what it holds becomes an immutable layer, and it goes on in a new one.

``seal`` is for callers (``branch``, the command line), synchronous. A mounted diff is sealed by its
worker (control op ``seal``, class ``Sealer``) while it is in use; one that is not mounted by this
process, under the diff's lock. ``overlay.sealing`` has the mechanism.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pbkfs.errors import DiffError, HostError, NotRunningError
from pbkfs.mount import control, lock, mounts
from pbkfs.mount.base import open_base
from pbkfs.mount.binding import read_binding
from pbkfs.mount.detaching import check_not_detached
from pbkfs.mount.keeping import EXIT_REFUSED
from pbkfs.mount.request import reason
from pbkfs.mount.standstill import Standstill
from pbkfs.overlay import sealing
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.sealing import BrokenSealError, Seal
from pbkfs.overlay.superblock import LayerRef
from pbkfs.overlay.tree import Tree

if TYPE_CHECKING:
    from pbkfs.mount.hydrating import Hydrator

logger = logging.getLogger(__name__)

# For how long a server may stand still: what it has written last goes to the disk meanwhile.
_HOLD_LIMIT_S = 10.0
# For how long the kernel may take to write back what it holds, before anything stands still.
_SYNC_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class Child:
    """A second head to be made on the sealed layer. Neither path may exist, their parents must.

    ``head`` becomes an ordinary diff directory (mountable, without a binding), ``live`` the layer
    directory that it writes to.
    """

    head: Path
    live: Path


@dataclass(frozen=True, slots=True)
class SealReport:
    """What a seal did. ``layer`` is the sealed layer: its uuid and absolute path.

    ``gate_ms`` is how long writes had to wait, ``held_ms`` how long the server's processes stood
    still (0.0: they did not), ``total_ms`` the whole. ``wal_bytes`` were copied for the child.
    ``note`` says why the server was not held although that was asked for.
    """

    layer: LayerRef
    gate_ms: float
    total_ms: float
    wal_bytes: int
    held_ms: float = 0.0
    note: str | None = None


def seal(
    diff: Path,
    *,
    new_live: Path,
    child: Child | None = None,
    hold: bool = True,
    timeout_s: float | None = None,
) -> SealReport:
    """Seal the diff at ``diff``; it goes on in the new layer directory ``new_live``.

    ``child`` is there, complete and durable, when this returns. ``hold``: the PostgreSQL server on
    the mount stands still for the instant, so that the seal is exact; where that is not allowed
    the seal is what a power cut would leave, and ``note`` says so. Raises PbkfsError; then diff and
    disk are as before (but for a HostError that says that the child could not be finished: the diff
    is sealed then). TimedOutError: the seal goes on.
    """
    diff = mounts.resolve(diff)
    new_live = Path(os.path.abspath(new_live))
    if child is not None:
        child = Child(Path(os.path.abspath(child.head)), Path(os.path.abspath(child.live)))
    try:
        reply = control.call(
            diff,
            "seal",
            timeout_s=timeout_s,
            live=os.fspath(new_live),
            child=None if child is None else [os.fspath(child.head), os.fspath(child.live)],
            hold=hold,
        )
    except NotRunningError:
        if os.path.lexists(new_live):
            raise DiffError(
                f"cannot seal diff {diff}: {new_live} exists already",
                hint=f"If its worker has just ended, see {diff / 'log' / 'worker.log'} for why.",
            ) from None
        return _seal_offline(diff, new_live, child)
    layer = reply["layer"]
    return SealReport(
        layer=LayerRef(uuid.UUID(layer["uuid"]), layer["path"]),
        gate_ms=reply["gate_ms"],
        total_ms=reply["total_ms"],
        wal_bytes=reply["wal_bytes"],
        held_ms=reply["held_ms"],
        note=reply["note"],
    )


def _seal_offline(diff: Path, new_live: Path, child: Child | None) -> SealReport:
    began = time.monotonic()
    diff_lock = lock.acquire(diff)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_host_errors(diff))
            bound = read_binding(diff)
            if bound is None:
                raise DiffError(
                    f"diff {diff} was never mounted", hint="Mount it once; then it can be sealed."
                )
            check_not_detached(diff)
            base = open_base(bound.base, force=True, owner=bound.owner)
            stack.callback(base.close)
            base.acquire(os.getpid())
            stack.callback(base.release, os.getpid())
            opened = Diff.open(diff, base)
            stack.callback(opened.close)
            tree = Tree(base, opened, open_layers(opened), owner=bound.owner, log_fd=-1)
            stack.callback(tree.close)
            made = None if child is None else sealing.Child(child.head, child.live)
            sealed = tree.seal(new_live, made)
        # A good end: whoever was recorded as the owner before has died, and was recovered from.
        diff_lock.clear()
    finally:
        diff_lock.close()
    return SealReport(
        layer=sealed.layer,
        gate_ms=sealed.gate_ns / 1e6,
        total_ms=(time.monotonic() - began) * 1e3,
        wal_bytes=sealed.wal_bytes,
    )


class Sealer:
    """The worker's half. One seal at a time, and no unmount beside it: the caller sees to that."""

    def __init__(
        self,
        tree: Tree,
        diff: Path,
        mountpoint: Path,
        hydrator: Hydrator,
        write_back: Callable[[Sequence[bytes]], None],
        note_hold: Callable[[bool], None],
        note_layer: Callable[[Path], None],
    ) -> None:
        """``write_back`` has the kernel write files back. ``note_hold`` is told before the server
        is held, and after it was let go; ``note_layer`` of the new layer's directory, before
        anything is written to it."""
        self._write_back_files = write_back
        self._note_hold = note_hold
        self._note_layer = note_layer
        self._tree = tree
        self._diff = diff
        self._mountpoint = mountpoint
        self._hydrator = hydrator

    async def seal(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the control op. Raises PbkfsError; a seal that broke ends the process."""
        import trio

        child = request.get("child")
        made = None if child is None else sealing.Child(Path(child[0]), Path(child[1]))
        answer: dict[str, Any] = {}
        was_hydrating = await self._hydrator.pause()
        try:
            with trio.CancelScope(shield=True), _host_errors(self._diff):
                answer = await self._seal(Path(request["live"]), made, hold=bool(request["hold"]))
        except BrokenSealError as error:
            end_worker(error)
        finally:
            self._hydrator.resume(is_wanted=was_hydrating)
        return answer

    async def _seal(
        self, new_live: Path, child: sealing.Child | None, *, hold: bool
    ) -> dict[str, Any]:
        import trio

        began = time.monotonic()
        await self._write_back(_SYNC_LIMIT_S)
        seal = self._tree.begin_seal(new_live, child)
        standstill = Standstill(self._mountpoint, _HOLD_LIMIT_S)
        note = None
        try:
            await trio.to_thread.run_sync(seal.prepare)
            self._note_layer(new_live)
            try:
                if hold:
                    self._note_hold(True)
                    note = await trio.to_thread.run_sync(standstill.begin)
                    if note is None:
                        await self._write_back(_HOLD_LIMIT_S)
                        await trio.to_thread.run_sync(seal.sync)
                sealed = seal.switch()
                self._tree.hydration.forget()
            finally:
                was_held = standstill.end()
                if hold:
                    self._note_hold(False)
            if hold and note is None and not was_held:
                note = "writing back took too long to keep it waiting"
            await trio.to_thread.run_sync(self._finish, seal)
        except BrokenSealError:
            raise
        except BaseException:
            await trio.to_thread.run_sync(seal.cancel)
            raise
        total_ms = (time.monotonic() - began) * 1e3
        gate_ms, held_ms = sealed.gate_ns / 1e6, standstill.held_s * 1e3
        logger.info(
            "sealed layer %s, the diff goes on in %s; writes waited %.1f ms, the server %.1f ms%s",
            sealed.layer.path,
            new_live,
            gate_ms,
            held_ms,
            f" (not held: {note})" if note else "",
        )
        return {
            "layer": {"uuid": str(sealed.layer.uuid), "path": sealed.layer.path},
            "gate_ms": gate_ms,
            "held_ms": held_ms,
            "total_ms": total_ms,
            "wal_bytes": sealed.wal_bytes,
            "note": note,
        }

    async def _write_back(self, limit_s: float) -> None:
        """Let the kernel write back; a thread, because that needs this one."""
        import trio

        paths = self._tree.paths_in_use()
        with trio.move_on_after(limit_s) as scope:
            await trio.to_thread.run_sync(self._write_back_files, paths, abandon_on_cancel=True)
        if scope.cancelled_caught:
            raise HostError(
                f"cannot seal diff {self._diff}: the kernel did not write back in {limit_s:g} s",
                hint="The disk under the diff is slow, or full; nothing has changed.",
            )

    def _finish(self, seal: Seal) -> None:
        try:
            seal.finish()
        except OSError as error:
            raise HostError(
                f"diff {self._diff} is sealed, but its child could not be made: {reason(error)}",
                hint="The diff goes on; seal it again for another child.",
            ) from error


def end_worker(error: BrokenSealError) -> NoReturn:
    """End this process at once: the disk has another stack than it has in memory.

    Nobody takes over: which stack a power cut would find, only the next mount settles.
    """
    logger.critical("%s; the worker ends, mount the diff again", error)
    logging.shutdown()
    os._exit(EXIT_REFUSED)


@contextlib.contextmanager
def _host_errors(diff: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise DiffError(
            f"cannot seal diff {diff}: {os.fsdecode(error.filename)} exists already",
            hint="Name directories that do not exist.",
        ) from error
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        raise HostError(
            f"cannot seal diff {diff}: {reason(error)}{where}",
            hint="The diff is as it was; when the cause is gone, try again.",
        ) from error
