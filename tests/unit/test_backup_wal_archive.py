"""The WAL archive: raw, gzipped, partial, absent and damaged segments."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from fix_catalogs import CatalogStore, manifests
from handmade import Store
from hypothesis import given
from hypothesis import strategies as st

from pbkfs.backup import open_archive, open_probackup
from pbkfs.backup.probackup.wal_archive import WalArchive, parse_segment_size
from pbkfs.errors import FormatError, NotFoundError

SIZE = 1 << 20
SEGMENT = "000000010000000000000010"
CONTENT = bytes(range(256)) * (SIZE // 256)


@pytest.fixture
def archive(tmp_path: Path) -> WalArchive:
    path = tmp_path / "wal"
    path.mkdir()
    return WalArchive(path, SIZE)


def read(archive: WalArchive, name: str) -> bytes:
    seed = archive.fetch(name)
    assert seed.name == name.encode()
    with seed.open() as file:
        data = file.read()
    assert len(data) == seed.size
    return data


def test_each_form_and_which_is_taken_first(archive: WalArchive) -> None:
    half = CONTENT[: SIZE // 2]
    padded = half + bytes(SIZE // 2)
    forms = [
        (".partial", half, padded),
        (".gz.partial", gzip.compress(half, 1), padded),
        (".gz", gzip.compress(CONTENT, 1), CONTENT),
        ("", CONTENT[::-1], CONTENT[::-1]),
    ]
    for suffix in (".part", ".gz.part", ".partial.part", ".gz.partial.part", ".00000028.backup"):
        (archive.path / (SEGMENT + suffix)).write_bytes(b"x")
    with pytest.raises(NotFoundError, match=SEGMENT):
        archive.fetch(SEGMENT)
    for suffix, stored, wanted in forms:
        (archive.path / (SEGMENT + suffix)).write_bytes(stored)
        assert read(archive, SEGMENT) == wanted


def test_a_partial_segment_may_end_anywhere(archive: WalArchive) -> None:
    packed = gzip.compress(CONTENT[: SIZE // 2], 1)
    for length in (0, 5, len(packed) // 2, len(packed) - 3):
        (archive.path / f"{SEGMENT}.gz.partial").write_bytes(packed[:length])
        data = read(archive, SEGMENT)
        assert CONTENT.startswith(data.rstrip(b"\0")[:-1])
    (archive.path / f"{SEGMENT}.gz.partial").write_bytes(packed[: len(packed) - 3])
    # What came before the end is there.
    assert len(read(archive, SEGMENT).rstrip(b"\0")) > SIZE // 4


@pytest.mark.parametrize(
    ("suffix", "stored", "said"),
    [
        ("", CONTENT[:-1], "has only"),
        ("", b"", "has only 0 of"),
        ("", CONTENT + b"x", "is longer"),
        (".gz", gzip.compress(CONTENT[:-1], 1), "has only"),
        (".gz", gzip.compress(CONTENT + b"x", 1), "is longer"),
        (".gz", gzip.compress(CONTENT, 1)[:-9], "is damaged"),
        (".gz", b"not gzip at all", "is damaged"),
        (".gz", gzip.compress(CONTENT, 1)[:100] + b"\xff" * 900, "is damaged"),
        (".partial", CONTENT + b"x", "is longer"),
    ],
)
def test_damaged_segments_are_errors(
    archive: WalArchive, suffix: str, stored: bytes, said: str
) -> None:
    (archive.path / (SEGMENT + suffix)).write_bytes(stored)
    with archive.fetch(SEGMENT).open() as file, pytest.raises(FormatError, match=said):
        file.read()


def test_small_reads_give_the_same(archive: WalArchive) -> None:
    (archive.path / f"{SEGMENT}.gz").write_bytes(gzip.compress(CONTENT, 1))
    with archive.fetch(SEGMENT).open() as file:
        pieces = []
        while piece := file.read(77_777):
            pieces.append(piece)
    assert b"".join(pieces) == CONTENT


def test_other_files(archive: WalArchive) -> None:
    (archive.path / "00000002.history").write_bytes(b"1\t0/1800000\tno recovery target\n")
    (archive.path / f"{SEGMENT}.00000028.backup").write_bytes(b"START WAL LOCATION")
    assert read(archive, "00000002.history").startswith(b"1\t")
    assert read(archive, f"{SEGMENT}.00000028.backup") == b"START WAL LOCATION"
    assert archive.history(2) == [(1, 0x1800000)]
    assert archive.history(3) == []
    (archive.path / "00000004.history").write_bytes(b"nonsense\n")
    with pytest.raises(FormatError, match=r"00000004\.history"):
        archive.history(4)


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "postgresql.conf", "a\0b"])
def test_other_names_are_not_found(archive: WalArchive, name: str) -> None:
    with pytest.raises(NotFoundError):
        archive.fetch(name)


def test_links_and_directories_are_not_files_of_the_archive(
    archive: WalArchive, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    (archive.path / SEGMENT).symlink_to(tmp_path / "elsewhere")
    (archive.path / f"{SEGMENT}.gz").mkdir()
    with pytest.raises(NotFoundError):
        archive.fetch(SEGMENT)


def put(archive: WalArchive, *names: str) -> None:
    for name in names:
        (archive.path / name).write_bytes(name.encode().ljust(SIZE, b"\0"))


def names(archive: WalArchive, tli: int, start: int, stop: int) -> list[str]:
    return [seed.name.decode() for seed in archive.range(tli, start, stop)]


def test_ranges(archive: WalArchive) -> None:
    put(archive, *(f"00000001000000000000000{n}" for n in "123"))
    one, two, three = (f"00000001000000000000000{n}" for n in "123")
    assert names(archive, 1, 0x100028, 0x1000B8) == [one]
    assert names(archive, 1, 0x100028, 0x3000B8) == [one, two, three]
    # At a boundary the last record ends in the segment before.
    assert names(archive, 1, 0x100028, 0x300000) == [one, two]
    with pytest.raises(NotFoundError, match="no 000000010000000000000004"):
        names(archive, 1, 0x100028, 0x4000B8)


def test_ranges_over_a_change_of_timeline(archive: WalArchive) -> None:
    put(archive, "000000010000000000000001", "000000020000000000000002", "000000030000000000000003")
    put(archive, "000000010000000000000002", "000000010000000000000003")
    with pytest.raises(NotFoundError):
        names(archive, 3, 0x100028, 0x3000B8)
    (archive.path / "00000002.history").write_text("1\t0/200100\tpromoted\n")
    (archive.path / "00000003.history").write_text("1\t0/200100\tx\n2\t0/300100\tx\n")
    assert names(archive, 3, 0x100028, 0x3000B8) == [
        "00000002.history", "00000003.history", "000000010000000000000001",
        "000000020000000000000002", "000000030000000000000003",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16777216", 16 << 20), ("16MB", 16 << 20), ("1048576", 1 << 20), ("64 MB", 64 << 20),
        ("1GB", 1 << 30), ("", None), ("12345", None), ("-1", None), ("lots", None),
        ("²", None), ("16XB", None),
    ],
)  # fmt: skip
def test_segment_sizes(text: str, size: int | None) -> None:
    assert parse_segment_size({"xlog-seg-size": text}) == size


@given(st.text(max_size=20))
def test_no_size_crashes(text: str) -> None:
    size = parse_segment_size({"xlog-seg-size": text})
    assert size is None or 1 << 20 <= size <= 1 << 30


def test_opening_by_instance(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert open_archive(store.root, "main").segment_size == 16 << 20
    store.conf("xlog-seg-size = 1048576\n")
    archive = open_archive(store.root, "main")
    assert (archive.segment_size, archive.path) == (1 << 20, store.archive)
    with pytest.raises(NotFoundError, match="no instance"):
        open_archive(store.root, "other")
    store.archive.rmdir()
    with pytest.raises(NotFoundError, match="does not exist"):
        archive.fetch(SEGMENT)


def test_seeding_says_what_is_missing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    backup_id = store.add(stream="false", start_lsn="0/1000028", stop_lsn="0/11000B8")
    base = open_probackup(store.root, "main", backup_id)
    put(base.wal_archive(), "000000010000000000000010")
    with pytest.raises(NotFoundError, match="no 000000010000000000000011, which the backup needs"):
        list(base.wal_seed())
    put(base.wal_archive(), "000000010000000000000011")
    assert len(list(base.wal_seed())) == 2
    base.close()


@pytest.mark.parametrize("catalog", manifests())
def test_every_file_of_a_real_archive(catalog: str, shared_catalog: CatalogStore) -> None:
    archive = open_archive(shared_catalog(catalog), manifests()[catalog]["instance"])
    for path in archive.path.iterdir():
        data = read(archive, path.name.removesuffix(".gz"))
        if path.suffix == ".gz":
            assert data == gzip.decompress(path.read_bytes())
        else:
            assert data == path.read_bytes()
