"""What a Tree promises beyond what the random machine compares: laziness, lives, errnos."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from conformance.file_machine import PAGE, make_lower, pattern, take_snapshot
from conformance.tree_place import OWNER, TreePlace, open_place
from faulty import Faulty

from pbkfs.backup.base import BaseEntry, Kind
from pbkfs.backup.empty import EmptyBase
from pbkfs.errors import FormatError
from pbkfs.overlay import attributes, contents
from pbkfs.overlay.journal import END_BYTES, is_end
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.tree import RENAME_EXCHANGE, RENAME_NOREPLACE, Attr, Tree

ROOT = Tree.ROOT


@pytest.fixture
def place(memory: Path) -> Iterator[TreePlace]:
    with open_place(memory) as made:
        make_lower(made.lower)
        made.open()
        yield made


def find(place: TreePlace, path: bytes) -> Attr:
    """Look a path up as the kernel does, keeping the lookups."""
    attr = place.tree.getattr(ROOT)
    for name in path.split(b"/"):
        attr = place.tree.lookup(attr.ino, name)
    return attr


def raises(number: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == number)


# --- laziness -------------------------------------------------------------------------------------


def test_mount_lists_no_directory(place: TreePlace) -> None:
    assert place.base.n_scans == 0
    assert place.tree.counters()["inodes"] == 1


def test_replay_lists_only_directories_on_its_way(place: TreePlace) -> None:
    place.driver.rename(b"base/5/16384", b"base/6/moved")
    place.close()
    place.base.n_scans = 0
    place.open()
    assert place.base.n_scans == 4  # the root, base, base/5, base/6


def test_rename_of_a_directory_moves_it_unseen(place: TreePlace) -> None:
    place.driver.rename(b"base", b"global/base")
    assert place.base.n_scans == 2  # the root and global
    assert len(place.journal_records()) < 100
    assert place.driver.read_file(b"global/base/5/PG_VERSION") == pattern(
        *_seed_and_size(b"base/5/PG_VERSION", 3)
    )
    place.driver.rename(b"global/base/5", b"five")
    before = take_snapshot(place.driver)
    place.reopen()
    assert take_snapshot(place.driver) == before
    assert place.driver.stat(b"five/16384").size == 5 * PAGE


def _seed_and_size(path: bytes, size: int) -> tuple[int, int]:
    from conformance.file_machine import hash_seed

    return hash_seed(path.decode()), size


# --- missing names --------------------------------------------------------------------------------


def test_missing_names_are_known_once_a_directory_is_listed(place: TreePlace) -> None:
    nodes = place.tree.nodes
    assert not nodes.is_absent(ROOT, b"missing")
    base = find(place, b"base").ino
    assert nodes.is_absent(ROOT, b"missing")
    assert not nodes.is_absent(ROOT, b"base")
    five = find(place, b"base/5").ino
    assert not nodes.is_absent(five, b"16384")
    place.driver.unlink(b"base/5/16384")
    assert nodes.is_absent(five, b"16384")
    place.driver.mkdir(b"base/5/new", 0o700)
    new = find(place, b"base/5/new").ino
    place.driver.rename(b"base/6", b"base/5/new/6")
    assert not nodes.is_absent(new, b"6")
    assert nodes.is_absent(new, b"7")
    assert nodes.is_absent(base, b"6")


def test_what_is_known_of_a_removed_directory_goes_with_it(place: TreePlace) -> None:
    place.driver.mkdir(b"new", 0o700)
    attr = place.tree.lookup(ROOT, b"new")
    with raises(errno.ENOENT):
        place.tree.lookup(attr.ino, b"name")
    assert place.tree.nodes.is_absent(attr.ino, b"name")
    place.tree.rmdir(ROOT, b"new")
    assert place.tree.nodes.is_absent(attr.ino, b"name")
    place.tree.forget(attr.ino, 1 << 30)
    assert not place.tree.nodes.is_absent(attr.ino, b"name")


# --- reading directories --------------------------------------------------------------------------


def test_directory_can_be_emptied_while_it_is_read(place: TreePlace) -> None:
    """As ``rm -rf`` does: read a few names, remove them, read on."""
    names = {b"f%d" % number for number in range(100)}
    place.driver.mkdir(b"full", 0o700)
    for name in sorted(names):
        place.driver.symlink(b"x", b"full/" + name)
    ino = find(place, b"full").ino
    cookie, seen = 0, set()
    while True:
        batch = []
        for name, _, next_cookie in place.tree.readdir(ino, cookie):
            batch.append(name)
            cookie = next_cookie
            if len(batch) == 7:
                break
        if not batch:
            break
        for name in batch:
            place.tree.unlink(ino, name)
        seen |= set(batch)
    assert seen == names
    assert place.driver.listdir(b"full") == []


def test_reader_sees_each_name_once_while_others_come_and_go(place: TreePlace) -> None:
    place.driver.mkdir(b"full", 0o700)
    stays = {b"stays%d" % number for number in range(50)}
    for name in sorted(stays):
        place.driver.symlink(b"x", b"full/" + name)
    ino = find(place, b"full").ino
    cookie, seen = 0, []
    for number in range(1000):
        entry = next(place.tree.readdir(ino, cookie), None)
        if entry is None:
            break
        seen.append(entry[0])
        cookie = entry[2]
        place.driver.symlink(b"x", b"full/new%d" % number)
        if number:
            place.driver.unlink(b"full/new%d" % (number - 1))
        if len(seen) > 60:
            break
    assert [name for name in seen if name in stays].count(b"stays7") == 1
    assert stays <= set(seen)
    assert len(seen) == len(set(seen))


def test_name_made_anew_while_a_directory_is_read_is_seen_once(place: TreePlace) -> None:
    place.driver.mkdir(b"full", 0o700)
    for name in (b"first", b"again", b"last"):
        place.driver.symlink(b"x", b"full/" + name)
    ino = find(place, b"full").ino
    [(name, _, cookie)] = islice(place.tree.readdir(ino, 0), 1)
    assert name == b"first"
    place.driver.unlink(b"full/again")
    place.driver.symlink(b"x", b"full/again")
    assert [name for name, _, _ in place.tree.readdir(ino, cookie)] == [b"last", b"again"]


class ManyNames(EmptyBase):
    """A base of one directory with ``n_names`` files."""

    def __init__(self, n_names: int) -> None:
        super().__init__(OWNER)
        self.n_names = n_names

    def scandir(self, path: bytes) -> list[BaseEntry]:
        assert path == b""
        return [BaseEntry(b"%d" % i, Kind.FILE, 0o600, 0, 0) for i in range(self.n_names)]


def test_reading_a_large_directory_is_not_quadratic() -> None:
    def read_all(n_names: int) -> float:
        """Read as the kernel does, some names a call; returns the seconds of CPU."""
        names = Namespace(ManyNames(n_names), OWNER, 0)
        begin = time.process_time()
        cookie = n_seen = 0
        while found := list(islice(names.entries(names.root, cookie), 30)):
            n_seen += len(found)
            cookie = found[-1][2]
        assert n_seen == n_names
        return time.process_time() - begin

    read_all(500)
    small = min(read_all(2000) for _ in range(3))
    large = min(read_all(40000) for _ in range(2))
    assert large < 100 * small, "20 times the names should take about 20 times as long"


# --- the lives of inodes --------------------------------------------------------------------------


def test_open_file_without_a_name_goes_on(place: TreePlace) -> None:
    handle = place.driver.open(b"work", os.O_RDWR | os.O_CREAT)
    place.driver.pwrite(handle, b"before", 0)
    place.driver.unlink(b"work")
    place.driver.forget_all()
    place.tree.sync()
    assert place.tree.reap() == 1, "the object is still in use"
    place.driver.pwrite(handle, b" and after", 6)
    assert place.driver.pread(handle, 100, 0) == b"before and after"
    assert place.driver.fstat(handle).nlink == 0
    place.driver.ftruncate(handle, 3)
    assert place.driver.fstat(handle).size == 3
    place.driver.close(handle)
    assert place.tree.reap() == 0
    assert place.object_paths() == []
    with raises(errno.ESTALE):
        place.tree.getattr(2**40)


@pytest.mark.parametrize("path", [b"base/5/16384", b"postgresql.conf"])
def test_open_lower_file_without_a_name_can_be_written(place: TreePlace, path: bytes) -> None:
    size = place.driver.stat(path).size
    assert size is not None
    handle = place.driver.open(path, os.O_RDWR)
    expected = bytearray(place.driver.pread(handle, size, 0))
    place.driver.unlink(path)
    place.driver.forget_all()
    place.driver.pwrite(handle, b"new", 1)
    expected[1:4] = b"new"
    assert place.driver.pread(handle, size, 0) == bytes(expected)
    place.tree.setattr(place.driver._handles[handle], mode=0o640)
    assert place.driver.fstat(handle).mode == 0o640
    place.driver.close(handle)
    place.tree.sync()
    assert place.tree.reap() == 0
    assert place.object_paths() == []
    place.reopen()
    with raises(errno.ENOENT):
        place.driver.stat(path)


def test_object_waits_for_the_record_that_ends_it(place: TreePlace) -> None:
    handle = place.driver.open(b"work", os.O_RDWR | os.O_CREAT)
    place.driver.pwrite(handle, b"content", 0)
    place.driver.fsync(handle)
    place.driver.close(handle)
    place.driver.unlink(b"work")
    place.driver.forget_all()
    assert place.tree.reap() == 1
    place.cut_power()
    assert place.driver.read_file(b"work") == b"content"
    place.driver.unlink(b"work")
    place.driver.forget_all()
    place.tree.sync()
    assert place.tree.reap() == 0
    assert place.object_paths() == []


def test_replaced_file_lives_on_for_who_has_it_open(place: TreePlace) -> None:
    handle = place.driver.open(b"base/5/16385", os.O_RDONLY)
    before = place.driver.pread(handle, PAGE, 0)
    place.driver.rename(b"base/5/16384", b"base/5/16385")
    place.driver.forget_all()
    assert place.driver.pread(handle, PAGE, 0) == before
    assert place.driver.read_file(b"base/5/16385") != before
    place.driver.close(handle)


def test_removed_directory_takes_nothing_new(place: TreePlace) -> None:
    ino = find(place, b"empty").ino
    place.driver.rmdir(b"empty")
    assert place.tree.getattr(ino).nlink == 0
    assert list(place.tree.readdir(ino, 0)) == []
    with raises(errno.ENOENT):
        place.tree.create(ino, b"f", 0o600, *OWNER)
    other = find(place, b"postgresql.conf").ino
    with raises(errno.ENOENT):
        place.tree.link(other, ino, b"f")
    with raises(errno.ENOENT):
        place.tree.rename(ROOT, b"postgresql.conf", ino, b"f")


def test_file_without_a_name_cannot_be_linked(place: TreePlace) -> None:
    ino = find(place, b"postgresql.conf").ino
    place.driver.unlink(b"postgresql.conf")
    with raises(errno.ENOENT):
        place.tree.link(ino, ROOT, b"again")


def test_forgotten_inodes_cost_nothing(place: TreePlace) -> None:
    place.driver.listdir(b"")
    n_inodes = place.tree.counters()["inodes"]
    for number in range(200):
        name = b"t%d" % number
        handle = place.driver.open(name, os.O_RDWR | os.O_CREAT)
        place.driver.pwrite(handle, b"x", 0)
        place.driver.close(handle)
        place.driver.unlink(name)
        place.driver.forget_all()
    place.tree.sync()
    assert place.tree.reap() == 0
    assert place.tree.counters()["inodes"] == n_inodes
    assert place.tree.nodes.counters()["nodes"] == 0


def test_forgotten_lower_file_gives_its_node_back(place: TreePlace) -> None:
    place.driver.read_file(b"base/5/16384")
    assert place.tree.nodes.counters()["nodes"] == 1
    place.driver.forget_all()
    assert place.tree.nodes.counters()["nodes"] == 0
    place.driver.read_file(b"base/5/16384")


def test_page_map_outlives_forgetting(place: TreePlace) -> None:
    handle = place.driver.open(b"base/5/16384", os.O_RDWR)
    place.driver.pwrite(handle, b"n" * PAGE, PAGE)
    place.driver.close(handle)
    place.driver.forget_all()
    assert place.driver.read_file(b"base/5/16384")[PAGE : 2 * PAGE] == b"n" * PAGE


# --- copying up -----------------------------------------------------------------------------------


def disk_bytes(place: TreePlace) -> int:
    return sum(path.stat().st_blocks * 512 for path in place.object_paths())


def test_changed_page_costs_a_page(place: TreePlace) -> None:
    handle = place.driver.open(b"base/5/16384", os.O_RDWR)
    place.driver.pwrite(handle, b"n" * PAGE, 2 * PAGE)
    place.driver.fsync(handle)
    place.driver.close(handle)
    assert disk_bytes(place) == PAGE
    assert place.tree.counters()["copied_up_mapped"] == 1


def test_large_file_that_is_no_relation_is_mapped(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MAX_WHOLE_BYTES", 4 * PAGE)
    before = place.driver.read_file(b"big")
    handle = place.driver.open(b"big", os.O_RDWR)
    place.driver.pwrite(handle, b"x", 4 * PAGE + 10)
    place.driver.close(handle)
    place.reopen()
    expected = before[: 4 * PAGE + 10] + b"x" + before[4 * PAGE + 11 :]
    assert place.driver.read_file(b"big") == expected
    assert disk_bytes(place) < 2 * PAGE


def test_emptying_a_lower_file_copies_nothing(place: TreePlace) -> None:
    place.driver.truncate(b"base/5/16384", 0)
    assert place.tree.counters()["copied_up_bytes"] == 0
    place.driver.truncate(b"base/5/16384", 2 * PAGE)
    place.reopen()
    assert place.driver.read_file(b"base/5/16384") == bytes(2 * PAGE)


def test_size_that_a_file_has_costs_nothing(place: TreePlace) -> None:
    before = place.driver.stat(b"base/5/16384")
    place.driver.truncate(b"base/5/16384", 5 * PAGE)
    assert place.object_paths() == []
    assert place.driver.stat(b"base/5/16384").mtime_ns > before.mtime_ns


def test_opening_for_writing_copies_nothing(place: TreePlace) -> None:
    """Crash recovery opens all files for writing and writes to few."""
    for path in (b"base/5/16384", b"postgresql.conf"):
        place.driver.close(place.driver.open(path, os.O_RDWR))
    assert place.object_paths() == []


def test_copy_has_the_attributes_of_what_it_copies(place: TreePlace) -> None:
    place.driver.chmod(b"base/5/16384", 0o640)
    place.driver.utime(b"base/5/16384", 10**18, 10**18 + 1)
    place.tree.copy_up(find(place, b"base/5/16384").ino)
    [path] = place.object_paths()
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_atime_ns, found.st_mtime_ns) == (10**18, 10**18 + 1)
    assert found.st_size == 5 * PAGE


@pytest.mark.parametrize("path", [b"base/5/16384", b"postgresql.conf", b"base/5/new"])
def test_blocks_do_not_look_sparse(place: TreePlace, path: bytes) -> None:
    """Tools take a file of few blocks for one of holes and skip what they believe to be zeros."""
    handle = place.driver.open(path, os.O_RDWR | os.O_CREAT)
    place.driver.pwrite(handle, b"x" * 4096, 0)
    place.driver.fsync(handle)
    place.driver.close(handle)
    attr = find(place, path)
    assert attr.blocks * 512 >= attr.size


@pytest.mark.expect_log("no object can be made for")
def test_base_that_cannot_be_read_is_an_io_error(place: TreePlace) -> None:
    inode = find(place, b"postgresql.conf").ino
    (place.lower / "postgresql.conf").write_bytes(b"short")
    with raises(errno.EIO):
        place.tree.copy_up(inode)
    assert place.object_paths() == []


@pytest.mark.expect_log("broken on purpose")
def test_damaged_metadata_of_the_base_fails_one_request(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: bytes) -> None:
        raise FormatError("broken on purpose")

    ino = find(place, b"postgresql.conf").ino
    monkeypatch.setattr(place.base, "sources", refuse)
    with raises(errno.EIO):
        place.tree.open(ino)
    monkeypatch.setattr(place.base, "scandir", refuse)
    with raises(errno.EIO):
        place.tree.lookup(ROOT, b"base")
        place.driver.listdir(b"base")
    monkeypatch.undo()
    assert place.driver.read_file(b"postgresql.conf")
    assert place.driver.listdir(b"base")


# --- attributes -----------------------------------------------------------------------------------


def test_root_is_private_until_somebody_says_otherwise(place: TreePlace) -> None:
    assert place.tree.getattr(ROOT).mode == stat.S_IFDIR | 0o700
    place.tree.setattr(ROOT, mode=0o750)
    place.reopen()
    assert place.tree.getattr(ROOT).mode == stat.S_IFDIR | 0o750


def test_base_is_shown_to_belong_to_the_owner(tmp_path: Path) -> None:
    with open_place(tmp_path) as place:
        (place.lower / "file").write_bytes(b"")
        diff = place.open_diff()
        tree = Tree(place.base, diff, owner=(4242, 4343), log_fd=-1)
        for attr in (tree.getattr(ROOT), tree.lookup(ROOT, b"file")):
            assert (attr.uid, attr.gid) == (4242, 4343)
        tree.close()


def test_directory_counts_its_directories(place: TreePlace) -> None:
    assert find(place, b"base").nlink == 4
    place.driver.mkdir(b"base/7", 0o700)
    assert find(place, b"base").nlink == 5
    place.driver.rename(b"base/7", b"global/7")
    assert (find(place, b"base").nlink, find(place, b"global").nlink) == (4, 3)
    place.driver.rename(b"postgresql.conf", b"base/conf")
    place.driver.rename(b"base/conf", b"global/7", RENAME_EXCHANGE)
    assert (find(place, b"base").nlink, find(place, b"global").nlink) == (5, 2)


def test_names_are_counted(place: TreePlace) -> None:
    place.driver.link(b"postgresql.conf", b"base/conf")
    place.driver.link(b"base/conf", b"base/5/conf")
    assert find(place, b"postgresql.conf").nlink == 3
    assert find(place, b"postgresql.conf").ino == find(place, b"base/5/conf").ino
    place.driver.unlink(b"postgresql.conf")
    place.reopen()
    assert find(place, b"base/conf").nlink == 2
    handle = place.driver.open(b"base/conf", os.O_RDWR)
    place.driver.pwrite(handle, b"seen by both", 0)
    place.driver.close(handle)
    assert place.driver.read_file(b"base/5/conf").startswith(b"seen by both")


def test_change_of_a_directory_is_seen_in_its_times(place: TreePlace) -> None:
    for change in (
        lambda: place.driver.mkdir(b"global/d", 0o700),
        lambda: place.driver.rename(b"global/d", b"global/e"),
        lambda: place.driver.rmdir(b"global/e"),
    ):
        ino = find(place, b"global").ino
        place.tree.setattr(ino, mtime_ns=5)
        change()
        assert place.tree.getattr(ino).mtime_ns > 5


def test_set_group_id_is_inherited(place: TreePlace) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs another group")
    made = place.tree.mkdir(ROOT, b"shared", 0o2770, *OWNER)
    place.tree.setattr(made.ino, gid=4343, mode=0o2770)
    assert place.tree.create(made.ino, b"f", 0o600, *OWNER).gid == 4343
    below = place.tree.mkdir(made.ino, b"d", 0o700, *OWNER)
    assert below.gid == 4343
    assert below.mode & stat.S_ISGID


def test_unprivileged_worker_gives_nothing_away(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = find(place, b"postgresql.conf")
    made = place.tree.create(ROOT, b"made", 0o600, *OWNER)
    monkeypatch.setattr(attributes.os, "geteuid", lambda: OWNER[0] or 4242)
    if OWNER[0] == 0:
        place.tree.setattr(made.ino, uid=4242)
    mine = OWNER[0] or 4242
    for ino in (lower.ino, made.ino):
        with raises(errno.EPERM):
            place.tree.setattr(ino, uid=mine + 1)
    assert place.tree.setattr(made.ino, uid=mine).uid == mine
    assert attributes.new_owner(mine + 1, os.getegid())[0] == mine


@pytest.fixture
def as_nobody(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TreePlace]:
    """A place whose worker has no privilege."""
    if os.geteuid() != 0:
        with open_place(memory) as made:
            yield made
        return
    monkeypatch.setattr("conformance.tree_place.OWNER", (65534, 65534))
    os.chown(memory, 65534, 65534)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        with open_place(memory) as made:
            yield made
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("mode", [0o400, 0o444, 0o000, 0o200])
def test_file_that_its_owner_may_not_write_is_written_by_who_made_it(
    as_nobody: TreePlace, mode: int
) -> None:
    """As ``cp -p`` of a private key does; root never sees the difference."""
    place = as_nobody
    (place.lower / "base").mkdir()
    (place.lower / "base/1").write_bytes(pattern(1, 3 * PAGE))
    place.open()
    for path, flags in ((b"made", os.O_CREAT | os.O_EXCL), (b"base/1", 0)):
        handle = place.driver.open(path, os.O_RDWR | flags, mode)
        if not flags:
            place.driver.chmod(path, mode)
        place.driver.pwrite(handle, b"secret", 0)
        place.driver.fsync(handle)
        place.driver.pwrite(handle, b"SECRET", 0)
        assert place.driver.fstat(handle).mode == mode
        place.driver.close(handle)
    place.crash()
    for path in (b"made", b"base/1"):
        assert place.driver.read_file(path).startswith(b"SECRET")
        assert place.driver.stat(path).mode == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owner_changes(place: TreePlace) -> None:
    for path in (b"postgresql.conf", b"base", b"link"):
        place.tree.setattr(find(place, path).ino, uid=4242, gid=4343)
    made = place.tree.create(ROOT, b"made", 0o4755, 4242, 4343)
    assert (made.uid, made.gid, made.mode) == (4242, 4343, stat.S_IFREG | 0o4755)
    place.tree.copy_up(find(place, b"postgresql.conf").ino)
    place.reopen()
    for path in (b"postgresql.conf", b"base", b"link", b"made"):
        attr = find(place, path)
        assert (attr.uid, attr.gid) == (4242, 4343)


def test_object_that_became_a_link_is_not_followed(place: TreePlace) -> None:
    made = place.tree.create(ROOT, b"made", 0o600, *OWNER)
    victim = place.place / "victim"
    victim.write_bytes(b"")
    victim.chmod(0o600)
    [path] = place.object_paths()
    path.unlink()
    path.symlink_to(victim)
    with raises(errno.EIO):
        place.tree.setattr(made.ino, mode=0o777)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    path.unlink()
    path.write_bytes(b"")


# --- errnos that a path never leads to ------------------------------------------------------------


def test_errnos(place: TreePlace) -> None:
    tree = place.tree
    conf, base = find(place, b"postgresql.conf").ino, find(place, b"base").ino
    with raises(errno.ENOTDIR):
        tree.lookup(conf, b"x")
    with raises(errno.ENOENT):
        tree.lookup(ROOT, b"x")
    with raises(errno.ENAMETOOLONG):
        tree.lookup(ROOT, b"x" * 256)
    with raises(errno.EISDIR):
        tree.open(base)
    with raises(errno.EISDIR):
        tree.setattr(base, size=0)
    with raises(errno.EINVAL):
        tree.readlink(conf)
    with raises(errno.EPERM):
        tree.link(base, ROOT, b"again")
    with raises(errno.EISDIR):
        tree.unlink(ROOT, b"base")
    with raises(errno.ENOTDIR):
        tree.rmdir(ROOT, b"postgresql.conf")
    with raises(errno.ENOTEMPTY):
        tree.rmdir(ROOT, b"base")
    with raises(errno.EINVAL):
        tree.rename(ROOT, b"base", base, b"below_itself")
    with raises(errno.EINVAL):
        tree.rename(ROOT, b"base", ROOT, b"x", 8)
    with raises(errno.EEXIST):
        tree.rename(ROOT, b"base", ROOT, b"global", RENAME_NOREPLACE)
    with raises(errno.ENOENT):
        tree.rename(ROOT, b"base", ROOT, b"x", RENAME_EXCHANGE)
    with raises(errno.EEXIST):
        tree.create(ROOT, b"base", 0o600, *OWNER)
    with raises(errno.ENAMETOOLONG):
        tree.symlink(ROOT, b"long", b"x" * 4096, *OWNER)
    for name in (b"", b".", b"..", b"a/b", b"a\0"):
        with raises(errno.EINVAL):
            tree.mkdir(ROOT, name, 0o700, *OWNER)


def test_path_that_fits_no_record_is_too_long(place: TreePlace) -> None:
    parent = ROOT
    with raises(errno.ENAMETOOLONG):
        for _ in range(300):
            parent = place.tree.mkdir(parent, b"d" * 255, 0o700, *OWNER).ino
    place.crash()


# --- files that live for a moment -----------------------------------------------------------------


def make_and_unlink(place: TreePlace, path: bytes, *, is_synced: bool) -> None:
    handle = place.driver.open(path, os.O_RDWR | os.O_CREAT)
    place.driver.pwrite(handle, b"x" * PAGE, 0)
    if is_synced:
        place.driver.fsync(handle)
    place.driver.close(handle)
    place.driver.unlink(path)
    place.driver.forget_all()


@pytest.mark.expect_log("was not durable before a power cut; the file is empty now")
@pytest.mark.parametrize("is_synced", [False, True])
def test_object_of_a_file_that_was_never_durable_goes_at_once(
    place: TreePlace, *, is_synced: bool
) -> None:
    """One that was fsynced has to stay until its removal is durable.

    The power is cut at each byte of what the journal has not synced.
    """
    seen = set()
    for tail in range(80):
        place.tree.sync()
        make_and_unlink(place, b"moment", is_synced=is_synced)
        assert len(place.object_paths()) == is_synced
        place.cut_power(torn_bytes=tail)
        try:
            seen.add(place.driver.read_file(b"moment"))
            place.driver.unlink(b"moment")
        except FileNotFoundError:
            seen.add(None)
        place.reopen()
        assert place.object_paths() == []
    assert seen == ({b"x" * PAGE, None} if is_synced else {b"", None})


def test_object_stays_while_all_that_is_open_is_synced(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor may have been given back, so it would be opened by its path."""
    handle = place.driver.open(b"moment", os.O_RDWR | os.O_CREAT)
    place.driver.close(handle)
    place.driver.unlink(b"moment")
    contents = place.tree._contents
    nodes = contents.nodes
    during = []

    class Nodes:
        def __getattr__(self, name: str) -> object:
            return getattr(nodes, name)

        def sync(self) -> None:
            place.driver.forget_all()
            place.tree.reap()
            during.append(place.object_paths())
            nodes.sync()

    with monkeypatch.context() as patch:
        patch.setattr(contents, "nodes", Nodes())
        contents.sync_open()
    assert len(during[0]) == 1
    place.tree.sync()
    place.tree.reap()
    assert place.object_paths() == []


