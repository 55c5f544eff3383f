"""Reading pages: every kind of source against a model, and what damage does."""

from __future__ import annotations

import errno
import os
import resource
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fix_postgres import wait_until
from hypothesis import given
from hypothesis import strategies as st
from native_store import (
    BLCKSZ,
    NO_LIMIT,
    NONE,
    PGLZ,
    ZLIB,
    Layer,
    Place,
    bits_of,
    compose,
    page,
)

INO = 7


@pytest.fixture
def place() -> Iterator[Place]:
    with Place() as place:
        yield place


def fails_with_eio(place: Place, offset: int, length: int) -> None:
    with pytest.raises(OSError) as caught:
        place.nodes.read(INO, offset, length)
    assert caught.value.errno == errno.EIO


layers_of_blocks = st.builds(
    Layer,
    pages=st.dictionaries(st.integers(0, 24), st.integers(0, 400).map(page), max_size=24),
    compress=st.sampled_from([NONE, ZLIB, PGLZ]),
    limit=st.one_of(st.just(NO_LIMIT), st.integers(0, 26)),
    is_padded=st.just(False),
    has_headers=st.booleans(),
)


@st.composite
def chains(draw: st.DrawFn) -> list[Layer]:
    layers = []
    limit = NO_LIMIT
    for layer in draw(st.lists(layers_of_blocks, min_size=1, max_size=4)):
        limit = layer.limit = min(limit, layer.limit)
        if not layer.pages:
            layer.has_headers = False  # the list has no place in the map for a file without pages
        if not layer.has_headers:
            layer.is_padded = draw(st.booleans())
            layer.marker = draw(st.none() | st.integers(0, 26))
        layers.append(layer)
    return layers


@given(chain=chains(), n_blocks=st.integers(0, 26), reads=st.data())
def test_chains_read_as_composed(chain: list[Layer], n_blocks: int, reads: st.DataObject) -> None:
    size = n_blocks * BLCKSZ
    expected = compose(chain, size)
    with Place() as place:
        place.nodes.add(INO, size, place.store(chain))
        assert place.nodes.read(INO, 0, size + 1) == expected
        for _ in range(4):
            offset = reads.draw(st.integers(0, size + 10))
            length = reads.draw(st.integers(0, 6 * BLCKSZ))
            assert place.nodes.read(INO, offset, length) == expected[offset : offset + length]
            if reads.draw(st.booleans()):
                place.nodes.drop_indexes()
        assert place.lines() == []


@given(size=st.integers(0, 5 * BLCKSZ), offset=st.integers(0, 6 * BLCKSZ), data=st.data())
def test_raw_reads_as_it_is(size: int, offset: int, data: st.DataObject) -> None:
    content = b"".join(page(2 + 4 * i) for i in range(5))[:size]
    length = data.draw(st.integers(0, 6 * BLCKSZ))
    with Place() as place:
        place.nodes.add(INO, size, place.store_raw(content))
        assert place.nodes.read(INO, offset, length) == content[offset : offset + length]


def test_reads_longer_than_one_request(place: Place) -> None:
    chain = [
        Layer({b: page(b) for b in range(0, 400, 3)}, compress=NONE),
        Layer({b: page(1000 + b) for b in range(400)}, compress=ZLIB),
    ]
    size = 400 * BLCKSZ
    place.nodes.add(INO, size, place.store(chain))
    assert place.nodes.read(INO, 100, size) == compose(chain, size)[100:]


def test_neighbours_are_read_at_once(place: Place) -> None:
    chain = [
        Layer({b: page(2 + 4 * b) for b in range(64) if b % 8 == 5}, compress=NONE),
        Layer({b: page(1002 + 4 * b) for b in range(64)}, compress=NONE),
    ]
    place.nodes.add(INO, 64 * BLCKSZ, place.store(chain))
    place.nodes.read(INO, 0, BLCKSZ)
    place.nodes.reset_counters()
    assert place.nodes.read(INO, 0, 64 * BLCKSZ) == compose(chain, 64 * BLCKSZ)
    counters = place.nodes.counters()
    # The FULL's records in one read, although 8 of them are replaced; so are the increment's.
    assert counters["base_reads"] == 2
    assert counters["pages_raw"] == 64
    assert counters["index_loads"] == 0


