"""pg_probackup's locks: added, respected, taken away, and left out of a store nobody may write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handmade import Store

from pbkfs.backup import open_probackup
from pbkfs.backup.probackup import guard
from pbkfs.errors import BusyError


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def living() -> Iterator[Callable[[], int]]:
    """Pids of processes that live until the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> int:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "BACKUP"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield path, fd
    os.close(fd)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "EXCLUSIVE_WAIT_S", 0.3)
    monkeypatch.setattr(guard, "EMPTY_WAIT_S", 0.1)
    monkeypatch.setattr(guard, "_POLL_S", 0.01)


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_reader_is_added_and_removed(backup: tuple[Path, int], living: Callable[[], int]) -> None:
    path, fd = backup
    before = path.stat().st_mtime_ns
    first, second = living(), living()
    assert guard.add_reader(fd, "X", first) is None
    assert (path / "backup_ro.pid").read_text() == f"{first}\n"
    assert guard.add_reader(fd, "X", second) is None
    assert guard.add_reader(fd, "X", second) is None
    assert (path / "backup_ro.pid").read_text() == f"{first}\n{second}\n"
    assert names(path) == {"backup_ro.pid"}
    guard.remove_reader(fd, "X", first)
    assert (path / "backup_ro.pid").read_text() == f"{second}\n"
    guard.remove_reader(fd, "X", second)
    assert names(path) == set()
    assert path.stat().st_mtime_ns == before


def test_dead_readers_are_dropped(
    backup: tuple[Path, int], dead_pid: int, living: Callable[[], int]
) -> None:
    path, fd = backup
    other = living()
    (path / "backup_ro.pid").write_text(f"{dead_pid}\n{other}\nnonsense\n-5\n0\n99999999999999\n")
    guard.add_reader(fd, "X", os.getpid())
    assert (path / "backup_ro.pid").read_text() == f"{other}\n{os.getpid()}\n"
    guard.remove_reader(fd, "X", os.getpid())
    assert (path / "backup_ro.pid").read_text() == f"{other}\n"


def test_a_backup_that_is_rewritten_is_refused(
    backup: tuple[Path, int], living: Callable[[], int]
) -> None:
    path, fd = backup
    merger = living()
    (path / "backup.pid").write_text(f"{merger}\n")
    with pytest.raises(BusyError, match=f"locked by process {merger}") as caught:
        guard.add_reader(fd, "X", os.getpid())
    assert caught.value.hint
    assert names(path) == {"backup.pid"}
    assert (path / "backup.pid").read_text() == f"{merger}\n"


@pytest.mark.parametrize("text", ["{dead}\n", "", "nonsense\n"])
def test_stale_locks_are_taken_over(backup: tuple[Path, int], dead_pid: int, text: str) -> None:
    path, fd = backup
    (path / "backup.pid").write_text(text.format(dead=dead_pid))
    assert guard.add_reader(fd, "X", os.getpid()) is None
    assert names(path) == {"backup_ro.pid"}


def test_a_short_lock_is_waited_for(
    backup: tuple[Path, int], living: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = backup
    monkeypatch.setattr(guard, "EXCLUSIVE_WAIT_S", 30.0)
    (path / "backup.pid").write_text(f"{living()}\n")
    waits: list[float] = []

    def release(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            (path / "backup.pid").unlink()

    monkeypatch.setattr(guard.time, "sleep", release)
    assert guard.add_reader(fd, "X", os.getpid()) is None
    assert len(waits) == 3
    assert names(path) == {"backup_ro.pid"}


def test_many_readers_at_once(backup: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = backup
    monkeypatch.setattr(guard, "EXCLUSIVE_WAIT_S", 30.0)
    # pg_probackup's protocol tells processes apart, not threads: so these are processes.
    program = (
        "import os, sys\n"
        "from pbkfs.backup.probackup import guard\n"
        "guard.EXCLUSIVE_WAIT_S = 30.0\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "for _ in range(20):\n"
        "    assert guard.add_reader(fd, 'X', os.getpid()) is None\n"
        "    assert str(os.getpid()) in open(sys.argv[1] + '/backup_ro.pid').read().split()\n"
        "    guard._replace_readers(fd, 'X', os.getpid(), is_added=False)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path)]) for _ in range(3)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0]
    assert names(path) == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_locks_belong_to_the_owner_of_the_backup(backup: tuple[Path, int]) -> None:
    path, fd = backup
    os.chown(path, 12345, 12346)
    guard.add_reader(fd, "X", os.getpid())
    status = (path / "backup_ro.pid").stat()
    assert (status.st_uid, status.st_gid) == (12345, 12346)
    assert status.st_mode & 0o777 == 0o600


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Store, str, str]:
    store = Store(tmp_path / "store")
    full = store.add()
    return store, full, store.add(mode="DELTA", parent=full)


def test_a_chain_is_guarded_as_a_whole(chain: tuple[Store, str, str]) -> None:
    store, full, last = chain
    base = open_probackup(store.root, "main", last)
    base.acquire(os.getpid())
    for backup_id in (full, last):
        assert (store.path / backup_id / "backup_ro.pid").read_text() == f"{os.getpid()}\n"
    base.release(os.getpid())
    assert not list(store.root.rglob("*.pid"))
    base.release(os.getpid())
    base.close()


def test_a_chain_of_which_one_member_is_busy_is_not_guarded_at_all(
    chain: tuple[Store, str, str], living: Callable[[], int]
) -> None:
    store, full, last = chain
    (store.path / full / "backup.pid").write_text(f"{living()}\n")
    base = open_probackup(store.root, "main", last)
    with pytest.raises(BusyError, match=full):
        base.acquire(os.getpid())
    assert not list(store.root.rglob("backup_ro.pid"))
    base.close()


@pytest.fixture
def as_nobody() -> Iterator[Callable[[], None]]:
    """Become a user whom permissions bind; root again after the test."""
    was_root = os.geteuid() == 0

    def become() -> None:
        if was_root:
            os.setegid(65534)
            os.seteuid(65534)

    yield become
    if was_root:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_store_that_cannot_be_written_is_used_without_a_guard(
    place: Path,
    living: Callable[[], int],
    as_nobody: Callable[[], None],
    is_busy: bool,
) -> None:
    store = Store(place / "store")
    backup_id = store.add()
    lock = store.path / backup_id / "backup.pid"
    if is_busy:
        lock.write_text(f"{living()}\n")
    lock.parent.chmod(0o555)
    as_nobody()
    base = open_probackup(store.root, "main", backup_id)
    if is_busy:
        with pytest.raises(BusyError, match="locked by process"):
            base.acquire(os.getpid())
    else:
        base.acquire(os.getpid())
        assert any("cannot be written" in note for note in base.notes)
    base.release(os.getpid())
    base.close()
    assert not list(store.root.rglob("backup_ro.pid*"))
    assert lock.exists() == is_busy
