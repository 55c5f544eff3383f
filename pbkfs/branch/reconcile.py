"""After a crash: compare what the store intends with what there is, and finish or undo.

An operation that died is one that is written down as under way and whose lock nobody holds. Every
operation begins with this; it costs some milliseconds where nothing is to be done. Never touched:
a head whose lock is held.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from pbkfs.branch.branches import Branches
from pbkfs.branch.lifecycle import Lifecycle
from pbkfs.branch.store import Head
from pbkfs.branch.trunks import Trunks
from pbkfs.errors import BusyError, PbkfsError

logger = logging.getLogger(__name__)


class Reconciler:
    """Finds and settles what operations left that did not come to their end."""

    def __init__(self, lifecycle: Lifecycle, branches: Branches, trunks: Trunks) -> None:
        self._life = lifecycle
        self._branches = branches
        self._trunks = trunks

    def run(self) -> list[str]:
        """Settle all heads and remove what nobody refers to; returns what was done, for people."""
        done: list[str] = []
        # Children first: what is deleted must have none.
        for head in reversed(self._life.store.heads()):
            if not self._needs_attention(head):
                continue
            try:
                with self._life.locks.hold(head.id, what=head.name, wait_s=0):
                    found = self._life.store.get(head.id)
                    if found is not None:
                        done += self._settle(found)
            except BusyError:
                continue  # it is being worked on
            except PbkfsError as error:
                logger.error("%s %s can't be settled: %s", head.kind, head.name, error.message)
                done.append(f"{head.kind} {head.name} can't be settled: {error.message}")
        if done:
            self._life.collect(wait_s=0)
        return done

    def _needs_attention(self, head: Head) -> bool:
        if head.operation or head.status in ("creating", "starting", "deleting"):
            return True
        return head.status == "running" and self._life.status_of(head) != "running"

    def _settle(self, head: Head) -> list[str]:
        life = self._life
        what = f"{head.kind} {head.name}"
        if head.status == "creating":
            life.erase(head, "creation was cut short")
            return [f"{what}: creation was cut short, removed"]
        if head.status == "deleting":
            with life.store.transaction() as tx:
                if tx.children(head.id):
                    return []
            life.erase(head)
            return [f"{what}: destroyed"]
        if head.operation == "reset":
            self._branches.finish_reset(head)
            return [f"{what}: reset finished"]
        if head.operation == "refresh":
            head = self._trunks.finish_refresh(head)
            done = [f"{what}: refresh settled"]
            if head.status == "running" and life.status_of(head) != "running":
                # It had been stopped for the refresh, and nothing else has gone wrong.
                done += self._settle_server(replace(head, operation="start"), what)
            return done
        return self._settle_server(head, what)

    def _settle_server(self, head: Head, what: str) -> list[str]:
        """A start or stop was cut short, or the server is gone: take down what is left of it."""
        life = self._life
        if head.operation == "" and life.status_of(head) == "running":
            return []
        # Whoever had it stopped does not want it to run, also after a start of the daemon.
        wish = {"is_wanted": 0} if head.operation == "stop" else {}
        try:
            life.take_down(head, "fast" if head.operation == "stop" else "immediate")
        except PbkfsError as error:
            # Called stopped, it would lose its port, and its data would be taken for at rest.
            first = error.message.splitlines()[0]
            with life.store.transaction() as tx:
                tx.update(head.id, status="error", operation="", error=first, is_asleep=0, **wish)
                tx.record(head, "can't be stopped", first)
            return [f"{what}: can't be stopped: {first}"]
        is_stopped = head.operation in ("stop", "start") or head.status == "starting"
        with life.store.transaction() as tx:
            if not head.is_asleep:
                tx.release_port(head.id)
            tx.update(
                head.id,
                status="stopped" if is_stopped else "error",
                operation="",
                error="" if is_stopped else "its server or its mount ended by itself",
                server_pid=0,
                server_ticks=0,
                **wish,
            )
            tx.record(head, "stopped" if is_stopped else "ended by itself")
        said = "stopped" if is_stopped else "its server or its mount had ended by itself"
        return [f"{what}: {said}"]
