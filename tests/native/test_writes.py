"""Writing: what is recorded and when, failures half-way, the gate, and threads on one file."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading
from collections.abc import Iterator

import pytest
from native_store import (
    BLCKSZ,
    NO_LIMIT,
    SESSION,
    Layer,
    Place,
    bits_of,
    blocks_in,
    compose,
    page,
    pages_record,
)

from pbkfs import _native

INO = 11
OBJECT = 0xAB12
N_BLOCKS = 20
SIZE = N_BLOCKS * BLCKSZ


@pytest.fixture
def place() -> Iterator[Place]:
    """A file of 20 stored blocks with an object on top."""
    with Place() as place:
        place.nodes.add(INO, SIZE, place.store([Layer({b: page(3 + 4 * b) for b in range(20)})]))
        place.attach(INO, OBJECT, SIZE)
        yield place


BELOW = compose([Layer({b: page(3 + 4 * b) for b in range(20)})], SIZE)


def durable_blocks(place: Place) -> set[int]:
    return blocks_in(place.scan().get(OBJECT, (b"", 0, False))[0])


def live_blocks(place: Place) -> set[int]:
    return blocks_in(place.scan(SESSION).get(OBJECT, (b"", 0, False))[0])


def limit(place: Place) -> int:
    return place.scan().get(OBJECT, (b"", NO_LIMIT, False))[1]


def test_records_of_writes_and_fsync(place: Place) -> None:
    assert live_blocks(place) == set()
    place.nodes.write(INO, 0, page(2))
    place.nodes.write(INO, 5 * BLCKSZ + 10, b"x")
    place.nodes.write(INO, SIZE, page(2))  # no block of below: needs no record
    assert live_blocks(place) == {0, 5}
    assert durable_blocks(place) == set()
    place.nodes.fsync(INO, True)
    assert durable_blocks(place) == {0, 5}
    assert place.journal.synced == place.journal.end
    end = place.journal.end
    place.nodes.write(INO, 0, page(6))
    place.nodes.fsync(INO, False)
    assert place.journal.end == end  # nothing new to record
    counters = place.nodes.counters()
    assert counters["writes"] == 4
    assert counters["bytes_written"] == 3 * BLCKSZ + 1
    assert counters["blocks_new"] == 2
    assert counters["blocks_copied"] == 1
    assert counters["bytes_copied"] == BLCKSZ
    assert counters["fsyncs"] == 2
    assert counters["page_records"] == 2


def test_neighbours_are_one_range(place: Place) -> None:
    before = place.journal.end
    place.nodes.write(INO, 0, page(2) * 10)
    head, range_, frame = 13, 8, 8
    assert place.journal.end == before + frame + head + range_
    place.nodes.fsync(INO, True)
    assert place.journal.end == before + 2 * (frame + head + range_)


def test_fsync_without_an_object_syncs_the_journal(place: Place) -> None:
    place.nodes.add(1, 0, [])
    place.journal.append(b"\x10name")
    place.nodes.fsync(1, True)
    assert place.journal.synced == place.journal.end


def test_page_is_copied_up_to_the_visible_end_only(place: Place) -> None:
    place.nodes.add(2, BLCKSZ + 100, place.store_raw(page(2) + page(6)[:100]))
    place.attach(2, 0x55, BLCKSZ + 100)
    place.nodes.write(2, BLCKSZ + 50, b"abc")
    assert place.object_path(0x55).stat().st_size == BLCKSZ + 100
    expected = bytearray(page(2) + page(6)[:100])
    expected[BLCKSZ + 50 : BLCKSZ + 53] = b"abc"
    assert place.nodes.read(2, 0, SIZE) == expected
    place.nodes.write(2, BLCKSZ + 200, b"d")
    assert place.nodes.read(2, 0, SIZE) == expected + bytes(100) + b"d"


# --- truncation ---------------------------------------------------------------------------------


def test_growth_waits_for_the_limit(place: Place) -> None:
    place.nodes.truncate(INO, 5 * BLCKSZ)
    assert limit(place) == 5
    assert place.journal.synced < place.journal.end
    place.nodes.write(INO, 0, b"x")  # no growth, no wait
    assert place.journal.synced < place.journal.end
    place.nodes.write(INO, 7 * BLCKSZ, b"x")
    _, _, maps = _native.scan_journal(place.journal_fd, SESSION)
    assert maps[OBJECT][1] == 5
    # All but the record of the write before the growth, at most.
    assert place.journal.synced > 64
    assert place.nodes.read(INO, 5 * BLCKSZ, SIZE) == bytes(2 * BLCKSZ) + b"x"


@pytest.mark.parametrize(
    "grow",
    [
        lambda nodes: nodes.truncate(INO, SIZE),
        lambda nodes: nodes.write(INO, SIZE - 1, b"\0"),
        lambda nodes: nodes.fallocate(INO, 0, SIZE - 10, 10),
    ],
)
def test_cut_blocks_stay_gone(place: Place, grow: object) -> None:
    assert callable(grow)
    place.nodes.truncate(INO, 3 * BLCKSZ + 5)
    limit_end = place.journal.end
    grow(place.nodes)
    assert place.journal.synced >= limit_end
    expected = BELOW[: 3 * BLCKSZ + 5].ljust(SIZE, b"\0")
    assert place.nodes.read(INO, 0, SIZE) == expected
    assert durable_blocks(place) == {3}
    assert limit(place) == 4


@pytest.mark.parametrize("size", [5 * BLCKSZ, 5 * BLCKSZ + 7, SIZE - 1, 0])
def test_truncation_that_a_crash_left_unrecorded(place: Place, size: int) -> None:
    """The object is cut, and no record says so."""
    place.nodes.close()
    os.truncate(place.object_path(OBJECT), size)
    place.nodes = place._new_nodes()
    place.nodes.add(INO, SIZE, place.store([Layer({b: page(3 + 4 * b) for b in range(20)})]))
    place.nodes.attach(INO, OBJECT, bitmap=b"", limit=NO_LIMIT, mapped=True, fresh=False)
    assert place.nodes.read(INO, 0, SIZE) == BELOW[:size]
    place.nodes.truncate(INO, SIZE)
    assert place.nodes.read(INO, 0, SIZE) == BELOW[:size].ljust(SIZE, b"\0")
    # And so it stays over the next mount.
    bitmap, new_limit, _, _ = place.scan()[OBJECT]
    place.nodes.close()
    place.nodes = place._new_nodes()
    place.nodes.add(INO, SIZE, place.store([Layer({b: page(3 + 4 * b) for b in range(20)})]))
    place.nodes.attach(INO, OBJECT, bitmap=bitmap, limit=new_limit, mapped=True, fresh=False)
    assert place.nodes.read(INO, 0, SIZE) == BELOW[:size].ljust(SIZE, b"\0")


def test_unrecorded_cut_inside_of_a_hydrated_block(place: Place) -> None:
    """What is left of the block is no longer as it is below, and has to be known as changed."""
    size = 5 * BLCKSZ + 7
    offset: int | None = 0
    while offset is not None:
        _, offset = place.nodes.hydrate(INO, offset, SIZE)
    assert place.nodes.hydrate_sync(INO)
    place.journal.sync()
    bitmap, _, is_whole, hydrated = place.scan()[OBJECT]
    place.nodes.close()
    os.truncate(place.object_path(OBJECT), size)
    place.nodes = place._new_nodes()
    place.nodes.add(INO, SIZE, place.store([Layer({b: page(3 + 4 * b) for b in range(20)})]))
    place.nodes.attach(
        INO,
        OBJECT,
        bitmap=bitmap,
        limit=6,
        mapped=True,
        fresh=False,
        hydrated=hydrated,
        whole=is_whole,
    )
    assert live_blocks(place) == {5}
    place.nodes.truncate(INO, SIZE)
    assert place.nodes.read(INO, 0, SIZE) == BELOW[:size].ljust(SIZE, b"\0")


def test_cut_inside_of_a_page_that_cannot_be_read(place: Place) -> None:
    place.nodes.add(2, 2 * BLCKSZ, place.store_raw(page(2) * 2))
    place.attach(2, 0x55, 2 * BLCKSZ)
    (place.root / "store" / "plain").unlink()
    with pytest.raises(OSError) as caught:
        place.nodes.truncate(2, BLCKSZ + 1)
    assert caught.value.errno == errno.EIO
    assert place.nodes.size(2) == 2 * BLCKSZ
    place.nodes.truncate(2, BLCKSZ)
    assert place.nodes.size(2) == BLCKSZ


def test_growth_waits_for_a_cut_whose_record_failed() -> None:
    """No limit falls: the record that is missing is the one of the cut block."""
    with Place() as place:
        place.nodes.add(INO, 2 * BLCKSZ, place.store_raw(page(2) * 2))
        place.attach(INO, OBJECT, 2 * BLCKSZ)
        # The journal becomes longer than the object, so that a limit ends the journal only.
        while place.journal.end <= 2 * BLCKSZ:
            place.journal.append(b"\x01" + SESSION)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Room for PAGES_LIVE, and not for PAGES.
        n_bytes = 8 + len(pages_record(OBJECT, {1}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (place.journal.end + n_bytes, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                place.nodes.truncate(INO, BLCKSZ + 5)
            assert live_blocks(place) == {1}
            with pytest.raises(OSError, match="too large"):
                place.nodes.truncate(INO, 2 * BLCKSZ)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        place.nodes.truncate(INO, 2 * BLCKSZ)
        assert durable_blocks(place) == {1}
        assert place.journal.synced == place.journal.end
        assert place.nodes.read(INO, BLCKSZ, BLCKSZ) == page(2)[:5].ljust(BLCKSZ, b"\0")


# --- failures -----------------------------------------------------------------------------------


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file can grow beyond this many bytes: writes are cut short there and then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    allowed = 6 * BLCKSZ + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    yield allowed
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_write_leaves_the_version_below(place: Place, file_size_limit: int) -> None:
    # Blocks 5 to 8: the limit lies in block 6.
    assert file_size_limit // BLCKSZ == 6
    for offset, data in ((5 * BLCKSZ, page(2) * 4), (6 * BLCKSZ + 50, b"x" * 100)):
        with pytest.raises(OSError, match="too large") as caught:
            place.nodes.write(INO, offset, data)
        assert caught.value.errno == errno.EFBIG
    assert place.nodes.read(INO, 0, SIZE) == BELOW
    assert live_blocks(place) == set()
    assert place.nodes.counters()["write_errors"] == 2
    assert place.nodes.size(INO) == SIZE


def test_failed_growth_leaves_the_objects_size(place: Place, file_size_limit: int) -> None:
    place.nodes.add(2, 0, [])
    place.attach(2, 0x55, 0, mapped=False)
    with pytest.raises(OSError, match="too large"):
        place.nodes.write(2, file_size_limit - 10, b"0123456789abcdef")
    assert place.nodes.size(2) == file_size_limit
    assert place.nodes.read(2, file_size_limit - 10, 100) == b"0123456789"


def test_write_over_a_page_that_cannot_be_read(place: Place) -> None:
    place.nodes.add(2, 2 * BLCKSZ, place.store_raw(page(2) * 2))
    place.attach(2, 0x55, 2 * BLCKSZ)
    (place.root / "store" / "plain").unlink()
    with pytest.raises(OSError) as caught:
        place.nodes.write(2, 10, b"x")
    assert caught.value.errno == errno.EIO
    # A whole page needs nothing from below.
    place.nodes.write(2, 0, page(6))
    assert place.nodes.read(2, 0, BLCKSZ) == page(6)
    assert live_blocks(place) == set()


def test_journal_that_refuses_records_refuses_new_blocks() -> None:
    full = os.open("/dev/full", os.O_RDWR)
    try:
        with Place() as place:
            place.journal = _native.Journal(full, 64)
            place.nodes = place._new_nodes()
            place.nodes.add(INO, BLCKSZ, place.store_raw(page(2)))
            place.attach(INO, OBJECT, BLCKSZ)
            for _ in range(2):
                with pytest.raises(OSError):
                    place.nodes.write(INO, 0, page(6))
                assert place.nodes.read(INO, 0, BLCKSZ) == page(2)
            with pytest.raises(OSError):
                place.nodes.fsync(INO, True)
    finally:
        os.close(full)


def test_missing_object(place: Place) -> None:
    place.nodes.add(2, 0, [])
    with pytest.raises(FileNotFoundError):
        place.nodes.attach(2, 0x99, bitmap=None, limit=0, mapped=False, fresh=True)
    assert not place.nodes.has_object(2)
    with pytest.raises(FileExistsError):
        place.nodes.attach(INO, OBJECT, bitmap=None, limit=0, mapped=False, fresh=True)


@pytest.mark.parametrize(
    ("offset", "size"), [(1 << 63, 1), ((1 << 63) - 1, 1), ((1 << 64) - 1, 2), (1 << 62, 1)]
)
def test_offsets_out_of_range(place: Place, offset: int, size: int) -> None:
    for call in (
        lambda: place.nodes.write(INO, offset, b"x" * size),
        lambda: place.nodes.truncate(INO, offset),
        lambda: place.nodes.fallocate(INO, 0, offset, size),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno in (errno.EFBIG, errno.EINVAL)
    assert place.nodes.read(INO, offset, size) == b""
    assert place.nodes.read(INO, 0, SIZE) == BELOW


@pytest.mark.parametrize("mode", [2, 8 | 1, 0x20, 0x40, 0x10 | 2 | 1])
def test_unsupported_modes_of_fallocate(place: Place, mode: int) -> None:
    with pytest.raises(OSError) as caught:
        place.nodes.fallocate(INO, mode, 0, BLCKSZ)
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(OSError) as caught:
        place.nodes.fallocate(INO, 0, 0, 0)
    assert caught.value.errno == errno.EINVAL


# --- what stays ---------------------------------------------------------------------------------


def test_attributes_are_the_objects(place: Place) -> None:
    info = place.object_path(OBJECT).stat()
    assert place.nodes.stat(INO) == (
        info.st_mode,
        info.st_uid,
        info.st_gid,
        info.st_size,
        info.st_atime_ns,
        info.st_mtime_ns,
        info.st_ctime_ns,
        info.st_blocks,
        info.st_nlink,
    )


def test_bits_at_or_above_the_limit_do_not_matter(place: Place) -> None:
    place.nodes.add(2, SIZE, place.store([Layer({b: page(3 + 4 * b) for b in range(20)})], "x"))
    place.make_object(0x55, SIZE)
    place.nodes.attach(
        2, 0x55, bitmap=bits_of({0, 19, 300}, 64), limit=10, mapped=True, fresh=False
    )
    expected = bytes(BLCKSZ) + BELOW[BLCKSZ : 10 * BLCKSZ]
    assert place.nodes.read(2, 0, SIZE) == expected.ljust(SIZE, b"\0")


def test_unlinked_object_stays_usable() -> None:
    """A server may hold a file that has no name any more: its descriptor can't be had again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        with Place() as place:
            for ino in range(1, 80):
                place.nodes.add(ino, 0, [])
                place.attach(ino, ino, 0, mapped=False)
                place.nodes.write(ino, 0, b"%d" % ino)
                if ino == 1:
                    place.object_path(1).unlink()
            assert place.nodes.counters()["open_files"] <= 33
            for ino in range(1, 80):
                assert place.nodes.read(ino, 0, 10) == b"%d" % ino
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_gate(place: Place) -> None:
    place.nodes.gate_close()
    done = threading.Event()

    def write() -> None:
        place.nodes.write(INO, 0, b"late")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        # Reads and fsyncs pass; the write does not, however often others come and go.
        for _ in range(20):
            assert place.nodes.read(INO, 0, BLCKSZ) == BELOW[:BLCKSZ]
            place.nodes.fsync(INO, True)
        assert not done.is_set()
        place.nodes.gate_close()
        place.nodes.gate_open()
        assert not done.is_set()
    finally:
        place.nodes.gate_open()
        thread.join()
    assert done.is_set()
    assert place.nodes.read(INO, 0, 4) == b"late"
    with pytest.raises(ValueError, match="open"):
        place.nodes.gate_open()


def test_threads_on_one_file(place: Place) -> None:
    """Halves of pages by one thread, the other halves by another, fsyncs by a third."""
    stamps = {}

    def write(half: int) -> None:
        for i in range(100):
            b = i * 7 % N_BLOCKS
            stamps[b, half] = i
            place.nodes.write(INO, b * BLCKSZ + half * 4096, struct.pack("<I", i) * 1024)

    threads = [threading.Thread(target=write, args=(half,)) for half in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        place.nodes.fsync(INO, True)
    for thread in threads:
        thread.join()
    content = place.nodes.read(INO, 0, SIZE)
    for (b, half), stamp in stamps.items():
        start = b * BLCKSZ + half * 4096
        assert content[start : start + 4096] == struct.pack("<I", stamp) * 1024
    place.nodes.fsync(INO, True)
    assert durable_blocks(place) == set(range(N_BLOCKS))
