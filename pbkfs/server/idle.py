"""Branches that nobody uses: they are stopped, and wait for a client behind a front.

The store says who is asleep, whatever process has changed that, so it is looked at several times a
second; that costs microseconds where nothing has changed. Belongs to trio's thread; servers are
asked in threads. Runs for the daemon's whole life.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from pbkfs.branch.store import Head
from pbkfs.errors import BusyError, PbkfsError
from pbkfs.server.control import Control
from pbkfs.server.front import Front, is_waiting

# Whoever starts a branch waits this long at most until its port is let go.
_LOOK_S = 0.1
# A server is asked at a quarter of its time, but neither for ever nor only rarely.
_ASK_S = (0.5, 30.0)
_ASK_SHARE = 0.25
# A question is a connection and a process of the server, 5 ms of a core.
_N_QUESTIONS = 2

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watched:
    """A running branch that is to be stopped when nobody uses it, since it was started."""

    seen_at: float
    asked_at: float
    n_sessions: int | None = None
    is_busy: bool = False


class Idle:
    """Stops idle branches, and keeps the fronts of those that are asleep."""

    def __init__(self, control: Control, nursery: trio.Nursery) -> None:
        self._control = control
        self._nursery = nursery
        self._questions = trio.CapacityLimiter(_N_QUESTIONS)
        self._heads: list[Head] = []
        self._changes: int | None = None
        self._fronts: dict[str, Front] = {}
        self._complained: set[str] = set()
        self._watched: dict[tuple[str, str | None], _Watched] = {}

    async def run(self) -> None:
        """Look after idle branches until cancelled, or until the daemon begins to end."""
        while not self._control.is_ready:
            await trio.sleep(_LOOK_S)
        try:
            while not self._control.is_stopping:
                try:
                    await self._look()
                except PbkfsError as error:
                    logger.error("cannot look after idle branches: %s", error.message)
                    await trio.sleep(1)
                await trio.sleep(_LOOK_S)
        finally:
            for front in self._fronts.values():
                front.close()

    async def _look(self) -> None:
        store = self._control.service.store
        changes = await self._control.read(store.changes)
        if changes != self._changes:
            self._heads = await self._control.read(store.heads, "branch")
            self._changes = changes
        self._settle_fronts()
        self._watch()

    # --- fronts ---------------------------------------------------------------------------------

    def _settle_fronts(self) -> None:
        waiting = {head.id: head for head in self._heads if is_waiting(head)}
        for head_id in [*self._fronts]:
            front = self._fronts[head_id]
            if head_id not in waiting and front.is_open:
                front.close()
            if head_id not in waiting and not front.n_clients:
                del self._fronts[head_id]
        self._complained &= waiting.keys()
        for head in waiting.values():
            front = self._fronts.setdefault(head.id, Front(self._control, self._nursery, head.id))
            if not front.is_open:
                self._open(front, head)

    def _open(self, front: Front, head: Head) -> None:
        try:
            front.open(head.port)
        except BusyError as error:
            # Somebody else has taken the port; it is tried again at each look.
            if head.id not in self._complained:
                self._complained.add(head.id)
                logger.warning("branch %s can't be woken by clients: %s", head.name, error.message)
        else:
            self._complained.discard(head.id)
            logger.info("branch %s is asleep: its port %d wakes it", head.name, head.port)

    # --- idle ones ------------------------------------------------------------------------------

    def _watch(self) -> None:
        now = trio.current_time()
        watched = {}
        for head in self._heads:
            if head.status != "running" or head.operation or head.idle_stop_s is None:
                continue
            key = head.id, head.started_at
            found = self._watched.get(key) or _Watched(seen_at=now, asked_at=now)
            watched[key] = found
            pause = min(max(head.idle_stop_s * _ASK_SHARE, _ASK_S[0]), _ASK_S[1])
            if not found.is_busy and now - found.asked_at >= pause:
                found.is_busy = True
                found.asked_at = now
                self._nursery.start_soon(self._ask, head, found)
        self._watched = watched

    async def _ask(self, head: Head, watched: _Watched) -> None:
        try:
            if await self._is_used(head, watched):
                watched.seen_at = trio.current_time()
            elif trio.current_time() - watched.seen_at >= (head.idle_stop_s or 0):
                operation = self._control.begin("fall_asleep", {"name": head.name})
                await operation.ended.wait()
                # If it did not come to that, it has its time again.
                watched.seen_at = trio.current_time()
        except PbkfsError as error:
            logger.debug("branch %s: %s", head.name, error.message)
        finally:
            watched.is_busy = False

    async def _is_used(self, head: Head, watched: _Watched) -> bool:
        """Return whether a client is there or was there since the last question.

        What can't be asked has too many clients, or too much to do.
        """
        try:
            found = await trio.to_thread.run_sync(
                self._control.service.life.serving.activity, head, limiter=self._questions
            )
        except PbkfsError as error:
            logger.debug("branch %s can't be asked: %s", head.name, error.message)
            return True
        # Each question is a session, too, and the last one has been counted since.
        was_used = watched.n_sessions is not None and found.n_sessions > watched.n_sessions + 1
        watched.n_sessions = found.n_sessions
        return was_used or found.n_clients > 0
