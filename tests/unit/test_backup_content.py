"""backup_content.control: lines, names, streams of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fix_catalogs import CatalogStore, manifests
from handmade import directory_line, line
from hypothesis import given
from hypothesis import strategies as st
from reference import crc32c

from pbkfs.backup.probackup import content
from pbkfs.backup.probackup.content import (
    DIRECTORY,
    EMPTY,
    LINK,
    STORED,
    UNCHANGED,
    Name,
    parse_line,
    read_entry,
    read_names,
)
from pbkfs.errors import FormatError


@contextmanager
def list_of(data: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def names(data: bytes) -> list[Name]:
    with list_of(data) as fd:
        *found, crc = read_names(fd, "the list", crc32c)
    assert crc == crc32c(data)
    assert all(isinstance(name, tuple) for name in found)
    return found  # type: ignore[return-value]


REAL = (
    b'{"path":"base/5/2619", "size":"51234", "mode":"33152", "is_datafile":"1", "is_cfs":"0", '
    b'"crc":"123", "compress_alg":"zlib", "external_dir_num":"0", "dbOid":"5","full_size":"131072",'
    b'"segno":"0","n_blocks":"16","n_headers":"16","hdr_crc":"456","hdr_off":"7890","hdr_size":"210"}'
)


def test_a_whole_line() -> None:
    entry = parse_line(REAL)
    assert entry == (
        b"base/5/2619", 51234, 0o100600, True, False, 123, 1, 0, 131072, None, 16,
        16, 456, 7890, 210,
    )  # fmt: skip
    assert entry.state == STORED
    assert names(REAL + b"\n") == [(0, b"base/5/2619", STORED, False, 0, 8100)]


def test_the_order_and_the_blanks_do_not_matter() -> None:
    fields = REAL[1:-1].replace(b", ", b",").split(b",")
    shuffled = b"{ " + b" , ".join(reversed(fields)) + b' , "unknown" : "x" }'
    assert parse_line(shuffled) == parse_line(REAL)
    assert names(shuffled + b"\n") == names(REAL + b"\n")


def test_lists_of_old_releases() -> None:
    # 2.0: no external_dir_num, no dbOid; a tablespace is a link; -1 printed as an unsigned number.
    old = (
        b'{"path":"pg_tblspc/16384", "size":"0", "mode":"41471", "is_datafile":"0", "is_cfs":"0", '
        b'"crc":"0", "compress_alg":"none","linked":"/srv/ts"}\n'
        b'{"path":"base/1/112", "size":"18446744073709551615", "mode":"33152", "is_datafile":"1", '
        b'"is_cfs":"0", "crc":"0", "compress_alg":"none","segno":"0"}\n'
    )
    assert [name[1:3] for name in names(old)] == [
        (b"pg_tblspc/16384", LINK),
        (b"base/1/112", UNCHANGED),
    ]
    assert parse_line(old.splitlines()[0]).linked == b"/srv/ts"


def test_states() -> None:
    data = (
        line("a", 0) + line("b", -1) + line("c", 5) + directory_line("d")
        + line("e", 7, external_dir_num=2) + line("f", 1, is_cfs=1)
    )  # fmt: skip
    found = names(data)
    assert [name[2] for name in found] == [EMPTY, UNCHANGED, STORED, DIRECTORY, STORED, STORED]
    assert [name[4] for name in found] == [0, 0, 0, 0, 2, 0]
    assert [name[3] for name in found] == [False] * 5 + [True]


def test_names_are_bytes() -> None:
    odd = [b"with space", "ф".encode(), b"\xff\xfe", b"back\\slash", b"{brace}", b"a,b:c", b"tab\t"]
    data = b"".join(line(name) for name in odd)
    assert [name[1] for name in names(data)] == odd


@pytest.mark.parametrize(
    "path",
    [
        b"../x", b"a/../x", b"a/..", b"..", b".", b"./a", b"a/./b", b"/etc/passwd", b"a//b", b"a/",
        b"/", b"//",
    ],
)  # fmt: skip
def test_names_that_climb_out_are_refused(path: bytes) -> None:
    with pytest.raises(FormatError, match=r"the list line 2: name .* has an empty component"):
        names(line("good") + line(path))


def test_names_with_dots_are_fine() -> None:
    odd = [b"a.", b"a..", b"...", b"..a", b"a/..b", b"a/b..", b".hidden", b"a/.b"]
    assert [name[1] for name in names(b"".join(map(line, odd)))] == odd


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"nonsense\n", "line 1: it does not begin with a brace"),
        (line("a") + b"\n", "line 2"),
        (line("a")[:-3] + b"\n", "line 1: not a field at byte"),
        (line("a")[:-1], "ends in the middle of line 1"),
        (line(""), "line 1: it has no path"),
        (line("a").replace(b'"size":"0", ', b""), "line 1: field size is missing"),
        (line("a").replace(b'"mode":"33152", ', b""), "line 1: field mode is missing"),
        (line("a", size="x"), "line 1: field size is not a number"),  # type: ignore[arg-type]
        (line("a", -2), "line 1: size is -2"),
        (line("a", mode=0o140600), "line 1: mode .* is of no type"),
        (line("a", mode=0), "line 1: mode 0 is of no type"),
        (line("a", compress_alg="lz4"), "line 1: compress_alg .* is not known"),
        (line("a", size=1, x='1","size":"2'), "line 1: field size occurs twice"),
        (line(b"a\0b"), "line 1: it contains a NUL byte"),
        (line("a", n_blocks=1 << 40), "line 1: n_blocks is"),
        (line("a", n_headers=1, hdr_crc=1 << 32, hdr_off=0, hdr_size=1), "line 1: hdr_crc is"),
        (line("x" * 256), "line 1: name of 256 bytes is too long"),
        (line("/".join(["x"] * 3000)), "line 1: name of 5999 bytes is too long"),
        (b"x" * (3 << 20), "line 1 is too long"),
    ],
)
def test_damaged_lists_name_the_line(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        names(data)


def test_lines_may_lie_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"".join(line(f"base/5/{n}", n + 1) for n in range(200))
    whole = names(data)
    for size in (1, 7, 100, 4096):
        monkeypatch.setattr(content, "PIECE", size)
        assert names(data) == whole


def test_entries_are_read_where_they_are() -> None:
    data = b"".join(line(f"f{n}", n, x="y" * 700) for n in range(9))
    with list_of(data) as fd:
        for offset, path, *_ in names(data):
            assert read_entry(fd, offset, path, "x").size == int(path[1:])
        for offset, path in ((0, b"f1"), (1, b"f0"), (len(data), b"f0"), (5, b"f0")):
            with pytest.raises(FormatError, match="changed while it was in use"):
                read_entry(fd, offset, path, "x")


@pytest.mark.parametrize("catalog", manifests())
def test_fast_and_slow_parsers_agree_on_real_lists(
    catalog: str, shared_catalog: CatalogStore
) -> None:
    n_lines = n_slow = 0
    for path in shared_catalog(catalog).glob("backups/*/*/backup_content.control"):
        for raw in path.read_bytes().splitlines()[::7]:
            n_lines += 1
            n_slow += content._LINE.fullmatch(raw) is None
            assert parse_line(raw) == content._parse_fields(content._scan_fields(raw))
    # The largest CRCs of headers are left to the slow one.
    assert n_slow <= n_lines / 100


_INTEGERS = st.one_of(
    st.integers(-3, 20), st.sampled_from([33152, 33188, 16832, 41471, 1 << 31, 1 << 63, 1 << 64])
)


@st.composite
def _lines(draw: st.DrawFn) -> bytes:
    path = draw(
        st.one_of(st.binary(max_size=12), st.from_regex(rb"[a-z0-9./]{1,12}", fullmatch=True))
    )
    keys = ["size", "mode", "is_datafile", "is_cfs", "crc", "compress_alg", "external_dir_num",
            "dbOid", "full_size", "segno", "linked", "n_blocks", "n_headers", "hdr_crc", "hdr_off",
            "hdr_size"]  # fmt: skip
    chosen = keys if draw(st.booleans()) else draw(st.lists(st.sampled_from(keys), max_size=16))
    fields = []
    for key in chosen:
        value = draw(_INTEGERS)
        if key == "compress_alg" and draw(st.integers(0, 9)):
            fields.append(f'"{key}":"{draw(st.sampled_from(["none", "zlib", "pglz"]))}"')
        elif key == "mode" and draw(st.integers(0, 9)):
            fields.append(f'"{key}":"{draw(st.sampled_from([33152, 33188, 16832, 41471]))}"')
        elif key.startswith("is_") and draw(st.integers(0, 9)):
            fields.append(f'"{key}":"{value & 1}"')
        else:
            fields.append(f'"{key}":"{value}"')
    return b'{"path":"' + path + b'", ' + ", ".join(fields).encode() + b"}"


@given(_lines())
def test_fast_and_slow_parsers_agree(raw: bytes) -> None:
    fast: object
    slow: object
    try:
        fast = parse_line(raw)
    except ValueError as error:
        fast = str(error)
    try:
        if b"\0" in raw:
            raise ValueError("it contains a NUL byte")
        slow = content._parse_fields(content._scan_fields(raw))
        content.check_path(slow.path)
        assert slow.state is not None
    except ValueError as error:
        slow = str(error)
    assert fast == slow
    found: object
    try:
        found = [name[1:3] for name in names(raw + b"\n")]
    except FormatError as error:
        found = error.message.partition("line 1: ")[2]
    if b"\n" not in raw:
        assert found == (slow if isinstance(slow, str) else [(slow.path, slow.state)])  # type: ignore[attr-defined]


@given(st.one_of(st.binary(max_size=400), st.lists(_lines(), max_size=5).map(b"\n".join)))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    try:
        found = names(data)
    except FormatError:
        return
    for _, path, *_ in found:
        assert not {b"", b".", b".."} & set(path.split(b"/"))
        assert os.path.normpath(path) == path
