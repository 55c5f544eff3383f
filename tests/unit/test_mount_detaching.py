"""Detaching a diff that is not mounted: what it makes and refuses, and a death at every step."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conformance.file_machine import PAGE, make_lower
from conformance.plain_base import PlainBase
from conformance.tree_place import TreePlace, open_place

from pbkfs import durable
from pbkfs.errors import BusyError, DiffError, HostError, NotFoundError, PbkfsError, UsageError
from pbkfs.mount import detaching
from pbkfs.mount.binding import BaseAddress, Binding, write_binding
from pbkfs.mount.detaching import Plan, finish_detach, plan_detach
from pbkfs.mount.hydrating import HydrationStatus
from pbkfs.mount.opening import check_not_detached
from pbkfs.overlay.superblock import read_superblock

Snapshot = dict[str, tuple[str, int, int, bytes]]


class Killed(BaseException):
    """Stands for SIGKILL at a step."""


def snapshot(root: Path) -> Snapshot:
    """Type, mode, mtime and content of everything below ``root``."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        kind = "l" if path.is_symlink() else "d" if path.is_dir() else "f"
        content = os.fsencode(os.readlink(path)) if kind == "l" else b""
        if kind == "f":
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (
            kind, status.st_mode, status.st_mtime_ns if kind == "f" else 0, content
        )  # fmt: skip
    return found


@dataclasses.dataclass
class Detachable:
    """A diff that was mounted once, and what it shows."""

    place: TreePlace
    mnt: Path
    expected: Snapshot

    @property
    def diff(self) -> Path:
        return self.place.diff_path

    def plan(self, to: Path | None = None) -> Plan:
        return plan_detach(None, self.diff, to)

    def detach(
        self, to: Path | None = None, *, may_hydrate: bool = True, is_kept: bool = False
    ) -> list[HydrationStatus]:
        shown: list[HydrationStatus] = []
        plan = self.plan(to)
        assert (
            finish_detach(plan, may_hydrate=may_hydrate, is_kept=is_kept, show=shown.append) == []
        )
        return shown


@pytest.fixture
def made(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Detachable]:
    """A diff with changes of every kind and pg_wal outside of the tree."""
    monkeypatch.setattr(detaching, "open_base", lambda *_args, **_kwargs: PlainBase(place.lower))
    with open_place(memory) as place:
        make_lower(place.lower)
        (place.lower / "pg_tblspc").mkdir()
        (place.lower / ".tblspc/77/PG_15").mkdir(parents=True)
        (place.lower / ".tblspc/77/PG_15/1").write_bytes(b"s" * PAGE)
        (place.lower / "pg_tblspc/77").symlink_to("../.tblspc/77")
        (place.lower / "pg_wal/archive_status").mkdir(parents=True)
        place.open()
        driver = place.driver
        handle = driver.open(b"base/5/16384", os.O_RDWR)
        driver.pwrite(handle, b"changed", PAGE)
        driver.close(handle)
        driver.close(driver.open(b"base/5/new", os.O_RDWR | os.O_CREAT))
        driver.link(b"base/5/new", b"base/6/same")
        driver.unlink(b"postgresql.conf")
        driver.rename(b"base/5/16385", b"base/6/moved")
        driver.chmod(b"global", 0o750)
        wal = place.diff_path / "pg_wal"
        (wal / "archive_status").mkdir(parents=True)
        (wal / "000000010000000000000001").write_bytes(b"wal" * 1000)
        wal.chmod(0o700)
        place.tree.wal_out()
        place.close()
        mnt = memory / "mnt"
        mnt.mkdir()
        write_binding(
            place.diff_path,
            Binding(
                base=BaseAddress("directory", path=str(place.lower)),
                mountpoint=str(mnt),
                owner=(os.geteuid(), os.getegid()),
                created_at="2026-01-01T00:00:00Z",
                last_used_at="2026-01-01T00:00:00Z",
                pbkfs_version="0.1.0",
                pid=None,
                host="here",
                state="released",
                made_directory=True,
            ),
        )
        expected = snapshot(place.lower)
        lower = (place.lower / "base/5/16384").read_bytes()
        for name in ("postgresql.conf", "base/5/16385", "pg_wal/archive_status", "pg_wal"):
            del expected[name]
        for name, entry in snapshot(wal).items():
            expected[f"pg_wal/{name}"] = entry
        expected["pg_wal"] = ("d", 0o40700, 0, b"")
        expected["base/6/moved"] = snapshot(place.lower)["base/5/16385"]
        expected["base/5/new"] = expected["base/6/same"] = ("f", 0o100600, 0, b"")
        mode = expected["base/5/16384"][1]
        content = lower[:PAGE] + b"changed" + lower[PAGE + 7 :]
        expected["base/5/16384"] = ("f", mode, 0, content)
        expected["global"] = ("d", 0o40750, 0, b"")
        yield Detachable(place, mnt, expected)


def check(found: Snapshot, expected: Snapshot) -> None:
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        kind, mode, mtime_ns, content = found[name]
        assert (kind, mode, content) == (entry[0], entry[1], entry[3]), name
        assert entry[2] in (0, mtime_ns), name


