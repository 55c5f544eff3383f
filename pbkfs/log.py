"""Where log lines go: a file, stderr or the systemd journal; as text or as JSON lines.

Set up once a process: by the command line (stderr) and by the worker after its fork. Modules log
through ``logging.getLogger(__name__)``. Any thread may log; a line that cannot be written (full
disk) is dropped, because the mount must not die of it.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import socket
import time
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

from pbkfs.plain_file import open_plain

Format = Literal["text", "json"]
Sink = Literal["file", "journald", "stderr"]

# Source: systemd.journal-fields(7) and sd_journal_send(3); the native protocol's socket.
_JOURNAL_SOCKET = "/run/systemd/journal/socket"
_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6}


class TextFormatter(logging.Formatter):
    """One line a record: UTC time, level, pid, module, message."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s [%(process)d] %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One JSON object a record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class JournalHandler(logging.Handler):
    """Send records to journald by its native datagram protocol, identifier ``pbkfs``."""

    def __init__(self, path: str = _JOURNAL_SOCKET) -> None:
        """Connect. Raises OSError where no journald listens."""
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {
                "MESSAGE": self.format(record),
                "PRIORITY": str(_PRIORITY.get(record.levelno, 7)),
                "SYSLOG_IDENTIFIER": "pbkfs",
                "SYSLOG_PID": str(record.process),
                "CODE_FILE": record.pathname,
                "CODE_LINE": str(record.lineno),
                "PBKFS_LOGGER": record.name,
            }
            self._socket.send(b"".join(_journal_field(k, v) for k, v in fields.items()))
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _journal_field(name: str, value: str) -> bytes:
    # Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL: a value with a newline is sent with a
    # little-endian 64 bit length instead of "=".
    data = value.encode(errors="replace")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file that is opened again after a rotation; 0640, because a worker's umask is 0.

    Only a regular one, which is looked at each time that it is opened.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            # Where its directory has gone, say; each line tries anew.
            self.handleError(record)

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return open_plain(path, flags, 0o640)

        file = open(  # noqa: SIM115 - the handler closes it
            self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=opener
        )
        assert isinstance(file, TextIOWrapper)
        return file


def configure(
    sink: Sink,
    *,
    path: Path | None = None,
    style: Format = "text",
    debug: bool = False,
    is_delayed: bool = False,
) -> int | None:
    """Send all log lines to ``sink``; replaces what was configured before.

    ``path`` is needed for ``file``; the file is opened again after a rotation, and with
    ``is_delayed`` for the first time when a line is written. Returns the file's
    descriptor where there is one (for a crash's last words), else None. Raises OSError.
    """
    handler: logging.Handler
    fd: int | None = None
    if sink == "journald":
        handler = JournalHandler()
    elif sink == "file":
        assert path is not None
        handler = _LogFile(path, encoding="utf-8", errors="replace", delay=is_delayed)
        fd = None if handler.stream is None else handler.stream.fileno()
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    if sink == "journald" and style == "text":
        handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.INFO)
    logging.captureWarnings(True)
    logging.raiseExceptions = debug
    return fd
