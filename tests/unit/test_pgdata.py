"""Names, pages, LSNs and pg_control."""

from __future__ import annotations

import contextlib
import struct

import pytest
from fix_catalogs import CatalogStore, manifests
from handmade import SYSTEM_IDENTIFIER, control_file, page
from hypothesis import given
from hypothesis import strategies as st
from reference import crc32c

from pbkfs import pgdata
from pbkfs.errors import FormatError, PbkfsError, UnsupportedError


@pytest.mark.parametrize(
    "path",
    [
        b"base/5/16384", b"base/5/16384.1", b"base/5/16384_fsm", b"base/5/16384_vm.12",
        b"base/5/16384_init", b"global/1262", b"base/5/t3_16400", b"base/5/t3_16400_fsm.1",
        b".tblspc/16390/PG_15_202209061/5/16400", b"pg_tblspc/16390/PG_18_202506291/5/2619_vm",
        b"space/PG_17_202406281/16386/112",
    ],
)  # fmt: skip
def test_relation_files_are_recognised(path: bytes) -> None:
    assert pgdata.is_relation_file(path)


@pytest.mark.parametrize(
    "path",
    [
        b"PG_VERSION", b"base/5/PG_VERSION", b"base/5/pg_filenode.map", b"global/pg_control",
        b"pg_xact/0000", b"pg_wal/000000010000000000000001", b"base/16384", b"16384",
        b"base/5/16384.0", b"base/5/16384_xyz", b"base/5/16384.1.pagemap", b"base/5/16384\n",
        b"base/pgsql_tmp/pgsql_tmp1.0", b"x/base/5/16384", b"base/5/x/16384",
    ],
)  # fmt: skip
def test_other_files_are_not(path: bytes) -> None:
    assert not pgdata.is_relation_file(path)


def test_pages() -> None:
    sane = page(7)
    assert pgdata.is_page_sane(sane)
    assert not pgdata.is_page_new(sane)
    assert pgdata.is_page_new(bytes(pgdata.BLCKSZ))
    assert not pgdata.is_page_sane(sane[:-1])
    for offset, value in ((10, 8), (12, 20), (14, 8193), (16, 8188), (18, 4096)):
        broken = bytearray(sane)
        struct.pack_into("<H", broken, offset, value)
        assert not pgdata.is_page_sane(bytes(broken))


@given(st.integers(0, (1 << 64) - 1))
def test_lsn_is_parsed_as_formatted(lsn: int) -> None:
    assert pgdata.parse_lsn(pgdata.format_lsn(lsn)) == lsn


@pytest.mark.parametrize("text", ["", "0", "0/", "/0", "0/1/2", "123456789/0", "g/0", "-1/0"])
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an LSN"):
        pgdata.parse_lsn(text)


@given(
    tli=st.integers(1, 0xFFFFFFFF),
    segno=st.integers(0, (1 << 34) - 1),
    size=st.sampled_from([1 << n for n in range(20, 31)]),
)
def test_wal_segment_names_are_parsed_as_formatted(tli: int, segno: int, size: int) -> None:
    name = pgdata.wal_segment_name(tli, segno, size)
    if len(name) == 24:  # the address space of a 1 GiB segment has fewer numbers
        assert pgdata.parse_wal_segment_name(name, size) == (tli, segno)
        assert pgdata.is_wal_segment_name(name)
        assert pgdata.is_wal_file_name(name)


def test_wal_file_names() -> None:
    assert pgdata.wal_segment_name(1, 0x15, 1 << 20) == "000000010000000000000015"
    assert pgdata.wal_segment_name(2, 0x100, 16 << 20) == "000000020000000100000000"
    for name in ("00000002.history", "000000010000000000000002.00000028.backup",
                 "000000010000000000000002.partial"):  # fmt: skip
        assert pgdata.is_wal_file_name(name)
    for name in (
        "",
        "../x",
        "00000002.history.gz",
        "00000001000000000000000g",
        "a/00000002.history",
    ):
        assert not pgdata.is_wal_file_name(name)


def test_timeline_history() -> None:
    text = "1\t0/3000000\tno recovery target specified\n\n# a comment\n2\t0/5000028 reason\n"
    assert pgdata.parse_timeline_history(text) == [(1, 0x3000000), (2, 0x5000028)]
    for broken in ("1\n", "x 0/1\n", "1 zero\n"):
        with pytest.raises(ValueError, match=r".+"):
            pgdata.parse_timeline_history(broken)


def test_tablespace_map() -> None:
    data = b"16384 /srv/ts one\n16385 /odd\\\nname\\\\x\nnonsense\n16386 /last"
    assert pgdata.parse_tablespace_map(data) == {
        b"16384": b"/srv/ts one",
        b"16385": b"/odd\nname\\x",
        b"16386": b"/last",
    }


@pytest.mark.parametrize("catalog", manifests())
def test_real_control_files(catalog: str, shared_catalog: CatalogStore) -> None:
    manifest = manifests()[catalog]
    store = shared_catalog(catalog)
    n_read = 0
    for path in store.glob("backups/*/*/database/global/pg_control"):
        control = pgdata.read_control_file(path.read_bytes(), crc32c)
        assert control.wal_segment_size == manifest["wal_segment_mb"] << 20
        assert control.block_size == control.wal_block_size == pgdata.BLCKSZ
        assert bool(control.data_checksum_version) == manifest["data_checksums"]
        assert control.relation_segment_blocks == (32 if catalog.startswith("i_") else 131072)
        assert control.redo_lsn <= control.checkpoint_lsn
        assert control.tli in (1, 2)
        conf = (path.parents[3] / "pg_probackup.conf").read_text()
        assert f"system-identifier = {control.system_identifier}\n" in conf
        n_read += 1
    assert n_read


@pytest.mark.parametrize("version", [1201, 1300, 1700, 1800])
def test_control_file_layouts(version: int) -> None:
    control = pgdata.read_control_file(control_file(version=version), crc32c)
    assert control.system_identifier == SYSTEM_IDENTIFIER
    assert control.pg_control_version == version
    assert control.wal_segment_size == 1 << 20


def test_damaged_control_files_are_refused() -> None:
    good = control_file()
    with pytest.raises(FormatError, match="own crc"):
        pgdata.read_control_file(good[:20] + b"\xff" + good[21:], crc32c)
    with pytest.raises(FormatError, match="only 100 bytes"):
        pgdata.read_control_file(good[:100], crc32c)
    with pytest.raises(UnsupportedError, match="version 999"):
        pgdata.read_control_file(good[:8] + struct.pack("<I", 999) + good[12:])
    with pytest.raises(UnsupportedError, match="byte order"):
        pgdata.read_control_file(good[:8] + struct.pack(">I", 1300) + good[12:])
    with pytest.raises(FormatError, match="layout"):
        pgdata.read_control_file(good[:208] + bytes(8) + good[216:])
    with pytest.raises(FormatError, match="WAL segment size"):
        pgdata.read_control_file(control_file(wal_segment_size=12345), crc32c)


@given(st.binary(max_size=400))
def test_no_control_file_crashes_the_parser(data: bytes) -> None:
    with contextlib.suppress(PbkfsError):
        pgdata.read_control_file(data, crc32c)


def test_versions() -> None:
    assert pgdata.parse_major("15\n") == 15
    assert pgdata.parse_major("9.6") == 9
    for text in ("", "x", "15devel", "-1"):
        with pytest.raises(ValueError, match="version"):
            pgdata.parse_major(text)
