"""Random operations on a real mount, beside a plain directory that has to show the same.

What ``conformance.file_machine`` does with a ``Tree``, here through the kernel, the dispatcher and
pyfuse3; with remounts, dropped caches, and workers that are killed. What the kernel held dirty when
a worker dies is lost, so a kill comes after a syncfs.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable

import pytest
from conformance.drivers import Driver, OsDriver
from conformance.file_machine import PAGE, FileMachine, pattern
from fuse.served import Served
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

# A process is started for each example and at each remount: seconds, beside other load.
pytestmark = pytest.mark.timeout(400)

libc = ctypes.CDLL(None, use_errno=True)

_choices = st.integers(0, 1 << 16)
_places = st.integers(0, 10 * PAGE)
_lengths = st.integers(1, 3 * PAGE)


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

    @precondition(lambda self: self.handles)
    @rule(choice=_choices)
    def drop_cached_pages(self, choice: int) -> None:
        """Have the kernel forget what is clean of one file; every other time nothing is dirty."""
        mine, _ = self.handles[choice % len(self.handles)]
        if choice % 2:
            self.driver.fsync(mine)
        os.posix_fadvise(mine, 0, 0, os.POSIX_FADV_DONTNEED)

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, offset=_places, length=_lengths, seed=st.integers(0, 255))
    def write_mapped(self, choice: int, offset: int, length: int, seed: int) -> None:
        def write(mapping: mmap.mmap) -> bytes:
            start = offset % len(mapping)
            end = min(len(mapping), start + length)
            mapping[start:end] = pattern(seed, end - start)
            if seed % 4 == 0:
                mapping.flush()
            return mapping[max(0, start - PAGE) : end + PAGE]

        self.with_mapping("write_mapped", choice, write)

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, offset=_places, length=_lengths)
    def read_mapped(self, choice: int, offset: int, length: int) -> None:
        def read(mapping: mmap.mmap) -> bytes:
            start = offset % len(mapping)
            return mapping[start : start + length]

        self.with_mapping("read_mapped", choice, read)

    def with_mapping(self, what: str, choice: int, use: Callable[[mmap.mmap], bytes]) -> None:
        """Do something with a shared mapping of all of a file, on both sides."""
        mine, theirs = self.handles[choice % len(self.handles)]
        size = os.fstat(theirs).st_size
        if fcntl.fcntl(theirs, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or size == 0:
            return

        def use_side(driver: Driver) -> bytes:
            with mmap.mmap(theirs if driver is self.oracle else mine, size) as mapping:
                return use(mapping)

        _, expected, found = self.both(what, use_side)
        assert expected == found, what
        self.changed(theirs)

    @rule(n_pages=st.integers(1, 5))
    def hydrate(self, n_pages: int) -> None:
        """Bring up a little more of what lies below."""
        assert self.served is not None
        assert self.served.ask("hydrate", max_bytes=n_pages * PAGE)["failed"] == 0

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
