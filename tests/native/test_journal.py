"""The journal: frames, rollback, group commit, and a scan that is strict about every length."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from native_store import JOURNAL_HEADER, NO_LIMIT, NO_SESSION, SESSION, blocks_in, pages_record

from pbkfs import _native


def frame(payload: bytes) -> bytes:
    body = struct.pack("<I", len(payload)) + payload
    return struct.pack("<I", reference.crc32c(body)) + body


def limit_record(object_id: int, limit: int) -> bytes:
    return struct.pack("<BQI", 4, object_id, limit)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT)
    os.write(fd, JOURNAL_HEADER)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def scan_of(
    fd: int, data: bytes, session: bytes = SESSION
) -> tuple[int, list[bytes], dict[int, tuple[set[int], int, bool]]]:
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)
    end, names, maps = _native.scan_journal(fd, session)
    return (
        end,
        names,
        {k: (blocks_in(bits), limit, whole) for k, (bits, limit, whole, _) in maps.items()},
    )


def test_frames_are_as_documented(fd: int) -> None:
    journal = _native.Journal(fd, len(JOURNAL_HEADER))
    payloads = [b"\x10name", b"\x14" + bytes(70000)]
    for payload in payloads:
        journal.append(payload)
    assert content(fd) == JOURNAL_HEADER + b"".join(map(frame, payloads))
    assert journal.end == os.fstat(fd).st_size
    assert _native.scan_journal(fd, SESSION) == (journal.end, payloads, {})


@pytest.mark.parametrize("payload", [b"", bytes((16 << 20) + 1)])
def test_payload_out_of_range(fd: int, payload: bytes) -> None:
    journal = _native.Journal(fd, len(JOURNAL_HEADER))
    with pytest.raises(ValueError, match="16 MiB"):
        journal.append(payload)
    journal.append(b"\x10" * (16 << 20))
    assert len(_native.scan_journal(fd, SESSION)[1][0]) == 16 << 20


def test_failed_append_leaves_no_trace(fd: int) -> None:
    journal = _native.Journal(fd, len(JOURNAL_HEADER))
    journal.append(b"\x10first")
    before = content(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # 20 bytes of the frame fit: a short write, and then an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
        with pytest.raises(OSError, match="too large") as caught:
            journal.append(b"\x10" + bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert content(fd) == before
    assert journal.end == len(before)
    journal.append(b"\x10second")
    assert _native.scan_journal(fd, SESSION)[1] == [b"\x10first", b"\x10second"]


def test_append_that_cannot_be_taken_back_ends_the_journal() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        journal = _native.Journal(fd, 64)
        with pytest.raises(OSError, match="space") as caught:
            journal.append(b"\x10x")
        assert caught.value.errno == errno.ENOSPC
        for call in (lambda: journal.append(b"\x10x"), journal.sync):
            with pytest.raises(OSError) as later:
                call()
            assert later.value.errno == errno.EIO
    finally:
        os.close(fd)


def test_failed_sync_is_not_forgotten() -> None:
    read, write = os.pipe()
    try:
        journal = _native.Journal(write, 64)  # fdatasync of a pipe is EINVAL
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                journal.sync()
            assert caught.value.errno == errno.EINVAL
        assert journal.synced == 0
    finally:
        os.close(read)
        os.close(write)


def test_sync(fd: int) -> None:
    journal = _native.Journal(fd, len(JOURNAL_HEADER))
    assert journal.synced == 0
    journal.append(b"\x10x")
    journal.sync()
    assert journal.synced == journal.end
    journal.append(b"\x10x")
    assert journal.synced < journal.end


def test_appends_and_syncs_of_many_threads(fd: int) -> None:
    journal = _native.Journal(fd, len(JOURNAL_HEADER))
    late: list[int] = []

    def work(number: int) -> None:
        for i in range(50):
            journal.append(bytes([16, number, i]) * (1 + i))
            end = journal.end
            if i % 5 == 0:
                journal.sync()
                if journal.synced < end:
                    late.append(end)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert late == []
    end, names, _ = _native.scan_journal(fd, SESSION)
    assert end == journal.end
    for number in range(4):
        own = [name for name in names if name[1] == number]
        assert own == [bytes([16, number, i]) * (1 + i) for i in range(50)]


@pytest.mark.parametrize("end", [0, 63, 1 << 63])
def test_end_out_of_range(fd: int, end: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        _native.Journal(fd, end)


# --- scan ---------------------------------------------------------------------------------------


def test_page_maps(fd: int) -> None:
    session = b"\x01" + SESSION
    records = [
        pages_record(1, {0, 63, 64, 200}),
        pages_record(1, {70}, kind=3),  # before any SESSION
        session,
        pages_record(1, {71}, kind=3),
        b"\x01" + bytes(range(1, 17)),
        pages_record(1, {72}, kind=3),  # of another session
        session,
        pages_record(2, {5, 9, 100}, kind=3),
        limit_record(2, 10),
        limit_record(2, 20),
        pages_record(2, {9, 15}),  # 15 is at or above the limit
        struct.pack("<BQ", 5, 3),
        pages_record(4, set()),
    ]
    data = JOURNAL_HEADER + b"".join(map(frame, records))
    expected = {
        1: ({0, 63, 64, 71, 200}, NO_LIMIT, False),
        2: ({5, 9}, 10, False),
        3: (set(), NO_LIMIT, True),
        4: (set(), NO_LIMIT, False),
    }
    assert scan_of(fd, data) == (len(data), [], expected)
    expected[1] = ({0, 63, 64, 200}, NO_LIMIT, False)
    expected[2] = ({9}, 10, False)
    assert scan_of(fd, data, NO_SESSION) == (len(data), [], expected)


@given(data=st.data())
def test_scan_ends_at_the_first_frame_that_does_not_check(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    payloads = data.draw(st.lists(st.binary(max_size=40).map(lambda b: b"\x10" + b), max_size=6))
    frames = [frame(p) for p in payloads]
    good = JOURNAL_HEADER + b"".join(frames)
    bad = bytearray(good)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(64, len(bad)))
        del bad[cut:]
    if len(bad) > 64 and data.draw(st.booleans()):
        at = data.draw(st.integers(64, len(bad) - 1))
        bad[at] ^= data.draw(st.integers(1, 255))
    n_good, position = 0, 64
    for one in frames:
        if bytes(bad[position : position + len(one)]) != one:
            break
        position += len(one)
        n_good += 1
    fd = os.open(tmp_path_factory.mktemp("scan") / "journal", os.O_RDWR | os.O_CREAT)
    try:
        assert scan_of(fd, bytes(bad)) == (position, payloads[:n_good], {})
    finally:
        os.close(fd)


NOT_OF_THE_FORMAT = {
    "unknown type": b"\x06x",
    "type zero": b"\x00",
    "session too short": b"\x01" + bytes(15),
    "session too long": b"\x01" + bytes(17),
    "pages without a count": b"\x02" + bytes(11),
    "fewer ranges than counted": struct.pack("<BQIII", 2, 1, 2, 0, 1),
    "more ranges than counted": struct.pack("<BQIIIII", 2, 1, 1, 0, 1, 0, 1),
    "count that overflows": struct.pack("<BQI", 2, 1, 0x20000000),
    "empty range": struct.pack("<BQIII", 2, 1, 1, 5, 0),
    "range that overflows": struct.pack("<BQIII", 2, 1, 1, 0xFFFFFFFF, 0xFFFFFFFF),
    "range of too many blocks": struct.pack("<BQIII", 3, 1, 1, 0, 0x7FFFFFFF),
    "limit too short": b"\x04" + bytes(11),
    "limit too long": b"\x04" + bytes(13),
    "whole too short": b"\x05" + bytes(7),
}


@pytest.mark.parametrize("case", NOT_OF_THE_FORMAT)
def test_frame_that_checks_but_is_not_of_the_format(fd: int, case: str) -> None:
    data = JOURNAL_HEADER + frame(b"\x10name") + frame(NOT_OF_THE_FORMAT[case])
    with pytest.raises(OSError, match="not of its format") as caught:
        scan_of(fd, data)
    assert caught.value.errno == errno.EIO


HEADERS = {
    "empty": (b"", "not a journal"),
    "short": (JOURNAL_HEADER[:63], "not a journal"),
    "other magic": (b"X" + JOURNAL_HEADER[1:], "not a journal"),
    "other version": (JOURNAL_HEADER[:8] + b"\x02" + JOURNAL_HEADER[9:], "format version"),
    "flags": (JOURNAL_HEADER[:12] + b"\x01" + JOURNAL_HEADER[13:], "format version"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(fd: int, case: str) -> None:
    header, message = HEADERS[case]
    with pytest.raises(OSError, match=message):
        scan_of(fd, header)


def test_frames_longer_than_the_buffer(fd: int) -> None:
    payloads = [bytes([16 + i % 3]) * (1 + i * 99_999) for i in range(8)]
    data = JOURNAL_HEADER + b"".join(map(frame, payloads))
    assert scan_of(fd, data) == (len(data), payloads, {})
    assert scan_of(fd, data[:-1]) == (len(data) - 8 - len(payloads[-1]), payloads[:-1], {})


def test_length_beyond_the_limit_ends_the_scan(fd: int) -> None:
    body = struct.pack("<I", (16 << 20) + 1) + b"\x10"
    data = JOURNAL_HEADER + struct.pack("<I", reference.crc32c(body)) + body
    assert scan_of(fd, data) == (64, [], {})


def test_session_has_16_bytes(fd: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        _native.scan_journal(fd, b"short")


def test_hydrated_blocks_are_told_from_changed_ones(fd: int) -> None:
    """PAGES of any kind make a hydrated block a changed one; PAGES_LIVE does so of any session."""

    def scan(*payloads: bytes, session: bytes = SESSION) -> tuple[set[int], set[int], int, bool]:
        journal = _native.Journal(fd, len(JOURNAL_HEADER))
        journal.append(b"\x01" + SESSION)
        for payload in payloads:
            journal.append(payload)
        os.ftruncate(fd, journal.end)
        changed, limit, whole, hydrated = _native.scan_journal(fd, session)[2][7]
        return blocks_in(changed), blocks_in(hydrated), limit, whole

    hydrated = pages_record(7, {1, 2, 3, 70}, kind=6)
    live = pages_record(7, {3, 5}, kind=3)
    limit = struct.pack("<BQI", 4, 7, 70)
    whole = struct.pack("<BQ", 5, 7)
    other = bytes(16)
    assert scan(hydrated) == (set(), {1, 2, 3, 70}, NO_LIMIT, False)
    assert scan(hydrated, pages_record(7, {2, 9})) == ({2, 9}, {1, 3, 70}, NO_LIMIT, False)
    assert scan(pages_record(7, {2}), hydrated) == ({2}, {1, 3, 70}, NO_LIMIT, False)
    # Of another session: block 3 is in the object anyway, block 5 perhaps never got there.
    assert scan(hydrated, live) == ({3, 5}, {1, 2, 70}, NO_LIMIT, False)
    assert scan(hydrated, live, session=other) == ({3}, {1, 2, 70}, NO_LIMIT, False)
    assert scan(hydrated, live, whole, session=other) == ({3, 5}, set(), NO_LIMIT, True)
    assert scan(hydrated, limit) == (set(), {1, 2, 3}, 70, False)
    assert scan(limit, hydrated) == (set(), {1, 2, 3}, 70, False)