def test_sealed_objects_above_a_chain(place: Place) -> None:
    chain = [Layer({b: page(3 + 4 * b) for b in range(10)})]
    older = b"".join(page(401 + 4 * b) for b in range(8))
    newer = b"".join(page(802 + 4 * b) for b in range(12))[: 12 * BLCKSZ - 100]
    place.make_object(0x101, older)
    place.make_object(0x202, newer)
    sources = [
        # cut to 6 blocks once, then grown: nothing of blocks 6 … comes from below
        ("object", place.objects_fd, 0x202, "newer", bits_of({0, 5}), 6),
        ("object", place.objects_fd, 0x101, "older", bits_of({1, 5, 7}), 8),
        *place.store(chain),
    ]
    place.nodes.add(INO, len(newer), sources)
    expected = bytearray(compose(chain, len(newer)))
    for content, blocks in ((older, {1, 5}), (newer, {0, 5, *range(6, 12)})):
        for b in blocks:
            expected[b * BLCKSZ : (b + 1) * BLCKSZ] = content[b * BLCKSZ : (b + 1) * BLCKSZ]
    assert place.nodes.read(INO, 0, len(newer) + 1) == expected[: len(newer)]


def test_whole_sealed_object_hides_the_rest(place: Place) -> None:
    content = page(2) + page(6)[:100]
    place.make_object(0x303, content)
    place.nodes.add(INO, len(content), [("object", place.objects_fd, 0x303, "sealed", None, 0)])
    assert place.nodes.read(INO, 0, 1 << 20) == content


def test_old_zlib_page_of_8192_bytes(place: Place) -> None:
    """Before 2.0.23 a page that compressed to exactly 8192 bytes was stored compressed."""
    # Stored blocks of deflate make any length: header, two blocks, checksum.
    content = page(2)
    deflate = zlib.compressobj(0)
    packed = deflate.compress(content) + deflate.flush()
    assert packed[0] == 0x78
    # A stream of exactly 8192 bytes that inflates to one page: a page with a compressible piece.
    for n_zeros in range(8, 400):
        candidate = content[: BLCKSZ - n_zeros] + bytes(n_zeros)
        packed = zlib.compress(candidate, 1)
        if len(packed) == BLCKSZ:
            break
    else:
        pytest.fail("no page compresses to exactly 8192 bytes")
    sane = struct.pack("<QHHHHHHI", 0, 0, 0, 24, 8192, 8192, 8192 | 4, 0).ljust(BLCKSZ, b"\1")
    sane = b"\x78" + sane[1:]
    stored = b"".join(
        struct.pack("<Ii", b, BLCKSZ) + payload for b, payload in enumerate((packed, sane, content))
    )
    (place.root / "store" / "old").write_bytes(stored)
    source = ("pages", place.root_fd, b"old", len(stored), "OLD", ZLIB, NO_LIMIT, True, True, None)
    place.nodes.add(INO, 3 * BLCKSZ, [source])
    assert place.nodes.read(INO, 0, 3 * BLCKSZ) == candidate + sane + content
    place.nodes.remove(INO)
    place.nodes.add(INO, 3 * BLCKSZ, [(*source[:8], False, None)])
    assert place.nodes.read(INO, 0, BLCKSZ) == packed


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [ZLIB, PGLZ])
def test_page_that_does_not_inflate(place: Place, compress: int) -> None:
    layer = Layer({b: page(1 + 4 * b) for b in range(4)}, compress=compress)
    sources = place.store([layer])
    with (place.root / "store" / "1259-0").open("r+b") as file:
        file.seek(layer.positions[2] + 8)
        file.write(b"\xff" * 12)
    place.nodes.add(INO, 4 * BLCKSZ, sources)
    fails_with_eio(place, 0, 4 * BLCKSZ)
    assert place.lines() == ["file=1259-0 block=2 layer=SBOL94 reason=page does not inflate"]
    fails_with_eio(place, 2 * BLCKSZ, 1)
    for b in (0, 1, 3):
        assert place.nodes.read(INO, b * BLCKSZ, BLCKSZ) == page(1 + 4 * b)
    assert place.nodes.counters()["read_errors"] == 2


