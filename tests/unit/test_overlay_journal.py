"""Records: their bytes, what a decoder refuses, and which of them a compaction may leave out."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkfs import _native
from pbkfs.backup.empty import EmptyBase
from pbkfs.errors import FormatError
from pbkfs.overlay import journal as records
from pbkfs.overlay.diff import Diff
from pbkfs.overlay.inode import Directory, File
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.replay import Replay
from pbkfs.overlay.stack import Stack

NAME = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
PATH = st.lists(NAME, max_size=4).map(b"/".join)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
RECORD = st.one_of(
    st.builds(records.Mkdir, U32, U32, U32, I64, PATH),
    st.builds(records.Create, U64, PATH),
    st.builds(records.CopyUp, U64, st.booleans(), PATH),
    st.builds(records.Symlink, U32, U32, I64, PATH, st.binary(max_size=4095)),
    st.builds(records.Remove, PATH),
    st.builds(records.Rename, st.sampled_from([0, 2]), PATH, PATH),
    st.builds(records.Link, PATH, PATH),
    st.builds(records.SetAttr, st.integers(1, 31), U32, U32, U32, I64, I64, PATH),
    st.builds(records.WalOut),
)


@given(RECORD)
def test_records_come_back(record: records.Record) -> None:
    payload = record.encode()
    assert payload[0] == record.type_code
    assert records.decode(payload) == record


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            records.Mkdir(0o700, 1, 2, -3, b"a/b"),
            b"\x10" + struct.pack("<IIIqH", 0o700, 1, 2, -3, 3) + b"a/b",
        ),
        (records.Create(0x1FF, b"f"), b"\x11" + struct.pack("<QH", 0x1FF, 1) + b"f"),
        (records.CopyUp(7, True, b"f"), b"\x12" + struct.pack("<QBH", 7, 1, 1) + b"f"),
        (
            records.Symlink(1, 2, 3, b"l", b"to/it"),
            b"\x13" + struct.pack("<IIqH", 1, 2, 3, 1) + b"l" + b"\5\0to/it",
        ),
        (records.Remove(b"gone"), b"\x14\4\0gone"),
        (records.Rename(2, b"x", b"yy"), b"\x15" + struct.pack("<I", 2) + b"\1\0x\2\0yy"),
        (records.Link(b"x", b"y"), b"\x16\1\0x\1\0y"),
        (
            records.SetAttr(31, 1, 2, 3, 4, 5, b""),
            b"\x17" + struct.pack("<IIIIqqH", 31, 1, 2, 3, 4, 5, 0),
        ),
        (records.WalOut(), b"\x18"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, bytes) else "",
)
def test_bytes_are_those_of_the_architecture(record: records.Record, expected: bytes) -> None:
    assert record.encode() == expected


@given(RECORD, st.data())
def test_damaged_records_are_refused_or_other_records(
    record: records.Record, data: st.DataObject
) -> None:
    payload = bytearray(record.encode())
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(payload)))
    for damaged in (bytes(payload), bytes(payload[:cut]), bytes(payload) + b"\0"):
        try:
            found = records.decode(damaged)
        except FormatError:
            continue
        assert found.encode() == damaged


@pytest.mark.parametrize(
    "path", [b"/a", b"a/", b"a//b", b"..", b"a/../b", b".", b"a\0", b"n" * 256]
)
def test_paths_that_lead_elsewhere_are_refused(path: bytes) -> None:
    with pytest.raises(FormatError, match="malformed"):
        records.decode(records.Remove(path).encode())


def test_path_that_does_not_fit_its_length_is_an_error_of_its_own() -> None:
    with pytest.raises(OSError, match="too long"):
        records.Remove(b"d/" * 40000).encode()


@given(st.sets(st.integers(0, 1500)))
def test_runs_are_the_set_bits(bits: set[int]) -> None:
    bitmap = sum(1 << bit for bit in bits).to_bytes(192, "little")
    runs = list(records.find_runs(bitmap))
    assert {first + i for first, count in runs for i in range(count)} == bits
    for (first, count), (following, _) in itertools.pairwise(runs):
        assert first + count < following


@settings(max_examples=30)
@given(
    bits=st.sets(st.integers(0, 70000), max_size=40),
    limit=st.none() | st.integers(0, 70000),
    is_whole=st.booleans(),
    names=st.lists(RECORD, max_size=5),
)
def test_native_scan_reads_what_a_compaction_writes(
    tmp_path_factory: pytest.TempPathFactory,
    bits: set[int],
    limit: int | None,
    is_whole: bool,
    names: list[records.Record],
) -> None:
    bitmap = sum(1 << bit for bit in bits).to_bytes(8800, "little")
    payloads = [*(record.encode() for record in names), records.encode_session(b"b" * 16)]
    payloads += records.encode_pages(77, bitmap)
    if limit is not None:
        payloads.append(records.encode_limit(77, limit))
    if is_whole:
        payloads.append(records.encode_whole(77))
    content = records.encode_header(b"u" * 16) + b"".join(map(records.encode_frame, payloads))
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.write_bytes(content + b"torn")
    with path.open("rb") as file:
        end, found, maps = _native.scan_journal(file.fileno(), bytes(16))
    assert end == len(content) == records.HEADER_BYTES + records.count_frame_bytes(payloads)
    assert found == [record.encode() for record in names]
    if bits or limit is not None or is_whole:
        found_bits, found_limit, found_whole, _ = maps[77]
        # From the limit on, a block is the object's own with or without a bit.
        counted = {bit for bit in bits if limit is None or bit < limit}
        assert {f + i for f, n in records.find_runs(found_bits) for i in range(n)} == counted
        assert found_limit == (records.NO_LIMIT if limit is None else limit)
        assert found_whole == is_whole
    records.check_header(content[: records.HEADER_BYTES], b"u" * 16)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"short", "has only 5 bytes"),
        (b"PBKFSJNX" + bytes(56), "begins with"),
        (b"PBKFSJNL" + struct.pack("<I", 2) + bytes(52), "version 2"),
        (records.encode_header(b"x" * 16), "another diff"),
    ],
)
def test_header_of_something_else_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        records.check_header(header, b"u" * 16)


# --- leaving out files that came and went ---------------------------------------------------------


class _Names:
    """A namespace that records are applied to, as a replay does."""

    def __init__(self, diff: Diff) -> None:
        base = EmptyBase((0, 0))
        self.namespace = Namespace(base, (0, 0), 0)
        self.replay = Replay(self.namespace, Stack(base, diff, []), 0)

    def apply(self, record: records.Record) -> bool:
        try:
            self.replay._apply(record)
        except OSError:
            return False
        return True

    def shape(self) -> dict[bytes, object]:
        """Path -> what is there; files by object, so that names of one file are seen as such."""
        found: dict[bytes, object] = {}

        def visit(directory: Directory, path: bytes) -> None:
            for name, inode in self.namespace.children(directory).items():
                child = path + b"/" + name if path else name
                if isinstance(inode, File):
                    found[child] = (inode.pieces[0].object_id, inode.n_names, inode.mode)
                else:
                    found[child] = inode.mode
                if isinstance(inode, Directory):
                    visit(inode, child)

        visit(self.namespace.root, b"")
        return found


_FEW = st.lists(st.sampled_from([b"a", b"b", b"c", b"pg_wal"]), min_size=1, max_size=3).map(
    b"/".join
)


_SOME_RECORDS = st.lists(
    st.one_of(
        st.builds(records.Create, st.just(0), _FEW),
        st.builds(records.Create, st.just(0), _FEW),
        st.builds(records.Remove, _FEW),
        st.builds(records.Remove, _FEW),
        st.builds(records.Mkdir, st.just(0o700), st.just(0), st.just(0), st.just(0), _FEW),
        st.builds(records.Rename, st.sampled_from([0, 2]), _FEW, _FEW),
        st.builds(records.Link, _FEW, _FEW),
        st.builds(records.WalOut),
    ),
    max_size=60,
)


def test_dropped_pairs_change_nothing(memory: Path) -> None:
    diff = Diff.open(memory / "diff", EmptyBase((0, 0)))

    @settings(max_examples=400)
    @given(_SOME_RECORDS)
    def check(tried: list[records.Record]) -> None:
        full = _Names(diff)
        kept: list[bytes] = []
        for number, record in enumerate(tried):
            if isinstance(record, records.Create):
                record.object_id = number + 1
            if full.apply(record):
                kept.append(record.encode())
        short = _Names(diff)
        for payload in records.drop_pairs(kept):
            assert short.apply(records.decode(payload)), records.decode(payload)
        assert short.shape() == full.shape()

    check()
    diff.close()


def test_pairs_are_dropped() -> None:
    def encode(*wanted: records.Record) -> list[bytes]:
        return [record.encode() for record in wanted]

    stays = records.Create(1, b"stays")
    came, went = records.Create(2, b"tmp"), records.Remove(b"tmp")
    other = records.Remove(b"base/5/16384")
    assert records.drop_pairs(encode(stays, came, other, went)) == encode(stays, other)
    moved = records.Rename(0, b"dir", b"new")
    assert records.drop_pairs(encode(came, moved, went)) == encode(came, moved, went)
