"""The parts of a start that need no server: binaries, places, targets, pid files, settings."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pbkfs.errors import BusyError, HostError, NotFoundError, PostgresError, UsageError
from pbkfs.postgres import network
from pbkfs.postgres.account import Account, account_of, check_can_serve, find_obstacle
from pbkfs.postgres.binaries import find_binaries, read_binaries
from pbkfs.postgres.cluster import Cluster, open_cluster, parse_control
from pbkfs.postgres.network import Place, find_free_port, port_is_free
from pbkfs.postgres.postmaster import find_postmaster, identify, read_pid_file
from pbkfs.postgres.recovery import (
    Recovery,
    RecoveryTarget,
    begun_recovery,
    make_restore_command,
    parse_target,
    plan_recovery,
)

# --- binaries ---------------------------------------------------------------------------------


def fake_installation(directory: Path, version: str, library_dir: str = "lib") -> Path:
    """A directory with a ``postgres`` that says its version."""
    bindir = directory / "bin"
    bindir.mkdir(parents=True)
    server = bindir / "postgres"
    server.write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
    server.chmod(0o755)
    libraries = directory / library_dir
    libraries.mkdir(parents=True)
    (libraries / "libpqwalreceiver.so").touch()
    return bindir


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An environment without servers, but for the directories given."""

    def use(*bindirs: Path, path: Path | None = None) -> None:
        monkeypatch.setenv("PBKFS_PG_BINDIR", os.pathsep.join(map(str, bindirs)))
        monkeypatch.setenv("PATH", f"{path}:/bin" if path else "/bin")
        monkeypatch.setattr("pbkfs.postgres.binaries._PLACES", ())

    return use


def test_the_major_decides(tmp_path: Path, nowhere: Callable[..., None]) -> None:
    old = fake_installation(tmp_path / "old", "14.2")
    new = fake_installation(tmp_path / "new", "17beta1 (Debian 17~beta1)")
    nowhere(old, new)
    assert find_binaries(17).bindir == new
    assert find_binaries(17).version == "17beta1"
    assert find_binaries(14).bindir == old
    nowhere(path=new)
    assert find_binaries(17).bindir == new
    with pytest.raises(PostgresError, match=r"no PostgreSQL 16 on this host; .*new/bin \(17\)"):
        find_binaries(16)


def test_pg_config_on_the_path_shows_the_way(tmp_path: Path, nowhere: Callable[..., None]) -> None:
    bindir = fake_installation(tmp_path / "hidden", "16.1")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "pg_config").write_text(f"#!/bin/sh\n[ $1 = --bindir ] && echo {bindir}\n")
    (tools / "pg_config").chmod(0o755)
    nowhere(path=tools)
    assert find_binaries(16).bindir == bindir


def test_a_server_that_does_not_run_is_none(tmp_path: Path) -> None:
    bindir = fake_installation(tmp_path, "15.1")
    (bindir / "postgres").write_text("#!/bin/sh\nexit 127\n")
    assert read_binaries(bindir) is None
    with pytest.raises(PostgresError, match="no PostgreSQL server in"):
        find_binaries(15, bindir)


@pytest.mark.parametrize("place", ["lib", "lib/postgresql", "lib64"])
def test_library_directory(tmp_path: Path, place: str) -> None:
    bindir = fake_installation(tmp_path / "real", "15.1", place)
    # Debian's alternatives are links: what counts is where the program really is.
    links = tmp_path / "links"
    links.mkdir()
    (links / "postgres").symlink_to(bindir / "postgres")
    for found in (read_binaries(bindir), read_binaries(links)):
        assert found is not None
        assert found.library_directory() == tmp_path / "real" / place


# --- places -----------------------------------------------------------------------------------


def test_ports() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        # Bound and not yet listening is in use as well.
        assert not port_is_free("127.0.0.1", port)
        assert not port_is_free("*", port)
        assert not port_is_free("", port)
        assert find_free_port("127.0.0.1", port) > port
        with pytest.raises(BusyError, match="no free port"):
            find_free_port("127.0.0.1", port, tries=1)
    assert port_is_free("127.0.0.1", port)
    with pytest.raises(UsageError, match="cannot listen on"):
        port_is_free("no such host", port)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ("127.0.0.1", "postgresql://me@127.0.0.1:5433/postgres"),
        ("*", "postgresql://me@127.0.0.1:5433/postgres"),
        ("::1, 10.0.0.1", "postgresql://me@[::1]:5433/postgres"),
        ("", "postgresql://me@/postgres?host=/run/a%20b&port=5433"),
    ],
)
def test_uris(addresses: str, expected: str) -> None:
    assert Place(5433, addresses, Path("/run/a b")).uri("me") == expected


