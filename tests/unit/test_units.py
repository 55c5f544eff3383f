"""Sizes and durations."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbkfs.errors import UsageError
from pbkfs.units import format_bytes, format_duration, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("8192", 8192),
        ("64MB", 64 << 20),
        ("64MiB", 64 << 20),
        ("64 m", 64 << 20),
        ("1.5g", 3 << 29),
        ("1kB", 1024),
        ("2TB", 2 << 40),
        ("17B", 17),
    ],
)
def test_parse_size(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e3", "1 2", "5XB", "1BB", "0x10", "1iB", "١٢"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("0.5", 0.5), ("2h", 7200), ("7d", 604800), ("1h30m", 5400), ("250ms", 0.25),
     ("1 min", 60), ("1d 2h", 93600), ("1w", 604800)],
)  # fmt: skip
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "h", "-1s", "1x", "1h x", "1,5s"])
def test_parse_duration_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse_duration(text)


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 17, 1024, 1536, 8192, 5 << 20, 3 << 40, 5000 << 40)] == [
        "0 B", "17 B", "1 KiB", "1.5 KiB", "8 KiB", "5 MiB", "3 TiB", "5000 TiB",
    ]  # fmt: skip


def test_format_duration() -> None:
    assert [format_duration(s) for s in (0, 0.9, 61, 3600, 90061, -5)] == [
        "0s", "0s", "1m 1s", "1h", "1d 1h", "0s",
    ]  # fmt: skip


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    for parse in (parse_size, parse_duration):
        with contextlib.suppress(UsageError):
            assert parse(text) >= 0
