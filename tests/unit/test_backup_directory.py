"""Plain data directories as bases."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade import SYSTEM_IDENTIFIER, control_file
from reference import read_sources

from pbkfs.backup import Base, BaseEntry, EmptyBase, Kind, open_directory
from pbkfs.errors import BusyError, FormatError, NotFoundError, PbkfsError, UnsupportedError


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for directory in ("base/5", "base/pgsql_tmp", "global", "pg_wal", "pg_tblspc", "pg_replslot/s"):
        (root / directory).mkdir(parents=True)
    (root / "PG_VERSION").write_text("15\n")
    (root / "global/pg_control").write_bytes(control_file())
    (root / "base/5/16384").write_bytes(b"x" * 8192)
    (root / "base/pgsql_tmp/pgsql_tmp1.0").write_bytes(b"x")
    (root / "pg_wal/000000010000000000000001").write_bytes(b"w")
    (root / "empty").touch()
    os.chmod(root / "base/5/16384", 0o640)
    return root


def entries(base: Base, path: str = "") -> dict[str, BaseEntry]:
    return {entry.name.decode(): entry for entry in base.scandir(path.encode())}


def content(base: Base, path: str) -> bytes:
    directory, _, name = path.rpartition("/")
    return read_sources(base.sources(path.encode()), entries(base, directory)[name].size)


def test_files_of_a_probackup_store_are_refused(pgdata: Path, tmp_path: Path) -> None:
    """Its files begin with a PG_VERSION too, and would be shown with a header before each page."""
    backup = tmp_path / "store/backups/main/SBOL94"
    backup.mkdir(parents=True)
    pgdata = pgdata.rename(backup / "database")
    open_directory(pgdata).close()
    (backup / "backup.control").touch()
    with pytest.raises(UnsupportedError, match="pg_probackup") as caught:
        open_directory(pgdata)
    assert caught.value.hint is not None
    assert "SBOL94" in caught.value.hint


@pytest.fixture
def opened(pgdata: Path) -> Iterator[Base]:
    base = open_directory(pgdata)
    yield base
    base.close()


def test_names_and_attributes(pgdata: Path, opened: Base) -> None:
    assert set(entries(opened)) == {
        "PG_VERSION", "base", "global", "pg_wal", "pg_tblspc", "pg_replslot", "empty",
    }  # fmt: skip
    entry = entries(opened, "base/5")["16384"]
    status = (pgdata / "base/5/16384").stat()
    assert entry == BaseEntry(b"16384", Kind.FILE, 0o640, 8192, status.st_mtime_ns)
    assert entries(opened)["base"].kind is Kind.DIR
    assert content(opened, "base/5/16384") == b"x" * 8192
    assert content(opened, "pg_wal/000000010000000000000001") == b"w"
    assert content(opened, "empty") == b""
    assert opened.system_identifier == SYSTEM_IDENTIFIER
    assert opened.pg_major == 15
    assert opened.owner == (os.getuid(), os.getgid())
    assert str(pgdata) in opened.describe()
    assert list(opened.wal_seed()) == []


def test_what_belongs_to_the_other_server_is_hidden(pgdata: Path, opened: Base) -> None:
    for name in ("postmaster.opts", "tablespace_map", "database_map"):
        (pgdata / name).touch()
    (pgdata / "base/postmaster.opts").touch()
    assert not {"postmaster.opts", "tablespace_map", "database_map"} & set(entries(opened))
    assert "postmaster.opts" in entries(opened, "base")
    assert entries(opened, "pg_replslot") == {}
    assert entries(opened, "base/pgsql_tmp") == {}
    with pytest.raises(NotFoundError):
        opened.sources(b"tablespace_map")


def test_what_is_not_there(opened: Base) -> None:
    for path in (
        b"x",
        b"base/x",
        b"PG_VERSION/x",
        b"base/../PG_VERSION",
        b"/etc/passwd",
        b"base//5",
    ):
        with pytest.raises(NotFoundError):
            opened.sources(path)
        with pytest.raises(NotFoundError):
            list(opened.scandir(path))
    with pytest.raises(NotFoundError):
        opened.sources(b"base")
    with pytest.raises(NotFoundError):
        list(opened.scandir(b"PG_VERSION"))


def test_links_are_shown_and_not_followed(pgdata: Path, opened: Base, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("x")
    (pgdata / "log").symlink_to(tmp_path / "outside")
    (pgdata / "conf").symlink_to("/etc/hostname")
    shown = entries(opened)
    assert (shown["log"].kind, shown["log"].target) == (Kind.LINK, bytes(tmp_path / "outside"))
    assert shown["conf"].size == len("/etc/hostname")
    for path in (b"log/secret", b"conf", b"log"):
        with pytest.raises(NotFoundError):
            opened.sources(path)
    with pytest.raises(NotFoundError):
        list(opened.scandir(b"log"))


def test_sockets_and_pipes_are_left_out(pgdata: Path, opened: Base) -> None:
    os.mkfifo(pgdata / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(pgdata / "sock"))
    assert not {"pipe", "sock"} & set(entries(opened))
    with pytest.raises(NotFoundError):
        opened.sources(b"pipe")


def test_tablespaces(pgdata: Path, tmp_path: Path) -> None:
    for oid, where in (("16400", tmp_path / "one"), ("16401", pgdata.parent / "two")):
        (where / "PG_15_202209061/5").mkdir(parents=True)
        (where / "PG_15_202209061/5/16500").write_text(oid)
    (pgdata / "pg_tblspc/16400").symlink_to(tmp_path / "one")
    (pgdata / "pg_tblspc/16401").symlink_to("../../two")
    (pgdata / "pg_tblspc/16402").mkdir()
    (pgdata / "tablespace_map").write_text("16400 /srv/production\n16401 /srv/other\n")
    (pgdata / ".tblspc").mkdir()
    base = open_directory(pgdata)
    links = {name: (e.kind, e.target) for name, e in entries(base, "pg_tblspc").items()}
    assert links == {
        "16400": (Kind.LINK, b"../.tblspc/16400"),
        "16401": (Kind.LINK, b"../.tblspc/16401"),
        "16402": (Kind.DIR, None),
    }
    assert [e.name for e in base.scandir(b"")].count(b".tblspc") == 1
    assert entries(base)[".tblspc"].mode == 0o700
    assert set(entries(base, ".tblspc")) == {"16400", "16401"}
    for oid in ("16400", "16401"):
        assert content(base, f".tblspc/{oid}/PG_15_202209061/5/16500") == oid.encode()
    for path in (b"pg_tblspc/16400/PG_15_202209061/5/16500", b".tblspc/16402/x", b".tblspc"):
        with pytest.raises(NotFoundError):
            base.sources(path)
    assert any(str(tmp_path / "one") in note for note in base.notes)
    base.close()


def test_tablespaces_that_lie_beside_the_directory(pgdata: Path) -> None:
    (pgdata / "tablespace_map").write_text("16400 /srv/production\n")
    with pytest.raises(NotFoundError, match=r"tablespace 16400 \(/srv/production\)") as caught:
        open_directory(pgdata)
    assert caught.value.hint
    (pgdata.parent / "16400/PG_15_202209061").mkdir(parents=True)
    (pgdata.parent / "16400/PG_15_202209061/x").write_text("x")
    base = open_directory(pgdata)
    assert content(base, ".tblspc/16400/PG_15_202209061/x") == b"x"
    base.close()


def test_a_tablespace_link_that_leads_nowhere(pgdata: Path) -> None:
    (pgdata / "pg_tblspc/16400").symlink_to("/nonexistent/place")
    with pytest.raises(NotFoundError, match="/nonexistent/place"):
        open_directory(pgdata)


def test_pg_wal_may_be_a_link(pgdata: Path, tmp_path: Path) -> None:
    (pgdata / "pg_wal").rename(tmp_path / "wal")
    (pgdata / "pg_wal").symlink_to(tmp_path / "wal")
    base = open_directory(pgdata)
    assert entries(base)["pg_wal"].kind is Kind.DIR
    assert content(base, "pg_wal/000000010000000000000001") == b"w"
    base.close()
    (tmp_path / "wal").rename(tmp_path / "gone")
    with pytest.raises(NotFoundError, match="pg_wal"):
        open_directory(pgdata)


def refusal(path: Path) -> PbkfsError:
    with pytest.raises(PbkfsError) as caught:
        open_directory(path).close()
    return caught.value


def test_what_is_no_data_directory(pgdata: Path, tmp_path: Path) -> None:
    assert isinstance(refusal(tmp_path / "nowhere"), NotFoundError)
    assert isinstance(refusal(pgdata / "PG_VERSION"), NotFoundError)
    (tmp_path / "plain").mkdir()
    error = refusal(tmp_path / "plain")
    assert isinstance(error, FormatError)
    assert "PG_VERSION" in error.message
    assert error.hint
    (pgdata / "PG_VERSION").write_text("fifteen\n")
    assert isinstance(refusal(pgdata), FormatError)
    (pgdata / "PG_VERSION").write_bytes(b"\xff\xfe")
    assert isinstance(refusal(pgdata), FormatError)
    (pgdata / "PG_VERSION").write_text("9.6\n")
    assert isinstance(refusal(pgdata), UnsupportedError)
    (pgdata / "PG_VERSION").write_text("15\n")
    (pgdata / "global/pg_control").write_bytes(control_file()[:-8000])
    assert isinstance(refusal(pgdata), FormatError)
    (pgdata / "global/pg_control").write_bytes(control_file(block_size=16384))
    assert isinstance(refusal(pgdata), UnsupportedError)
    (pgdata / "global/pg_control").unlink()
    assert "global/pg_control" in refusal(pgdata).message


def test_incremental_backups_of_pg_basebackup_are_refused_by_name(pgdata: Path) -> None:
    label = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n"
    (pgdata / "backup_label").write_text(label)
    open_directory(pgdata).close()
    (pgdata / "backup_label").write_text(label + "INCREMENTAL FROM LSN: 0/1000028\n")
    error = refusal(pgdata)
    assert isinstance(error, UnsupportedError)
    assert "pg_combinebackup" in (error.hint or "")


@pytest.fixture
def in_directory() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes to end after the test."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_a_directory_with_a_living_server_is_refused(
    pgdata: Path, tmp_path: Path, in_directory: list[subprocess.Popen[bytes]]
) -> None:
    # A postmaster lives in its data directory; that and the pid file are what tells it.
    for cwd in (pgdata, tmp_path):
        in_directory.append(subprocess.Popen(["sleep", "600"], cwd=cwd))
    server, stranger = in_directory
    pid_file = pgdata / "postmaster.pid"
    pid_file.write_text(f"{server.pid}\n{pgdata}\n1700000000\n5432\n")
    error = refusal(pgdata)
    assert isinstance(error, BusyError)
    assert str(server.pid) in error.message
    assert error.hint
    # By another path too.
    (tmp_path / "link").symlink_to(pgdata)
    assert isinstance(refusal(tmp_path / "link"), BusyError)
    # A pid that now belongs to another process, or to none, or is no number.
    for text in (f"{stranger.pid}\n{pgdata}\n", "4194399\n", "", "x\n", "-1\n"):
        pid_file.write_text(text)
        base = open_directory(pgdata)
        assert "postmaster.pid" not in entries(base)
        base.close()


def test_identity_tells_that_the_base_changed(pgdata: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> dict[str, str | int | None]:
        base = open_directory(path)
        base.close()
        return base.identity

    before = identity(pgdata)
    (tmp_path / "link").symlink_to(pgdata)
    assert identity(tmp_path / "link") == before
    (pgdata / "backup_label").write_text("START WAL LOCATION: 0/2000028\n")
    assert identity(pgdata) != before
    (pgdata / "backup_label").unlink()
    assert identity(pgdata) == before
    (pgdata / "global/pg_control").write_bytes(control_file(version=1700))
    assert identity(pgdata) != before


def test_no_descriptor_is_left_open(pgdata: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    base = open_directory(pgdata)
    entries(base, "base/5")
    base.sources(b"base/5/16384")
    base.close()
    base.close()
    (pgdata / "pg_tblspc/16400").symlink_to("/nonexistent/place")
    refusal(pgdata)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_names_are_bytes(pgdata: Path, opened: Base) -> None:
    (Path(os.fsdecode(bytes(pgdata) + b"/\xff\xfe"))).write_text("x")
    assert b"\xff\xfe" in {entry.name for entry in opened.scandir(b"")}
    assert len(opened.sources(b"\xff\xfe")) == 1


def test_the_empty_base() -> None:
    base = EmptyBase((1, 2))
    assert list(base.scandir(b"")) == []
    assert (base.owner, base.identity, base.pg_major) == ((1, 2), {"kind": "empty"}, None)
    with pytest.raises(NotFoundError):
        base.scandir(b"x")
    with pytest.raises(NotFoundError):
        base.sources(b"x")
    base.acquire(os.getpid())
    base.release(os.getpid())
    base.close()
    assert "empty" in base.describe()


def test_imports_without_the_extension() -> None:
    """Names can be listed by tools that never read a page."""
    program = "import pbkfs.backup, sys; sys.exit('pbkfs._native' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
