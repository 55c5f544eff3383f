"""The daemon's own state: operations under way, the reaper, what is remembered between requests.

All of it belongs to trio's thread; what reads the store or the disk goes through ``read`` into a
thread, what changes something through ``begin`` into a process (``hands``).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from pbkfs.branch.durations import parse_idle_stop
from pbkfs.branch.engine import Size
from pbkfs.branch.errors import (
    NameConflictError,
    ParentNotFoundError,
    ParentNotReadyError,
    UnknownHeadError,
)
from pbkfs.branch.limits import parse_limits
from pbkfs.branch.names import check_name, make_name
from pbkfs.branch.service import Service
from pbkfs.branch.settings import MAIN
from pbkfs.branch.store import Head, Kind
from pbkfs.branch.views import HeadView
from pbkfs.errors import PbkfsError
from pbkfs.postgres.cgroup import Limits
from pbkfs.server.hands import Event, Hands
from pbkfs.server.numbers import Numbers, Storage
from pbkfs.server.problems import StoppingError

T = TypeVar("T")
Arguments = dict[str, Any]
Before = Callable[[], Awaitable[bool]]

# Two cores serve four operations at a time: each waits half its time for PostgreSQL and the disk.
_N_OPERATIONS = 6
_N_READS = 8
_N_FAILURES = 1000
# Sizes cost a walk over all files of all heads, so the walk may take a tenth of the time at most.
_SIZES_AGE_S = 1.0
_SIZES_SHARE = 10.0

logger = logging.getLogger(__name__)


class Operation:
    """One operation, running or ended. ``begun`` is also set by its end."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        self.name = name
        self.arguments = arguments
        self.begun = trio.Event()
        self.ended = trio.Event()
        self.result: Any = None
        self.error: Exception | None = None

    async def wait(self, limit_s: float, *, at_least_begun: bool = False) -> bool:
        """Wait for its end, and if told so for its begin in any case; returns whether it ended.

        Raises what the operation failed with.
        """
        if at_least_begun:
            await self.begun.wait()
        with trio.move_on_after(limit_s):
            await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.ended.is_set()