def stop_at(step: int) -> Callable[[str], None]:
    left = step

    def stop(_: str) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise Killed

    return stop


def test_detached_is_a_plain_pgdata_in_the_place_of_the_mount_point(made: Detachable) -> None:
    shown = made.detach()
    check(snapshot(made.mnt), made.expected)
    assert made.mnt.stat().st_mode & 0o777 == 0o700
    assert (made.mnt / "base/5/new").stat().st_nlink == 2
    assert (made.mnt / "base/5/16384").stat().st_nlink == 1
    assert (made.mnt / "pg_tblspc/77/PG_15/1").read_bytes() == b"s" * PAGE
    assert not made.diff.exists()
    assert not list(made.mnt.parent.glob("*.partial"))
    assert [status.state for status in shown][-2:] == ["running", "done"]
    assert shown[-1].bytes_done == shown[-1].bytes_total > 0


def test_kept_diff_cannot_be_mounted_any_more(made: Detachable) -> None:
    target = made.mnt.with_name("standalone")
    made.detach(target, is_kept=True)
    check(snapshot(target), made.expected)
    assert read_superblock(made.diff).detached_to == str(target)
    with pytest.raises(DiffError, match="was detached to"):
        check_not_detached(made.diff)
    with pytest.raises(DiffError, match="was detached to"):
        made.place.open_diff()
    made.detach()
    assert not made.diff.exists()
    check(snapshot(target), made.expected)


@pytest.mark.parametrize("is_remounted", [False, True], ids=["", "mounted between"])
def test_death_at_every_step_and_again(
    made: Detachable, monkeypatch: pytest.MonkeyPatch, is_remounted: bool
) -> None:
    target = made.mnt.with_name("standalone")
    # A copy, because each attempt would get further.
    saved = made.diff.with_name("saved")
    shutil.copytree(made.diff, saved, symlinks=True)
    n_deaths = 0
    while True:
        monkeypatch.setattr(durable, "on_step", stop_at(n_deaths * 7))
        try:
            made.detach(target)
            is_dead = False
        except Killed:
            is_dead = True
        monkeypatch.setattr(durable, "on_step", lambda _label: None)
        if not is_dead:
            break
        n_deaths += 1
        assert not target.exists() or snapshot(target).keys() == made.expected.keys()
        if is_remounted:
            try:
                check_not_detached(made.diff)
                made.place.open()
            except DiffError:
                assert target.exists()
            else:
                assert not target.exists()
                made.place.close()
        made.detach(target)
        check(snapshot(target), made.expected)
        assert not made.diff.exists()
        assert not target.with_name("standalone.partial").exists()
        shutil.rmtree(target)
        shutil.copytree(saved, made.diff, symlinks=True)
    assert n_deaths > 5
    check(snapshot(target), made.expected)


def refused(made: Detachable, error: type[PbkfsError], match: str, to: Path | None = None) -> None:
    before = snapshot(made.diff)
    with pytest.raises(error, match=match) as caught:
        made.plan(to)
    assert caught.value.hint
    assert snapshot(made.diff) == before


def test_refusals_change_nothing(made: Detachable) -> None:
    exists = made.mnt.with_name("exists")
    exists.mkdir()
    refused(made, UsageError, "exists already", exists)
    refused(made, UsageError, "inside of the diff", made.diff / "below")
    refused(made, UsageError, "inside of the mount point", made.mnt / "below")
    refused(made, NotFoundError, "does not exist", made.mnt.with_name("missing") / "pgdata")
    partial = made.mnt.with_name("pgdata.partial")
    partial.mkdir()
    (partial / "somebody's").touch()
    refused(made, UsageError, "not of an interrupted detach", made.mnt.with_name("pgdata"))
    (made.mnt / "file").touch()
    plan = made.plan()
    with pytest.raises(UsageError, match="not empty"):
        finish_detach(plan, may_hydrate=True, is_kept=False, show=lambda _: None)


def test_another_file_system_is_refused(made: Detachable, tmp_path: Path) -> None:
    if os.stat(tmp_path).st_dev == os.stat(made.diff).st_dev:
        pytest.skip("there is no second file system here")
    refused(made, HostError, "another file system", tmp_path / "pgdata")


def test_what_is_missing_is_said_without_hydration(made: Detachable) -> None:
    with pytest.raises(BusyError, match=r"still needs .* KiB in 1\d files"):
        made.detach(may_hydrate=False)
    assert list(made.mnt.iterdir()) == []
    made.detach()
    check(snapshot(made.mnt), made.expected)


def test_a_full_disk_while_hydrating_is_one_error(
    made: Detachable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(label: str) -> None:
        if label == "copy_up:object:create":
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(durable, "on_step", full)
    with pytest.raises(HostError, match="no space left"):
        made.detach()
    monkeypatch.setattr(durable, "on_step", lambda _label: None)
    made.detach()
    check(snapshot(made.mnt), made.expected)
