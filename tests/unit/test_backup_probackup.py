"""Chains made by hand: the rule of composition, damage, attacks, tablespaces."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest
from handmade import (
    Store,
    control_file,
    directory_line,
    header_map_entry,
    line,
    page,
    page_stream,
    write_control,
)
from reference import BLCKSZ, Damage, read_sources

from pbkfs import _native
from pbkfs.backup import NO_LIMIT, Kind, PageSource, RawSource, open_probackup
from pbkfs.backup.probackup.base import ProbackupBase
from pbkfs.errors import (
    ChainError,
    FormatError,
    NotFoundError,
    PbkfsError,
    UnsupportedError,
)

FILE = "base/5/16384"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def open_base(store: Store, backup_id: str, *, force: bool = False) -> ProbackupBase:
    return open_probackup(store.root, store.instance, backup_id, force=force)


def refusal(store: Store, backup_id: str, *, force: bool = False) -> PbkfsError:
    with pytest.raises(PbkfsError) as caught:
        open_base(store, backup_id, force=force).close()
    return caught.value


def data_line(path: str, stored: bytes, **fields: object) -> bytes:
    return line(path, len(stored), is_datafile=1, segno=0, **fields)


def size_of(base: ProbackupBase, path: str) -> int:
    directory, _, name = path.rpartition("/")
    [entry] = [e for e in base.scandir(directory.encode()) if e.name == name.encode()]
    assert entry.kind is Kind.FILE
    return entry.size


def content(store: Store, backup_id: str, path: str = FILE) -> bytes:
    base = open_base(store, backup_id)
    try:
        return read_sources(base.sources(path.encode()), size_of(base, path))
    finally:
        base.close()


def fills(data: bytes) -> str:
    """One letter a page, "." for zeros."""
    return "".join(
        chr(data[at + 100]) if data[at + 100] else "." for at in range(0, len(data), BLCKSZ)
    )


def pages(text: str, *, first: int = 0) -> dict[int, bytes]:
    """Pages of the letters; blanks are not stored."""
    return {first + n: page(ord(letter)) for n, letter in enumerate(text) if letter != " "}


class Chain:
    """A chain of one data file; each step is (letters stored, n_blocks or None for absent)."""

    def __init__(self, store: Store, version: str = "2.5.16") -> None:
        self.store = store
        self.version = version
        self.last: str | None = None

    def add(
        self,
        stored: str | None = "",
        *,
        n_blocks: int | None = None,
        is_listed: bool = True,
        marker: int | None = None,
        version: str | None = None,
    ) -> str:
        """``stored`` None: unchanged; "": empty."""
        version = version or self.version
        is_padded = tuple(map(int, version.split("."))) < (2, 4, 0)
        content = pages(stored or "")
        if marker is not None:
            content[marker] = b""
        data = page_stream(content, compress="zlib", is_padded=is_padded)
        fields: dict[str, object] = {"compress_alg": "zlib"}
        if n_blocks is not None:
            fields["n_blocks"] = n_blocks
        lines = []
        if is_listed and stored is None and marker is None:
            lines = [line(FILE, -1, is_datafile=1, **fields)]
        elif is_listed:
            lines = [data_line(FILE, data, **fields)]
        self.last = self.store.add(
            *lines,
            mode="DELTA" if self.last else "FULL",
            parent=self.last,
            files={FILE: data} if data else {},
            program_version=version,
        )
        return self.last


def test_newest_layer_wins(store: Store) -> None:
    chain = Chain(store)
    chain.add("aaaa", n_blocks=4)
    chain.add(" b b", n_blocks=4)
    assert fills(content(store, chain.add("  cc", n_blocks=4))) == "abcc"


def test_a_file_cut_in_between_does_not_come_back(store: Store) -> None:
    chain = Chain(store)
    chain.add("aaaaaa", n_blocks=6)
    chain.add(None, n_blocks=2)
    last = chain.add("   d", n_blocks=6)
    assert fills(content(store, last)) == "aa.d.."
    base = open_base(store, last)
    limits = [s.limit for s in base.sources(FILE.encode()) if isinstance(s, PageSource)]
    assert limits == [6, 2]
    base.close()


def test_an_empty_or_absent_layer_ends_the_walk(store: Store) -> None:
    for step in ({"stored": ""}, {"is_listed": False}):
        chain = Chain(store)
        chain.add("aaaa", n_blocks=4)
        chain.add(**step)  # type: ignore[arg-type]
        assert fills(content(store, chain.add(" b", n_blocks=4))) == ".b.."


def test_a_file_that_is_empty_now(store: Store) -> None:
    chain = Chain(store)
    chain.add("aaaa", n_blocks=4)
    last = chain.add("")
    base = open_base(store, last)
    assert base.sources(FILE.encode()) == ()
    assert size_of(base, FILE) == 0
    base.close()


def test_blocks_above_the_number_are_ignored(store: Store) -> None:
    assert fills(content(store, Chain(store).add("abcd", n_blocks=3))) == "abc"


def test_lengths_of_old_releases(store: Store) -> None:
    chain = Chain(store, "2.2.7")
    assert fills(content(store, chain.add("aaaa"))) == "aaaa"
    assert fills(content(store, chain.add(None))) == "aaaa"
    assert fills(content(store, chain.add(" b"))) == "abaa"
    assert fills(content(store, chain.add("c", marker=2))) == "cb"
    assert fills(content(store, chain.add(None))) == "cb"
    assert fills(content(store, chain.add("   d"))) == "cb.d"
    assert fills(content(store, chain.add("", marker=1))) == "c"
    assert fills(content(store, chain.add(None, n_blocks=3, version="2.3.5"))) == "c.."
    assert fills(content(store, chain.add(" e", n_blocks=2, version="2.5.16"))) == "ce"


def test_a_marker_does_not_cut_newer_blocks(store: Store) -> None:
    chain = Chain(store, "2.2.7")
    chain.add("aaaaaa")
    chain.add("", marker=2)
    last = chain.add("    ee", n_blocks=6, version="2.5.16")
    assert fills(content(store, last)) == "aa..ee"


def test_each_layer_is_decoded_by_its_own_version(store: Store) -> None:
    chain = Chain(store)
    chain.add("aaa", n_blocks=3, version="2.0.22")
    chain.add(" b", n_blocks=3, version="2.3.5")
    last = chain.add("  c", n_blocks=3)
    assert fills(content(store, last)) == "abc"
    base = open_base(store, last)
    sources = base.sources(FILE.encode())
    assert all(isinstance(source, PageSource) for source in sources)
    assert [source.padded for source in sources if isinstance(source, PageSource)] == [
        False, True, True,
    ]  # fmt: skip
    assert [source.old_zlib_8192 for source in sources if isinstance(source, PageSource)] == [
        False, False, True,
    ]  # fmt: skip
    base.close()


@pytest.mark.expect_log("size of .* is unknown")
def test_a_length_that_cannot_be_found_is_not_zero(store: Store) -> None:
    other = page_stream(pages("b"), compress="zlib", is_padded=True)
    stored = page_stream(pages("aa"), compress="zlib", is_padded=True)
    for damage in (None, stored[:-9], b"\xff" * len(stored)):
        backup_id = store.add(
            data_line(FILE, stored, compress_alg="zlib"),
            data_line("base/5/16385", other, compress_alg="zlib"),
            files={"base/5/16385": other, **({FILE: damage} if damage else {})},
            program_version="2.2.7",
        )
        base = open_base(store, backup_id)
        sizes = {entry.name: entry.size for entry in base.scandir(b"base/5")}
        assert sizes[b"16384"] >= BLCKSZ
        assert sizes[b"16385"] == BLCKSZ
        with pytest.raises((Damage, OSError)):
            read_sources(base.sources(FILE.encode()), BLCKSZ)
        base.close()


def test_a_length_that_cannot_be_found_now_is_not_made_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing fails, for it would be kept; once the store is back, it is right."""
    stored = page_stream(pages("aaa"), compress="zlib", is_padded=True)
    backup_id = store.add(
        data_line(FILE, stored, compress_alg="zlib"), files={FILE: stored}, program_version="2.2.7"
    )
    base = open_base(store, backup_id)

    def stale(*_: object) -> NoReturn:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as away:
        away.setattr(_native, "scan_pages", stale)
        with pytest.raises(OSError, match="Stale"):
            list(base.scandir(b"base/5"))
    assert [entry.size for entry in base.scandir(b"base/5")] == [3 * BLCKSZ]
    base.close()


