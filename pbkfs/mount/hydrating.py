"""Hydration in a worker: the task that drives it, its rate, and what is told of it.

One task on the trio thread, for the life of the mount; the bytes move in a thread. It runs when
``start`` was called, and ends by itself (all is in the diff, or no space is left), by ``stop``, or
with the mount. The work itself is ``overlay.hydration``'s.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbkfs.mount.request import reason
from pbkfs.overlay.tree import Tree
from pbkfs.units import format_bytes

if TYPE_CHECKING:
    import trio

logger = logging.getLogger(__name__)

State = Literal["off", "looking", "running", "stopped", "done", "incomplete", "failed"]

# As much as is copied without looking up: a stop or an unmount waits for it.
_MAX_PIECE_BYTES = 4 << 20
_MIN_PIECE_BYTES = 128 << 10
_PIECES_PER_S = 4
# The rate shown is that of the last seconds.
_RATE_WINDOW_S = 5.0
# How often a pause looks whether the step under way has ended.
_POLL_S = 0.005
# Left on the disk for those who work on the mount, but not more than a 50th of it.
_RESERVE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class HydrationStatus:
    """``rate`` is in bytes a second, now; ``rate_limit`` 0 is none. ``error`` says why it ended."""

    state: State = "off"
    files_done: int = 0
    files_total: int = 0
    bytes_done: int = 0
    bytes_total: int = 0
    rate: int = 0
    rate_limit: int = 0
    error: str | None = None
    hint: str | None = None


class Hydrator:
    """See the module. All methods belong to the trio thread."""

    def __init__(self, tree: Tree, diff: Path) -> None:
        self._tree = tree
        self._diff = diff
        self._state: State = "off"
        self._error: str | None = None
        self._hint: str | None = None
        self._rate_limit = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._is_wanted = False
        self._wanted: trio.Event | None = None
        self._running: trio.CancelScope | None = None
        self._is_busy = False
        self._is_paused = False

    def start(self, rate_limit: int | None) -> None:
        """Begin, or go on after a stop; a running one only gets the new limit, if there is one."""
        if rate_limit is not None:
            self._rate_limit = rate_limit
        if self._running is None:
            self._error = self._hint = None
            self._state = "looking"
        if self._running is None or self._running.cancel_called:
            self._is_wanted = True
            if self._wanted is not None:
                self._wanted.set()

    def stop(self) -> None:
        """Stop soon; what was brought up stays."""
        self._is_wanted = False
        if self._running is not None:
            self._running.cancel()
        elif self._state == "looking":
            self._state = "stopped"

    async def pause(self) -> bool:
        """Stop, and return when nothing is under way; whether it was wanted, for ``resume``."""
        import trio

        was_wanted = self._is_wanted or (
            self._running is not None and not self._running.cancel_called
        )
        self.stop()
        self._is_paused = True
        while self._is_busy:
            await trio.sleep(_POLL_S)
        return was_wanted

    def resume(self, *, is_wanted: bool) -> None:
        """End a pause; go on if it was wanted before, or was started meanwhile."""
        self._is_paused = False
        if is_wanted or self._is_wanted:
            self.start(None)

    async def look(self) -> None:
        """Count what is missing, without bringing it up; while it runs the counts are there."""
        import trio

        survey = iter(() if self._is_running else self._tree.hydration.survey())
        for _ in survey:
            await trio.lowlevel.checkpoint()
            if self._is_running:
                return

    @property
    def _is_running(self) -> bool:
        return self._running is not None

    def status(self) -> HydrationStatus:
        """Return how far it is."""
        hydration = self._tree.hydration
        return HydrationStatus(
            state=self._state,
            files_done=hydration.n_files_done,
            files_total=hydration.n_files,
            bytes_done=hydration.n_bytes_done,
            bytes_total=hydration.n_bytes,
            rate=self._rate(),
            rate_limit=self._rate_limit,
            error=self._error,
            hint=self._hint,
        )

    def fields(self) -> dict[str, int | str | None]:
        """Return the status for the control socket."""
        return asdict(self.status())

    async def serve(self) -> None:
        """Run whenever it is wanted, until cancelled."""
        import trio

        while True:
            while not self._is_wanted or self._is_paused:
                self._wanted = trio.Event()
                await self._wanted.wait()
            self._is_wanted = False
            self._is_busy = True
            try:
                with trio.CancelScope() as self._running:
                    try:
                        await self._run()
                    except OSError as error:
                        self._fail(error)
                is_stopped = self._running.cancelled_caught
                self._running = None
                if is_stopped:
                    self._state = "stopped"
                    logger.info("hydration stopped, %s", self._progress())
                    await self._sync()
            finally:
                self._is_busy = False

    async def _run(self) -> None:
        import trio

        hydration = self._tree.hydration
        self._state = "looking"
        for _ in hydration.survey():
            await trio.sleep(0)
        self._state = "running"
        self._samples.clear()
        logger.info("hydration runs, %s", self._progress())
        credit_at = trio.current_time()
        while True:
            self._check_space()
            step = hydration.next_step(self._piece_bytes())
            if step is None:
                break
            with trio.CancelScope(shield=True):  # or what was made would be nobody's
                await trio.to_thread.run_sync(step.run)
            hydration.finish(step)
            self._sample(step.n_bytes)
            await trio.lowlevel.checkpoint()
            if self._rate_limit:
                # A pause is made good by up to a second's worth, not more.
                credit_at = max(credit_at, trio.current_time() - 1)
                credit_at += step.n_bytes / self._rate_limit
                while (left := credit_at - trio.current_time()) > 0 and self._rate_limit:
                    await trio.sleep(min(left, 0.25))
        await trio.to_thread.run_sync(self._tree.sync)
        if hydration.failed:
            paths = sorted(hydration.failed.values())
            first = paths[0].decode(errors="backslashreplace")
            self._state = "incomplete"
            self._error = f"{len(paths)} files can't be read from below, the first is {first}"
            self._hint = "The worker's log names what is damaged; the rest is hydrated."
            logger.error("hydration ended: %s", self._error)
        else:
            self._state = "done"
            logger.info("hydration is complete, %s", self._progress())

    def _piece_bytes(self) -> int:
        if not self._rate_limit:
            return _MAX_PIECE_BYTES
        return min(max(self._rate_limit // _PIECES_PER_S, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)

    def _check_space(self) -> None:
        """Raise OSError ENOSPC before nothing is left for those who work on the mount."""
        found = self._tree.statfs()
        reserve = min(_RESERVE_BYTES, found.f_blocks * found.f_frsize // 50)
        reserve += self._tree.reserve_bytes
        if found.f_bavail * found.f_frsize < reserve + _MAX_PIECE_BYTES:
            raise OSError(errno.ENOSPC, f"less than {format_bytes(reserve)} would be left")

    def _fail(self, error: OSError) -> None:
        self._state = "failed"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._error = f"no space is left for diff {self._diff} ({reason(error)})"
            self._hint = "The mount goes on working; free some space, then start hydration again."
        else:
            self._error = f"hydration of diff {self._diff} failed: {reason(error)}"
            self._hint = "The mount goes on working; its log may say more."
        logger.error("hydration stopped: %s", self._error)

    async def _sync(self) -> None:
        import trio

        try:
            await trio.to_thread.run_sync(self._tree.hydration.sync)
        except OSError as error:
            logger.warning("what was hydrated last is not recorded: %s", reason(error))

    def _sample(self, n_bytes: int) -> None:
        now = time.monotonic()
        self._samples.append((now, n_bytes))
        while self._samples[0][0] < now - _RATE_WINDOW_S:
            self._samples.popleft()

    def _rate(self) -> int:
        if self._state != "running" or not self._samples:
            return 0
        now = time.monotonic()
        recent = [(at, n_bytes) for at, n_bytes in self._samples if at >= now - _RATE_WINDOW_S]
        if not recent:
            return 0
        return int(sum(n_bytes for _, n_bytes in recent) / max(now - recent[0][0], 1.0))

    def _progress(self) -> str:
        hydration = self._tree.hydration
        return (
            f"{hydration.n_files_done} of {hydration.n_files} files, "
            f"{format_bytes(hydration.n_bytes_done)} of {format_bytes(hydration.n_bytes)}"
        )
