"""Start a worker: fork, wait for its report, and say how far it got.

Called by the command line, in a process without threads. The worker is a descendant in a session
of its own, so that neither a terminal's Ctrl-C nor the end of the command reaches it; its parent is
the keeper of a supervised mount (``keeping``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pbkfs.config import START_LIMIT_S
from pbkfs.errors import HostError, TimedOutError
from pbkfs.mount import keeping, wipe, worker
from pbkfs.mount.opening import OpenMount
from pbkfs.mount.report import ReportReader, ReportWriter, fields_to_error


@dataclass(frozen=True, slots=True)
class Launched:
    """How far a mount got: ``pid`` is its owner's, the keeper or else the worker."""

    state: Literal["ready", "in progress", "interrupted"]
    pid: int | None


def serve_here(opened: OpenMount) -> int:
    """Serve in this process until unmounted (``--console``); returns the exit code."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    os.umask(0)
    report = ReportWriter(write_end)
    code = worker.run(opened, report, is_console=True)
    report.close()
    reader = ReportReader(read_end)
    try:
        while (message := reader.receive(None)) is not None:
            if message["event"] == "error":
                raise fields_to_error(message)
    finally:
        reader.close()
    return code


def start_worker(
    opened: OpenMount, *, foreign: set[int], wait: bool, timeout_s: float | None
) -> Launched:
    """Fork the worker and wait until the mount point answers.

    ``foreign`` are descriptors that this process inherited: the worker closes them. ``wait`` also
    waits for an answer through the kernel. Raises what the worker failed with.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _become_worker(opened, write_end, foreign)
    os.close(write_end)
    os.waitpid(child, 0)
    reader = ReportReader(read_end)
    try:
        return _await_report(opened, reader, wait=wait, deadline=deadline)
    finally:
        reader.close()
        opened.leave()
        # Only now: if the worker dies without a word, the diff is still locked while we clean up.
        opened.lock.close()


def _become_worker(opened: OpenMount, write_end: int, foreign: set[int]) -> None:
    """Detach and serve; never returns."""
    code = 1
    try:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        os.chdir("/")
        os.umask(0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for fd in foreign:
            with contextlib.suppress(OSError):
                os.close(fd)
        link = keeping.become_keeper() if opened.request.is_supervised else None
        code = worker.run(opened, ReportWriter(write_end), is_console=False, link=link)
    finally:
        os._exit(code)


def inherited_descriptors() -> set[int]:
    """Return the descriptors above stderr that are open now; call it before opening anything."""
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if fd > 2 and _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False  # the one that listed the directory
    return True


def _await_report(
    opened: OpenMount, reader: ReportReader, *, wait: bool, deadline: float | None
) -> Launched:
    pid: int | None = None
    start_deadline = time.monotonic() + START_LIMIT_S
    try:
        while True:
            try:
                message = reader.receive(deadline if pid is not None else start_deadline)
            except TimeoutError:
                if pid is None:
                    raise TimedOutError(
                        f"the worker did not start within {START_LIMIT_S:g} s",
                        hint="The machine may be overloaded; try again.",
                    ) from None
                return Launched("in progress", pid)
            if message is None:
                _clean_up_after(opened)
                raise HostError(
                    f"the worker of {opened.place.path} died before it had mounted",
                    hint="The kernel's log may say why (dmesg): out of memory, or a crash.",
                )
            if message["event"] == "error":
                raise fields_to_error(message)
            pid = int(message["pid"])
            if message["event"] == "ok":
                break
        if wait and not _answers(lambda: os.statvfs(opened.place.path), deadline):
            return Launched("in progress", pid)
        return Launched("ready", pid)
    except KeyboardInterrupt:
        return Launched("interrupted", pid)


def _answers(probe: Callable[[], object], deadline: float | None) -> bool:
    """Return whether ``probe`` came back in time. It runs in a thread, as it may hang for ever."""
    failure: list[OSError] = []

    def look() -> None:
        try:
            probe()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    # In pieces, because a join without a limit can't be ended by Ctrl-C.
    while thread.is_alive():
        left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
        if left <= 0:
            return False
        thread.join(left)
    if failure:
        raise HostError(
            f"the mount point does not answer: {failure[0].strerror}",
            hint="The worker's log says why.",
        ) from failure[0]
    return True


def _clean_up_after(opened: OpenMount) -> None:
    """Take away the new diff of a worker that died; this process still has the lock."""
    if opened.is_new:
        wipe.wipe(opened.diff_path)
        wipe.remove_made(opened.made)