def test_plain_files_are_found_below(store: Store) -> None:
    full = store.add(line("conf", 3), line("other", 2), files={"conf": b"abc", "other": b"xy"})
    middle = store.add(line("conf", -1, full_size=3), line("other", 0), mode="PAGE", parent=full)
    last = store.add(line("conf", -1), line("other", -1), mode="PAGE", parent=middle)
    base = open_base(store, last)
    [source] = base.sources(b"conf")
    assert isinstance(source, RawSource)
    assert (source.size, source.label, source.path) == (3, full, b"database/conf")
    assert (size_of(base, "conf"), size_of(base, "other")) == (3, 0)
    assert base.sources(b"other") == ()
    base.close()
    assert content(store, last, "conf") == b"abc"


@pytest.mark.parametrize("is_datafile", [0, 1])
def test_unchanged_since_nothing_is_damage(store: Store, is_datafile: int) -> None:
    gone = line(FILE, -1, is_datafile=is_datafile, n_blocks=2, full_size=16384)
    full = store.add(gone)
    error = refusal(store, full)
    assert isinstance(error, FormatError)
    assert (
        f"{FILE} is listed as unchanged in backup {full}, which is a FULL backup" in error.message
    )
    good = store.add()
    last = store.add(gone, mode="DELTA", parent=good)
    error = refusal(store, last)
    assert isinstance(error, FormatError)
    assert "its parent does not have it" in error.message
    # With --force everything else can be read, and this file is an error.
    base = open_base(store, last, force=True)
    assert size_of(base, FILE) == 16384
    with pytest.raises(FormatError, match="unchanged"):
        base.sources(FILE.encode())
    assert len(base.sources(b"PG_VERSION")) == 1
    assert any(FILE in note for note in base.notes)
    base.close()


