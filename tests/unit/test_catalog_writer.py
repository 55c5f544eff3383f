"""The catalog writer against pg_probackup: from the same states it writes the same backups.

A state is a restored backup of a real catalog. What the writer makes of it must read back equal
(through the oracle, which shares no code with writer or package), and every field of the list that
the state determines must be what pg_probackup wrote, down to the CRCs of compressed files.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from catalog_format import (
    BLCKSZ,
    ControlFile,
    crc32c,
    crc32c_reference,
    page_checksum,
    parse_lsn,
    pglz_compress,
)
from catalog_writer import (
    CatalogWriter,
    synthetic_control_file,
    synthetic_page,
    synthetic_pgdata,
)
from fix_catalogs import manifests
from reference import Backup, Catalog, Composed, pglz_decompress

from pbkfs._native import scan_pages

# One branch each, of every version and kind; no large part in pglz, which takes Python long.
REAL = [
    name
    for name in (
        "a_full_none_stream",
        "b_full_delta_delta_zlib_stream",
        "e_tablespace_external",
        "f_no_checksums",
        "j_old_formats_pg13",
    )
    if name in manifests()
]


def _write_tree(tree: dict[bytes, Composed], target: Path) -> None:
    target.mkdir()
    for path, entry in sorted(tree.items()):
        place = target / path.decode()
        if entry.kind == "d":
            place.mkdir()
            place.chmod(entry.mode)
        else:
            place.write_bytes(entry.content)
            place.chmod(entry.mode)


def _fields(backup: Backup) -> dict[str, dict[str, str]]:
    return {
        path.decode(): {key.decode(): value.decode() for key, value in fields.items()}
        for (path, external), fields in backup.entries.items()
        if external == 0
    }


def _compose(catalog: Catalog, backup_id: str) -> dict[bytes, Composed]:
    return dict(catalog.compose(backup_id))


def _undetermined(
    real: Backup, path: str, real_fields: dict[str, str], mine: dict[str, str]
) -> set[str]:
    """The fields that depend on more than the state: on time, threads, or names of databases."""
    ignored = {"hdr_off"}  # the order in which threads were ready
    is_data = real_fields["is_datafile"] == "1"
    if path == "database_map":
        ignored |= {"size", "crc", "full_size"}
    if not is_data and mine["size"] == "-1" and real_fields["size"] != "-1":
        ignored |= {"size", "full_size"}  # pg_probackup also looks at mtime
    if is_data and real.version < 20400:
        ignored |= {"crc"}  # garbage in the padding
    if real.version < 20500:
        ignored |= {"hdr_crc", "hdr_size"}  # 2.4.10 puts something else there for zero pages
    if real_fields["compress_alg"] == "pglz":
        ignored |= {"size", "crc", "hdr_crc", "hdr_size"}  # another compressor
    if is_data and real.control["backup-mode"] == "PAGE":
        # pg_probackup takes what WAL names, equal or not; the writer takes what differs.
        ignored |= {"size", "crc", "full_size", "compress_alg", "n_headers", "hdr_crc", "hdr_size"}
    return ignored


@pytest.mark.parametrize("name", REAL)
def test_writes_what_pg_probackup_wrote(name: str, shared_catalog: Any, tmp_path: Path) -> None:
    store = shared_catalog(name)
    real_catalog = Catalog(store, "main")
    writer = CatalogWriter(tmp_path / "store")
    mine_catalog = Catalog(tmp_path / "store", "main")
    backups = [Backup(path) for path in sorted(real_catalog.root.iterdir()) if path.is_dir()]
    n_stored = 0
    for real in backups:
        mode = real.control["backup-mode"]
        version = real.control["program-version"]
        tree = _compose(real_catalog, real.path.name)
        state = tmp_path / real.path.name
        _write_tree(tree, state)
        made = writer.add(
            state,
            mode,
            compress=real.control["compress-alg"],
            level=int(real.control["compress-level"]),
            version=version,
            is_stream=real.control["stream"] == "true",
            stop_lsn=parse_lsn(real.control["stop-lsn"]),
        )
        mine = Backup(mine_catalog.root / made)
        for key in ("start-lsn", "stop-lsn", "timelineid", "recovery-xid", "wal-bytes", "stream",
                    "server-version", "checksum-version", "backup-mode", "block-size"):  # fmt: skip
            if key != "wal-bytes" or real.control["stream"] == "true":
                assert mine.control[key] == real.control[key], key
        assert ("content-crc" in mine.control) == ("content-crc" in real.control)
        if "content-crc" in mine.control:
            raw = (mine.path / "backup_content.control").read_bytes()
            assert int(mine.control["content-crc"]) == crc32c(raw)

        wanted, found = _fields(real), _fields(mine)
        assert found.keys() | {"tablespace_map"} == wanted.keys() | {"tablespace_map"}
        wanted.pop("tablespace_map", None)
        for path, fields in wanted.items():
            ignored = _undetermined(real, path, fields, found[path])
            known = {key: value for key, value in fields.items() if key not in ignored}
            assert {k: v for k, v in found[path].items() if k not in ignored} == known, path
            n_stored += int(fields["size"]) > 0

        again = _compose(mine_catalog, made)
        assert again.keys() == tree.keys()
        assert [p for p in tree if again[p] != tree[p]] == []
    assert n_stored > 300


# --- states made by hand ------------------------------------------------------------------------


def _pages(*numbers: int, lsn: int = 0x1000028) -> list[bytes]:
    return [synthetic_page(number, lsn) for number in numbers]


NEW = 0x2000028  # an LSN after the first backup


def _states(tmp_path: Path) -> list[Path]:
    """Three states of one cluster with every way a file can change."""
    first, second, third = (tmp_path / f"state{n}" for n in range(3))
    synthetic_pgdata(
        first,
        {
            "base/1/100": _pages(*range(40)),
            "base/1/101": _pages(*range(30)),
            "base/1/102": _pages(*range(20)),
            "base/1/103": _pages(1, 2),
            "base/1/104": b"",
            "base/1/105": [*_pages(1), bytes(BLCKSZ), *_pages(3)],
            "base/1/105_fsm": bytes(3 * BLCKSZ),
            "base/1/t3_106": _pages(1),
            "base/1/107_init": _pages(1),
            "base/1/107": _pages(1),
            "base/1/pg_filenode.map": bytes(512),
            "postgresql.conf": b"port = 1\n",
            "pg_notify/0000": bytes(8192),
            "postmaster.pid": b"1\n",
        },
    )
    synthetic_pgdata(
        second,
        {
            "base/1/100": [*_pages(*range(10)), *_pages(90, lsn=NEW), *_pages(*range(11, 40))],
            "base/1/101": _pages(*range(12)),
            "base/1/102": b"",
            "base/1/104": _pages(5, 6, lsn=NEW),
            "base/1/105": [*_pages(1), bytes(BLCKSZ), *_pages(3)],
            "base/1/105_fsm": bytes(3 * BLCKSZ),
            "base/1/108": _pages(1, 2, 3),
            "base/1/pg_filenode.map": bytes(512),
            "postgresql.conf": b"port = 2\n",
        },
    )
    synthetic_pgdata(
        third,
        {
            "base/1/100": [*_pages(*range(10)), *_pages(90, lsn=NEW), *_pages(*range(11, 40))],
            "base/1/101": [*_pages(*range(12)), *_pages(*range(70, 85), lsn=NEW + 0x1000000)],
            "base/1/102": _pages(8, lsn=NEW + 0x1000000),
            "base/1/104": _pages(5, 6, lsn=NEW),
            "base/1/105": [*_pages(1), bytes(BLCKSZ), *_pages(3)],
            "base/1/105_fsm": bytes(3 * BLCKSZ),
            "base/1/pg_filenode.map": bytes(512),
            "postgresql.conf": b"port = 2\n",
        },
    )
    for number, state in enumerate((first, second, third)):
        redo = 0x1500028 + (number << 24)
        (state / "global/pg_control").write_bytes(synthetic_control_file(redo=redo))
        segment = redo >> 24
        wal = bytearray(16 << 20)
        struct.pack_into("<HHIQ", wal, 0, 0xD110, 2, 1, segment << 24)
        (state / f"pg_wal/{1:08X}{0:08X}{segment:08X}").write_bytes(wal)
    return [first, second, third]


@pytest.mark.parametrize("version", ["2.2.7", "2.3.5", "2.4.10", "2.5.16"])
@pytest.mark.parametrize("compress", ["none", "zlib", "pglz"])
@pytest.mark.parametrize("mode", ["DELTA", "PAGE"])
def test_a_chain_reads_back_equal(mode: str, compress: str, version: str, tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "store", n_jobs=1)
    catalog = Catalog(tmp_path / "store", "main")
    for number, state in enumerate(_states(tmp_path)):
        made = writer.add(state, mode if number else "FULL", compress=compress, version=version)
        tree = _compose(catalog, made)
        for path, entry in tree.items():
            if entry.kind == "f" and path != b"backup_label":
                assert entry.content == (state / path.decode()).read_bytes(), path
        names = {path.decode() for path in tree}
        assert not names & {"base/1/t3_106", "pg_notify/0000", "postmaster.pid"}
        assert ("base/1/107" in names) == (number == 0 and version < "2.5")
        assert ("base/1/107_init" in names) == (number == 0)
        backup = Backup(catalog.root / made)
        _check_stored_files(backup)


def _check_stored_files(backup: Backup) -> None:
    """Sizes, CRCs and header maps of everything that a list says is stored."""
    root = os.open(backup.path / "database", os.O_RDONLY)
    try:
        for (path, _), fields in backup.entries.items():
            size = int(fields[b"size"])
            if size <= 0 or fields[b"is_datafile"] == b"0":
                assert size != 0 or not (backup.path / "database" / path.decode()).is_file()
                continue
            data = backup.stored(path)
            assert len(data) == size
            assert crc32c_reference(data) == int(fields[b"crc"])
            n_pages, end, _ = scan_pages(root, path, size, backup.version < 20400)
            if backup.version >= 20300:
                assert end <= int(fields[b"n_blocks"])
            if backup.version >= 20400:
                assert n_pages == int(fields[b"n_headers"])
                start = int(fields[b"hdr_off"])
                with (backup.path / "page_header_map").open("rb") as headers:
                    headers.seek(start)
                    plain = zlib.decompress(headers.read(int(fields[b"hdr_size"])))
                assert len(plain) == 24 * (n_pages + 1)
                assert crc32c_reference(plain) == int(fields[b"hdr_crc"])
                assert struct.unpack_from("<i", plain, 24 * n_pages + 12)[0] == size
    finally:
        os.close(root)


def test_sizes_say_how_a_file_changed(tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "store")
    first, second, third = _states(tmp_path)
    writer.add(first)
    writer.add(second, "DELTA", compress="none")
    fields = _fields(Backup(writer.backups / writer.last))
    page = BLCKSZ + 8
    assert fields["base/1/100"]["size"] == str(page)
    assert (fields["base/1/101"]["size"], fields["base/1/101"]["n_blocks"]) == ("-1", "12")
    assert (fields["base/1/102"]["size"], "n_blocks" in fields["base/1/102"]) == ("0", False)
    assert "base/1/103" not in fields
    assert fields["base/1/104"]["size"] == str(2 * page)
    assert fields["base/1/105"]["size"] == str(page)  # the zero page
    assert fields["base/1/105_fsm"]["size"] == "-1"
    assert fields["base/1/105_fsm"]["full_size"] == str(3 * BLCKSZ)
    assert fields["base/1/108"]["size"] == str(3 * page)  # new: with old pages, too
    assert fields["base/1/pg_filenode.map"]["size"] == "512"
    assert fields["global/pg_control"]["size"] == "8192"
    assert fields["postgresql.conf"]["size"] == "9"
    writer.add(third, "DELTA", compress="none")
    fields = _fields(Backup(writer.backups / writer.last))
    assert (fields["base/1/101"]["size"], fields["base/1/101"]["n_blocks"]) == (
        str(15 * page),
        "27",
    )
    assert fields["base/1/104"]["size"] == "-1"
    assert "base/1/108" not in fields


def test_old_page_backups_mark_a_truncation(tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "store")
    first, second, _ = _states(tmp_path)
    writer.add(first, version="2.2.7")
    made = writer.add(second, "PAGE", version="2.2.7")
    assert (writer.backups / made / "database/base/1/101").read_bytes() == struct.pack(
        "<Ii", 12, -2
    )


# --- numbers and generators -----------------------------------------------------------------------


def test_crc32c() -> None:
    assert crc32c_reference(b"123456789") == 0xE3069283
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


@pytest.mark.parametrize(
    "page",
    [
        bytes(BLCKSZ),
        synthetic_page(3),
        bytes(range(256)) * 32,
        b"".join(struct.pack("<I", (n * 2654435761) % (1 << 32)) for n in range(2048)),
        (b"a" * 300 + b"b") * 28,
    ],
)
def test_pglz_reads_back(page: bytes) -> None:
    page = page.ljust(BLCKSZ, b"x")[:BLCKSZ]
    assert pglz_decompress(pglz_compress(page), BLCKSZ) == page


def test_page_checksums_are_postgresqls(shared_catalog: Any) -> None:
    tree = dict(Catalog(shared_catalog("a_full_none_stream"), "main").compose("TOTENV"))
    data = tree[b"global/1262"].content + tree[b"base/5/1259"].content
    n_checked = 0
    for block, at in enumerate(range(BLCKSZ, len(data), BLCKSZ)):
        page = data[at : at + BLCKSZ]
        assert page_checksum(page, block) == struct.unpack_from("<H", page, 8)[0]
        n_checked += 1
    assert n_checked > 5


def test_control_files_of_every_major_seen(shared_catalog: Any) -> None:
    for name in REAL:
        store = shared_catalog(name)
        conf = (store / "backups/main/pg_probackup.conf").read_text()
        identifier = int(re.search(r"system-identifier = (\d+)", conf)[1])  # type: ignore[index]
        segment = int(re.search(r"xlog-seg-size = (\d+)", conf)[1])  # type: ignore[index]
        for path in (store / "backups/main").glob("T*/database/global/pg_control"):
            raw = path.read_bytes()
            found = ControlFile.parse(raw)
            assert (found.system_identifier, found.wal_segment_size) == (identifier, segment)
            crc_at = raw.index(struct.pack("<I", found.crc), 200)
            assert crc32c(raw[:crc_at]) == found.crc


def test_many_files(tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "store")
    made = writer.add_many_files(4500)
    backup = Backup(writer.backups / made)
    assert sum(fields[b"is_datafile"] == b"1" for fields in backup.entries.values()) == 4500
    tree = dict(Catalog(tmp_path / "store", "main").compose(made))
    assert tree[b"base/16386/20001"].content == synthetic_page(7)
    _check_stored_files(backup)


def test_a_large_backup_takes_the_space_of_one_segment(tmp_path: Path) -> None:
    writer = CatalogWriter(tmp_path / "store")
    made = writer.add_large(50, blocks_per_segment=256)
    paths = list((writer.backups / made / "database/base/16384").iterdir())
    assert len(paths) == 50
    assert len({path.stat().st_ino for path in paths}) == 1
    tree = dict(Catalog(tmp_path / "store", "main").compose(made))
    wanted = b"".join(synthetic_page(block) for block in range(256))
    assert tree[b"base/16384/20000.49"].content == wanted
    _check_stored_files(Backup(writer.backups / made))
