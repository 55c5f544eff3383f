"""What trunks and branches have in common: coming up, going down, being removed, being found.

The steps of one head, each of which can be done again after a crash at any point. Whoever calls
holds the head's lock (``locks``), except for what only reads. Called by ``trunks``, ``branches``,
``reconcile``; blocking, any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pbkfs.branch.engine import Engine, Size
from pbkfs.branch.errors import UnknownHeadError, WrongStateError
from pbkfs.branch.layout import Layout
from pbkfs.branch.locks import LAYERS, Locks
from pbkfs.branch.ports import assign_port
from pbkfs.branch.serving import Serving, free_of_holders
from pbkfs.branch.settings import Settings
from pbkfs.branch.store import Head, Kind, Store, now
from pbkfs.branch.views import Connection, HeadView
from pbkfs.errors import BusyError, PbkfsError
from pbkfs.postgres.network import first_address

logger = logging.getLogger(__name__)

Say = Callable[[str], None]

_PORT_TRIES = 5
_TAIL_LINES = 20
# The daemon looks at the store several times a second.
_FRONT_LIMIT_S = 5.0


def say_nothing(text: str) -> None:
    """Drop ``text``: the progress of an operation that nobody looks at."""
    del text


def ignore_begin(head: Head) -> None:
    """Drop ``head``: nobody waits for the begin of its creation."""
    del head


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """One DATA directory with all that works on it."""

    layout: Layout
    settings: Settings
    store: Store
    locks: Locks
    engine: Engine
    serving: Serving
    measures: bool = True
    """Whether sizes are measured at all: a walk over all files of all heads."""

    # --- finding --------------------------------------------------------------------------------

    def find(self, name: str, kind: Kind | None = None) -> Head:
        """Return the head of this name. Raises UnknownHeadError."""
        head = self.store.find(name)
        if head is None or (kind is not None and head.kind != kind):
            what = kind or "trunk or branch"
            hint = None
            if head is not None:
                hint = f"{name!r} is a {head.kind}: pbkfs {head.kind} … works on it."
            raise UnknownHeadError(f"{what} {name!r} does not exist", hint=hint)
        return head

    @contextlib.contextmanager
    def locked(self, name: str, kind: Kind | None = None) -> Iterator[Head]:
        """Hold the lock of the head of this name; gives the head as it is then."""
        while True:
            found = self.find(name, kind)
            with self.locks.hold(found.id, what=f"{found.kind} {name!r}"):
                head = self.store.find(name)
                if head is not None and head.id == found.id:
                    yield head
                    return

    def reload(self, head: Head) -> Head:
        """Return the head as the store has it now. Raises UnknownHeadError."""
        found = self.store.get(head.id)
        if found is None:
            raise UnknownHeadError(f"{head.kind} {head.name!r} does not exist any more")
        return found

    # --- up and down ----------------------------------------------------------------------------

    def bring_up(
        self, head: Head, say: Say, *, is_new: bool = False, may_move: bool = False
    ) -> Head:
        """Mount a head and start its server; returns the head as it is then.

        A failure leaves it not mounted and without a port, and is written down unless ``is_new``:
        then the caller takes all of it back. ``may_move``: see ``assign_port``.
        """
        try:
            return self._bring_up(head, say, is_new=is_new, may_move=may_move)
        except BaseException as error:
            with contextlib.suppress(PbkfsError, OSError):
                self.take_down(head, "immediate")
            if not is_new:
                said = error.message if isinstance(error, PbkfsError) else type(error).__name__
                first = said.splitlines()[0] if said else said
                with self.store.transaction() as tx:
                    if head.is_asleep:  # the next client may have more luck
                        tx.update(head.id, is_wanted=0)
                    else:
                        tx.release_port(head.id)
                    tx.update(head.id, status="error", error=first, operation="")
                    tx.record(head, "start failed", first)
            raise

    def _bring_up(self, head: Head, say: Say, *, is_new: bool, may_move: bool) -> Head:
        if not is_new:
            # While one that was asleep is mounted, clients still get through to the daemon.
            begun = "wake" if head.is_asleep else "start"
            self.store.update(head.id, status="starting", operation=begun, error="", is_wanted=1)
        self.serving.make_password(head)
        self.flatten_deep(head, say)
        self.engine.mount(head.id)
        if head.started_at is None:
            # Before the first start of this data; a slot that is made on the head itself stays.
            slots = self.serving.remove_slots(head)
            if slots:
                self.store.record(head, "slots removed", ", ".join(slots))
        if head.is_asleep:
            self.store.update(head.id, operation="start")
            self._wait_for_front(head)
        avoid: set[int] = set()
        for attempt in range(_PORT_TRIES):
            with self.store.transaction() as tx:
                port = assign_port(
                    tx,
                    head,
                    self.settings,
                    self.serving.is_port_free,
                    avoid=avoid,
                    may_move=may_move,
                )
                head = tx.get(head.id) or head
            try:
                served = self.serving.start(head, say)
                break
            except BusyError:
                # Somebody took the port between our look and the server's.
                if self.serving.is_port_free(port) or attempt + 1 == _PORT_TRIES:
                    raise
                avoid.add(port)
        else:
            raise AssertionError("unreachable")
        # At every start: a reset takes the data back to before it was set.
        self.serving.set_password(head)
        with self.store.transaction() as tx:
            tx.update(
                head.id,
                status="running",
                operation="",
                error="",
                is_wanted=1,
                is_asleep=0,
                pg_version=served.version,
                bindir=served.bindir,
                server_pid=served.postmaster.pid,
                server_ticks=served.postmaster.start_ticks,
                started_at=now(),
            )
            tx.record(head, "started", f"port {served.port}")
        return self.reload(head)

    def take_down(self, head: Head, mode: str = "fast") -> None:
        """Stop the server of a head and unmount it; neither has to be there."""
        self.serving.stop(head, mode)
        free_of_holders(lambda: self.engine.unmount(head.id))

    def start(self, head: Head, say: Say) -> Head:
        """Start a head that is stopped or in error; one that runs is left as it is."""
        self.check_is_whole(head)
        if head.status == "running":
            if self.status_of(head) == "running":
                return head
            self.take_down(head, "immediate")
        elif head.status == "error":
            # Perhaps something of it is still there, which could not be taken down before.
            self.take_down(head, "immediate")
        elif head.status != "stopped":
            raise WrongStateError(f"{head.kind} {head.name!r} is {head.status}")
        return self.bring_up(head, say)

    def check_is_whole(self, head: Head) -> None:
        """Raise WrongStateError for a head that a reset or refresh has left half-way.

        Its WAL may be that of another state than its layers.
        """
        if head.operation in ("reset", "refresh"):
            raise WrongStateError(
                f"the {head.operation} of {head.kind} {head.name!r} did not come to its end",
                hint="The next command goes on with it, once what stopped it is gone: perhaps a "
                f"full disk. See pbkfs {head.kind} log {head.name}.",
            )

    def stop(self, head: Head) -> Head:
        """Stop a head; its data stays, its port is free for others."""
        self.check_is_whole(head)
        if head.status not in ("running", "error", "stopped"):
            raise WrongStateError(f"{head.kind} {head.name!r} is {head.status}")
        self.store.update(head.id, operation="stop")
        self.take_down(head)
        with self.store.transaction() as tx:
            tx.release_port(head.id)
            tx.set_stopped(head.id, is_wanted=0, is_asleep=0)
            if head.status != "stopped" or head.is_asleep:
                tx.record(head, "stopped")
        if head.is_asleep:
            self._wait_for_front(head)
        return self.reload(head)

    def fall_asleep(self, head: Head) -> None:
        """Stop a head that nobody uses; it keeps its port, on which the daemon takes its clients.

        Without a daemon, or after its end, it is one that is stopped.
        """
        self.store.update(head.id, operation="stop", is_asleep=1)
        self.take_down(head)
        with self.store.transaction() as tx:
            tx.set_stopped(head.id, is_wanted=0)
            tx.record(head, "fell asleep", f"no client for {head.idle_stop_s:g} s")

    def _wait_for_front(self, head: Head) -> None:
        """Wait until the daemon lets go of a head's port; whoever else has it keeps it."""
        deadline = time.monotonic() + _FRONT_LIMIT_S
        while not self.serving.is_port_free(head.port) and time.monotonic() < deadline:
            time.sleep(0.01)

    def undo_creation(self, head: Head, error: BaseException) -> None:
        """Remove a head that could not be made; what ``error`` says stays true afterwards."""
        log = self.layout.server_log(head.id)
        if isinstance(error, PbkfsError) and str(log) in f"{error.message} {error.hint}":
            lines: list[str] = []
            with contextlib.suppress(OSError):
                lines = self.read_log(head, _TAIL_LINES)
            end = "\n".join(f"  {line}" for line in lines)
            if end and "\n" not in error.message:
                error.message += f"; the end of its log:\n{end}"
            kept = (error.hint or "").replace(f"The whole log is {log}.", "").strip()
            gone = f"The {head.kind} is gone again, and the rest of the log with it."
            error.hint = f"{kept} {gone}".strip()
        with contextlib.suppress(PbkfsError, OSError):
            self.erase(head, "creation failed")
            self.collect(wait_s=0)

    def erase(self, head: Head, what: str = "destroyed") -> None:
        """Remove a head with all that it is; it has no children. Can be done again."""
        self.store.update(head.id, status="deleting", operation="destroy")
        with contextlib.suppress(PbkfsError):
            self.serving.stop(head, "immediate")
        self.engine.destroy(head.id)
        self.serving.forget_password(head)
        with self.store.transaction() as tx:
            tx.delete(head.id)
            tx.record(head, what)

    def flatten(self, head: Head, limit: int = 1) -> tuple[int, int]:
        """Let at most ``limit`` sealed layers lie below a head; returns how many did, and do.

        Raises PbkfsError; the head is as sound as before.
        """
        before = self.engine.n_layers(head.id)
        if before <= limit:
            return before, before
        try:
            with self.locks.hold(LAYERS, what="the layers", shared=True):
                after = self.engine.flatten(head.id, limit, self._try_lock)
        finally:
            self.collect(wait_s=0)
        with self.store.transaction() as tx:
            tx.record(head, "flattened", f"from {before} layers to {after}")
        return before, after

    def flatten_deep(self, head: Head, say: Say, *, n_more: int = 0) -> None:
        """Do that where more layers lie below a head than the settings allow, with ``n_more``.

        Half of them stay, so that it does not come back at once. What keeps it from being done is
        for the log: a deep stack is only a slow one.
        """
        limit = self.settings.max_layers
        try:
            if self.engine.n_layers(head.id) + n_more > limit:
                say(f"folding layers of {head.name}")
                self.flatten(head, max(1, limit // 2))
        except PbkfsError as error:
            logger.warning("%s %s stays deep: %s", head.kind, head.name, error.message)

    @contextlib.contextmanager
    def _try_lock(self, head_id: str) -> Iterator[bool]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.locks.hold(head_id, what="a head", wait_s=0))
            except BusyError:
                yield False
                return
            yield True

    def collect(self, wait_s: float = 10.0) -> list[str]:
        """Delete layers and points that nobody refers to any more.

        Left for the next time where a branch is made all the while, or where something can't be
        read: then nothing is deleted.
        """
        try:
            with self.locks.hold(LAYERS, what="the layers", wait_s=wait_s):
                with self.store.transaction() as tx:
                    points = tx.point_ids()
                    heads = tx.heads()
                made = [head.id for head in heads if head.status not in ("creating", "deleting")]
                return self.engine.collect(points, self._known_ids, made)
        except BusyError:
            return []
        except PbkfsError as error:
            logger.warning("nothing was cleaned up: %s", error.message)
            return []

    def _known_ids(self) -> set[str]:
        heads = self.store.heads()
        return {head.id for head in heads} | {head.pending_id for head in heads}

    # --- showing --------------------------------------------------------------------------------

    def status_of(self, head: Head) -> str:
        """Return the state of a head, seen and not only remembered."""
        if head.status == "running" and not (
            self.serving.is_running(head) and self.engine.is_mounted(head.id)
        ):
            return "error"
        return head.status

    def connection(self, head: Head, *, with_password: bool = False) -> Connection | None:
        """Return how to connect to a head; None if it has never had a port."""
        if not head.port:
            return None
        host = first_address(self.settings.listen_addresses) or "127.0.0.1"
        password = self.serving.password(head) if with_password else None
        return Connection(host, head.port, head.pg_user, head.pg_database, password)

    def view(
        self, kind: Kind | None = None, *, name: str | None = None, with_sizes: bool = True
    ) -> list[HeadView]:
        """Return all heads, or those of a kind or name, as they are shown, oldest first."""
        with self.store.transaction() as tx:
            heads, tags = tx.heads(), tx.tags()
        sizes = self.sizes(heads) if with_sizes and self.measures else {}
        names = {head.id: head.name for head in heads}
        children: dict[str, list[str]] = {}
        depths: dict[str, int] = {}
        for head in heads:
            depths[head.id] = depths.get(head.parent_id, 0) + 1 if head.parent_id else 0
            if head.parent_id:
                children.setdefault(head.parent_id, []).append(head.name)
        return [
            HeadView(
                head=head,
                status=self.status_of(head),
                parent=names.get(head.parent_id or ""),
                tags=tags.get(head.id, []),
                size=sizes.get(head.id, Size()),
                connection=self.connection(head),
                depth=depths[head.id],
                children=children.get(head.id, []),
            )
            for head in heads
            if kind in (None, head.kind) and name in (None, head.name)
        ]

    def view_one(self, head: Head, notes: list[str] | None = None) -> HeadView:
        """Return one head as it is shown."""
        for found in self.view(name=self.reload(head).name):
            if found.head.id == head.id:
                found.notes.extend(notes or [])
                return found
        raise UnknownHeadError(f"{head.kind} {head.name!r} does not exist any more")

    def sizes(self, heads: list[Head]) -> dict[str, Size]:
        """Return the sizes of heads by id."""
        return self.engine.sizes(self.point_users(heads))

    def point_users(self, heads: list[Head]) -> dict[str, set[str]]:
        """Return which heads refer to which branch point."""
        users: dict[str, set[str]] = {}
        with self.store.transaction() as tx:
            for head in heads:
                if head.point_id:
                    users.setdefault(head.point_id, set()).add(head.id)
                point = tx.point(head.id)
                if point is not None:
                    users.setdefault(point.point_id, set()).add(head.id)
        return users

    def read_log(self, head: Head, n_lines: int) -> list[str]:
        """Return the last lines of a head's server log."""
        path = self.layout.server_log(head.id)
        try:
            return tail_lines(path, n_lines)
        except FileNotFoundError:
            return []


def tail_lines(path: Path, n_lines: int) -> list[str]:
    """Return the last lines of a text file, of its last MiB at most. Raises OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 20)))
        lines = file.read().decode(errors="replace").splitlines()
    return lines[-n_lines:] if n_lines > 0 else []