def test_a_file_that_changes_its_kind_is_damage(store: Store) -> None:
    full = store.add(line(FILE, 3), files={FILE: b"abc"})
    last = store.add(line(FILE, -1, is_datafile=1, n_blocks=1), mode="DELTA", parent=full)
    base = open_base(store, last)
    with pytest.raises(FormatError, match="data file"):
        base.sources(FILE.encode())
    base.close()
    full = store.add(directory_line(FILE))
    last = store.add(line(FILE, -1, is_datafile=1, n_blocks=1), mode="DELTA", parent=full)
    base = open_base(store, last)
    with pytest.raises(FormatError, match="is a file in backup"):
        base.sources(FILE.encode())
    base.close()


def test_header_maps(store: Store) -> None:
    data = page_stream(pages("ab"), compress="none")
    packed, fields = header_map_entry([(0, 0), (1, 8200)], len(data))
    entry = data_line(FILE, data, n_blocks=2, **fields)
    good = store.add(entry, files={FILE: data}, header_map=packed)
    base = open_base(store, good)
    [source] = base.sources(FILE.encode())
    assert isinstance(source, PageSource)
    assert source.headers == (
        source.root_fd, b"page_header_map", 0, len(packed), fields["hdr_crc"], 2,
    )  # fmt: skip
    base.close()
    assert fills(content(store, good)) == "ab"

    for header_map, what in ((None, "missing"), (b"", "missing"), (packed[:-1], "truncated")):
        bad = store.add(entry, files={FILE: data}, header_map=header_map)
        error = refusal(store, bad)
        assert isinstance(error, FormatError)
        assert f"header map of backup {bad} is {what}" in error.message
        base = open_base(store, bad, force=True)
        [source] = base.sources(FILE.encode())
        assert isinstance(source, PageSource)
        assert source.headers is None
        assert any(what in note for note in base.notes)
        base.close()

    # Offsets that had overflowed: the headers inside of the file are used.
    overflowed = data_line(FILE, data, n_blocks=2, **{**fields, "hdr_off": -2147483000})
    backup_id = store.add(overflowed, files={FILE: data}, program_version="2.4.5")
    base = open_base(store, backup_id)
    [source] = base.sources(FILE.encode())
    assert isinstance(source, PageSource)
    assert source.headers is None
    base.close()


