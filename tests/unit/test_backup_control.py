"""backup.control and pg_probackup.conf."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkfs.backup.probackup.control import (
    format_backup_id,
    parse_backup_id,
    parse_control,
    parse_settings,
    parse_time,
    parse_version,
)
from pbkfs.errors import FormatError, PbkfsError


def test_settings_in_every_spelling() -> None:
    text = b"""#Configuration
backup-mode = FULL
Backup_Mode=DELTA   # the last one wins
primary conninfo = 'user=x password=''y'' # no comment'
empty =
note = 'said "so"'   # a comment
bytes = \xff\xfe
"""
    assert parse_settings(text, "x") == {
        "backup-mode": "DELTA",
        "primary-conninfo": "user=x password='y' # no comment",
        "empty": "",
        "note": 'said "so"',
        "bytes": "\udcff\udcfe",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a = 1\nnonsense\n", "line 2 is not"),
        (b"= 1\n", "line 1 is not"),
        (b"a = 'open\n", "line 1 has an unterminated quote"),
        (b"a = 'one' two\n", "line 1 has an unterminated quote"),
        (b"a = \0\n", "NUL"),
    ],
)
def test_damaged_settings_name_the_line(text: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        parse_settings(text, "the file")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-20 19:11:55+00", 1795201915),
        ("2026-11-20 22:11:55+03", 1795201915),
        ("2026-11-21 00:41:55+05:30", 1795201915),
        ("2026-11-20 15:41:55-0330", 1795201915),
        ("2026-11-20 19:11:55", 1795201915),
        ("1970-01-01 00:00:00+00", 0),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2026-13-01 00:00:00", "yesterday", "2026-11-20", "0000-01-01 00:00:00"]
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_time(text)


@given(st.integers(1, 1 << 40))
def test_ids_are_parsed_as_formatted(start: int) -> None:
    assert parse_backup_id(format_backup_id(start)) == start
    assert parse_backup_id(format_backup_id(start).lower()) == start


def test_real_id() -> None:
    assert format_backup_id(parse_time("2026-11-20 19:11:55+00")) == "TOTENV"


@pytest.mark.parametrize("text", ["", "TOT-NV", "TOTENVTOTENVX", "ÄÖ", "../X"])
def test_what_is_no_id(text: str) -> None:
    with pytest.raises(ValueError, match="not a backup id"):
        parse_backup_id(text)


def test_versions() -> None:
    assert parse_version("2.5.16") == (2, 5, 16)
    assert parse_version("2.5") == (2, 5, 0)
    assert parse_version("2.4.0-beta") == (2, 4, 0)
    with pytest.raises(ValueError, match="not a version"):
        parse_version("two")


def test_modes_may_be_cut() -> None:
    for text, mode in (("F", "FULL"), ("delta", "DELTA"), ("PT", "PTRACK"), ("pa", "PAGE")):
        assert parse_control(f"backup-mode = {text}\n".encode(), "x").mode == mode


def test_absent_keys() -> None:
    control = parse_control(b"status = nonsense\n", "x")
    assert control.status == "UNKNOWN"
    assert control.mode is control.backup_id is control.parent_id is control.program_version is None
    assert (control.start_lsn, control.content_crc, control.block_size) == (0, 0, 8192)
    assert not control.stream
    assert control.external_dirs == ()


@pytest.mark.parametrize(
    "text",
    [
        b"backup-mode = SIDEWAYS", b"stream = perhaps", b"block-size = many", b"start-lsn = 12",
        b"start-time = 'noon'", b"program-version = new", b"content-crc = 0x12",
        b"start-time = '1969-01-01 00:00:00+00'", b"timelineid = -4",
    ],
)  # fmt: skip
def test_values_that_cannot_be_name_the_key(text: bytes) -> None:
    with pytest.raises(FormatError, match=text.partition(b" ")[0].decode()):
        parse_control(text, "the file")


_KEYS = st.sampled_from(
    ["backup-mode", "stream", "block-size", "start-time", "start-lsn", "program-version",
     "content-crc", "status", "external-dirs", "timelineid", "parent-backup-id", "merge-time"]
)  # fmt: skip
_VALUES = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"'?[0-9/:+\- .]{0,30}'?", fullmatch=True),
    st.sampled_from(["FULL", "true", "2.5.16", "'2026-11-20 19:11:55+00'", "0/1", "8192"]),
)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    with contextlib.suppress(PbkfsError):
        parse_control(data, "x")


@given(st.lists(st.tuples(_KEYS, _VALUES), max_size=12))
def test_no_values_crash_the_parser(pairs: list[tuple[str, str]]) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in pairs)
    with contextlib.suppress(PbkfsError):
        parse_control(text.encode("utf-8", "surrogateescape"), "x")
