"""How a process tells another one what happened: errors as fields, and the readiness pipe.

The worker is the grandchild of the command that started it, so an exception cannot just rise:
it goes through a pipe (or the control socket) and is raised again on the other side, with its
class, and so with its exit code.
"""

from __future__ import annotations

import json
import os
import select
import time
import traceback
from collections.abc import Iterator
from typing import Any

from pbkfs.errors import PbkfsError


class WorkerBugError(Exception):
    """An unexpected exception in the worker, raised again here; its traceback is a note."""

    def __init__(self, summary: str, text: str) -> None:
        super().__init__(summary)
        if text:
            self.add_note(text)


def error_to_fields(error: BaseException) -> dict[str, Any]:
    """Return what ``fields_to_error`` needs to make the same error again."""
    if isinstance(error, PbkfsError):
        return {"slug": error.slug, "message": error.message, "hint": error.hint}
    summary = f"{type(error).__name__}: {' '.join(str(error).split())}"
    text = "".join(traceback.format_exception(error))
    return {"slug": "bug", "message": summary, "hint": None, "traceback": text}


def fields_to_error(fields: dict[str, Any]) -> Exception:
    """Return the error that ``error_to_fields`` took apart."""
    for cls in _subclasses(PbkfsError):
        if cls.slug == fields["slug"]:
            return cls(fields["message"], hint=fields["hint"])
    return WorkerBugError(fields["message"], fields.get("traceback", ""))


def _subclasses(cls: type[PbkfsError]) -> Iterator[type[PbkfsError]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


class ReportWriter:
    """The worker's end of the readiness pipe. A reader that went away is no failure."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, event: str, **fields: object) -> None:
        """Send ``started``, ``ok`` or ``error``."""
        if self._fd < 0:
            return
        data = json.dumps({"event": event, **fields}).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except BrokenPipeError:
            self.close()

    def close(self) -> None:
        """Send nothing more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ReportReader:
    """The command's end of the readiness pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""

    def receive(self, deadline: float | None) -> dict[str, Any] | None:
        """Return the next message, or None when the worker is gone without one.

        ``deadline`` is of time.monotonic(). Raises TimeoutError.
        """
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while b"\n" not in self._buffer:
            left_ms = None if deadline is None else max(0, (deadline - time.monotonic()) * 1000)
            if not poller.poll(left_ms):
                raise TimeoutError
            data = os.read(self._fd, 65536)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Listen no more."""
        os.close(self._fd)