def test_lists_that_do_not_match_their_crc(store: Store) -> None:
    good = store.add(line("conf", 3), files={"conf": b"abc"})
    path = store.path / good / "backup_content.control"
    path.write_bytes(path.read_bytes().replace(b'"crc":"0"', b'"crc":"1"', 1))
    error = refusal(store, good)
    assert isinstance(error, FormatError)
    assert "content-crc" in error.message
    assert good in error.message
    base = open_base(store, good, force=True)
    assert any("content-crc" in note for note in base.notes)
    base.close()
    unchecked = store.add(content_crc=0)
    open_base(store, unchecked).close()
    open_base(store, store.add(content_crc=None)).close()


def test_lists_that_are_missing_empty_or_partial(store: Store) -> None:
    missing = store.add()
    (store.path / missing / "backup_content.control").unlink()
    assert "is missing" in refusal(store, missing).message
    empty = store.add(raw_list=b"")
    assert "is empty" in refusal(store, empty).message
    partial = store.add(raw_list=line("PG_VERSION", 3))
    assert "does not list global/pg_control" in refusal(store, partial).message
    garbage = store.add(raw_list=b"\x00\x01\x02\n")
    error = refusal(store, garbage)
    assert isinstance(error, FormatError)
    assert "line 1" in error.message
    full = store.add()
    last = store.add(mode="DELTA", parent=full)
    (store.path / full / "backup_content.control").unlink()
    assert f"file list of backup {full} is missing" in refusal(store, last).message


@pytest.mark.parametrize("path", ["../../escape", "/etc/shadow", "a//b", "base/5/..", "x/./y"])
def test_names_that_climb_out(store: Store, path: str) -> None:
    backup_id = store.add(line(path, 3))
    for force in (False, True):
        error = refusal(store, backup_id, force=force)
        assert isinstance(error, FormatError)
        assert repr(path) in error.message
    # In an ancestor too: its names are never joined to a path, but the list is not to be trusted.
    last = store.add(mode="DELTA", parent=backup_id)
    assert isinstance(refusal(store, last), FormatError)


def test_names_that_collide(store: Store) -> None:
    twice = store.add(line("conf", 3), line("conf", 4))
    assert "lists 'conf' twice" in refusal(store, twice).message
    as_both = store.add(line("conf", 3), line("conf/d", 4))
    assert "'conf' as a file and as a directory" in refusal(store, as_both).message
    deep = store.add(line("conf", 3), line("conf/d/e/f", 4))
    assert "'conf' as a file and as a directory" in refusal(store, deep).message
    kinds = store.add(line("conf", 3), directory_line("conf"))
    assert "twice" in refusal(store, kinds).message
    # The same name in an external directory is another file.
    external = store.add(line("PG_VERSION", 3, external_dir_num=1), external_dirs="/a")
    open_base(store, external).close()


def test_directories_without_a_line_are_implied(store: Store) -> None:
    backup_id = store.add(line("some/where/deep", 1), files={"some/where/deep": b"x"})
    base = open_base(store, backup_id)
    assert [(e.name, e.kind, e.mode) for e in base.scandir(b"some")] == [
        (b"where", Kind.DIR, 0o700)
    ]
    assert [e.name for e in base.scandir(b"some/where")] == [b"deep"]
    base.close()