def test_the_run_directory_of_a_stranger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBKFS_RUN_DIR", str(tmp_path / "run"))
    account = account_of(os.geteuid(), os.getegid())
    data_dir = tmp_path / "data"
    path = network.make_run_directory(data_dir, account)
    assert path.stat().st_mode & 0o777 == 0o700
    assert network.make_run_directory(tmp_path / "other", account) != path
    path.chmod(0o777)
    with pytest.raises(HostError, match="can be changed by others"):
        network.make_run_directory(data_dir, account)
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(HostError):
        network.make_run_directory(data_dir, account)
    path.unlink()
    made = network.make_run_directory(data_dir, account)
    (made / ".s.PGSQL.5432").touch()
    (made / "something").touch()
    network.remove_run_directory(data_dir, account)
    assert [entry.name for entry in made.iterdir()] == ["something"]


# --- accounts ---------------------------------------------------------------------------------


def test_obstacles_are_named(place: Path) -> None:
    closed = place / "a" / "b"
    closed.mkdir(parents=True)
    stranger = Account(54321, 54321, (), "uid 54321", "/")
    if os.geteuid() != 0:
        stranger = account_of(os.geteuid(), os.getegid())
    assert find_obstacle(stranger, closed) is None
    (place / "a").chmod(0o600 if os.geteuid() != 0 else 0o700)
    said = find_obstacle(stranger, closed)
    assert said is not None
    assert str(place / "a") in said
    (place / "a").chmod(0o755)
    assert find_obstacle(stranger, place / "none") == f"{place}/none: No such file or directory"


def test_who_may_serve(tmp_path: Path) -> None:
    with pytest.raises(PostgresError, match="owned by root"):
        check_can_serve(account_of(0, 0), tmp_path)
    if os.geteuid() != 0:
        with pytest.raises(PostgresError, match="is owned by uid 54321, and you are"):
            check_can_serve(account_of(54321, 54321), tmp_path)
    check_can_serve(account_of(os.geteuid() or 54321, 54321), tmp_path)


# --- clusters and pid files -------------------------------------------------------------------


@pytest.fixture
def pgdata(tmp_path: Path) -> Path:
    """What looks like a PGDATA at first sight."""
    directory = tmp_path / "data"
    for name in ("global", "base", "pg_wal"):
        (directory / name).mkdir(parents=True)
    (directory / "PG_VERSION").write_text("16\n")
    return directory


def test_open_cluster(pgdata: Path) -> None:
    link = pgdata.parent / "link"
    link.symlink_to(pgdata)
    cluster = open_cluster(link)
    assert (cluster.data_dir, cluster.major, cluster.is_mount) == (pgdata, 16, False)
    assert cluster.owner.uid == os.geteuid()
    (pgdata / "global").rmdir()
    with pytest.raises(NotFoundError, match="global or base is missing"):
        open_cluster(pgdata)
    with pytest.raises(NotFoundError, match="is not a directory"):
        open_cluster(pgdata / "PG_VERSION")


def test_pid_files(pgdata: Path) -> None:
    path = pgdata / "postmaster.pid"
    assert read_pid_file(pgdata) is None
    path.write_text(f"123\n{pgdata}\n1700000000\n5433\n/run/x\n127.0.0.1\n 1 2\nready   \n")
    found = read_pid_file(pgdata)
    assert found is not None
    assert (found.pid, found.port, found.socket_dir) == (123, 5433, "/run/x")
    assert (found.listen_address, found.status) == ("127.0.0.1", "ready")
    # A server that just started has written only a few lines.
    path.write_text(f"123\n{pgdata}\n1700000000\n")
    found = read_pid_file(pgdata)
    assert found is not None
    assert (found.port, found.status) == (None, "")
    for junk in (b"", b"junk\n", b"\xff\xfe\n", b"12 13\n"):
        path.write_bytes(junk)
        assert read_pid_file(pgdata) is None


def test_a_process_of_another_program_is_no_postmaster(pgdata: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=pgdata
    ) as p:
        (pgdata / "postmaster.pid").write_text(f"{p.pid}\n{pgdata}\n1\n5432\n\n\n\nready\n")
        assert identify(p.pid, pgdata) is None
        assert find_postmaster(pgdata) is None
        p.communicate(b"\n")
    assert identify(p.pid, pgdata) is None
    assert identify(2**22 + 1, pgdata) is None


