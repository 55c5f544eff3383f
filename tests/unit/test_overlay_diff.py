"""A diff directory: made, refused, recovered."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conformance.drivers import OsDriver
from conformance.file_machine import PAGE, pattern
from conformance.tree_place import OWNER, TreePlace, open_place

from pbkfs import durable
from pbkfs.backup.empty import EmptyBase
from pbkfs.errors import BusyError, DiffError, HostError
from pbkfs.overlay import layer as layers
from pbkfs.overlay.diff import Diff, is_free_place, open_layers
from pbkfs.overlay.journal import HEADER_BYTES, encode_frame
from pbkfs.overlay.tree import Tree

RELATION = b"base/5/16384"


@pytest.fixture
def place(memory: Path) -> Iterator[TreePlace]:
    with open_place(memory) as made:
        (made.lower / "base/5").mkdir(parents=True)
        (made.lower / os.fsdecode(RELATION)).write_bytes(pattern(1, 4 * PAGE))
        (made.lower / "conf").write_bytes(b"as it was\n")
        yield made


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def write(place: TreePlace, path: bytes, data: bytes, offset: int = 0, flags: int = 0) -> None:
    handle = place.driver.open(path, os.O_RDWR | flags)
    place.driver.pwrite(handle, data, offset)
    place.driver.close(handle)


# --- making ---------------------------------------------------------------------------------------


def test_new_diff(tmp_path: Path) -> None:
    path = tmp_path / "diff"
    Diff.open(path, EmptyBase(OWNER)).close()
    assert path.stat().st_mode & 0o7777 == 0o711
    assert {p.name: p.stat().st_mode & 0o7777 for p in path.iterdir()} == {
        "objects": 0o700,
        "journal": 0o600,
        "superblock.json": 0o600,
    }
    assert (path / "journal").stat().st_size == HEADER_BYTES


def test_new_diff_is_small(place: TreePlace) -> None:
    """An idle branch must not cost a directory for each of 256 object groups."""
    place.open()
    write(place, b"conf", b"x")
    place.close()
    n_blocks = sum(p.lstat().st_blocks for p in place.diff_path.rglob("*"))
    assert n_blocks * 512 < 200_000


def test_place_of_a_diff_may_hold_what_a_mount_puts_there(tmp_path: Path) -> None:
    for name in ("lock", "binding.json"):
        (tmp_path / name).touch()
    (tmp_path / "log").mkdir()
    assert is_free_place(tmp_path)
    Diff.open(tmp_path, EmptyBase(OWNER)).close()


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"...")
    assert not is_free_place(tmp_path)
    with pytest.raises(DiffError, match="not empty and is no diff") as raised:
        Diff.open(tmp_path, EmptyBase(OWNER))
    assert raised.value.hint
    assert contents(tmp_path) == {"photo.jpg": b"..."}


def test_diff_without_superblock_is_no_free_place(place: TreePlace) -> None:
    place.open()
    write(place, b"conf", b"x")
    place.close()
    (place.diff_path / "superblock.json").unlink()
    before = contents(place.diff_path)
    with pytest.raises(DiffError, match=r"no superblock.json"):
        place.open()
    assert contents(place.diff_path) == before


def test_file_instead_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "diff").write_bytes(b"")
    with pytest.raises(DiffError, match="not a directory"):
        Diff.open(tmp_path / "diff", EmptyBase(OWNER))


class Killed(BaseException):
    """Stands for the end of the process at a labelled step."""


def steps_of(action: object, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    labels: list[str] = []
    monkeypatch.setattr(durable, "on_step", labels.append)
    action()  # type: ignore[operator]
    return labels


def test_superblock_that_is_found_is_durable_before_it_is_used(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch to another layer that died before its fsync must not be lost under new data."""
    Diff.open(memory / "diff", EmptyBase(OWNER)).close()
    synced: list[Path] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
    )
    Diff.open(memory / "diff", EmptyBase(OWNER)).close()
    assert synced[:1] == [memory / "diff"]