def test_hidden_names(store: Store) -> None:
    hidden = ["tablespace_map", "database_map", "postmaster.pid", "postmaster.opts"]
    backup_id = store.add(
        *(line(name, 1) for name in hidden), line("base/tablespace_map", 1), line("backup_label", 1)
    )
    base = open_base(store, backup_id)
    names = {entry.name for entry in base.scandir(b"")}
    assert b"backup_label" in names
    assert not names & {name.encode() for name in hidden}
    for name in hidden:
        with pytest.raises(NotFoundError):
            base.sources(name.encode())
    assert b"tablespace_map" in {entry.name for entry in base.scandir(b"base")}
    base.close()


@pytest.mark.parametrize("is_link", [False, True])
def test_tablespaces_are_links_into_the_mount(store: Store, is_link: bool) -> None:
    below = "pg_tblspc/16400/PG_15_202209061/5/16500"
    root = (
        line("pg_tblspc/16400", 0, mode=0o120777, linked="/srv/production")
        if is_link
        else directory_line("pg_tblspc/16400")
    )
    backup_id = store.add(
        root,
        directory_line("pg_tblspc/16400/PG_15_202209061"),
        directory_line("pg_tblspc/16400/PG_15_202209061/5"),
        line(below, 3),
        directory_line("pg_tblspc/in_place"),
        files={below: b"abc"},
    )
    base = open_base(store, backup_id)
    assert {(e.name, e.kind, e.target) for e in base.scandir(b"pg_tblspc")} == {
        (b"16400", Kind.LINK, b"../.tblspc/16400"),
        (b"in_place", Kind.DIR, None),
    }
    [entry] = [e for e in base.scandir(b"") if e.name == b".tblspc"]
    assert (entry.kind, entry.mode) == (Kind.DIR, 0o700)
    assert [(e.name, e.kind, e.mode) for e in base.scandir(b".tblspc")] == [
        (b"16400", Kind.DIR, 0o700)
    ]
    shown = below.replace("pg_tblspc", ".tblspc").encode()
    assert [e.name for e in base.scandir(shown.rpartition(b"/")[0])] == [b"16500"]
    [source] = base.sources(shown)
    assert source.path == b"database/" + below.encode()
    for path in (below.encode(), b".tblspc/99/x", b".tblspc", b"pg_tblspc/16400"):
        with pytest.raises(NotFoundError):
            base.sources(path)
    for path in (b"pg_tblspc/16400", b".tblspc/99", b"pg_tblspc/16400/PG_15_202209061"):
        with pytest.raises(NotFoundError):
            list(base.scandir(path))
    base.close()


def test_without_tablespaces_there_is_no_place_for_them(store: Store) -> None:
    base = open_base(store, store.add())
    assert b".tblspc" not in {entry.name for entry in base.scandir(b"")}
    with pytest.raises(NotFoundError):
        list(base.scandir(b".tblspc"))
    base.close()


def test_a_name_in_the_place_of_tablespaces_is_refused(store: Store) -> None:
    backup_id = store.add(directory_line("pg_tblspc/1"), directory_line(".tblspc"))
    assert "where tablespaces are shown" in refusal(store, backup_id).message


def test_links_elsewhere_are_refused(store: Store) -> None:
    backup_id = store.add(line("pg_xact", 0, mode=0o120777, linked="/srv/x"))
    error = refusal(store, backup_id)
    assert isinstance(error, FormatError)
    assert "'pg_xact' outside of pg_tblspc" in error.message