@pytest.mark.parametrize("field", [0, 4])
def test_record_header_that_disagrees(place: Place, field: int) -> None:
    layer = Layer({b: page(3 + 4 * b) for b in range(4)})
    sources = place.store([layer])
    with (place.root / "store" / "1259-0").open("r+b") as file:
        file.seek(layer.positions[1] + field)
        file.write(b"\x07")
    place.nodes.add(INO, 4 * BLCKSZ, sources)
    fails_with_eio(place, BLCKSZ, BLCKSZ)
    assert place.lines() == [
        "file=1259-0 block=1 layer=SBOL94 reason=record header disagrees with the index"
    ]
    assert place.nodes.read(INO, 0, BLCKSZ) == page(3)


def test_stored_file_is_missing(place: Place) -> None:
    sources = place.store([Layer({0: page(1)}, label="SBOL 94\n")])
    (place.root / "store" / "1259-0").unlink()
    place.nodes.add(INO, BLCKSZ, sources)
    fails_with_eio(place, 0, 10)
    assert place.lines() == [
        r"file=1259-0 block=0 layer=SBOL\x2094\x0a reason=stored file can't be opened: ENOENT"
    ]


def test_stored_file_is_shorter_than_listed(place: Place) -> None:
    layer = Layer({b: page(2 + 4 * b) for b in range(4)}, compress=NONE)
    sources = place.store([layer])
    os.truncate(place.root / "store" / "1259-0", layer.positions[3] + 100)
    place.nodes.add(INO, 4 * BLCKSZ, sources)
    fails_with_eio(place, 0, 4 * BLCKSZ)
    assert place.lines() == [
        "file=1259-0 block=3 layer=SBOL94 reason=stored file is shorter than listed"
    ]
    assert place.nodes.read(INO, 0, 3 * BLCKSZ) == compose([layer], 3 * BLCKSZ)


def test_raw_file_is_shorter_than_listed(place: Place) -> None:
    sources = place.store_raw(page(2) * 2)
    os.truncate(place.root / "store" / "plain", BLCKSZ + 5)
    place.nodes.add(INO, 2 * BLCKSZ, sources)
    fails_with_eio(place, 0, 2 * BLCKSZ)
    assert place.lines() == ["file=plain block=1 layer=base reason=file is shorter than listed"]
    assert place.nodes.read(INO, 0, BLCKSZ + 5) == (page(2) * 2)[: BLCKSZ + 5]


def _flip_map(place: Place, headers: tuple[Any, ...]) -> tuple[Any, ...]:
    with (place.root / "store" / "1259-1.map").open("r+b") as file:
        file.seek(20)
        byte = file.read(1)
        file.seek(20)
        file.write(bytes([byte[0] ^ 0x55]))
    return headers


def _cut_map(place: Place, headers: tuple[Any, ...]) -> tuple[Any, ...]:
    os.truncate(place.root / "store" / "1259-1.map", 10)
    return headers


def _drop_map(place: Place, headers: tuple[Any, ...]) -> tuple[Any, ...]:
    (place.root / "store" / "1259-1.map").unlink()
    return headers


MAP_DAMAGES = {
    "does not inflate": (_flip_map, "reason=header map does not inflate"),
    "truncated": (_cut_map, "reason=header map is truncated"),
    "missing": (_drop_map, "reason=header map can't be opened: ENOENT"),
    "wrong crc": (lambda _, h: (*h[:4], h[4] ^ 1, h[5]), "reason=header map has a wrong checksum"),
    "wrong count": (lambda _, h: (*h[:5], h[5] + 1), "reason=header map does not inflate"),
    "too many headers": (
        lambda _, h: (*h[:5], NO_LIMIT),
        "reason=list has more headers than the stored file has room for",
    ),
    "negative offset": (
        lambda _, h: (*h[:2], -5, *h[3:]),
        "reason=list has an impossible place in the header map",
    ),
    "huge": (
        lambda _, h: (*h[:3], 1 << 62, *h[4:]),
        "reason=list has an impossible place in the header map",
    ),
    "far away": (lambda _, h: (*h[:2], 1 << 40, *h[3:]), "reason=header map is truncated"),
}


