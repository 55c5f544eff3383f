"""Reading postgresql.conf as PostgreSQL reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkfs.errors import PostgresError
from pbkfs.postgres.configuration import (
    join_list,
    parse_line,
    parse_memory,
    read_configuration,
    split_list,
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("port = 5432", ("port", "5432")),
        ("  Port=5432  # comment", ("port", "5432")),
        ("port 5432", ("port", "5432")),
        ("port '5432'", ("port", "5432")),
        ("port'5432'", ("port", "5432")),
        ("name = 'it''s # not a comment'  # this is", ("name", "it's # not a comment")),
        (r"name = 'a\'b\n\101'", ("name", "a'b\nA")),
        ("name = ''", ("name", "")),
        ("my.custom_setting = on", ("my.custom_setting", "on")),
        ("timezone = Europe/Berlin", ("timezone", "Europe/Berlin")),
        ("lower = -1.5e3\r", ("lower", "-1.5e3")),
        ("# port = 1", None),
        ("", None),
        ("   ", None),
        ("port", None),
        ("port = 'unterminated", None),
        ("port = a b", None),
        ("= 1", None),
    ],
)
def test_lines(line: str, expected: tuple[str, str] | None) -> None:
    assert parse_line(line) == expected


def test_the_last_value_wins_across_files(tmp_path: Path) -> None:
    directory = tmp_path / "conf.d"
    directory.mkdir()
    (tmp_path / "postgresql.conf").write_text(
        "a = 1\nb = 1\ninclude 'more.conf'\ninclude_dir = 'conf.d'\nc = main\n"
        "include_if_exists 'none.conf'\n"
    )
    (tmp_path / "more.conf").write_text("a = 2\nb = 2\nc = 2\n")
    (directory / "20.conf").write_text("b = 4\n")
    (directory / "10.conf").write_text("b = 3\n")
    (directory / ".hidden.conf").write_text("b = 9\n")
    (directory / "30.other").write_text("b = 9\n")
    (tmp_path / "postgresql.auto.conf").write_text("d = 'auto'\n")
    found = read_configuration(tmp_path)
    assert found.values == {"a": "2", "b": "4", "c": "main", "d": "auto"}
    assert found.lines["a"] == [(tmp_path / "postgresql.conf", 1), (tmp_path / "more.conf", 1)]
    assert found.missing == []
    assert found.has_main_file


def test_missing_includes_and_files(tmp_path: Path) -> None:
    assert not read_configuration(tmp_path).has_main_file
    (tmp_path / "postgresql.conf").write_text("include 'a'\ninclude_dir '/none/b'\nx = 1\n")
    found = read_configuration(tmp_path)
    assert [(m.line_number, str(m.target)) for m in found.missing] == [
        (1, f"{tmp_path}/a"),
        (2, "/none/b"),
    ]
    assert found.values == {"x": "1"}


def test_a_file_that_includes_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").write_text("a = 1\ninclude 'postgresql.conf'\n")
    assert read_configuration(tmp_path).values == {"a": "1"}


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "postgresql.conf").mkdir()
    with pytest.raises(PostgresError, match="cannot read"):
        read_configuration(tmp_path)


@given(st.binary(max_size=300))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.mktemp("conf")
    (directory / "postgresql.auto.conf").write_bytes(data)
    read_configuration(directory)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", []),
        ("a", ["a"]),
        ("a, b ,c", ["a", "b", "c"]),
        ('"a, b", c', ["a, b", "c"]),
        ("$libdir/x,/usr/lib/y.so", ["$libdir/x", "/usr/lib/y.so"]),
    ],
)
def test_lists(value: str, expected: list[str]) -> None:
    assert split_list(value) == expected
    assert split_list(join_list(expected)) == expected


@given(st.lists(st.text(alphabet='ab ,"/$', min_size=1).filter(lambda s: s == s.strip())))
def test_lists_survive_quoting(items: list[str]) -> None:
    assert split_list(join_list(items)) == items


@pytest.mark.parametrize(
    ("text", "is_on"),
    [("on", True), ("TRUE", True), ("y", True), ("1", True), ("t", True), ("off", False),
     ("of", False), ("o", False), ("", False), ("0", False), ("no", False)],
)  # fmt: skip
def test_booleans(tmp_path: Path, text: str, is_on: bool) -> None:
    (tmp_path / "postgresql.conf").write_text(f"ssl = '{text}'\n")
    assert read_configuration(tmp_path).is_on("ssl") is is_on


def test_memory() -> None:
    assert parse_memory("128MB") == 128 << 20
    assert parse_memory("16384") == 128 << 20
    assert parse_memory("1.5 GB") == 3 << 29
    assert parse_memory("1gb") is None
    assert parse_memory("") is None