@pytest.mark.parametrize(
    "entry",
    [
        line("pg_tblspc/1/PG_15_1/5/16500", 3, is_datafile=1, is_cfs=1),
        line("pg_tblspc/1/PG_15_1/pg_compression", 3),
    ],
)
def test_compressed_tablespaces_are_refused_by_name(store: Store, entry: bytes) -> None:
    backup_id = store.add(entry)
    for force in (False, True):
        error = refusal(store, backup_id, force=force)
        assert isinstance(error, UnsupportedError)
        assert "CFS" in error.message
        assert "pg_tblspc/1/PG_15_1/" in error.message


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "link", "directory"])
def test_pg_control_has_to_be_right(store: Store, damage: str, tmp_path: Path) -> None:
    backup_id = store.add()
    path = store.path / backup_id / "database" / "global" / "pg_control"
    data = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(data[:100])
    elif damage == "flipped":
        path.write_bytes(data[:50] + b"\xff" + data[51:])
    elif damage == "link":
        (tmp_path / "pg_control").write_bytes(data)
        path.symlink_to(tmp_path / "pg_control")
    elif damage == "directory":
        path.write_bytes(data)
        database = store.path / backup_id / "database"
        database.rename(tmp_path / "database")
        database.symlink_to(tmp_path / "database")
    error = refusal(store, backup_id)
    assert isinstance(error, FormatError)
    assert "global/pg_control" in error.message
    assert backup_id in error.message


def test_what_the_base_says_of_itself(store: Store) -> None:
    full = store.add()
    last = store.add(mode="DELTA", parent=full, stream="false", external_dirs="'/b:/a'")
    base = open_base(store, last)
    assert base.pg_major == 15
    assert base.system_identifier == 7000000000000000001
    assert base.owner == (os.getuid(), os.getgid())
    for word in (last, full, "DELTA", "FULL", "main", "15", "ARCHIVE"):
        assert word in base.describe()
    assert base.external_directories() == [(1, "/a", 0), (2, "/b", 0)]
    [entry] = [e for e in base.scandir(b"") if e.name == b"base"]
    assert entry.mtime_ns % 1_000_000_000 == 0
    assert entry.mtime_ns > 1_700_000_000_000_000_000
    base.close()
    base.close()


def test_identity_tells_bases_apart(store: Store) -> None:
    full = store.add()
    last = store.add(mode="DELTA", parent=full)

    def identity(backup_id: str) -> dict[str, str | int | None]:
        base = open_base(store, backup_id)
        base.close()
        return base.identity

    before = identity(last)
    assert identity(last.lower()) == before
    assert identity(full) != before
    # The list of an ancestor changes, as a merge does it.
    raw = (store.path / full / "backup_content.control").read_bytes() + line("new", 0)
    (store.path / full / "backup_content.control").write_bytes(raw)
    control = store.path / full / "backup.control"
    text = control.read_text().splitlines()
    control.write_text("\n".join(row for row in text if "content-crc" not in row))
    assert identity(last) != before


def test_a_chain_that_changes_while_it_is_opened(store: Store) -> None:
    full = store.add()
    last = store.add(mode="DELTA", parent=full)
    base = open_base(store, last)
    control = store.path / full / "backup.control"
    control.rename(control.with_suffix(".old"))
    write_control(store.path / full, {"status": "MERGING"})
    with pytest.raises(ChainError, match=f"backup {full} changed"):
        base.acquire(os.getpid())
    assert not list(store.root.rglob("*.pid"))
    base.close()
    base = open_base(store, store.add())
    (store.path / str(base.identity["backup_id"])).rename(store.path / "GONE")
    with pytest.raises(ChainError, match="was removed"):
        base.acquire(os.getpid())
    base.close()


def test_what_is_not_there(store: Store) -> None:
    base = open_base(store, store.add())
    for path in (b"x", b"base/x", b"PG_VERSION/x"):
        with pytest.raises(NotFoundError):
            base.sources(path)
        with pytest.raises(NotFoundError):
            list(base.scandir(path))
    with pytest.raises(NotFoundError):
        base.sources(b"base")
    with pytest.raises(NotFoundError):
        list(base.scandir(b"PG_VERSION"))
    base.close()


def test_no_descriptor_is_left_open(store: Store) -> None:
    full = store.add()
    bad = store.add(line("../x"), mode="DELTA", parent=full)
    before = sorted(os.listdir("/proc/self/fd"))
    refusal(store, bad)
    base = open_base(store, full)
    base.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_no_limit_is_the_natives() -> None:
    assert NO_LIMIT == 0xFFFFFFFF
    assert control_file() != b""
