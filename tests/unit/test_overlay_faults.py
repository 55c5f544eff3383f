"""Every labelled step of every operation: it fails, or the worker dies there.

A failed operation leaves the tree as it was, now and after a remount. After a death, the tree is
as it was before the operation or as it is after it, and never anything between.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.drivers import TreeDriver
from conformance.file_machine import PAGE, Snapshot, make_lower, take_snapshot
from conformance.tree_place import TreePlace, open_place

from pbkfs import durable

Operation = Callable[[TreeDriver], object]


def _write(driver: TreeDriver, path: bytes, data: bytes, offset: int, flags: int = 0) -> None:
    handle = driver.open(path, os.O_RDWR | flags)
    try:
        driver.pwrite(handle, data, offset)
    finally:
        driver.close(handle)


# One step of the tree each; several steps would have states between.
OPERATIONS: dict[str, Operation] = {
    "create": lambda d: d.close(d.open(b"base/5/new", os.O_RDWR | os.O_CREAT | os.O_EXCL)),
    "mkdir": lambda d: d.mkdir(b"base/7", 0o700),
    "symlink": lambda d: d.symlink(b"to/nowhere", b"base/link"),
    "link of a new file": lambda d: d.link(b"made", b"base/5/made_too"),
    "copy up a whole file": lambda d: d.tree.copy_up(d._find(b"postgresql.conf").ino),
    "copy up a mapped file": lambda d: d.tree.copy_up(d._find(b"base/5/16384").ino),
    "truncate a lower file to nothing": lambda d: d.truncate(b"base/5/16385", 0),
    "chmod of a lower file": lambda d: d.chmod(b"global/1262", 0o640),
    "chmod of a new file": lambda d: d.chmod(b"made", 0o640),
    "times of a lower file": lambda d: d.utime(b"pg_xact/0000", 10**18, 10**18),
    "unlink a lower file": lambda d: d.unlink(b"base/5/16384"),
    "unlink a new file": lambda d: d.unlink(b"made"),
    "rmdir": lambda d: d.rmdir(b"empty"),
    "rename a lower file": lambda d: d.rename(b"base/5/16384", b"base/6/1"),
    "rename over a lower file": lambda d: d.rename(b"made", b"postgresql.conf"),
    "rename a lower directory": lambda d: d.rename(b"base", b"moved"),
    "exchange": lambda d: d.rename(b"base/5", b"global", 2),
    "wal_out": lambda d: d.tree.wal_out(),
}


@contextmanager
def made_place(path: Path) -> Iterator[TreePlace]:
    """A tree with lower files, a file and a directory of its own, after a remount."""
    with open_place(path) as made:
        make_lower(made.lower)
        made.open()
        _write(made.driver, b"made", b"made before", 0, os.O_CREAT)
        made.driver.utime(b"made", 10**18, 10**18)
        made.driver.mkdir(b"pg_wal", 0o700)
        made.reopen()
        yield made


@pytest.fixture
def place(memory: Path) -> Iterator[TreePlace]:
    with made_place(memory) as made:
        yield made


def make(path: Path) -> Path:
    path.mkdir()
    return path


def snapshot(place: TreePlace) -> Snapshot:
    """All of the tree; the link to pg_wal without the part that is the test's own directory."""
    found = take_snapshot(place.driver)
    wal = os.fsencode(place.diff_path / "pg_wal")
    return {
        path: replace(entry, target=b"DIFF/pg_wal", size=None) if entry.target == wal else entry
        for path, entry in found.items()
    }


def stop_at(step: int, error: BaseException) -> Callable[[str], None]:
    left = step

    def stop(_: str) -> None:
        nonlocal left
        if left == 0:
            left = -1
            raise error
        left -= left > 0

    return stop


class Killed(BaseException):
    """Stands for SIGKILL at a step."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_failed_step_leaves_all_as_it_was(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    operation = OPERATIONS[name]
    before = snapshot(place)
    step = 0
    while True:
        n_objects = len(place.object_paths())
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(durable, "on_step", stop_at(step, full))
        try:
            operation(place.driver)
        except OSError as error:
            assert error is full  # noqa: PT017 - some steps fail, one day one does not
        else:
            break
        finally:
            monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert snapshot(place) == before, f"step {step} of {name}"
        assert len(place.object_paths()) == n_objects, f"step {step} left an object"
        step += 1
    assert step >= 1 or name == "chmod of a new file"
    after = snapshot(place)
    place.reopen()
    assert snapshot(place) == after


@pytest.mark.parametrize("name", OPERATIONS)
def test_failed_step_is_not_seen_after_a_remount(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    operation = OPERATIONS[name]
    before = snapshot(place)
    for step in range(20):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(durable, "on_step", stop_at(step, full))
        try:
            operation(place.driver)
        except OSError:
            monkeypatch.setattr(durable, "on_step", lambda _: None)
            place.crash()
            assert snapshot(place) == before, f"step {step} of {name}"
        else:
            return


@pytest.mark.parametrize("is_power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_death_at_a_step_finds_the_old_or_the_new_tree(
    memory: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_power_cut: bool
) -> None:
    operation = OPERATIONS[name]
    with made_place(make(memory / "reference")) as reference:
        before = snapshot(reference)
        operation(reference.driver)
        after = snapshot(reference)
    with made_place(make(memory / "tried")) as place:
        is_done = False
        step = n_deaths = 0
        while True:
            monkeypatch.setattr(durable, "on_step", stop_at(step, Killed()))
            try:
                if not is_done:
                    operation(place.driver)
                place.tree.sync()
                place.tree.reap()
                break
            except Killed:
                monkeypatch.setattr(durable, "on_step", lambda _: None)
            n_deaths += 1
            step += 1
            if is_power_cut:
                place.cut_power()
            else:
                place.crash()
            found = snapshot(place)
            assert found == after or (found == before and not is_done), f"step {step}"
            if not is_done and found == after and before != after:
                # What follows comes after the record: no more of the operation, only its rest.
                is_done, step = True, 0
        monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert n_deaths >= 2


def test_write_to_a_full_disk_can_be_repeated(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy-up that found no room leaves the page readable, and works once there is room."""
    handle = place.driver.open(b"base/5/16384", os.O_RDWR)
    before = place.driver.pread(handle, 5 * PAGE, 0)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for step in range(4):
        monkeypatch.setattr(durable, "on_step", stop_at(step, full))
        with pytest.raises(OSError, match="No space"):
            place.driver.pwrite(handle, b"x" * PAGE, 0)
        monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert place.driver.pread(handle, 5 * PAGE, 0) == before
    assert place.driver.pwrite(handle, b"x" * PAGE, 0) == PAGE
    assert place.driver.pread(handle, 5 * PAGE, 0) == b"x" * PAGE + before[PAGE:]
    place.driver.close(handle)


def test_journal_that_cannot_be_written_fails_the_request_only(place: TreePlace) -> None:
    """The real thing instead of an injected error: the journal may not grow (RLIMIT_FSIZE)."""
    import resource
    import signal

    before = snapshot(place)
    end = place.tree.counters()["journal_bytes"]
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (end + 4, hard))
    try:
        for name in ("mkdir", "rename a lower directory", "unlink a lower file", "create"):
            with pytest.raises(OSError, match="too large"):
                OPERATIONS[name](place.driver)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old_handler)
    assert snapshot(place) == before
    assert place.tree.counters()["journal_bytes"] == end
    place.driver.mkdir(b"later", 0o700)
    place.crash()
    assert snapshot(place).keys() == before.keys() | {b"later"}