class Control:
    """What the routes work with."""

    def __init__(self, service: Service, hands: Hands, nursery: trio.Nursery) -> None:
        self.service = service
        self.settings = service.settings
        self.numbers = Numbers()
        self.is_ready = False
        self.is_stopping = False
        self._hands = hands
        self._nursery = nursery
        self._operations_at_a_time = trio.CapacityLimiter(_N_OPERATIONS)
        self._reads_at_a_time = trio.CapacityLimiter(_N_READS)
        self._creating: dict[str, Operation] = {}
        self._failures: OrderedDict[str, str] = OrderedDict()
        self._making_main = trio.Lock()
        self._measuring = trio.Lock()
        self._sizes: dict[str, Size] = {}
        self._storage = Storage()
        self._measured_at = float("-inf")
        self._measuring_took_s = 0.0

    async def read(self, function: Callable[..., T], *args: Any) -> T:
        """Call something that reads, in a thread."""
        return await trio.to_thread.run_sync(function, *args, limiter=self._reads_at_a_time)

    # --- operations -----------------------------------------------------------------------------

    def begin(self, name: str, arguments: Arguments, *, before: Before | None = None) -> Operation:
        """Begin an operation; it goes on whatever becomes of the request. Raises StoppingError.

        ``before`` is awaited first; if it returns False, nothing is left to be done.
        """
        if self.is_stopping:
            raise StoppingError("the daemon is about to end")
        operation = Operation(name, arguments)
        self._nursery.start_soon(self._run, operation, before)
        return operation

    async def _run(self, operation: Operation, before: Before | None) -> None:
        def follow(event: Event) -> None:
            if event["event"] == "begun":
                operation.begun.set()

        began_at = time.monotonic()
        result = "done"
        self.numbers.n_running += 1
        try:
            if before is None or await before():
                async with self._operations_at_a_time:
                    operation.result = await self._hands.run(
                        operation.name, operation.arguments, follow
                    )
        except PbkfsError as error:
            result = error.slug
            operation.error = error
            logger.info("%s %s: %s", operation.name, _subject(operation), error.message)
        except Exception as error:
            result = "bug"
            operation.error = error
            logger.exception("%s %s failed", operation.name, _subject(operation))
        else:
            level = logging.DEBUG if operation.name == "settle" else logging.INFO
            logger.log(level, "%s %s: done", operation.name, _subject(operation))
        finally:
            self.numbers.n_running -= 1
            self.numbers.operations[operation.name, result] += 1
            self.numbers.add_time(operation.name, time.monotonic() - began_at)
            operation.begun.set()
            operation.ended.set()

    async def finish(self) -> None:
        """Begin nothing more and wait for what is under way."""
        self.is_stopping = True
        while self.numbers.n_running:
            await trio.sleep(0.05)

    async def create(
        self, kind: Kind, given: Arguments, *, wait_s: float
    ) -> tuple[HeadView, list[str]]:
        """Make a trunk or branch; returns it once it is there, or is ready within ``wait_s``.

        The same request again while it is creating joins it. Raises PbkfsError.
        """
        name = check_name(given["name"] or make_name())
        arguments = {**given, "name": name}
        operation = self._creating.get(name)
        if operation is None:
            operation = self._begin_creation(kind, arguments, is_watched=wait_s > 0)
        elif operation.name != f"create_{kind}" or _wish(operation.arguments) != _wish(arguments):
            raise NameConflictError(f"{name!r} is being created already, and not like this")
        is_done = await operation.wait(wait_s, at_least_begun=True)
        notes = operation.result if is_done and isinstance(operation.result, list) else []
        try:
            return await self.show(name, kind), notes
        except UnknownHeadError:
            # It failed and is gone since; if somebody destroyed it, that is what is said.
            await operation.wait(float("inf"))
            raise

    def _begin_creation(self, kind: Kind, arguments: Arguments, *, is_watched: bool) -> Operation:
        name = arguments["name"]
        if kind == "branch" and not is_watched:
            # Nobody may be there any more to be told why, so the branch stays and tells it.
            arguments = {**arguments, "keep_failed": True}

        async def before() -> bool:
            if await self._is_being_created(kind, arguments, operation.begun.set):
                return False
            if kind == "branch":
                await self._check_parent(arguments["parent"])
            return True

        operation = self.begin(f"create_{kind}", arguments, before=before)
        self._creating[name] = operation
        self._failures.pop(name, None)

        async def forget() -> None:
            await operation.ended.wait()
            del self._creating[name]
            if operation.error is not None:
                said = getattr(operation.error, "message", "an unexpected failure")
                self._failures[name] = said
                while len(self._failures) > _N_FAILURES:
                    self._failures.popitem(last=False)

        self._nursery.start_soon(forget)
        return operation

    async def _is_being_created(
        self, kind: Kind, arguments: Arguments, begun: Callable[[], None]
    ) -> bool:
        """Wait for a creation that an earlier daemon began or the command line, if it is the same.

        Returns False if there is none; ``begun`` is called if there is. Raises NameConflictError
        if it is another one.
        """
        name, is_first = arguments["name"], True
        while True:
            head = await self.read(self.service.store.find, name)
            if head is None:
                if is_first:
                    return False
                raise UnknownHeadError(f"the creation of {kind} {name!r} failed")
            if is_first and not (
                head.status == "creating" and await self.read(self._is_alike, head, arguments)
            ):
                raise NameConflictError(f"a {head.kind} named {name!r} exists already")
            begun()
            if head.status not in ("creating", "starting"):
                return True
            is_first = False
            await trio.sleep(0.1)

    def _is_alike(self, head: Head, arguments: Arguments) -> bool:
        """Tell whether a branch that is creating is what these arguments ask for."""
        if head.kind != "branch" or "parent" not in arguments:
            return False
        with self.service.store.transaction() as tx:
            parent = tx.get(head.parent_id or "")
            tags = tx.tags().get(head.id, [])
        return (
            parent is not None
            and parent.name == arguments["parent"]
            and head.auth == arguments["auth"]
            and sorted(set(arguments["tags"])) == tags
            and bool(head.expires_at) == bool(arguments["ttl"])
            and head.idle_stop_s
            == (parse_idle_stop(arguments["idle_stop"]) if arguments["idle_stop"] else None)
            and Limits(head.cpu_limit, head.memory_limit_bytes)
            == parse_limits(arguments["cpu"], arguments["memory"])
        )

    async def _check_parent(self, parent: str) -> None:
        """Refuse at once what can't be branched, and make the default trunk if it is missing."""
        head = await self.read(self.service.store.find, parent)
        if head is None and parent == MAIN:
            await self.make_main()
            return
        if head is None:
            raise ParentNotFoundError(f"trunk or branch {parent!r} does not exist")
        if head.status not in ("running", "stopped"):
            raise ParentNotReadyError(f"{head.kind} {parent!r} is {head.status}")

    async def make_main(self) -> None:
        """Make the default trunk if there is none. Raises PbkfsError."""
        async with self._making_main:
            if await self.read(self.service.store.find, MAIN) is not None:
                return
            await self.begin("create_trunk", {"name": MAIN}).wait(float("inf"))

    # --- showing --------------------------------------------------------------------------------

    async def views(
        self, kind: Kind | None = None, *, name: str | None = None, with_sizes: bool = True
    ) -> list[HeadView]:
        """Return all heads, or those of a kind or name, as they are shown."""

        def look() -> list[HeadView]:
            return self.service.life.view(kind, name=name, with_sizes=False)

        if with_sizes:
            await self.measure()
        found = await self.read(look)
        return [
            dataclasses.replace(view, size=self._sizes.get(view.head.id, Size())) for view in found
        ]

    async def show(self, name: str, kind: Kind) -> HeadView:
        """Return one head as it is shown. Raises UnknownHeadError."""
        for view in await self.views(kind, name=name):
            return view
        failure = self._failures.get(name)
        if failure is not None:
            raise UnknownHeadError(
                f"{kind} {name!r} does not exist: its creation failed: {failure}"
            )
        raise UnknownHeadError(f"{kind} {name!r} does not exist")

    async def measure(self) -> Storage:
        """Return what is used on disk: as of now, or of some moments ago where that is costly."""
        age_limit_s = max(_SIZES_AGE_S, _SIZES_SHARE * self._measuring_took_s)

        def is_fresh() -> bool:
            return time.monotonic() - self._measured_at < age_limit_s

        if is_fresh():
            return self._storage
        async with self._measuring:
            if not is_fresh():
                began_at = time.monotonic()
                self._sizes, self._storage = await self.read(self._measure)
                self._measured_at = time.monotonic()
                self._measuring_took_s = self._measured_at - began_at
        return self._storage

    def _measure(self) -> tuple[dict[str, Size], Storage]:
        overview = self.service.overview()
        sizes = self.service.life.sizes(self.service.store.heads())
        return sizes, Storage(overview.storage_used_bytes, overview.shared_bytes)

    # --- in the background ----------------------------------------------------------------------

    async def settle_at_start(self) -> None:
        """Settle what a crash left, make the default trunk, start what is meant to run."""
        await self._settle()
        try:
            await self.make_main()
        except StoppingError:
            return
        except Exception as error:
            # It is tried again when a branch of it is asked for.
            logger.error("the default trunk can't be made: %s", getattr(error, "message", error))
        self.is_ready = True
        for head in await self.read(self.service.store.heads):
            if self.is_stopping:
                return
            if head.is_wanted and head.status in ("stopped", "error"):
                self.begin("start", {"name": head.name, "kind": head.kind})

    async def reap_for_ever(self) -> None:
        """Settle and remove what has expired, at each interval."""
        while True:
            await trio.sleep(self.settings.reaper_interval_s)
            await self._settle()

    async def _settle(self) -> None:
        if self.is_stopping:
            return
        operation = self.begin("settle", {})
        await operation.ended.wait()
        self.numbers.reaper_runs += 1
        for line in operation.result or ():
            logger.info("%s", line)
            if line.endswith(": expired"):
                self.numbers.reaped += 1
            else:
                self.numbers.settled += 1


def _wish(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if name != "keep_failed"}


def _subject(operation: Operation) -> str:
    return str(operation.arguments.get("name", ""))