def test_making_can_be_cut_short_anywhere(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = EmptyBase(OWNER)
    labels = steps_of(lambda: Diff.open(memory / "whole", base).close(), monkeypatch)
    assert len(labels) > 6
    for count in range(len(labels)):
        left = count

        def kill(label: str) -> None:
            nonlocal left
            if left == 0:
                raise Killed(label)
            left -= 1

        path = memory / f"cut{count}"
        monkeypatch.setattr(durable, "on_step", kill)
        with pytest.raises(Killed):
            Diff.open(path, base)
        monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert not path.exists() or (path / "superblock.json").exists() or is_free_place(path)
        Diff.open(path, base).close()
        assert sorted(os.listdir(path)) == ["journal", "objects", "superblock.json"]


# --- refusing -------------------------------------------------------------------------------------


def edit_superblock(place: TreePlace, **changes: object) -> None:
    path = place.diff_path / "superblock.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.fixture
def used(place: TreePlace) -> TreePlace:
    """A place whose diff has a whole and a mapped copy and a new file, all durable."""
    place.open()
    write(place, b"conf", b"changed\n")
    write(place, RELATION, pattern(2, PAGE), PAGE)
    write(place, b"new", b"new content", flags=os.O_CREAT)
    place.close()
    return place


def refused(place: TreePlace, message: str) -> DiffError:
    before = contents(place.diff_path)
    with pytest.raises(DiffError, match=message) as raised:
        place.open()
    assert raised.value.hint
    assert contents(place.diff_path) == before, "a refused diff has to stay as it is"
    return raised.value


def test_diff_of_another_base_is_refused(used: TreePlace) -> None:
    used.base.identity = {"kind": "directory", "path": "/elsewhere"}
    assert "/elsewhere" in refused(used, "belongs to").message


def test_diff_of_another_version_is_refused(used: TreePlace) -> None:
    edit_superblock(used, format_version=99)
    refused(used, "format version 99")


def test_diff_with_unknown_feature_is_refused(used: TreePlace) -> None:
    edit_superblock(used, features=["compressed"])
    refused(used, "compressed")


@pytest.mark.parametrize("name", ["journal", "objects"])
def test_diff_without_a_part_is_refused(used: TreePlace, name: str) -> None:
    os.rename(used.diff_path / name, used.place / "aside")
    refused(used, f"has no {name}")


def test_journal_that_is_a_link_is_refused(used: TreePlace) -> None:
    os.rename(used.diff_path / "journal", used.place / "aside")
    (used.diff_path / "journal").symlink_to(used.place / "aside")
    refused(used, "symbolic link")


@pytest.mark.parametrize("damage", [b"XXXXXXXX", b"PBKFSJNL\2"])
def test_damaged_journal_header_is_refused(used: TreePlace, damage: bytes) -> None:
    with (used.diff_path / "journal").open("r+b") as journal:
        journal.write(damage)
    refused(used, "can't be read")


def test_journal_of_another_diff_is_refused(used: TreePlace, tmp_path: Path) -> None:
    Diff.open(tmp_path / "other", used.base).close()
    shutil.copy(tmp_path / "other/journal", used.diff_path / "journal")
    refused(used, "another diff")


@pytest.mark.parametrize(
    "record",
    [
        b"\x14\4\0gone",  # REMOVE of what is not there
        b"\x10" + bytes(20) + b"\4\0conf",  # MKDIR of what is there
        b"\x12" + struct.pack("<QB", 99, 0) + b"\4\0conf",  # a second COPY_UP
        b"\x63",
    ],
)
def test_record_that_does_not_fit_is_refused(used: TreePlace, record: bytes) -> None:
    with (used.diff_path / "journal").open("ab") as journal:
        journal.write(encode_frame(record))
    refused(used, r"record 6, .*")


@pytest.mark.parametrize("path", ["conf", os.fsdecode(RELATION)])
def test_missing_object_of_a_copy_is_refused(used: TreePlace, path: str) -> None:
    tree = used.open()
    object_id = tree._namespace.resolve(path.encode()).pieces[0].object_id  # type: ignore[attr-defined]
    used.close()
    (used.diff_path / f"objects/{object_id & 255:02x}/{object_id:x}").unlink()
    error = refused(used, "is missing")
    assert path in error.message


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, "written"), (errno.ENOSPC, "space"), (errno.EACCES, "user")],
)
def test_trouble_of_the_host_is_named(
    used: TreePlace, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def refuse(_: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable, "on_step", refuse)
    with pytest.raises(HostError, match=str(used.diff_path)) as raised:
        used.open()
    assert raised.value.hint is not None
    assert hint in raised.value.hint


def object_path_of(used: TreePlace, name: bytes) -> Path:
    file = used.tree._namespace.resolve(name)
    object_id = file.pieces[0].object_id  # type: ignore[attr-defined]
    return used.diff_path / f"objects/{object_id & 255:02x}/{object_id:x}"


def make_fresh(used: TreePlace) -> Path:
    """Make a file whose record is durable, and die; returns its object."""
    used.open()
    write(used, b"fresh", b"content", flags=os.O_CREAT)
    used.tree.sync()
    path = object_path_of(used, b"fresh")
    used.drop()
    return path


# --- recovering -----------------------------------------------------------------------------------


def test_torn_record_is_cut_off(used: TreePlace) -> None:
    journal = used.diff_path / "journal"
    good = journal.read_bytes()
    journal.write_bytes(good + encode_frame(b"\x14\4\0conf")[:-1])
    used.open()
    assert used.driver.read_file(b"conf") == b"changed\ns\n"
    assert journal.read_bytes().startswith(good)


@pytest.mark.expect_log("not durable before a power cut")
def test_object_of_a_new_file_that_a_power_cut_took_is_made_again(used: TreePlace) -> None:
    make_fresh(used).unlink()
    used.open()
    found = used.driver.stat(b"fresh")
    assert (found.size, found.mode) == (0, 0o600)
    write(used, b"fresh", b"again")
    used.reopen()
    assert used.driver.read_file(b"fresh") == b"again"


@pytest.mark.parametrize("ends", ["well", "after a mark", "after a mark and more"])
def test_object_that_was_durable_is_missed(used: TreePlace, ends: str) -> None:
    """A file that was synced must not become an empty one quietly."""
    if ends == "well":
        path = make_fresh(used)
        used.open()
        used.close()
    else:
        tree = used.open()
        write(used, b"fresh", b"content", flags=os.O_CREAT)
        moment = tree.now()
        tree.sync()
        tree.mark(moment)
        if ends == "after a mark and more":
            write(used, b"later", b"content", flags=os.O_CREAT)
        path = object_path_of(used, b"fresh")
        used.drop()
    path.unlink()
    with pytest.raises(DiffError, match=r"is missing \(file 'fresh'\)"):
        used.open()


@pytest.mark.expect_log("not durable before a power cut")
def test_lost_object_that_is_half_made_is_made_again(used: TreePlace) -> None:
    """The power cut took the rename only, or a crash came while the object was made again."""
    path = make_fresh(used)
    path.rename(f"{path}.tmp")
    used.open()
    assert used.driver.read_file(b"fresh") == b""
    assert not path.with_name(f"{path.name}.tmp").exists()


def test_orphans_and_leftovers_go(used: TreePlace) -> None:
    objects = used.diff_path / "objects"
    there = used.object_paths()
    for name in ("05/105", "06/6.tmp", "05/README", "05/106", "ff"):
        (objects / name).parent.mkdir(exist_ok=True)
        (objects / name).write_bytes(b"left")
    used.open()
    assert used.object_paths() == sorted(
        # Neither the name of an object nor of one being made: not ours to remove.
        [*there, objects / "05/106", objects / "05/README", objects / "ff"]
    )


# A worker dies and no other one takes over, on a kernel that goes on: what is in the page cache
# need not be on the disk, or get there, whatever a later fsync says.


def test_page_that_only_a_page_cache_had_is_not_believed(place: TreePlace) -> None:
    """Its write-back may have failed, or the file system may have been gone in between."""
    place.open()
    write(place, RELATION, pattern(2, PAGE), PAGE)
    place.tree.sync()  # its record is durable, the page is not
    place.kill()
    assert place.driver.read_file(RELATION) == pattern(1, 4 * PAGE)
    place.reopen()
    assert place.driver.read_file(RELATION) == pattern(1, 4 * PAGE)


def test_journal_of_a_dead_worker_is_written_anew(used: TreePlace) -> None:
    """An fdatasync of the old file may have failed: nothing would write its pages again."""
    journal = used.diff_path / "journal"
    used.open()
    used.driver.mkdir(b"made", 0o700)
    used.drop()
    before, ino = journal.read_bytes(), journal.stat().st_ino
    used.open()
    assert journal.stat().st_ino != ino
    assert journal.read_bytes().startswith(before)
    assert used.driver.stat(b"made").kind == "dir"
    used.close()
    ino = journal.stat().st_ino
    used.open()  # it ended well: all of it was durable
    assert journal.stat().st_ino == ino


def test_it_is_secured_before_anything_is_unlinked(
    used: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    (used.diff_path / "objects/05").mkdir(exist_ok=True)
    (used.diff_path / "objects/05/105").touch()
    used.open()
    used.drop()
    labels: list[str] = []
    monkeypatch.setattr(durable, "on_step", labels.append)
    (used.diff_path / "objects/05/105").touch()
    used.open()
    assert labels.index("recover:journal:fsync_dir") < labels.index("reap:object:unlink")


@pytest.mark.expect_log("no room to copy the journal")
def test_no_room_for_a_copy_of_the_journal(
    used: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is to make room has to be able to mount."""
    used.open()
    used.driver.mkdir(b"made", 0o700)
    used.drop()

    def fail(_fd: int, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "write_all", fail)
    used.open()
    monkeypatch.undo()
    assert used.driver.stat(b"made").kind == "dir"
    assert sorted(os.listdir(used.diff_path)) == ["journal", "objects", "superblock.json"]
    used.reopen()
    assert used.driver.stat(b"made").kind == "dir"


@pytest.mark.expect_log("the end of the journal is not marked")
def test_end_that_could_not_be_marked_is_not_marked(
    used: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    used.open()
    used.driver.mkdir(b"made", 0o700)
    n_marks = 0

    def fail_at_second(label: str) -> None:
        nonlocal n_marks
        n_marks += label == "journal:end:append"
        if n_marks == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, "on_step", fail_at_second)
    used.close()
    monkeypatch.undo()
    ino = (used.diff_path / "journal").stat().st_ino
    used.open()
    assert (used.diff_path / "journal").stat().st_ino != ino
    assert used.driver.stat(b"made").kind == "dir"


def test_two_heads_do_not_write_to_one_layer(place: TreePlace) -> None:
    """A copy of a diff names the live layer of the original, if that was ever sealed."""
    place.open()
    place.seal_live()
    place.close()
    copy = place.place / "copy"
    shutil.copytree(place.diff_path, copy)
    place.open()
    with pytest.raises(BusyError, match="is written to by another mount"), place.opened(copy):
        pass
    place.driver.mkdir(b"made", 0o700)
    place.reopen()
    assert place.driver.stat(b"made").kind == "dir"


def test_number_of_a_lost_object_is_not_used_again(used: TreePlace) -> None:
    """Page records of a dead object must never count for a new one."""
    used.open()
    used.driver.unlink(RELATION)
    used.close()
    highest = max(int(path.name, 16) for path in used.object_paths())
    used.open()
    write(used, b"next", b"x", flags=os.O_CREAT)
    assert max(int(path.name, 16) for path in used.object_paths()) > highest
    assert used.tree._stack.live.objects.next_id > 3


def test_pages_of_a_dead_worker_become_durable(place: TreePlace) -> None:
    """A page that only the page cache vouched for is synced and recorded at once."""
    place.open()
    write(place, RELATION, pattern(2, PAGE), PAGE)
    place.crash()
    place.cut_power()
    expected = bytearray(pattern(1, 4 * PAGE))
    expected[PAGE : 2 * PAGE] = pattern(2, PAGE)
    assert place.driver.read_file(RELATION) == bytes(expected)


def test_page_that_was_not_synced_reads_as_its_lower_version(place: TreePlace) -> None:
    place.open()
    write(place, RELATION, pattern(2, PAGE), PAGE)
    place.tree.sync()  # the names, and the copy-up among them, but no file
    place.cut_power()
    assert place.driver.read_file(RELATION) == pattern(1, 4 * PAGE)


def test_size_of_a_copy_is_durable_before_its_record(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves the record and an object of no size: an empty relation."""
    place.open()
    labels: list[str] = []
    monkeypatch.setattr(durable, "on_step", labels.append)
    write(place, RELATION, pattern(2, PAGE), PAGE)
    order = [
        labels.index(name)
        for name in (
            "copy_up:object:create",
            "copy_up:object:fsync",
            "copy_up:object:rename",
            "copy_up:directory:fsync",
            "journal:copy_up:append",
        )
    ]
    assert order == sorted(order)


def test_names_are_durable_together_with_their_objects(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that a sync made durable must not lead to an object that a power cut took."""
    place.open()
    labels: list[str] = []
    monkeypatch.setattr(durable, "on_step", labels.append)
    write(place, b"new", b"x", flags=os.O_CREAT)
    assert labels.index("objects:directory:fsync") < labels.index("create:object:create")
    place.tree.sync()
    assert labels.index("journal:create:append") < labels.index("sync:objects:fsync")
    assert labels.index("sync:objects:fsync") < labels.index("journal:sync")
    labels.clear()
    place.tree.sync()
    assert labels == ["journal:sync"]


@pytest.mark.parametrize("size", [PAGE, PAGE + 100, 0])
def test_truncation_without_its_record_is_completed(place: TreePlace, size: int) -> None:
    """A worker that died between the truncation of the object and the LIMIT record."""
    place.open()
    write(place, RELATION, pattern(2, 10), 3 * PAGE)
    place.close()
    [path] = place.object_paths()
    os.truncate(path, size)
    place.open()
    assert place.driver.read_file(RELATION) == pattern(1, size)
    place.crash()
    place.driver.truncate(RELATION, 4 * PAGE)
    place.reopen()
    expected = pattern(1, size).ljust(4 * PAGE, b"\0")
    assert place.driver.read_file(RELATION) == expected, "old content came back from below"


@pytest.mark.parametrize("size", [PAGE, PAGE + 100, 0])
def test_growth_waits_for_a_completed_truncation(place: TreePlace, size: int) -> None:
    """What the mount recorded of it is not known to be durable when the file grows."""
    place.open()
    write(place, RELATION, pattern(2, 10), 3 * PAGE)
    place.close()
    [path] = place.object_paths()
    os.truncate(path, size)
    place.open()
    place.driver.truncate(RELATION, 3 * PAGE)
    place.cut_power()
    expected = pattern(1, size).ljust(3 * PAGE, b"\0")
    assert place.driver.read_file(RELATION) == expected, "old content came back from below"


def test_cut_inside_of_the_last_block_is_completed_for_the_layers_above(place: TreePlace) -> None:
    """No limit falls then, and nobody opens the file before it is sealed."""
    place.open()
    handle = place.driver.open(RELATION, os.O_RDWR)
    place.driver.ftruncate(handle, 3 * PAGE)
    place.driver.fsync(handle)
    size = 2 * PAGE + PAGE // 2
    place.driver.ftruncate(handle, size)
    place.cut_power()
    place.seal_live()
    handle = place.driver.open(RELATION, os.O_RDWR)
    place.driver.ftruncate(handle, 4 * PAGE)
    place.driver.fsync(handle)
    place.driver.close(handle)
    expected = pattern(1, size).ljust(4 * PAGE, b"\0")
    assert place.driver.read_file(RELATION) == expected
    place.seal_live()
    place.reopen()
    assert place.driver.read_file(RELATION) == expected, "old content came back from below"


def test_journal_is_rewritten_when_most_of_it_is_dead(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "COMPACTION_BYTES", 10_000)
    place.open()
    handle = place.driver.open(RELATION, os.O_RDWR)
    for round_number in range(300):
        place.driver.pwrite(handle, pattern(round_number, 16), PAGE * (round_number % 4))
        write(place, b"t%d" % round_number, b"x", flags=os.O_CREAT)
        place.driver.unlink(b"t%d" % round_number)
        place.driver.forget_all()
    place.driver.close(handle)
    place.driver.mkdir(b"kept", 0o700)
    expected = {path: place.driver.read_file(path) for path in (RELATION, b"conf")}
    place.tree.sync()
    place.tree.reap()
    place.close()
    before = (place.diff_path / "journal").stat().st_size
    place.open()
    place.close()
    after = (place.diff_path / "journal").stat().st_size
    assert before > 10_000
    assert after < 1000
    place.open()
    assert {path: place.driver.read_file(path) for path in expected} == expected
    assert sorted(place.driver.listdir(b"")) == [b"base", b"conf", b"kept"]


def test_live_pages_survive_a_rewrite_of_the_journal(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewritten journal calls them durable, so they have to be, also after a power cut."""
    monkeypatch.setattr(layers, "COMPACTION_BYTES", 4000)
    place.open()
    write(place, RELATION, pattern(2, 3 * PAGE))
    for number in range(200):
        write(place, b"t%d" % number, b"", flags=os.O_CREAT)
        place.driver.unlink(b"t%d" % number)
        place.driver.forget_all()
    place.crash()
    assert place.tree.counters()["journal_bytes"] < 1000
    place.cut_power()
    assert place.driver.read_file(RELATION)[: 3 * PAGE] == pattern(2, 3 * PAGE)


def test_moved_diff_is_the_same(used: TreePlace) -> None:
    used.open()
    used.tree.mkdir(Tree.ROOT, b"pg_wal", 0o700, *OWNER)
    used.tree.wal_out()
    assert used.driver.readlink(b"pg_wal") == os.fsencode(used.diff_path / "pg_wal")
    used.close()
    os.rename(used.diff_path, used.place / "moved")
    used.diff_path = used.place / "moved"
    used.open()
    assert used.driver.readlink(b"pg_wal") == os.fsencode(used.place / "moved/pg_wal")
    assert used.driver.read_file(b"new") == b"new content"


# --- layers ---------------------------------------------------------------------------------------


def test_sealed_layer_is_never_changed(used: TreePlace) -> None:
    used.open()
    used.seal()
    layer = Path(used.layers[0].path)
    before = contents(layer)
    write(used, b"conf", b"upper")
    used.driver.unlink(b"new")
    write(used, RELATION, pattern(3, PAGE))
    used.reopen()
    assert used.driver.read_file(b"conf").startswith(b"upper")
    assert used.driver.read_file(RELATION) == (
        pattern(3, PAGE) + pattern(2, PAGE) + pattern(1, 4 * PAGE)[2 * PAGE :]
    )
    assert b"new" not in used.driver.listdir(b"")
    assert contents(layer) == before


def test_truncation_in_a_layer_holds_above_it(place: TreePlace) -> None:
    """What was cut off in a layer never comes back from the base, wherever the file grew again."""
    place.open()
    write(place, RELATION, pattern(2, 10), 0)
    place.driver.truncate(RELATION, PAGE)
    place.driver.truncate(RELATION, 4 * PAGE)
    place.seal()
    expected = pattern(2, 10) + pattern(1, PAGE)[10:] + bytes(3 * PAGE)
    assert place.driver.read_file(RELATION) == expected
    write(place, RELATION, b"x", 2 * PAGE)
    expected = expected[: 2 * PAGE] + b"x" + expected[2 * PAGE + 1 :]
    place.seal()
    assert place.driver.read_file(RELATION) == expected


def test_missing_layer_is_named(used: TreePlace) -> None:
    used.open()
    used.seal()
    used.close()
    layer = used.layers[0].path
    os.rename(layer, used.place / "aside")
    with pytest.raises(DiffError, match=f"sealed layer {layer} is missing"):
        used.open()


def test_layer_in_the_place_of_another_is_refused(used: TreePlace) -> None:
    used.open()
    used.seal()
    used.close()
    shutil.rmtree(used.layers[0].path)
    Diff.open(Path(used.layers[0].path), used.base).close()
    with pytest.raises(DiffError, match="journal belongs to another"):
        used.open()


def test_missing_object_of_a_layer_is_named(used: TreePlace) -> None:
    used.open()
    used.seal()
    used.close()
    next(p for p in Path(used.layers[0].path).rglob("objects/*/*") if p.is_file()).unlink()
    with pytest.raises(DiffError, match="is missing"):
        used.open()


def test_layers_of_another_order_are_refused(used: TreePlace) -> None:
    used.open()
    used.seal()
    used.seal()
    used.close()
    writable = used.open_diff()
    layers = open_layers(writable)
    with pytest.raises(DiffError, match="lies on the layers"):
        Tree(used.base, writable, list(reversed(layers)), owner=OWNER, log_fd=-1)


def test_descriptors_are_given_back(used: TreePlace) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        used.open()
        assert OsDriver(used.lower).listdir(b"")
        used.close()
    (used.diff_path / "journal").write_bytes(b"")
    with pytest.raises(DiffError):
        used.open()
    assert len(os.listdir("/proc/self/fd")) == before