def test_control_values() -> None:
    said = "pg_control version number:            1300\nmax_connections setting:   42\nno colon\n"
    assert parse_control(said) == {
        "pg_control version number": "1300",
        "max_connections setting": "42",
    }


# --- recovery ---------------------------------------------------------------------------------

NO_VALUES: dict[str, str | None] = {"time": None, "lsn": None, "xid": None, "name": None}


def target(point: str | None = None, **values: str) -> RecoveryTarget | None:
    return parse_target(
        NO_VALUES | values, point=point, action=None, timeline=None, is_inclusive=None
    )


def test_targets() -> None:
    assert target() is None
    assert target(lsn="0/16B3740") == RecoveryTarget("lsn", "0/16B3740")
    assert target("immediate") == RecoveryTarget("immediate", None)
    found = parse_target(NO_VALUES, point=None, action=None, timeline="latest", is_inclusive=None)
    assert found == RecoveryTarget("latest", None, timeline="latest")
    for wrong in ({"lsn": "16B3740"}, {"xid": "x"}, {"name": ""}, {"time": ""}):
        with pytest.raises(UsageError):
            target(**wrong)
    with pytest.raises(UsageError, match="more than one"):
        target("latest", xid="1")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("2026-11-20T19:13:14Z", "2026-11-20T19:13:14+00"),
        ("2026-11-20 19:13:14.5z", "2026-11-20 19:13:14.5+00"),
        ("2026-11-20 19:13:14 UTC", "2026-11-20 19:13:14 UTC"),
        ("2026-11-20 19:13:14 Europe/Zagreb", "2026-11-20 19:13:14 Europe/Zagreb"),
    ],
)
def test_a_time_in_zulu_is_understood(given: str, meant: str) -> None:
    values = {**NO_VALUES, "time": given}
    found = parse_target(values, point=None, action=None, timeline=None, is_inclusive=None)
    assert found is not None
    assert found.value == meant


def test_a_begun_recovery_is_remembered(pgdata: Path) -> None:
    cluster = open_cluster(pgdata)
    assert begun_recovery(cluster) is None
    begun = Recovery(RecoveryTarget("name", 'it"s', "pause"), Path("/a b"))
    cluster.write("recovery.signal", begun.signal_text())
    assert begun_recovery(cluster) == begun
    assert plan_recovery(cluster, None, None) == begun
    further = RecoveryTarget("latest", None)
    assert plan_recovery(cluster, further, None) == Recovery(further, Path("/a b"))
    for junk in ("", "# pbkfs {", "# pbkfs {}", '# pbkfs {"archive": null, "kind": "x"}'):
        cluster.write("recovery.signal", junk)
        assert begun_recovery(cluster) is None
    with pytest.raises(PostgresError, match="recovered already"):
        plan_recovery(cluster, further, Path("/a"))


def test_restore_command_survives_the_shell_and_per_cent_signs(pgdata: Path, place: Path) -> None:
    cluster = open_cluster(pgdata)
    assert make_restore_command(cluster, None, place, place / "s").text == "false"
    archive = place / "a 'b\" $(touch x) %f;&"
    archive.mkdir()
    name = "000000010000000000000001"
    (archive / "00000002.history").write_bytes(b"history")
    command = make_restore_command(cluster, archive, place, place / "wal.sock")
    assert not command.needs_feeder
    # As the server does: %f and %p are replaced, %% is a per cent sign, a shell runs it.
    for wanted, code in ((name, 1), ("00000002.history", 0)):
        text = command.text.replace("%%", "\0").replace("%f", wanted).replace("%p", "got")
        done = subprocess.run(text.replace("\0", "%"), shell=True, cwd=place)
        assert done.returncode == code
    assert (place / "got").read_bytes() == b"history"
    assert not (place / "x").exists()


def test_clusters_write_for_their_owner(pgdata: Path) -> None:
    cluster = Cluster(pgdata, 16, account_of(os.geteuid(), os.getegid()), None)
    cluster.write("new", "text")
    assert (pgdata / "new").stat().st_mode & 0o777 == 0o600
    (pgdata / "link").symlink_to("/etc/passwd")
    with pytest.raises(HostError):
        cluster.write("link", "text")
