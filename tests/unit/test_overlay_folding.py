"""Folding: several sealed layers become one, and nobody sees a difference."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conformance.file_machine import PAGE, Snapshot, describe_difference
from conformance.tree_place import TreePlace
from fix_memory import memory_root
from fix_postgres import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.test_overlay_faults import Killed, stop_at
from unit.test_overlay_sealing import (
    BIG,
    OTHER,
    SMALL,
    files_of,
    made_place,
    show,
    show_head,
    write,
)

from pbkfs import durable
from pbkfs.errors import HostError
from pbkfs.overlay import contents, folding, hydration
from pbkfs.overlay.check import check_diff
from pbkfs.overlay.folding import fold, read_layers, replace_run
from pbkfs.overlay.inode import File
from pbkfs.overlay.journal import NO_LIMIT
from pbkfs.overlay.layer import EMPTY_MAP, Layer, delete_layer
from pbkfs.overlay.sealing import BrokenSealError
from pbkfs.overlay.stack import count_blocks


@pytest.fixture
def place(memory: Path) -> Iterator[TreePlace]:
    with made_place(memory) as made:
        yield made


PATHS = [BIG, OTHER, SMALL, b"new", b"base/5/99999", b"base/6/1", b"base/7/1", b"again"]
path = st.sampled_from(PATHS)
offset = st.one_of(st.integers(0, 12 * PAGE), st.integers(0, 12).map(lambda n: n * PAGE))
length = st.one_of(st.integers(1, 3 * PAGE), st.just(PAGE))


def _write(place: TreePlace, name: bytes, at: int, n_bytes: int, fill: int) -> None:
    write(place, name, at, bytes([fill]) * n_bytes, os.O_CREAT)


def _hydrate(place: TreePlace, n_steps: int) -> None:
    for _ in place.tree.hydration.survey():
        pass
    for _ in range(n_steps):
        step = place.tree.hydration.next_step(2 * PAGE)
        if step is None:
            break
        step.run()
        place.tree.hydration.finish(step)


Operation = Callable[[TreePlace], None]


def _operation(call: Callable[..., None], *values: st.SearchStrategy[int | bytes]) -> object:
    return st.tuples(*values).map(lambda found: lambda place: call(place, *found))


operations = st.one_of(
    _operation(_write, path, offset, length, st.integers(1, 255)),
    _operation(_write, path, offset, length, st.integers(1, 255)),
    _operation(_write, path, offset, length, st.integers(1, 255)),
    _operation(lambda p, name, size: p.driver.truncate(name, size), path, offset),
    _operation(lambda p, name: p.driver.truncate(name, 0), path),
    _operation(lambda p, name: p.driver.unlink(name), path),
    _operation(lambda p, old, new: p.driver.rename(old, new), path, path),
    _operation(lambda p, old, new: p.driver.rename(old, new, 2), path, path),
    _operation(lambda p, old, new: p.driver.link(old, new), path, path),
    _operation(
        lambda p, name, mode: p.driver.chmod(name, mode), path, st.sampled_from([0o600, 0o640])
    ),
    _operation(lambda p, name, at: p.driver.utime(name, at, at), path, st.integers(10**18, 2**60)),
    _operation(lambda p: p.driver.mkdir(b"base/7", 0o700)),
    _operation(lambda p: p.driver.rename(b"base/6", b"base/7")),
    _operation(lambda p: p.driver.rename(b"base/7", b"base/6")),
    _operation(lambda p: p.driver.symlink(b"nowhere", b"link")),
    _operation(lambda p: p.driver.unlink(b"link")),
    _operation(_hydrate, st.integers(1, 6)),
)  # type: ignore[arg-type]
rounds = st.lists(st.lists(operations, max_size=6), min_size=2, max_size=7)
runs = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=3)


def blocks_known_as_changed(place: TreePlace) -> dict[bytes, int]:
    """Of each file with a mapped object, by its first name: blocks that a layer calls changed.

    Of those that could come from below at all.
    """
    stack, namespace = place.tree._stack, place.tree._namespace
    result: dict[bytes, int] = {}
    for inode in list(namespace.inodes.values()):
        if not isinstance(inode, File) or not any(piece.is_mapped for piece in inode.pieces):
            continue
        changed, limit = 0, NO_LIMIT
        sizes = [stack.layers[p.layer].objects.stat(p.object_id).st_size for p in inode.pieces]
        for piece, size, below in zip(
            inode.pieces, sizes, [*sizes[1:], inode.base_size], strict=True
        ):
            if piece.is_mapped:
                found = stack.layers[piece.layer].page_maps.get(piece.object_id, EMPTY_MAP)
                changed |= int.from_bytes(found.changed, "little")
                limit = min(limit, found.limit, count_blocks(size), count_blocks(below))
        if inode.pieces[-1].is_mapped:
            result[namespace.path_of(inode) or b""] = changed & (1 << limit) - 1
    return result


@settings(
    max_examples=int(os.environ.get("PBKFS_TEST_FOLDS", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(rounds=rounds, runs=runs, has_children=st.booleans())
def test_a_fold_is_not_seen(
    rounds: list[list[Operation]], runs: list[tuple[int, int]], has_children: bool
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="pbkfs-fold-", dir=memory_root()) as name,
        pytest.MonkeyPatch.context() as patch,
        made_place(Path(name)) as place,
    ):
        patch.setattr(contents, "MAX_WHOLE_BYTES", 2 * PAGE)
        patch.setattr(hydration, "MAX_SMALL_BYTES", PAGE)
        heads: list[tuple[Path, Snapshot]] = []
        for number, each in enumerate(rounds):
            for operation in each:
                with suppress(OSError):
                    operation(place)
            child = place.place / f"child{number}" if has_children else None
            place.seal_live(child)
            if child is not None:
                heads.append((child, show(place)))
            if number % 3 == 2:
                place.reopen()
        before = show(place)
        place.reopen()
        changed = blocks_known_as_changed(place)
        place.close()
        for newest, n_layers in runs:
            place.fold([place.diff_path, *(head for head, _ in heads)], newest, n_layers)
        place.open()
        found = show(place)
        assert found == before, describe_difference(before, found)
        assert blocks_known_as_changed(place) == changed
        # It goes on as ever, also with a fold of what was folded.
        for operation in rounds[0]:
            with suppress(OSError):
                operation(place)
        before = show(place)
        place.seal_live()
        place.close()
        place.fold([place.diff_path, *(head for head, _ in heads)], 0, 9)
        assert place.n_layers <= 1
        place.open()
        found = show(place)
        assert found == before, describe_difference(before, found)
        for head, expected in heads:
            found = show_head(place, head)
            assert found == expected, describe_difference(expected, found)


@settings(
    max_examples=int(os.environ.get("PBKFS_TEST_FOLDS", "150")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(rounds=rounds, runs=runs, dropped=st.sets(st.integers(0, 9)))
def test_a_fold_is_not_seen_by_a_tree_in_use(
    rounds: list[list[Operation]], runs: list[tuple[int, int]], dropped: set[int]
) -> None:
    """With files open all the while, written to before and afterwards, and the old layers gone."""
    with (
        tempfile.TemporaryDirectory(prefix="pbkfs-fold-", dir=memory_root()) as name,
        pytest.MonkeyPatch.context() as patch,
        made_place(Path(name)) as place,
    ):
        patch.setattr(contents, "MAX_WHOLE_BYTES", 2 * PAGE)
        patch.setattr(hydration, "MAX_SMALL_BYTES", PAGE)
        handles = {each: place.driver.open(each, os.O_RDWR) for each in (BIG, OTHER, SMALL)}
        for number, each in enumerate(rounds):
            for operation in each:
                with suppress(OSError):
                    operation(place)
            if number in dropped:
                place.tree.nodes.drop_indexes()
            place.seal_live()
        for operation in rounds[0]:
            with suppress(OSError):
                operation(place)
        for newest, n_layers in runs:
            before = show(place)
            inside = [place.driver.pread(handle, 1 << 20, 0) for handle in handles.values()]
            if newest < place.n_layers:
                place.fold_in_use(newest, n_layers)
            found = show(place)
            assert found == before, describe_difference(before, found)
            place.tree.nodes.drop_indexes()
            assert inside == [place.driver.pread(h, 1 << 20, 0) for h in handles.values()]
            for operation in rounds[-1]:
                with suppress(OSError):
                    operation(place)
        for handle in handles.values():
            place.driver.pwrite(handle, b"end", 3 * PAGE)
            place.driver.fsync(handle)
        place.seal_live()
        before = show(place)
        if place.n_layers:
            place.fold_in_use(0, 20)
        found = show(place)
        assert found == before, describe_difference(before, found)
        for handle in handles.values():
            place.driver.close(handle)
        place.crash()
        found = show(place)
        assert found == before, describe_difference(before, found)
        place.close()
        report = check_diff(place.diff_path, place.base)
        assert report.is_clean, report.findings


def test_newest_attributes_win_over_records_of_older_ones(place: TreePlace) -> None:
    """Those of a file without an object are in the journal, of one with an object they are its."""
    write(place, BIG, 0, b"one")
    place.seal_live()
    place.driver.chmod(BIG, 0o640)
    place.driver.chmod(OTHER, 0o640)
    place.seal_live()
    write(place, BIG, PAGE, b"two")
    place.driver.chmod(BIG, 0o604)
    place.driver.utime(BIG, 10**18, 10**18)
    place.seal_live()
    place.driver.chmod(SMALL, 0o604)
    place.seal_live()
    before = show(place)
    place.close()
    place.fold([place.diff_path], 0, 9)
    place.open()
    assert show(place) == before
    assert before[BIG].mode & 0o777 == 0o604
    assert before[SMALL].mode & 0o777 == 0o604


def test_objects_that_stand_alone_are_shared_and_come_and_gone_is_forgotten(
    place: TreePlace,
) -> None:
    for number in range(40):
        write(place, b"came%d" % number, 0, b"x" * PAGE, os.O_CREAT)
        place.driver.unlink(b"came%d" % number)
    write(place, b"gone", 0, b"x" * PAGE, os.O_CREAT)
    write(place, OTHER, PAGE, b"only here")
    place.seal_live()
    place.driver.rename(b"gone", b"moved")
    place.driver.chmod(b"moved", 0o640)
    write(place, BIG, 5 * PAGE, b"second")
    place.seal_live()
    place.driver.unlink(b"moved")
    place.seal_live()
    before = show(place)
    place.close()
    old = [Path(ref.path) for ref in read_layers(place.diff_path)]
    n_old_bytes = sum((path / "journal").stat().st_size for path in old)
    layers = read_layers(place.diff_path)
    folded = fold(place.base, layers, 3, place.place / "folded")
    assert folded.n_copied == 1
    assert folded.n_linked >= 3
    assert folded.copied_bytes <= 5 * PAGE
    objects = [p for p in (place.place / "folded" / "objects").rglob("*") if p.is_file()]
    assert len(objects) == folded.n_linked + folded.n_copied
    assert sum(p.stat().st_nlink == 2 for p in objects) == folded.n_linked
    assert (place.place / "folded" / "journal").stat().st_size < n_old_bytes / 2
    assert replace_run(place.diff_path, layers, folded.layer)
    assert not replace_run(place.diff_path, layers, folded.layer)
    place.open()
    assert show(place) == before
    # What is shared is never changed, whoever writes to the file.
    contents_before = files_of(old[1] / "objects")
    write(place, OTHER, 0, b"later" * PAGE)
    place.driver.truncate(OTHER, 10)
    place.driver.chmod(OTHER, 0o604)
    place.tree.sync()
    assert files_of(old[1] / "objects") == contents_before


def test_an_object_that_cannot_be_linked_is_copied(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.seal_live()
    write(place, SMALL, 0, b"again")
    place.seal_live()
    before = show(place)
    place.close()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(os, "link", refuse)
    folded = place.fold([place.diff_path], 0, 2)
    assert folded is not None
    assert folded.n_linked == 0
    assert folded.n_copied > 2
    place.open()
    assert show(place) == before


@pytest.mark.parametrize("is_death", [False, True], ids=["failed", "killed"])
def test_every_step_leaves_the_old_stack_or_the_new_one(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch, is_death: bool
) -> None:
    for number in range(3):
        write(place, BIG, number * PAGE, b"%d" % number)
        write(place, b"new%d" % number, 0, b"n", os.O_CREAT)
        place.seal_live(place.place / "child" if number == 2 else None)
    before = show(place)
    place.close()
    heads = [place.diff_path, place.place / "child"]
    layers = read_layers(place.diff_path)
    names = sorted(os.listdir(place.place))
    step = n_old = n_mixed = 0
    while True:
        error = Killed() if is_death else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if is_death:
            # A death tidies nothing up.
            monkeypatch.setattr(folding.shutil, "rmtree", lambda *_, **__: None)
        monkeypatch.setattr(durable, "on_step", stop_at(step, error))
        try:
            folded = fold(place.base, layers, len(layers), place.place / f"f{step}")
            for head in heads:
                replace_run(head, layers, folded.layer)
        except (OSError, HostError, Killed):
            is_done = False
        else:
            is_done = True
        monkeypatch.undo()
        states = {len(read_layers(head)) for head in heads}
        assert states <= {1, 3}
        n_old += states == {3}
        n_mixed += len(states) == 2
        if states == {3} and not is_death:
            left = {name for name in os.listdir(place.place) if name not in names}
            # A fold that was made and could not be put anywhere is its caller's.
            assert left <= {f"f{n}" for n in range(step + 1)}
        for head in heads:
            assert check_diff(head, place.base).is_clean
            assert show_head(place, head) == before, f"step {step}"
        if is_done:
            break
        step += 1
    assert n_old > 10
    assert n_mixed >= 1


def test_a_run_that_a_head_has_only_in_part_is_not_replaced(place: TreePlace) -> None:
    place.seal_live(place.place / "child")
    write(place, BIG, 0, b"two")
    place.seal_live()
    write(place, BIG, 0, b"three")
    place.seal_live()
    place.close()
    expected = show_head(place, place.place / "child")
    place.fold([place.diff_path, place.place / "child"], 0, 3)
    assert len(read_layers(place.place / "child")) == 1
    assert len(read_layers(place.diff_path)) == 1
    assert show_head(place, place.place / "child") == expected


# --- in use ---------------------------------------------------------------------------------------


def test_a_file_in_use_without_a_name_keeps_its_layer(place: TreePlace) -> None:
    handle = place.driver.open(BIG, os.O_RDWR)
    write(place, BIG, 0, b"one")
    content = place.driver.pread(handle, 3 * PAGE, 0)
    place.seal_live()
    place.driver.unlink(BIG)
    place.seal_live()
    before = show(place)
    assert not place.fold_in_use(0, 2)
    assert place.n_layers == 2
    assert show(place) == before
    assert place.driver.pread(handle, 3 * PAGE, 0) == content
    place.driver.close(handle)
    place.driver.forget_all()
    assert place.fold_in_use(0, 2)
    assert show(place) == before


def test_a_file_that_lost_its_name_later_is_read_on(place: TreePlace) -> None:
    handle = place.driver.open(BIG, os.O_RDWR)
    write(place, BIG, 0, b"one")
    place.seal_live()
    write(place, BIG, PAGE, b"two")
    place.seal_live()
    place.driver.unlink(BIG)
    content = place.driver.pread(handle, 3 * PAGE, 0)
    assert place.fold_in_use(0, 2)
    assert place.driver.pread(handle, 3 * PAGE, 0) == content
    place.driver.pwrite(handle, b"three", 2 * PAGE)
    assert place.driver.pread(handle, 5, 2 * PAGE) == b"three"
    place.driver.close(handle)


@pytest.mark.parametrize("is_death", [False, True], ids=["failed", "killed"])
def test_every_step_of_a_fold_in_use(
    memory: Path, monkeypatch: pytest.MonkeyPatch, is_death: bool
) -> None:
    """It fails, and the tree goes on as before; or it dies, and is found old or new."""
    step = n_old = n_new = 0
    is_done = False
    while not is_done:
        root = memory / f"{step}"
        root.mkdir()
        with made_place(root) as place:
            handle = place.driver.open(BIG, os.O_RDWR)
            for number in range(3):
                place.driver.pwrite(handle, b"%d" % number, number * PAGE)
                place.seal_live()
            place.driver.pwrite(handle, b"live", 4 * PAGE)
            place.driver.fsync(handle)
            before = show(place)
            layers = read_layers(place.diff_path)
            folded = fold(place.base, layers, 2, place.place / "folded")
            new = Layer.sealed(Path(folded.layer.path), folded.layer.uuid)
            error = Killed() if is_death else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(durable, "on_step", stop_at(step, error))
            is_broken = False
            try:
                assert place.tree.restack(layers[:2], new, folded.origins)
                is_done = True
            except BrokenSealError:
                is_broken = True
            except (OSError, Killed):
                pass
            finally:
                monkeypatch.setattr(durable, "on_step", lambda _: None)
            if not is_done:
                new.close()
            if not is_death and not is_broken:
                assert show(place) == before
                place.driver.pwrite(handle, b"more", 5 * PAGE)
                place.driver.fsync(handle)
                before = show(place)
            place.crash()
            assert place.n_layers in ((2,) if is_done else (3, 2) if is_broken else (3,))
            n_old += place.n_layers == 3
            n_new += place.n_layers == 2
            assert show(place) == before, f"step {step}"
        step += 1
    assert n_old >= 3
    assert n_new >= 2


def test_readers_and_writers_go_on_while_layers_are_folded(place: TreePlace) -> None:
    """In other threads, as the dispatcher's are: no read finds anything else, no write is lost."""
    handle = place.driver.open(BIG, os.O_RDWR)
    for number in range(4):
        place.driver.pwrite(handle, bytes([number + 1]) * PAGE, number * PAGE)
        place.seal_live()
    place.driver.pwrite(handle, b"w" * PAGE, 6 * PAGE)
    nodes, ino = place.tree.nodes, place.driver._find(BIG).ino
    expected = nodes.read(ino, 0, 5 * PAGE)
    wrong: list[bytes] = []
    n_rounds = [0, 0, 0]
    is_over = threading.Event()

    def read(index: int) -> None:
        while not is_over.is_set():
            found = nodes.read(ino, 0, 5 * PAGE)
            if found != expected:
                wrong.append(found)
            if index:
                nodes.drop_indexes()
            n_rounds[index] += 1

    def write_on() -> None:
        while not is_over.is_set():
            n_rounds[2] += 1
            nodes.write(ino, 6 * PAGE, n_rounds[2].to_bytes(8, "little") * (PAGE // 8))

    def fold_later(newest: int, n_layers: int) -> None:
        # While all of them are at it.
        goal = [n + 20 for n in n_rounds]
        wait_until(lambda: all(n >= each for n, each in zip(n_rounds, goal, strict=True)))
        assert place.fold_in_use(newest, n_layers, counts_descriptors=False)

    threads = [
        threading.Thread(target=read, args=(0,)),
        threading.Thread(target=read, args=(1,)),
        threading.Thread(target=write_on),
    ]
    for thread in threads:
        thread.start()
    try:
        fold_later(1, 2)
        fold_later(0, 2)
        fold_later(0, 2)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert place.n_layers == 1
    assert nodes.read(ino, 0, 5 * PAGE) == expected
    assert nodes.read(ino, 6 * PAGE, 8) == n_rounds[2].to_bytes(8, "little")
    before = show(place)
    place.driver.close(handle)
    place.reopen()
    assert show(place) == before


def test_a_layer_in_use_is_not_deleted(place: TreePlace) -> None:
    place.seal_live()
    write(place, BIG, 0, b"two")
    place.seal_live()
    layers = read_layers(place.diff_path)
    paths = [Path(ref.path) for ref in layers]
    folded = fold(place.base, layers, 2, place.place / "folded")
    assert [delete_layer(path) for path in paths] == [False, False]
    new = Layer.sealed(Path(folded.layer.path), folded.layer.uuid)
    assert not delete_layer(new.path)
    assert place.tree.restack(layers, new, folded.origins)
    assert not delete_layer(new.path)
    assert delete_layer(paths[0])
    assert not paths[0].exists()
    before = show(place)
    place.reopen()
    assert show(place) == before