# --- pg_wal ---------------------------------------------------------------------------------------


def test_wal_moves_out_with_all_that_was_in_it(place: TreePlace) -> None:
    (place.lower / "pg_wal/archive_status").mkdir(parents=True)
    (place.lower / "pg_wal/000000010000000000000001").write_bytes(b"wal")
    place.close()
    place.open()
    handle = place.driver.open(b"pg_wal/000000010000000000000002", os.O_RDWR | os.O_CREAT)
    place.driver.close(handle)
    held = find(place, b"pg_wal/archive_status")
    place.driver.forget_all()
    place.tree.wal_out()
    place.tree.wal_out()
    assert place.driver.readlink(b"pg_wal") == os.fsencode(place.diff_path / "pg_wal")
    assert place.tree.getattr(held.ino).nlink in (0, 2)
    assert find(place, b"pg_wal").size == len(os.fsencode(place.diff_path / "pg_wal"))
    place.tree.sync()
    assert place.tree.reap() == 0
    assert place.object_paths() == []
    place.cut_power()
    assert place.driver.stat(b"pg_wal").kind == "link"
    place.driver.unlink(b"pg_wal")
    place.driver.mkdir(b"pg_wal", 0o700)
    place.reopen()
    assert place.driver.stat(b"pg_wal").kind == "dir"


