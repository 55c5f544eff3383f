"""What a worker does to its own process: log, descriptors, limits, signals, pid file.

Called by ``worker`` on the main thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

from pbkfs import log
from pbkfs.errors import HostError, PbkfsError
from pbkfs.mount.request import LogOptions, own_file_error, reason
from pbkfs.plain_file import open_plain


class StartAbortedError(PbkfsError):
    """The worker was told to end before it had mounted."""

    slug, exit_code = "aborted", 130


def configure_log(
    options: LogOptions, diff: Path, *, is_console: bool, is_needed: bool = True
) -> int | None:
    """Set the worker's log up as asked; returns the log file's descriptor or None.

    Raises HostError where it can't be written, unless the worker is to go on without.
    """
    if options.sink == "journald":
        try:
            return log.configure("journald", style=options.style, debug=options.debug)
        except OSError as error:
            if not is_needed:
                return None
            raise HostError(
                f"cannot reach journald: {reason(error)}",
                hint="Use --log-sink file where no systemd-journald runs.",
            ) from error
    if is_console and options.path is None:
        return log.configure("stderr", style=options.style, debug=options.debug)
    path = options.path or diff / "log" / "worker.log"
    try:
        if options.path is None:
            # 0711: the server's own log lies beside it, and its user has to get to that.
            path.parent.mkdir(mode=0o711, exist_ok=True)
        return log.configure("file", path=path, style=options.style, debug=options.debug)
    except OSError as error:
        if not is_needed:
            # Each line tries anew.
            return log.configure(
                "file", path=path, style=options.style, debug=options.debug, is_delayed=True
            )
        raise own_file_error("log file", path, error) from error


def redirect(log_fd: int | None) -> None:
    """Give stdin, stdout and stderr back: what a library prints goes to the log file."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null if log_fd is None else log_fd, 1)
    os.dup2(null if log_fd is None else log_fd, 2)
    os.close(null)


def raise_descriptor_limit() -> None:
    """Allow as many open files as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def write_pid_file(path: Path | None, pid: int) -> None:
    """Write ``pid`` to ``path``, if there is one; only to a regular file. Raises HostError."""
    if path is None:
        return
    try:
        with open(path, "w", encoding="ascii", opener=_open_public) as file:
            file.write(f"{pid}\n")
    except OSError as error:
        raise own_file_error("pid file", path, error) from error


def remove_pid_file(path: Path | None, pid: int) -> None:
    """Remove the pid file if it still says ``pid``."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        with open(open_plain(path, os.O_RDONLY), "rb") as file:
            is_ours = file.read(32).strip() == str(pid).encode()
        if is_ours:
            path.unlink()


def _open_public(path: str, flags: int) -> int:
    # The worker's umask is 0, for the modes of the files it serves.
    return open_plain(path, flags, 0o644)


@contextlib.contextmanager
def abort_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an exception, so that a half-made mount is taken back."""

    def abort(signum: int, _frame: object) -> None:
        raise StartAbortedError(f"the mount was aborted by {signal.Signals(signum).name}")

    before = {number: signal.signal(number, abort) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
