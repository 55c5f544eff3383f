"""Random operations on a real mount, beside a plain directory that has to show the same.

What ``conformance.file_machine`` does with a ``Tree``, here through the kernel, the dispatcher and
pyfuse3; with remounts, dropped caches, and workers that are killed. What the kernel held dirty when
a worker dies is lost, so a kill comes after a syncfs.
"""

from __future__ import annotations

import ctypes
import os

import pytest
from conformance.drivers import OsDriver
from conformance.file_machine import PAGE, FileMachine
from fuse.served import Served
from hypothesis import HealthCheck, settings
from hypothesis.stateful import rule

# A process is started for each example and at each remount: seconds, beside other load.
pytestmark = pytest.mark.timeout(400)

libc = ctypes.CDLL(None, use_errno=True)


class MountMachine(FileMachine):
    def start(self) -> None:
        (self.place / "mnt").mkdir()
        self.served: Served | None = None
        self.serve()

    def serve(self) -> None:
        limit = str(4 * PAGE)
        self.served = Served(
            self.place / "mnt", self.place / "diff", self.lower, "--max-whole", limit
        )
        self.driver = OsDriver(self.served.path)

    def stop(self) -> None:
        if self.served is not None:
            self.served.end()

    def syncfs(self) -> None:
        fd = os.open(self.place / "mnt", os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert libc.syncfs(fd) == 0
        finally:
            os.close(fd)

    @rule()
    def compare_all(self) -> None:
        self.compare()

    @rule()
    def sync(self) -> None:
        self.syncfs()

    @rule()
    def drop_cached_data(self) -> None:
        """Have the kernel write and forget what it holds of all files; names stay."""
        assert self.served is not None
        for path in self.paths():
            if self.oracle.stat(path).kind == "file":
                self.served.ask("invalidate", ino=self.driver.stat(path).ino)

    @rule()
    def remount(self) -> None:
        assert self.served is not None
        self.close_handles()
        assert self.served.unmount() == {}
        self.served.end()
        self.serve()
        self.compare()

    @rule()
    def kill(self) -> None:
        assert self.served is not None
        self.close_handles()
        self.syncfs()
        self.served.process.kill()
        self.served.wait()
        self.served.end()
        self.serve()
        self.compare()


class TestMount(MountMachine.TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=8,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