def test_wal_of_a_layer_is_that_of_the_upper_diff(place: TreePlace) -> None:
    place.driver.mkdir(b"pg_wal", 0o700)
    place.tree.wal_out()
    place.seal()
    assert place.driver.readlink(b"pg_wal") == os.fsencode(place.diff_path / "pg_wal")


# --- the rest -------------------------------------------------------------------------------------


def test_statfs_is_that_of_the_diff(place: TreePlace) -> None:
    assert place.tree.statfs().f_blocks == os.statvfs(place.diff_path).f_blocks


def test_closing_makes_all_durable(place: TreePlace) -> None:
    handle = place.driver.open(b"base/5/16384", os.O_RDWR)
    place.driver.pwrite(handle, b"n" * PAGE, 0)
    place.driver.close(handle)
    place.driver.mkdir(b"made", 0o700)
    place.close()
    place.open()
    assert place.driver.read_file(b"base/5/16384")[:PAGE] == b"n" * PAGE
    assert place.driver.stat(b"made").kind == "dir"
    place.tree.close()
    place.tree.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file system that fails")
@pytest.mark.expect_log("cannot sync object")
@pytest.mark.parametrize("syncfs_from", [0, 2000])
def test_end_fails_where_a_sync_has_failed(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch, syncfs_from: int
) -> None:
    """However many files there are, and also if nothing fails any more."""
    monkeypatch.setattr(contents, "_SYNCFS_FROM", syncfs_from)
    place.close()
    faulty = Faulty(place.live_path / "objects")
    try:
        place.open()
        handle = place.driver.open(b"work", os.O_RDWR | os.O_CREAT)
        place.driver.pwrite(handle, b"content", 0)
        faulty.fail({"op": "fsync", "path": "", "errno": errno.EIO})
        with raises(errno.EIO):
            place.driver.fsync(handle)
        faulty.fail()
        with raises(errno.EIO):
            place.close()
    finally:
        place.drop()
        faulty.close()
    journal = (place.live_path / "journal").read_bytes()
    assert not is_end(journal[-END_BYTES:], len(journal) - END_BYTES)