@pytest.mark.parametrize("damage", MAP_DAMAGES)
def test_damaged_header_map_spares_newer_layers(place: Place, damage: str) -> None:
    chain = [
        Layer({1: page(7)}, label="DELTA", limit=6),
        Layer({b: page(3 + 4 * b) for b in range(8)}, label="FULL", limit=6),
        Layer({b: page(2) for b in range(8)}, label="OLDER", limit=6),
    ]
    sources = place.store(chain)
    change, reason = MAP_DAMAGES[damage]
    sources[1] = (*sources[1][:9], change(place, sources[1][9]))
    place.nodes.add(INO, 8 * BLCKSZ, sources)
    fails_with_eio(place, 0, BLCKSZ)
    assert place.lines() == [
        f"file=1259-1 block=- layer=FULL {reason}",
        "file=1259-1 block=0 layer=FULL reason=layer is damaged where it may store the page",
    ]
    # Known without the damaged layer: what the newest stores, and what nobody may store.
    assert place.nodes.read(INO, BLCKSZ, BLCKSZ) == page(7)
    assert place.nodes.read(INO, 6 * BLCKSZ, 2 * BLCKSZ) == bytes(2 * BLCKSZ)
    fails_with_eio(place, 5 * BLCKSZ, 1)


def test_header_map_that_was_away_is_read_again(place: Place) -> None:
    """What a store lacks for a while is no damage: nothing of it is kept for long."""
    chain = [Layer({b: page(3 + 4 * b) for b in range(8)}, label="FULL")]
    sources = place.store(chain)
    headers = place.root / "store" / "1259-0.map"
    headers.rename(place.root / "away")
    place.nodes.add(INO, 8 * BLCKSZ, sources)
    fails_with_eio(place, 0, BLCKSZ)
    (place.root / "away").rename(headers)

    def is_read() -> bool:
        try:
            return place.nodes.read(INO, 0, 8 * BLCKSZ) == compose(chain, 8 * BLCKSZ)
        except OSError:
            return False

    wait_until(is_read)


def test_damaged_stream_is_good_up_to_the_damage(place: Place) -> None:
    chain = [
        Layer({b: page(2 + 4 * b) for b in (0, 2, 4)}, compress=NONE, has_headers=False),
        Layer({b: page(802 + 4 * b) for b in range(6)}, compress=NONE, has_headers=False),
    ]
    sources = place.store(chain)
    with (place.root / "store" / "1259-0").open("r+b") as file:
        file.seek(chain[0].positions[4])
        file.write(bytes(8))  # (0, 0) is damage
    place.nodes.add(INO, 6 * BLCKSZ, sources)
    assert place.nodes.read(INO, 0, 3 * BLCKSZ) == compose(chain, 3 * BLCKSZ)
    for b in (3, 4, 5):
        fails_with_eio(place, b * BLCKSZ, 1)
    assert place.lines()[0] == (
        "file=1259-0 block=- layer=SBOL94 reason=record has an impossible length"
    )


@pytest.mark.parametrize("where", [b"link", b"dir/1259-0", b"../outside", b"/etc/passwd", b"fifo"])
def test_nothing_outside_of_the_store_is_opened(place: Place, where: bytes) -> None:
    store = place.root / "store"
    (place.root / "outside").write_bytes(page(2))
    (place.root / "other").mkdir()
    (place.root / "other" / "1259-0").write_bytes(page(2))
    (store / "link").symlink_to(place.root / "outside")
    (store / "dir").symlink_to(place.root / "other")
    os.mkfifo(store / "fifo")
    place.nodes.add(INO, BLCKSZ, [("raw", place.root_fd, where, BLCKSZ, "base")])
    fails_with_eio(place, 0, BLCKSZ)
    assert len(place.lines()) == 1


def test_uncompressed_page_of_another_length(place: Place) -> None:
    stored = struct.pack("<Ii", 0, 100) + bytes(100)
    (place.root / "store" / "odd").write_bytes(stored)
    source = ("pages", place.root_fd, b"odd", len(stored), "A", NONE, NO_LIMIT, False, False, None)
    place.nodes.add(INO, BLCKSZ, [source])
    fails_with_eio(place, 0, 1)
    assert place.lines() == ["file=odd block=0 layer=A reason=page has an impossible length"]


