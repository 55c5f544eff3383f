"""Deleting a diff takes what is pbkfs's and nothing else; an interrupted deletion stays a diff."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pbkfs.errors import BusyError, DiffError, NotFoundError, UsageError
from pbkfs.mount import lock, wipe
from pbkfs.mount.ending import cleanup
from pbkfs.mount.request import SUPERBLOCK


@pytest.fixture
def diff(tmp_path: Path) -> Path:
    """A directory with all that a diff may hold, as far as names go."""
    path = tmp_path / "diff"
    for directory in ("objects/0a", "pg_wal/archive_status", "log"):
        (path / directory).mkdir(parents=True)
    for file in ("journal", "journal.new", ".binding.json.77.tmp", "objects/0a/10a", "log/a.log"):
        (path / file).write_text("x")
    for file in (SUPERBLOCK, "binding.json", "control.sock", "lock"):
        (path / file).write_text("")
    return path


def test_all_of_a_diff_goes(diff: Path) -> None:
    assert wipe.wipe(diff) == []
    assert list(diff.iterdir()) == []


def test_foreign_files_and_targets_of_links_stay(diff: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "000000010000000000000001").write_text("precious")
    shutil.rmtree(diff / "pg_wal")
    (diff / "pg_wal").symlink_to(elsewhere)
    (diff / "objects" / "0a" / "link").symlink_to(elsewhere)
    (diff / "notes.txt").write_text("mine")
    assert wipe.wipe(diff) == ["notes.txt"]
    assert (elsewhere / "000000010000000000000001").read_text() == "precious"


def test_order_of_deletion(diff: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    real = wipe._remove

    def remove(path: Path) -> None:
        gone.append(path.name)
        real(path)

    monkeypatch.setattr(wipe, "_remove", remove)
    wipe.wipe(diff)
    assert gone[0] == "journal"
    assert gone[-2:] == [SUPERBLOCK, "lock"]


def test_cleanup_keeps_a_directory_that_was_there_before(diff: Path) -> None:
    assert cleanup(diff) == []
    assert diff.is_dir()
    with pytest.raises(DiffError, match="is no diff"):
        cleanup(diff)


def test_cleanup_refuses_what_is_no_diff(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="root directory"):
        cleanup(Path("/"))
    with pytest.raises(NotFoundError):
        cleanup(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiffError, match="not a directory"):
        cleanup(tmp_path / "file")
    for force in (False, True):
        with pytest.raises(DiffError, match="is no diff"):
            cleanup(tmp_path, force=force)
    assert (tmp_path / "file").read_text() == "x"


def test_cleanup_of_a_damaged_diff_needs_force(diff: Path) -> None:
    (diff / SUPERBLOCK).unlink()
    with pytest.raises(DiffError):
        cleanup(diff)
    assert (diff / "journal").exists()
    assert cleanup(diff, force=True) == []


@pytest.mark.parametrize("force", [False, True])
def test_cleanup_refuses_a_live_owner(diff: Path, force: bool) -> None:
    taken = lock.acquire(diff)
    with pytest.raises(BusyError, match="in use"):
        cleanup(diff, force=force)
    assert (diff / "journal").exists()
    taken.close()
