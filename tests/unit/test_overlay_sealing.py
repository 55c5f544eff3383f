"""Sealing a tree in use: what it shows, what its children show, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.drivers import TreeDriver
from conformance.file_machine import PAGE, Snapshot, make_lower, take_snapshot
from conformance.tree_place import TreePlace, open_place
from unit.test_overlay_faults import Killed, stop_at

from pbkfs import durable
from pbkfs.errors import HostError
from pbkfs.overlay import wal_copy
from pbkfs.overlay.check import check_diff
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.sealing import BrokenSealError, Child
from pbkfs.overlay.superblock import read_superblock
from pbkfs.overlay.wal_copy import WalCopy, WalStart

BIG = b"base/5/16384"
OTHER = b"base/5/16385"
SMALL = b"postgresql.conf"


@pytest.fixture
def place(memory: Path) -> Iterator[TreePlace]:
    """An open tree with lower files, of which some were changed."""
    with made_place(memory) as made:
        yield made


@contextmanager
def made_place(path: Path) -> Iterator[TreePlace]:
    with open_place(path) as made:
        make_lower(made.lower)
        made.open()
        write(made, BIG, PAGE + 100, b"one")
        write(made, SMALL, 10, b"two")
        write(made, b"new", 0, b"three", os.O_CREAT)
        made.driver.truncate(OTHER, PAGE + 5)
        made.driver.rename(b"base/6/16384", b"base/6/moved")
        made.driver.unlink(b"global/1262")
        made.driver.chmod(b"pg_xact", 0o750)
        yield made


def write(place: TreePlace, path: bytes, offset: int, data: bytes, flags: int = 0) -> None:
    handle = place.driver.open(path, os.O_RDWR | flags)
    place.driver.pwrite(handle, data, offset)
    place.driver.close(handle)


def show(place: TreePlace) -> Snapshot:
    return normal(take_snapshot(place.driver), place.diff_path)


def normal(found: Snapshot, diff: Path) -> Snapshot:
    wal = os.fsencode(diff / "pg_wal")
    return {
        path: replace(entry, target=b"DIFF/pg_wal", size=None) if entry.target == wal else entry
        for path, entry in found.items()
    }


def show_head(place: TreePlace, diff_path: Path) -> Snapshot:
    with place.opened(diff_path) as tree:
        return normal(take_snapshot(TreeDriver(tree)), diff_path)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_source_and_child_show_what_was_sealed(place: TreePlace) -> None:
    before = show(place)
    child = place.place / "child"
    sealed = place.seal_live(child)
    assert show(place) == before
    assert sealed.layer.path == str(place.diff_path)
    assert sealed.gate_ns > 0
    assert sealed.wal_bytes == 0
    place.driver.forget_all()  # the native half forgets, too
    place.tree.nodes.drop_indexes()
    assert show(place) == before
    assert show_head(place, child) == before
    write(place, BIG, 0, b"after" * PAGE)
    write(place, b"new", 2, b"after")
    place.driver.unlink(SMALL)
    after = show(place)
    assert after != before
    assert show_head(place, child) == before
    place.reopen()
    assert show(place) == after
    for diff in (place.diff_path, child):
        place.close()
        report = check_diff(diff, place.base)
        assert report.is_clean, report.findings


def test_sealed_layer_is_never_written_to_again(place: TreePlace) -> None:
    handle = place.driver.open(BIG, os.O_RDWR)
    gone = place.driver.open(b"new", os.O_RDWR)
    place.seal_live()
    layer = place.diff_path
    before = {name: files_of(layer / name) for name in ("objects",)}
    journal = (layer / "journal").read_bytes()
    place.driver.pwrite(handle, b"x" * 3 * PAGE, 50)
    place.driver.ftruncate(handle, 2 * PAGE + 7)
    place.driver.ftruncate(handle, 9 * PAGE)
    place.driver.fallocate(handle, 3, 0, PAGE)
    place.driver.fsync(handle)
    place.driver.chmod(SMALL, 0o640)
    place.driver.utime(OTHER, 10**18, 10**18)
    place.driver.rename(SMALL, b"base/renamed")
    place.driver.truncate(OTHER, 0)
    place.driver.link(b"new", b"again")
    place.driver.unlink(b"new")
    place.driver.pwrite(gone, b"y" * 100, 0)
    for each in (handle, gone):
        place.driver.close(each)
    place.tree.sync()
    place.tree.reap()
    after = show(place)
    place.reopen()
    assert show(place) == after
    assert {name: files_of(layer / name) for name in ("objects",)} == before
    assert (layer / "journal").read_bytes() == journal


def test_open_files_without_a_name_live_on(place: TreePlace) -> None:
    """Their objects stay for as long as the files are open, and then go, sealed or not."""
    old = place.driver.open(b"new", os.O_RDWR)
    big = place.driver.open(BIG, os.O_RDWR)
    content = place.driver.pread(big, 10 * PAGE, 0)
    place.driver.unlink(b"new")
    place.driver.unlink(BIG)
    n_objects = len(place.object_paths())
    place.seal_live()
    layer = place.diff_path / "objects"
    place.tree.reap()
    assert len([p for p in layer.rglob("*") if p.is_file()]) == n_objects
    assert place.driver.pread(old, 100, 0) == b"three"
    assert place.driver.pread(big, 10 * PAGE, 0) == content
    place.driver.pwrite(big, b"more", PAGE)
    place.driver.pwrite(old, b"T", 0)
    place.tree.nodes.drop_indexes()
    assert place.driver.pread(old, 100, 0) == b"Three"
    assert place.driver.pread(big, 10 * PAGE, 0) == content[:PAGE] + b"more" + content[PAGE + 4 :]
    for handle in (old, big):
        place.driver.close(handle)
    place.driver.forget_all()
    place.tree.sync()
    assert place.tree.reap() == 0
    assert len([p for p in layer.rglob("*") if p.is_file()]) == n_objects - 2
    assert place.object_paths() == []


def test_seals_upon_seals(place: TreePlace) -> None:
    """Five layers, with pages of a file in each, and a child of each."""
    handle = place.driver.open(BIG, os.O_RDWR)
    seen: list[tuple[Path, Snapshot]] = []
    for number in range(5):
        place.driver.pwrite(handle, b"%d" % number * 10, number * PAGE + 5)
        if number == 3:
            place.driver.ftruncate(handle, 2 * PAGE + 1)
        write(place, b"file%d" % number, 0, b"%d" % number, os.O_CREAT)
        child = place.place / f"child{number}"
        seen.append((child, show(place)))
        place.seal_live(child)
        assert show(place) == seen[-1][1]
    assert place.tree.counters()["layers"] == 5
    place.driver.close(handle)
    place.reopen()
    assert show(place) == seen[-1][1]
    for child, expected in seen:
        assert show_head(place, child) == expected
    # A child is a source like any other.
    with place.opened(seen[2][0]) as tree:
        TreeDriver(tree).unlink(b"file1")
        tree.seal(place.place / "grandchild.source")
        after = normal(take_snapshot(TreeDriver(tree)), seen[2][0])
    assert show_head(place, seen[2][0]) == after
    assert show(place) == seen[-1][1]


def test_hydrated_and_whole_files_are_sealed_with_what_they_hold(place: TreePlace) -> None:
    for _ in place.tree.hydration.survey():
        pass
    while (step := place.tree.hydration.next_step(2 * PAGE)) is not None:
        step.run()
        place.tree.hydration.finish(step)
    before = show(place)
    place.seal_live()
    assert place.tree.hydration.n_files == 0
    (place.lower / os.fsdecode(BIG)).write_bytes(b"")  # nothing comes from there any more
    assert show(place) == before
    place.reopen()
    assert show(place) == before


def test_diff_can_be_moved_with_the_layer_inside_of_it(place: TreePlace) -> None:
    before = show(place)
    place.seal_live()
    place.close()
    assert read_superblock(place.diff_path).layers[0].path == "."
    moved = place.place / "moved"
    os.rename(place.diff_path, moved)
    assert show_head(place, moved) == before


def test_paths_in_use_are_refused(place: TreePlace) -> None:
    before = sorted(os.listdir(place.place))
    for live, child in (("diff1", None), ("new", "lower"), ("new", "diff1")):
        with pytest.raises(FileExistsError):
            place.tree.seal(
                place.place / live,
                None if child is None else sealing_child(place, child),
            )
    assert sorted(os.listdir(place.place)) == before


def sealing_child(place: TreePlace, name: str) -> Child:
    return Child(place.place / name, place.place / f"{name}.live")


# --- failures and crashes -------------------------------------------------------------------------


def test_failed_step_leaves_all_as_it_was(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one behind the switch, after which the process must not go on."""
    before = show(place)
    names = sorted(os.listdir(place.place))
    uuid = read_superblock(place.diff_path).live_id
    made: list[Layer] = []
    make = Layer.make
    monkeypatch.setattr(
        Layer, "make", lambda *args, **kwargs: (made.append(make(*args, **kwargs)), made[-1])[1]
    )
    step = 0
    while True:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(durable, "on_step", stop_at(step, full))
        try:
            place.tree.seal(place.place / "live", sealing_child(place, "child"))
        except (OSError, HostError) as error:
            assert full in (error, error.__cause__)  # noqa: PT017 - one day none fails
        except BrokenSealError:
            break
        finally:
            monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert show(place) == before, f"step {step}"
        assert sorted(os.listdir(place.place)) == names, f"step {step}"
        assert read_superblock(place.diff_path).live_id == uuid
        write(place, b"new", 0, b"three")  # the gate is open again
        step += 1
    assert step > 10
    for layer in made:
        layer.close()  # as the end of the process does
    place.kill()
    assert show(place) == before
    assert place.live_path == place.place / "live"