def test_log_lines_are_limited_and_never_block(place: Place) -> None:
    place.nodes.add(INO, BLCKSZ, place.store_raw(page(2)))
    (place.root / "store" / "plain").unlink()
    for _ in range(1500):
        fails_with_eio(place, 0, 1)
    counters = place.nodes.counters()
    assert counters["read_errors"] == 1500
    assert counters["log_lines"] + counters["log_suppressed"] == 1500
    assert counters["log_suppressed"] > 0
    assert len(place.lines()) == counters["log_lines"]


# --- the table, and what is kept open or in memory ----------------------------------------------


def test_registering(place: Place) -> None:
    nodes = place.nodes
    assert not nodes.has(INO)
    nodes.add(INO, 5, place.store_raw(b"abcde"))
    assert nodes.has(INO)
    assert not nodes.has_object(INO)
    assert nodes.size(INO) == 5
    assert nodes.stat(INO) is None
    with pytest.raises(FileExistsError):
        nodes.add(INO, 5, [])
    for change in (
        lambda: nodes.write(INO, 0, b"x"),
        lambda: nodes.truncate(INO, 1),
        lambda: nodes.fallocate(INO, 0, 0, 1),
    ):
        with pytest.raises(OSError, match="not supported") as caught:
            change()
        assert caught.value.errno == errno.ENOTSUP
    nodes.remove(INO)
    with pytest.raises(FileNotFoundError):
        nodes.remove(INO)
    with pytest.raises(FileNotFoundError):
        nodes.read(INO, 0, 1)
    assert nodes.counters()["nodes"] == 0


def test_many_nodes(place: Place) -> None:
    (source,) = place.store_raw(b"abc")
    inos = [i * 4096 + 1 for i in range(5000)]
    for ino in inos:
        place.nodes.add(ino, 3, [source])
    assert all(place.nodes.has(ino) for ino in inos)
    assert place.nodes.counters()["nodes"] == 5000
    assert place.nodes.counters()["open_files"] == 0
    for ino in inos[::2]:
        place.nodes.remove(ino)
    assert [place.nodes.has(ino) for ino in inos[:4]] == [False, True, False, True]


BAD_SOURCES: list[Any] = [
    ["raw"],
    [("raw", 3)],
    [("other", 3, b"a", 1, "x")],
    [("raw", 3, b"a\0b", 1, "x")],
    [("raw", 3, b"a", -1, "x")],
    [("raw", 3, b"a", 1 << 63, "x")],
    [("raw", 3, "a", 1, "x")],
    [("raw", 3, b"a", 1, b"x")],
    [("raw", 3, b"a", 1, "x"), ("raw", 3, b"a", 1, "x")],
    [("raw", 3, b"a", 1, "x"), ("object", 3, 1, "x", None, 0)],
    [("pages", 3, b"a", 1, "x", 3, 1, False, False, None)],
    [("pages", 3, b"a", 1, "x", 0, 1 << 32, False, False, None)],
    [("pages", 3, b"a", 1, "x", 0, 1, False, False, (1, b"m", 0, 0, 0))],
    [("object", 3, 1, "x", b"1234567", 0)],
    [("object", 3, 1, "x", 5, 0)],
    5,
]


@pytest.mark.parametrize("sources", BAD_SOURCES)
def test_sources_that_make_no_sense(place: Place, sources: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError, OSError)):
        place.nodes.add(INO, 1, sources)
    assert not place.nodes.has(INO)


def test_indexes_are_bounded_and_droppable() -> None:
    # 100 blocks are 800 bytes and a few: room for two of them.
    with Place(index_bytes=2000) as place:
        sources = place.store([Layer({b: page(1) for b in range(100)})])
        for ino in range(1, 11):
            place.nodes.add(ino, 100 * BLCKSZ, sources)
            place.nodes.read(ino, 0, 1)
            assert place.nodes.counters()["index_bytes"] <= 2000
        assert place.nodes.counters()["index_loads"] == 10
        place.nodes.read(10, 0, 1)
        place.nodes.read(9, 0, 1)
        assert place.nodes.counters()["index_loads"] == 10
        place.nodes.read(1, 0, 1)
        assert place.nodes.counters()["index_loads"] == 11
        freed = place.nodes.drop_indexes()
        assert 1600 < freed <= 2000
        assert place.nodes.counters()["index_bytes"] == 0
        assert place.nodes.read(9, 0, 5) == page(1)[:5]


