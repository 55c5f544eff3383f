"""pg_wal moves out of the tree once, wholly or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from handmade import control_file

from pbkfs import durable
from pbkfs.backup.base import Base, WalSeed
from pbkfs.backup.directory import open_directory
from pbkfs.backup.empty import EmptyBase
from pbkfs.errors import FormatError
from pbkfs.mount import wal
from pbkfs.overlay.diff import Diff
from pbkfs.overlay.tree import Tree

ME = (os.geteuid(), os.getegid())
SEGMENT = bytes(range(256)) * 4096
NAMES = ["000000010000000000000001", "000000010000000000000002"]


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    """A PGDATA with two segments and a status directory."""
    path = tmp_path / "base"
    for name in ("base", "global", "pg_wal/archive_status"):
        (path / name).mkdir(parents=True)
    (path / "PG_VERSION").write_text("15\n")
    (path / "global" / "pg_control").write_bytes(control_file())
    for name in NAMES:
        (path / "pg_wal" / name).write_bytes(SEGMENT)
        (path / "pg_wal" / name).chmod(0o600)
    (path / "pg_wal" / "archive_status" / f"{NAMES[0]}.done").write_text("")
    return path


@contextmanager
def opened(base: Base, diff: Path) -> Iterator[Tree]:
    """A tree as the worker has it."""
    tree = Tree(base, Diff.open(diff, base), owner=ME, log_fd=-1)
    try:
        yield tree
    finally:
        tree.close()


def check(tree: Tree, diff: Path, names: list[str]) -> None:
    """Check the link and what it leads to."""
    entry = tree.lookup(Tree.ROOT, b"pg_wal")
    assert stat.S_ISLNK(entry.mode)
    assert tree.readlink(entry.ino) == os.fsencode(diff / "pg_wal")
    assert sorted(os.listdir(diff / "pg_wal")) == sorted(names)
    assert not (diff / "pg_wal.new").exists()


def test_once_and_for_all(base_dir: Path, tmp_path: Path) -> None:
    base, diff = open_directory(base_dir), tmp_path / "diff"
    with opened(base, diff) as tree:
        assert wal.move_out(tree, base, diff, ME) == 3
        check(tree, diff, [*NAMES, "archive_status"])
        segment = diff / "pg_wal" / NAMES[0]
        assert segment.read_bytes() == SEGMENT
        assert segment.stat().st_mode & 0o777 == 0o600
        assert segment.stat().st_mtime_ns == (base_dir / "pg_wal" / NAMES[0]).stat().st_mtime_ns
        segment.write_bytes(b"newer")
        assert wal.move_out(tree, base, diff, ME) is None
    with opened(base, diff) as tree:
        assert wal.move_out(tree, base, diff, ME) is None
        check(tree, diff, [*NAMES, "archive_status"])
    assert segment.read_bytes() == b"newer"
    base.close()


def test_nothing_to_move(tmp_path: Path) -> None:
    base = EmptyBase(ME)
    with opened(base, tmp_path / "diff") as tree:
        assert wal.move_out(tree, base, tmp_path / "diff", ME) is None
        assert not (tmp_path / "diff" / "pg_wal").exists()
        tree.symlink(Tree.ROOT, b"pg_wal", b"/somewhere", *ME)
        assert wal.move_out(tree, base, tmp_path / "diff", ME) is None


def test_what_initdb_made_inside_moves_too(tmp_path: Path) -> None:
    base, diff = EmptyBase(ME), tmp_path / "diff"
    with opened(base, diff) as tree:
        directory = tree.mkdir(Tree.ROOT, b"pg_wal", 0o700, *ME)
        file = tree.create(directory.ino, b"segment", 0o600, *ME)
        tree.nodes.write(file.ino, 0, SEGMENT)
    with opened(base, diff) as tree:
        assert wal.move_out(tree, base, diff, ME) == 1
        check(tree, diff, ["segment"])
        assert (diff / "pg_wal" / "segment").read_bytes() == SEGMENT
    with opened(base, diff):
        assert not any(files for _, _, files in os.walk(diff / "objects"))


@pytest.mark.expect_log("no file 'pg_wal/")
@pytest.mark.parametrize("is_missing", [True, False])
def test_segment_that_cannot_be_read_is_named(
    base_dir: Path, tmp_path: Path, is_missing: bool
) -> None:
    base, diff = open_directory(base_dir), tmp_path / "diff"
    with opened(base, diff) as tree:
        entry = tree.lookup(Tree.ROOT, b"pg_wal")
        sizes = {name: attr.size for name, attr, _ in tree.readdir(entry.ino, 0)}
        assert sizes[NAMES[1].encode()] == len(SEGMENT)
        if is_missing:
            (base_dir / "pg_wal" / NAMES[1]).unlink()
        else:
            os.truncate(base_dir / "pg_wal" / NAMES[1], 100)
        with pytest.raises(FormatError, match=f"{NAMES[1]} of .* cannot be read"):
            wal.move_out(tree, base, diff, ME)
        assert not (diff / "pg_wal").exists()
    base.close()


class SeededBase(EmptyBase):
    """An empty base whose archive has files for pg_wal."""

    def wal_seed(self) -> list[WalSeed]:
        return [
            WalSeed(b"segment", lambda: BytesIO(b"archived"), 8),
            WalSeed(b"00000002.history", lambda: BytesIO(b"1\t0/0\tx\n"), 8),
        ]


def test_archive_adds_what_is_missing(tmp_path: Path) -> None:
    base, diff = SeededBase(ME), tmp_path / "diff"
    with opened(base, diff) as tree:
        directory = tree.mkdir(Tree.ROOT, b"pg_wal", 0o700, *ME)
        file = tree.create(directory.ino, b"segment", 0o600, *ME)
        tree.nodes.write(file.ino, 0, b"the base's own")
        assert wal.move_out(tree, base, diff, ME) == 2
        check(tree, diff, ["segment", "00000002.history"])
    assert (diff / "pg_wal" / "segment").read_bytes() == b"the base's own"
    assert (diff / "pg_wal" / "00000002.history").stat().st_mode & 0o777 == 0o600


class Crash(BaseException):
    """The end of the process, as far as it can be played in one."""


def steps_of(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the labels of all durable steps of a move."""
    labels: list[str] = []
    monkeypatch.setattr(durable, "on_step", labels.append)
    base = open_directory(base_dir)
    with opened(base, tmp_path / "dry") as tree:
        labels.clear()
        wal.move_out(tree, base, tmp_path / "dry", ME)
        taken = list(labels)
    base.close()
    return taken


def test_crash_at_every_step(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = steps_of(base_dir, tmp_path, monkeypatch)
    assert {"wal:file:fsync", "wal:seed:fsync_dir", "wal:rename"} <= set(labels)
    for at in range(len(labels)):
        left = at

        def crash(_label: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        base, diff = open_directory(base_dir), tmp_path / f"diff{at}"
        monkeypatch.setattr(durable, "on_step", lambda _label: None)
        tree = Tree(base, Diff.open(diff, base), owner=ME, log_fd=-1)
        monkeypatch.setattr(durable, "on_step", crash)
        with pytest.raises(Crash):
            wal.move_out(tree, base, diff, ME)
        monkeypatch.setattr(durable, "on_step", lambda _label: None)
        tree.nodes.close()
        for layer in tree._stack.layers:
            layer.close()
        with opened(base, diff) as tree:
            wal.move_out(tree, base, diff, ME)
            check(tree, diff, [*NAMES, "archive_status"])
            for name in NAMES:
                assert (diff / "pg_wal" / name).read_bytes() == SEGMENT
        base.close()
