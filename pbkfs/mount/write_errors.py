"""Whether a file system below had write errors since this worker serves: asked before an upgrade.

Who takes over asks the keeper's descriptors, and of an error the mount ends; see ``takeover``. The
kernel tells a descriptor of an error once, whichever program it happened to, so a worker that asks
beforehand needs descriptors of its own, opened anew. Owned by the worker; ``ask`` for any thread.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pbkfs.mount.request import reason
from pbkfs.overlay.layer import sync_file_system


class WriteErrors:
    """What was told is remembered: it holds until another mount."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._found: str | None = None
        self._lock = threading.Lock()

    def watch(self, directory: Path | str) -> None:
        """Ask later about the file system of ``directory``, from now on, if not since earlier.

        Before another descriptor is opened that must not know of more. Raises OSError.
        """
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._fds.setdefault(os.fstat(fd).st_dev, fd) != fd:
            os.close(fd)

    def watch_again(self, fd: int) -> None:
        """Watch the file system of somebody else's descriptor; never raises OSError."""
        try:
            self.watch(f"/proc/self/fd/{fd}")
        except OSError as error:
            self._found = f"its file systems can't be asked for write errors: {reason(error)}"

    def ask(self) -> str | None:
        """Return what the file systems tell of errors until now, in words; None: there were none.

        Waits until they have written out what they hold.
        """
        with self._lock:
            for fd in list(self._fds.values()):
                try:
                    sync_file_system(fd)
                except OSError as error:
                    path = os.readlink(f"/proc/self/fd/{fd}")
                    found = f"the file system of {path} tells of a write error: {reason(error)}"
                    self._found = self._found or found
            return self._found
