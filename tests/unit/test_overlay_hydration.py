"""Hydration of a tree: its order, what is kept of it, and what comes between its steps."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conformance.file_machine import PAGE, make_lower, take_snapshot
from conformance.tree_place import TreePlace, open_place

from pbkfs import durable
from pbkfs.overlay import hydration
from pbkfs.overlay.hydration import FillObject, MakeObjects, Step

BIG = b"base/5/16384"
N_BIG = 5


class Killed(BaseException):
    """Stands for SIGKILL at a step."""


@pytest.fixture
def place(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TreePlace]:
    """An open tree over a base where files of more than one page count as large."""
    monkeypatch.setattr(hydration, "MAX_SMALL_BYTES", PAGE)
    with open_place(memory) as made:
        make_lower(made.lower)
        made.open()
        yield made


def survey(place: TreePlace) -> None:
    for _ in place.tree.hydration.survey():
        pass


def steps(place: TreePlace, max_bytes: int = 1 << 20) -> Iterator[Step]:
    """Run the steps there are; each one is finished when the next one is asked for."""
    while (step := place.tree.hydration.next_step(max_bytes)) is not None:
        step.run()
        yield step
        place.tree.hydration.finish(step)


def hydrate(place: TreePlace, max_bytes: int = 1 << 20) -> None:
    survey(place)
    for _ in steps(place, max_bytes):
        pass
    assert is_done(place)


def is_done(place: TreePlace) -> bool:
    survey(place)
    found = place.tree.hydration
    assert not found.failed
    return (found.n_files_done, found.n_bytes_done) == (found.n_files, found.n_bytes)


def ino(place: TreePlace, path: bytes) -> int:
    return place.driver._find(path).ino


def write(place: TreePlace, path: bytes, offset: int, data: bytes) -> None:
    handle = place.driver.open(path, os.O_RDWR)
    place.driver.pwrite(handle, data, offset)
    place.driver.close(handle)


def changed_blocks(place: TreePlace, path: bytes) -> set[int]:
    """The blocks that the journal calls changed, after a remount."""
    place.reopen()
    piece = place.tree._namespace.resolve(path).pieces[0]  # type: ignore[attr-defined]
    found = place.tree._stack.live.page_maps[piece.object_id]
    assert found.is_whole
    bits = int.from_bytes(found.changed, "little")
    return {block for block in range(bits.bit_length()) if bits >> block & 1}


def stop_at(step: int, error: BaseException) -> Callable[[str], None]:
    left = step

    def stop(_: str) -> None:
        nonlocal left
        if left == 0:
            left = -1
            raise error
        left -= left > 0

    return stop


# --- what comes between the steps: forgotten files ---------------------------------------------


@pytest.mark.parametrize("is_opened_again", [False, True])
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("path", [BIG, b"postgresql.conf"])
def test_a_file_that_is_forgotten_meanwhile(
    place: TreePlace, path: bytes, *, is_early: bool, is_opened_again: bool
) -> None:
    """The kernel may forget a file while a step works on it, and ask for it again."""
    content = place.driver.read_file(path)
    number = ino(place, path)
    survey(place)
    found = place.tree.hydration
    while (step := found.next_step(1)) is not None:
        if isinstance(step, MakeObjects) and number in [item.file.ino for item in step.items]:
            break
        step.run()
        found.finish(step)
    assert step is not None
    if is_early:
        place.driver.forget_all()
        step.run()
    else:
        step.run()
        place.driver.forget_all()
    if is_opened_again:
        assert place.driver.read_file(path) == content
    found.finish(step)
    for _ in steps(place):
        pass
    assert is_done(place)
    assert place.driver.read_file(path) == content


# --- order and amounts -------------------------------------------------------------------------


def test_files_in_use_come_first_then_small_ones(place: TreePlace) -> None:
    place.driver.read_file(b"big")
    place.driver.read_file(b"big")
    place.driver.read_file(BIG)
    survey(place)
    sizes = []
    order = []
    for step in steps(place):
        if isinstance(step, MakeObjects):
            sizes += [item.file.size for item in step.items]
            order += [item.file.name for item in step.items]
    assert order[:2] == [b"big", b"16384"]
    assert sizes[2:] == sorted(sizes[2:])
    assert is_done(place)


def test_progress_counts_up_to_the_whole(place: TreePlace) -> None:
    survey(place)
    found = place.tree.hydration
    sizes = [p.stat().st_size for p in place.lower.rglob("*") if p.is_file() and not p.is_symlink()]
    assert (found.n_files, found.n_bytes) == (len(sizes), sum(sizes))
    assert (found.n_files_done, found.n_bytes_done) == (0, 0)
    last = 0
    for _ in steps(place, PAGE):
        assert last <= found.n_bytes_done <= found.n_bytes
        last = found.n_bytes_done
    assert (found.n_files_done, found.n_bytes_done) == (len(sizes), sum(sizes))


def test_nothing_is_read_from_below_any_more(place: TreePlace) -> None:
    before = take_snapshot(place.driver)
    hydrate(place)
    assert take_snapshot(place.driver) == before
    place.tree.nodes.reset_counters()
    place.reopen()
    assert take_snapshot(place.driver) == before
    assert place.tree.nodes.counters()["base_reads"] == 0


def test_attributes_stay(place: TreePlace) -> None:
    place.driver.chmod(BIG, 0o640)
    place.driver.utime(BIG, 10**18, 10**18)
    place.driver.utime(b"postgresql.conf", 10**18 + 1, 10**18 + 1)
    before = take_snapshot(place.driver)
    hydrate(place, PAGE)
    place.reopen()
    assert take_snapshot(place.driver) == before
    assert place.driver.stat(BIG).mtime_ns == 10**18
    assert place.driver.stat(b"postgresql.conf").mtime_ns == 10**18 + 1


# --- the map -----------------------------------------------------------------------------------


def test_the_map_tells_changed_blocks_from_hydrated_ones(place: TreePlace) -> None:
    write(place, BIG, PAGE, b"before")
    hydrate(place)
    assert changed_blocks(place, BIG) == {1}
    assert changed_blocks(place, b"base/5/16385") == set()
    write(place, BIG, 3 * PAGE - 1, b"ab")
    assert changed_blocks(place, BIG) == {1, 2, 3}
    assert place.driver.read_file(BIG) == (
        (place.lower / "base/5/16384").read_bytes()[:PAGE]
        + b"before"
        + (place.lower / "base/5/16384").read_bytes()[PAGE + 6 : 3 * PAGE - 1]
        + b"ab"
        + (place.lower / "base/5/16384").read_bytes()[3 * PAGE + 1 :]
    )


def test_the_map_survives_the_death_of_the_worker_and_the_compaction(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pbkfs.overlay import layer as layers

    hydrate(place)
    write(place, BIG, 4 * PAGE, b"new")
    place.crash()
    assert changed_blocks(place, BIG) == {4}
    monkeypatch.setattr(layers, "COMPACTION_BYTES", 0)
    for i in range(500):
        write(place, BIG, i % 2 * PAGE, b"again")
        handle = place.driver.open(BIG, os.O_RDWR)
        place.driver.fsync(handle)
        place.driver.close(handle)
    assert changed_blocks(place, BIG) == {0, 1, 4}
    assert is_done(place)


def test_a_sealed_layer_that_is_half_hydrated_is_read_as_it_is(place: TreePlace) -> None:
    before = take_snapshot(place.driver)
    survey(place)
    for step in steps(place, PAGE):
        if isinstance(step, FillObject) and step.offset > 0:
            break
    place.seal()
    assert take_snapshot(place.driver) == before
    hydrate(place)
    assert take_snapshot(place.driver) == before


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["unmount", "killed", "power cut"])
def test_progress_survives(place: TreePlace, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hydration, "_SYNC_BYTES", PAGE)
    before = take_snapshot(place.driver)
    place.driver.read_file(BIG)  # so it is the first
    survey(place)
    for step in steps(place, PAGE):
        if isinstance(step, FillObject) and step.offset == 3 * PAGE:
            break
    place.tree.sync()
    {"unmount": place.reopen, "killed": place.crash, "power cut": place.cut_power}[end]()
    survey(place)
    found = place.tree.hydration
    assert found.n_bytes_done >= 2 * PAGE
    assert take_snapshot(place.driver) == before
    hydrate(place)
    assert take_snapshot(place.driver) == before


@pytest.mark.parametrize("is_power_cut", [False, True], ids=["killed", "power cut"])
def test_death_at_every_step_changes_nothing(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch, is_power_cut: bool
) -> None:
    write(place, BIG, PAGE, b"changed")
    place.reopen()
    before = take_snapshot(place.driver)
    n_deaths = 0
    while True:
        survey(place)
        monkeypatch.setattr(durable, "on_step", stop_at(3 + n_deaths, Killed()))
        try:
            for _ in steps(place, PAGE):
                pass
            break
        except Killed:
            n_deaths += 1
        finally:
            monkeypatch.setattr(durable, "on_step", lambda _: None)
        if is_power_cut:
            place.cut_power()
        else:
            place.crash()
        assert take_snapshot(place.driver) == before
        assert n_deaths < 200
    assert n_deaths >= 5
    place.reopen()
    assert take_snapshot(place.driver) == before
    assert is_done(place)
    # No object is left that nobody names.
    assert len(place.object_paths()) == place.tree.hydration.n_files


# --- what goes wrong, what comes between ----------------------------------------------------------


def test_a_full_disk_stops_it_and_leaves_all_working(
    place: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = take_snapshot(place.driver)
    n_failures = 0
    while True:
        survey(place)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(durable, "on_step", stop_at(2 + n_failures, full))
        try:
            for _ in steps(place, PAGE):
                pass
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - the last round does not raise
            n_failures += 1
        finally:
            monkeypatch.setattr(durable, "on_step", lambda _: None)
        assert not place.tree.hydration.failed
        assert take_snapshot(place.driver) == before
    assert n_failures >= 5
    assert is_done(place)
    assert len(place.object_paths()) == place.tree.hydration.n_files


def test_a_file_that_is_changed_before_the_step_ends_keeps_its_change(place: TreePlace) -> None:
    survey(place)
    changed: set[bytes] = set()
    for step in steps(place, PAGE):
        if isinstance(step, MakeObjects):
            for item in step.items:
                path = place.tree._namespace.path_of(item.file)
                assert path is not None
                if path in changed:
                    continue
                changed.add(path)
                match len(changed) % 4:
                    case 0:
                        place.driver.chmod(path, 0o640)
                    case 1:
                        write(place, path, 0, b"written meanwhile")
                    case 2:
                        place.driver.unlink(path)
                    case 3:
                        place.driver.truncate(path, 1)
    expected = take_snapshot(place.driver)
    assert is_done(place)
    place.reopen()
    assert take_snapshot(place.driver) == expected
    assert len(changed) >= 8


def test_a_file_that_goes_away_while_it_is_filled_is_left(place: TreePlace) -> None:
    place.driver.read_file(BIG)
    survey(place)
    for step in steps(place, PAGE):
        if isinstance(step, FillObject) and step.ino == ino(place, BIG):
            place.driver.unlink(BIG)
            place.driver.forget_all()
            break
    hydrate(place)


@pytest.mark.expect_log("'big' can't be hydrated")
def test_what_cannot_be_read_is_named_and_the_rest_goes_on(
    place: TreePlace, caplog: pytest.LogCaptureFixture
) -> None:
    survey(place)
    (place.lower / "big").write_bytes(b"shorter than listed")
    for _ in steps(place):
        pass
    found = place.tree.hydration
    assert list(found.failed.values()) == [b"big"]
    assert found.n_files_done == found.n_files - 1
    assert "'big' can't be hydrated" in caplog.text
