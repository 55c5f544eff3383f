"""Names, durations and settings of branches: what is understood, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pbkfs.branch.durations import parse_duration, parse_ttl
from pbkfs.branch.errors import InvalidNameError, InvalidRequestError
from pbkfs.branch.names import check_name, check_tag, make_name
from pbkfs.branch.settings import read_settings
from pbkfs.branch.trunks import mask_url, split_password
from pbkfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200), ("7d", 604800), ("90m", 5400), ("1h30m", 5400), ("500ms", 0.5),
        ("1.5h", 5400), (".5h", 1800), ("1w", 604800), (" 30s ", 30), ("1d12h", 129600),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2", "h", "2 moons", "-1h", "1h-5m", "2h3", "1y", "1e3s", "∞"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_ttl(text)
    assert caught.value.slug == "invalid_request"
    assert caught.value.http_status == 400


def test_ttl_is_within_reason() -> None:
    assert parse_ttl("never") is None
    for text in ("0s", "0h", "200000w", "9" * 400 + "h"):
        with pytest.raises(InvalidRequestError):
            parse_ttl(text)


@pytest.mark.parametrize("name", ["a", "pr-123", "my.feature_2", "0", "a" * 63])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a/b", "a b", "a" * 64, "ä", "a\n", "..", "_"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidNameError) as caught:
        check_name(name)
    assert (caught.value.slug, caught.value.http_status) == ("invalid_name", 400)


def test_made_names_are_names() -> None:
    names = {check_name(make_name()) for _ in range(100)}
    assert len(names) == 100


def test_tags() -> None:
    assert check_tag("pr:123/Ünï") == "pr:123/Ünï"
    for tag in ("", "a b", "a,b", "x" * 129):
        with pytest.raises(InvalidRequestError):
            check_tag(tag)


def test_settings_of_an_empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    found = read_settings({})
    assert found.data_dir == Path("/var/lib/pbkfs")
    assert found.metadata_path == Path("/var/lib/pbkfs/metadata.db")
    assert (found.port_range_start, found.port_range_end) == (5500, 5599)
    assert (found.max_branches, found.max_depth, found.max_layers) == (50, 10, 32)
    assert (found.trunk_port, found.trunk_auto_start, found.wal_level) == (5432, True, "replica")
    assert (found.api_port, found.reaper_interval_s) == (8080, 30.0)


def test_settings_name_who_runs_the_servers_of_trunks() -> None:
    assert read_settings({}).owner is None
    assert read_settings({"PBKFS_OWNER": "123:456"}).owner == (123, 456)
    assert read_settings({"PGBRANCH_OWNER": "root"}).owner == (0, 0)


def test_settings_take_both_prefixes_and_the_older_names() -> None:
    found = read_settings(
        {
            "PGBRANCH_DATA_DIR": "/d",
            "PBKFS_MAX_BRANCHES": "7",
            "PGBRANCH_MAX_BRANCHES": "8",
            "PGBRANCH_MAIN_PORT": "6000",
            "PGBRANCH_MAIN_AUTO_START": "false",
            "PGBRANCH_MAIN_WAL_LEVEL": "logical",
            "PGBRANCH_REAPER_INTERVAL": "1m30s",
        }
    )
    assert found.data_dir == Path("/d")
    assert found.max_branches == 7
    assert (found.trunk_port, found.trunk_auto_start, found.wal_level) == (6000, False, "logical")
    assert found.reaper_interval_s == 90


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OWNER", "no-such-user"),
        ("API_PORT", "http"), ("API_PORT", "70000"), ("MAX_DEPTH", "0"), ("MAX_BRANCHES", "-1"),
        ("TRUNK_AUTO_START", "maybe"), ("DEFAULT_WAL_LEVEL", "high"), ("REAPER_INTERVAL", "30"),
        ("PORT_RANGE_START", "6000"), ("STORAGE_BACKEND", "floppy"), ("LOG_LEVEL", "loud"),
        ("MAX_LAYERS", "0"),
    ],
)  # fmt: skip
def test_settings_that_are_not_possible(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        read_settings({f"PBKFS_{name}": value})


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://u:secret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u@h:5432/db", "postgresql://u@h:5432/db"),
        ("host=h password=secret user=u", "host=h password=*** user=u"),
        ("password='a b' host=h", "password=*** host=h"),
        ("postgresql://h/db?password=secret&x=1", "postgresql://h/db?password=***&x=1"),
    ],
)
def test_urls_are_shown_without_their_password(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:s%40cret@h:5432/db?a=b", ("postgresql://u@h:5432/db?a=b", "s@cret")),
        ("postgres://u@h/db", ("postgres://u@h/db", None)),
        ("postgresql://h/db?user=u&password=p%26w&a=b", ("postgresql://h/db?user=u&a=b", "p&w")),
        ("postgresql://h/db?password=pw", ("postgresql://h/db?", "pw")),
        ("host=h password = 'it\\'s \\\\ it' user=u", ("host=h  user=u", "it's \\ it")),
        ("password=p\\ w host=h", (" host=h", "p w")),
        ("host=h passfile=/x", ("host=h passfile=/x", None)),
    ],
)
def test_passwords_are_kept_from_the_command_line(
    url: str, expected: tuple[str, str | None]
) -> None:
    assert split_password(url) == expected