def test_child_that_cannot_be_finished_leaves_a_sealed_source(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = show(place)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(label: str) -> None:
        if label == "seal:child:rename":
            raise full

    monkeypatch.setattr(durable, "on_step", fail)
    with pytest.raises(OSError, match="No space"):
        place.tree.seal(place.place / "live", sealing_child(place, "child"))
    monkeypatch.setattr(durable, "on_step", lambda _: None)
    assert place.live_path == place.place / "live"
    assert sorted(os.listdir(place.place)) == ["diff1", "live", "lower"]
    write(place, b"after", 0, b"x", os.O_CREAT)
    assert show(place).keys() == before.keys() | {b"after"}


@pytest.mark.parametrize("is_power_cut", [False, True], ids=["killed", "power cut"])
def test_death_at_a_step_finds_all_that_was_there(
    memory: Path, monkeypatch: pytest.MonkeyPatch, is_power_cut: bool
) -> None:
    """Whatever the superblock says then, old or new: it is complete; and so is a child."""
    step = n_old = n_new = n_children = 0
    is_done = False
    while not is_done:
        root = memory / f"{step}"
        root.mkdir()
        with made_place(root) as place:
            place.tree.sync()
            for path in (BIG, SMALL, b"new", OTHER):
                handle = place.driver.open(path, os.O_RDWR)
                place.driver.fsync(handle)
                place.driver.close(handle)
            before = show(place)
            child = place.place / "child"
            monkeypatch.setattr(durable, "on_step", stop_at(step, Killed()))
            try:
                seal_until_death(place)
                is_done = True
            except (Killed, BrokenSealError):
                pass
            finally:
                monkeypatch.setattr(durable, "on_step", lambda _: None)
            if is_power_cut:
                place.kill()
            else:
                place.crash()
            is_new = place.live_path == place.place / "live"
            n_old += not is_new
            n_new += is_new
            assert show(place) == before, f"step {step}"
            write(place, b"after", 0, b"x", os.O_CREAT)
            if child.exists():
                assert is_new
                n_children += 1
                assert show_head(place, child) == before, f"step {step}"
        step += 1
    assert n_old > 10
    assert n_new >= 3
    assert n_children >= 1


def seal_until_death(place: TreePlace) -> None:
    """Seal; what is raised is a death, so nothing is taken away."""
    seal = place.tree.begin_seal(place.place / "live", sealing_child(place, "child"))
    try:
        seal.prepare()
        seal.switch()
        seal.finish()
    finally:
        if seal._new is not None and seal._new is not place.tree._stack.live:
            seal._new.close()


# --- write-ahead log ------------------------------------------------------------------------------

SEGMENT = 1 << 20
START = WalStart(lsn=2 * SEGMENT + 100, segment_bytes=SEGMENT, page_bytes=PAGE)


def segment_name(tli: int, number: int) -> str:
    return f"{tli:08X}{number // 4096:08X}{number % 4096:08X}"


def make_segment(path: Path, number: int, n_pages: int, *, fill: bytes = b"w") -> bytes:
    """A segment whose first pages are its own and whose rest is that of an older one."""
    pages = []
    for page in range(SEGMENT // PAGE):
        address = number * SEGMENT + page * PAGE
        if page >= n_pages:
            address -= 1000 * SEGMENT
        header = struct.pack("<HHIQI", 0xD113, 0, 1, address % (1 << 64), 0)
        pages.append(header + fill * (PAGE - len(header)))
    data = b"".join(pages)
    path.write_bytes(data)
    os.utime(path, ns=(0, 10**18))
    return data[: n_pages * PAGE]


def test_copy_holds_the_pages_that_count_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "pg_wal", tmp_path / "copy"
    (source / "archive_status").mkdir(parents=True)
    (source / "archive_status" / "x.ready").touch()
    source.chmod(0o700)
    make_segment(source / segment_name(1, 1), 1, 128)  # before the redo point
    full = make_segment(source / segment_name(1, 2), 2, 128)
    part = make_segment(source / segment_name(2, 3), 3, 5)
    make_segment(source / segment_name(2, 4), 4, 0)  # recycled
    (source / "00000002.history").write_bytes(b"1\t0/300000\tno reason\n")
    (source / "xlogtemp.1").touch()
    copy = WalCopy(source, target)
    copy.advance(START)
    copy.sync()
    expected = {
        segment_name(1, 2): full,
        segment_name(2, 3): part.ljust(SEGMENT, b"\0"),
        "00000002.history": (source / "00000002.history").read_bytes(),
    }
    assert files_of(target) == expected
    assert copy.n_bytes == len(full) + len(part) + len(expected["00000002.history"])
    assert (target / "archive_status").is_dir()
    assert target.stat().st_mode & 0o777 == 0o700
    assert (target / segment_name(2, 3)).stat().st_blocks * 512 < SEGMENT


def test_what_lies_before_the_redo_point_is_a_hole_also_in_a_copy_of_a_copy(
    tmp_path: Path,
) -> None:
    source = tmp_path / "pg_wal"
    source.mkdir()
    name = segment_name(1, 2)
    full = make_segment(source / name, 2, 20)
    start = replace(START, lsn=2 * SEGMENT + 5 * PAGE + 100)
    expected = full[:PAGE] + bytes(4 * PAGE) + full[5 * PAGE :]
    for number in range(2):
        copy = WalCopy(source, tmp_path / f"copy{number}")
        copy.advance(start)
        assert files_of(tmp_path / f"copy{number}") == {name: expected.ljust(SEGMENT, b"\0")}
        assert copy.n_bytes == 16 * PAGE
        source = tmp_path / f"copy{number}"
    # Where recovery begins further on, there is more of a hole; nothing valid there, only a page.
    for page, n_pages in ((12, 9), (0, 1), (1, 1), (20, 1), (50, 1)):
        copy = WalCopy(source, tmp_path / f"from{page}")
        copy.advance(replace(START, lsn=2 * SEGMENT + page * PAGE))
        assert copy.n_bytes == n_pages * PAGE, page


def test_second_pass_takes_what_changed_and_drops_what_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "pg_wal"
    source.mkdir()
    make_segment(source / segment_name(1, 2), 2, 128)
    make_segment(source / segment_name(1, 3), 3, 10)
    copy = WalCopy(source, tmp_path / "copy")
    copy.advance(START)
    copied: list[str] = []
    monkeypatch.setattr(wal_copy, "copy_bytes", note_copies(copied))
    # The server goes on, and recycles what it does not need.
    os.rename(source / segment_name(1, 2), source / segment_name(1, 9))
    part = make_segment(source / segment_name(1, 3), 3, 20, fill=b"v")
    os.utime(source / segment_name(1, 3))
    whole = make_segment(source / segment_name(1, 4), 4, 128)
    copy.advance(replace(START, lsn=3 * SEGMENT))
    assert files_of(tmp_path / "copy") == {
        segment_name(1, 3): part.ljust(SEGMENT, b"\0"),
        segment_name(1, 4): whole,
    }
    assert len(copied) == 2
    # What was written to just now is looked at again, and what was not, is not.
    copy.advance(replace(START, lsn=3 * SEGMENT))
    assert len(copied) == 3


def note_copies(copied: list[str]) -> Callable[[int, int, int, int], None]:
    real = wal_copy.copy_bytes

    def note(source: int, target: int, begin: int, end: int) -> None:
        copied.append(os.readlink(f"/proc/self/fd/{source}"))
        real(source, target, begin, end)

    return note


def test_copies_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    source = tmp_path / "pg_wal"
    source.mkdir()
    full = make_segment(source / segment_name(1, 2), 2, 128)
    WalCopy(source, tmp_path / "copy").advance(START)
    assert files_of(tmp_path / "copy") == {segment_name(1, 2): full}