def test_descriptors_are_bounded() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        with Place() as place:  # a quarter of 100
            for ino in range(1, 201):
                place.nodes.add(ino, BLCKSZ, place.store_raw(page(ino), f"f{ino}"))
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(2):
                for ino in range(1, 201):
                    assert place.nodes.read(ino, 0, BLCKSZ) == page(ino)
            assert place.nodes.counters()["open_files"] == 25
            assert len(os.listdir("/proc/self/fd")) == before + 25
            place.nodes.remove(200)
            assert place.nodes.counters()["open_files"] == 24
            place.nodes.close()
            assert len(os.listdir("/proc/self/fd")) == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_indexes_dropped_while_threads_read() -> None:
    with Place(index_bytes=500) as place:
        chain = [Layer({b: page(3 + 4 * b) for b in range(50)})]
        expected = compose(chain, 50 * BLCKSZ)
        sources = place.store(chain)
        for ino in range(1, 5):
            place.nodes.add(ino, 50 * BLCKSZ, sources)
        wrong: list[str] = []

        def read(first: int) -> None:
            for i in range(150):
                ino = 1 + (first + i) % 4
                if (
                    place.nodes.read(ino, i * 1000, 20_000)
                    != expected[i * 1000 : i * 1000 + 20_000]
                ):
                    wrong.append(f"node {ino}")

        threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            place.nodes.drop_indexes()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_copy_to(place: Place, tmp_path: Path) -> None:
    chain = [Layer({b: page(3 + 4 * b) for b in range(0, 300, 2)})]
    size = 300 * BLCKSZ - 77
    place.nodes.add(INO, size, place.store(chain))
    with (tmp_path / "copy").open("w+b") as file:
        file.write(b"x" * (size + 1000))
        file.flush()
        place.nodes.copy_to(INO, file.fileno())
    assert (tmp_path / "copy").read_bytes() == compose(chain, size)


def test_closed(place: Place) -> None:
    place.nodes.add(INO, 0, [])
    place.nodes.close()
    place.nodes.close()
    for call in (
        lambda: place.nodes.has(INO),
        lambda: place.nodes.read(INO, 0, 1),
        lambda: place.nodes.add(1, 0, []),
        place.nodes.counters,
        place.nodes.gate_close,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


# --- fuzz ---------------------------------------------------------------------------------------


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        if out:
            at = draw(st.integers(0, len(out) - 1))
            out[at] = draw(st.integers(0, 255))
    return bytes(out[: draw(st.sampled_from([len(out), draw(st.integers(0, len(out)))]))])


@given(data=st.data(), compress=st.sampled_from([NONE, ZLIB, PGLZ]), has_headers=st.booleans())
def test_damage_is_eio_or_right(data: st.DataObject, compress: int, has_headers: bool) -> None:
    """Whatever happens to a store, a read fails with EIO or returns a page of the right length."""
    chain = [
        Layer({b: page(1 + 4 * b) for b in (1, 3)}, compress=compress, has_headers=has_headers),
        Layer({b: page(3 + 4 * b) for b in range(6)}, compress=compress, has_headers=has_headers),
    ]
    with Place() as place:
        sources = place.store(chain)
        for name in sorted(os.listdir(place.root / "store")):
            path = place.root / "store" / name
            path.write_bytes(data.draw(mutations(path.read_bytes())))
        if has_headers and data.draw(st.booleans()):
            headers = list(sources[0][9])
            headers[data.draw(st.integers(2, 3))] = data.draw(st.integers(-(1 << 62), 1 << 62))
            headers[5] = data.draw(st.integers(0, NO_LIMIT))
            sources[0] = (*sources[0][:9], tuple(headers))
        if data.draw(st.booleans()):
            sources[0] = (*sources[0][:3], data.draw(st.integers(0, 1 << 40)), *sources[0][4:])
        place.nodes.add(INO, 8 * BLCKSZ, sources)
        for block in range(8):
            try:
                assert len(place.nodes.read(INO, block * BLCKSZ, BLCKSZ)) == BLCKSZ
            except OSError as error:
                if error.errno != errno.EIO or not place.lines():
                    raise
