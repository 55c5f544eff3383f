"""Ctrl-C, SIGTERM and SIGHUP as one exception, raised at most once and never while tidying up.

Used by the main thread of the drill's process.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(BaseException):
    """Somebody wants the drill to end. No Exception, so that nothing but the drill catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """A context in which a signal is held back, and raises StoppedError between hear and hold."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._is_held = True
        self._pending: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for signum in _SIGNALS:
            # nohup and a shell's background jobs have them ignored; so they stay.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def hear(self) -> None:
        """Raise StoppedError at the next signal, or now for one that was held back."""
        self._is_held = False
        if self._pending is not None:
            self._take(self._pending, None)

    def hold(self) -> None:
        """Hold signals back from now on."""
        self._is_held = True

    def release(self) -> None:
        """Give a forked child the signals' defaults."""
        for signum in self._before:
            signal.signal(signum, signal.SIG_DFL)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            # A child that was forked for a moment, and has nothing of the drill's to tidy up.
            os._exit(128 + signum)
        if self._is_held:
            self._pending = signum
            return
        self._is_held = True
        raise StoppedError(signum)
