"""Recovery to a point: ``pbkfs start --recovery-target…`` and ``pbkfs wal-get``."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fix_mounts import run_pbkfs
from fix_postgres import ArchivedSource, Cluster, is_running, wait_until
from machine import MAJORS

from pbkfs.postgres import wal_file

# As PostgreSQL: count and greatest value tell how far recovery went.
ROWS = "select count(*) || ' ' || max(n) from t"


OLDEST_AND_NEWEST = pytest.mark.parametrize("programs", [MAJORS[0], MAJORS[-1]], indirect=True)


@pytest.fixture
def bare(archived: ArchivedSource, server_place: Path) -> Cluster:
    """A copy of the backup without WAL, of every major in turn."""
    return archived.copy("bare", server_place)


@pytest.fixture
def newest_bare(newest_archived: ArchivedSource, server_place: Path) -> Cluster:
    """The same of the newest major."""
    return newest_archived.copy("bare", server_place)


def test_a_backup_with_its_wal_starts_as_it_is(
    archived: ArchivedSource, server_place: Path
) -> None:
    cluster = archived.copy("stream", server_place)
    cluster.start()
    assert cluster.sql(ROWS) == "10 10"
    # Crash-like recovery: the same timeline, and it is the first.
    assert cluster.sql("select timeline_id from pg_control_checkpoint()") == "1"
    assert not (cluster.pgdata / "backup_label").exists()
    assert cluster.setting("archive_mode") == "off"
    before = set(archived.archive.iterdir())
    cluster.sql("select pg_switch_wal()", "checkpoint")
    cluster.stop()
    assert set(archived.archive.iterdir()) == before


def test_latest_on_every_major(archived: ArchivedSource, bare: Cluster) -> None:
    found = bare.start("--recovery-target", "latest", "--wal-archive", archived.archive)
    assert found["in_recovery"] is False
    assert bare.sql(ROWS) == "30 30"
    bare.sql("insert into t values (31)")
    assert not (bare.pgdata / "recovery.signal").exists()
    bare.stop()
    # Without options from now on: an ordinary server on its new timeline.
    bare.start()
    assert bare.sql(ROWS) == "31 31"
    assert bare.setting("restore_command") == ""
    assert bare.sql("select timeline_id from pg_control_checkpoint()") == "2"


@pytest.mark.parametrize("kind", ["xid", "lsn", "name", "time"])
def test_targets(newest_archived: ArchivedSource, newest_bare: Cluster, kind: str) -> None:
    value = newest_archived.points[kind]
    newest_bare.start(f"--recovery-target-{kind}", value, "--wal-archive", newest_archived.archive)
    assert newest_bare.sql(ROWS) == "20 20"
    newest_bare.sql("insert into t values (31)")


def test_exclusive_xid(newest_archived: ArchivedSource, newest_bare: Cluster) -> None:
    newest_bare.start(
        "--recovery-target-xid", newest_archived.points["xid"], "--recovery-target-inclusive=false",
        "--wal-archive", newest_archived.archive,
    )  # fmt: skip
    assert newest_bare.sql(ROWS) == "10 10"


@OLDEST_AND_NEWEST
def test_immediate_needs_no_archive_where_the_backup_has_its_wal(
    archived: ArchivedSource, server_place: Path
) -> None:
    cluster = archived.copy("stream", server_place)
    cluster.start("--recovery-target", "immediate")
    assert cluster.sql(ROWS) == "10 10"
    assert cluster.sql("select timeline_id from pg_control_checkpoint()") == "2"


@OLDEST_AND_NEWEST
def test_pause_then_go_on_then_promote(archived: ArchivedSource, bare: Cluster) -> None:
    name = archived.points["name"]
    options = ["--wal-archive", str(archived.archive)]
    found = bare.start(
        "--recovery-target-name", name, "--recovery-target-action", "pause", *options
    )
    assert found["in_recovery"] is True
    assert bare.sql(ROWS) == "20 20"
    status = bare.status()
    assert (status["in_recovery"], status["paused"]) == (True, True)
    assert "/" in status["lsn"]
    bare.stop()

    # A start without options goes on with what was begun, from the same archive.
    found = bare.start()
    assert found["in_recovery"] is True
    assert "going on to recover to name twenty rows" in bare.notices
    assert bare.sql(ROWS) == "20 20"
    bare.stop()

    # A further target; the archive is remembered.
    bare.start("--recovery-target", "latest")
    assert bare.sql(ROWS) == "30 30"
    assert bare.status()["in_recovery"] is False


def test_shutdown_at_the_target(newest_archived: ArchivedSource, newest_bare: Cluster) -> None:
    found = newest_bare.start(
        "--recovery-target-lsn", newest_archived.points["lsn"],
        "--recovery-target-action", "shutdown", "--wal-archive", newest_archived.archive,
    )  # fmt: skip
    assert found["running"] is False
    assert newest_bare.status(code=3)["running"] is False
    state = newest_bare.programs.run("pg_controldata", "-D", newest_bare.pgdata)
    assert "shut down in recovery" in state
    newest_bare.start("--recovery-target", "latest")
    assert newest_bare.sql(ROWS) == "30 30"


def test_targets_of_an_earlier_restore_do_not_count(
    newest_archived: ArchivedSource, newest_bare: Cluster
) -> None:
    with open(newest_bare.pgdata / "postgresql.auto.conf", "a") as file:
        file.write(
            "recovery_target_time = '2020-01-01'\nrestore_command = 'false'\n"
            "recovery_target_action = 'shutdown'\nprimary_conninfo = 'host=192.0.2.1'\n"
        )
    newest_bare.start(
        "--recovery-target-name", newest_archived.points["name"],
        "--wal-archive", newest_archived.archive,
    )  # fmt: skip
    assert newest_bare.sql(ROWS) == "20 20"


# --- refusals ---------------------------------------------------------------------------------


def test_a_target_that_the_archive_does_not_reach(
    newest_archived: ArchivedSource, newest_bare: Cluster
) -> None:
    message, hint = newest_bare.fail_to_start(
        10, "--recovery-target-time", "2099-01-01", "--wal-archive", newest_archived.archive
    )
    assert "recovery ended before configured recovery target was reached" in message
    assert "archive ends before the recovery target" in hint


def test_a_target_before_the_end_of_the_backup(
    newest_archived: ArchivedSource, newest_bare: Cluster
) -> None:
    message, hint = newest_bare.fail_to_start(
        10, "--recovery-target-lsn", "0/1", "--wal-archive", newest_archived.archive
    )
    assert "before consistent recovery point" in message
    assert "mount an older backup" in hint


def test_a_cluster_that_has_run_cannot_be_recovered_to_a_point(
    newest_archived: ArchivedSource, server_place: Path
) -> None:
    cluster = newest_archived.copy("stream", server_place)
    cluster.start()
    cluster.stop()
    before = cluster.tree()
    message, hint = cluster.fail_to_start(
        10, "--recovery-target", "latest", "--wal-archive", newest_archived.archive
    )
    assert "has been recovered already: it has no backup_label" in message
    assert "new diff" in hint
    assert cluster.tree() == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--recovery-target-lsn", "nonsense"], "lsn 'nonsense' is not understood"),
        (["--recovery-target-xid", "-1"], "xid '-1' is not understood"),
        (["--recovery-target-time", "yesterdayish"], "recovery_target_time"),
        (["--recovery-target-name", "x" * 64], "too long"),
        (["--recovery-target", "latest", "--recovery-target-xid", "1"], "more than one"),
        (["--recovery-target-action", "pause"], "without a recovery target"),
        (["--recovery-target", "latest", "--recovery-target-timeline", "x"], "timeline 'x'"),
        (["--recovery-target", "latest", "--recovery-target-action", "pause"], "cannot pause"),
        (["--wal-archive", "/tmp"], "without a recovery target"),
    ],
)
def test_options_that_make_no_sense(
    newest_archived: ArchivedSource, newest_bare: Cluster, options: list[str], complaint: str
) -> None:
    before = newest_bare.tree()
    if "--wal-archive" not in options:
        options = [*options, "--wal-archive", str(newest_archived.archive)]
    message, _ = newest_bare.fail_to_start(2, *options)
    assert complaint in message
    assert newest_bare.tree() == before


def test_no_archive_is_known(newest_bare: Cluster) -> None:
    message, hint = newest_bare.fail_to_start(2, "--recovery-target", "latest")
    assert "no WAL archive is known" in message
    assert "--wal-archive" in hint


def test_an_archive_that_does_not_exist(newest_bare: Cluster, server_place: Path) -> None:
    before = newest_bare.tree()
    message, hint = newest_bare.fail_to_start(
        9, "--recovery-target", "latest", "--wal-archive", server_place / "none"
    )
    user = newest_bare.programs.user.name
    assert f"{user} cannot fetch WAL from {server_place}/none: " in message
    assert "No such file or directory" in message
    assert user in hint
    assert newest_bare.tree() == before


@pytest.fixture
def closed_archive(newest_archived: ArchivedSource, server_place: Path) -> Path:
    """An archive that only root can read."""
    if os.geteuid() != 0:
        pytest.skip("only root can close a directory to the server")
    closed = server_place / "closed"
    shutil.copytree(newest_archived.archive, closed)
    closed.chmod(0o700)
    return closed


def feeders(archive: Path) -> list[int]:
    """The processes which serve WAL and were started with this archive."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = process.info["cmdline"] or []
        if str(archive) in arguments and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def wait_until_gone(archive: Path) -> None:
    """Wait until no feeder of the archive is left."""
    processes = [psutil.Process(pid) for pid in feeders(archive)]
    psutil.wait_procs(processes, timeout=30)
    assert feeders(archive) == []


def test_an_archive_that_only_root_can_read(closed_archive: Path, newest_bare: Cluster) -> None:
    newest_bare.start("--recovery-target", "latest", "--wal-archive", closed_archive)
    assert newest_bare.sql(ROWS) == "30 30"
    # Its work is done when recovery is.
    wait_until_gone(closed_archive)
    assert newest_bare.status()["running"] is True


def test_a_feeder_serves_wal_only_and_as_long_as_its_server_recovers(
    newest_archived: ArchivedSource, closed_archive: Path, newest_bare: Cluster, tmp_path: Path
) -> None:
    (closed_archive.parent / "secret").write_text("secret")
    newest_bare.start(
        "--recovery-target-name", newest_archived.points["name"],
        "--recovery-target-action", "pause", "--wal-archive", closed_archive,
    )  # fmt: skip
    assert len(feeders(closed_archive)) == 1
    socket = Path(newest_bare.status()["socket_directory"]) / "wal.sock"
    assert socket.stat().st_mode & 0o777 == 0o600
    name, data = max(segments(closed_archive).items())
    target = tmp_path / "got"
    assert wal_file.main(["--feeder", str(socket), name, str(target)]) == 0
    assert target.read_bytes() == data
    target.unlink()
    for other in ("../secret", "secret", "", "00000009.history", "x" * 200):
        assert wal_file.main(["--feeder", str(socket), other, str(target)]) == wal_file.NOT_THERE
        assert not target.exists()
    os.kill(newest_bare.pid, signal.SIGKILL)
    wait_until_gone(closed_archive)
    # An answer that does not come is no end of the archive.
    code = wal_file.main(["--feeder", str(socket), name, str(target)])
    assert code == wal_file.STOP_RECOVERY


def test_a_damaged_segment_stops_recovery_instead_of_ending_it(
    newest_archived: ArchivedSource, newest_bare: Cluster, server_place: Path
) -> None:
    """Taken for the end of the archive, it would give an older state and call it the latest."""
    archive = server_place / "archive"
    shutil.copytree(newest_archived.archive, archive)
    newest_bare.programs.user.give(archive)
    last = sorted(archive.glob("*[0-9A-F]"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    message, _ = newest_bare.fail_to_start(
        10, "--recovery-target", "latest", "--wal-archive", archive
    )
    assert "a segment has" in message
    last.write_bytes((newest_archived.archive / last.name).read_bytes())
    newest_bare.start("--recovery-target", "latest", "--wal-archive", archive)
    assert newest_bare.sql(ROWS) == "30 30"


def test_a_place_full_of_special_characters(
    newest_archived: ArchivedSource, server_place: Path
) -> None:
    odd = server_place / "a b'c%f$d\"e"
    odd.mkdir()
    archive = odd / "arch ive"
    shutil.copytree(newest_archived.archive, archive)
    newest_archived.programs.user.give(archive)
    cluster = newest_archived.copy("bare", odd, "da'ta %p")
    cluster.start("--recovery-target", "latest", "--wal-archive", archive)
    assert cluster.sql(ROWS) == "30 30"
    cluster.stop()
    assert not is_running(cluster.pid)


def test_a_timed_out_start_goes_on(newest_archived: ArchivedSource, newest_bare: Cluster) -> None:
    message, hint = newest_bare.fail_to_start(
        12, "--recovery-target", "latest", "--wal-archive", newest_archived.archive,
        "--timeout", "0",
        # Nobody watches it any more: where another server takes its port, it would end.
        "--listen", "",
    )  # fmt: skip
    assert "is not ready after 0 s; it goes on (pid " in message
    match = re.search(r"pid (\d+)", message)
    assert match is not None
    pid = int(match[1])
    # It is known for a server once it has its pid file.
    wait_until(lambda: (newest_bare.pgdata / "postmaster.pid").exists())
    assert newest_bare.status()["pid"] == pid
    assert "pbkfs stop" in hint
    newest_bare.stop("-m", "immediate")
    assert not is_running(pid)


# --- wal-get ----------------------------------------------------------------------------------


@pytest.fixture
def store(newest_archived: ArchivedSource, tmp_path: Path) -> Path:
    """A store's archive: wal/main."""
    shutil.copytree(newest_archived.archive, tmp_path / "wal" / "main")
    return tmp_path


def segments(archive: Path) -> dict[str, bytes]:
    """Every archived segment, unpacked, with tools that are not ours."""
    found = {}
    for path in sorted(archive.iterdir()):
        match = re.fullmatch(r"([0-9A-F]{24})(\.gz)?", path.name)
        if match:
            data = path.read_bytes()
            if match[2]:
                data = subprocess.run(
                    ["gzip", "-dc"], input=data, capture_output=True, check=True
                ).stdout
            found[match[1]] = data
    return found


def test_wal_get_raw_and_compressed(store: Path, tmp_path: Path) -> None:
    archive = store / "wal" / "main"
    names = {path.suffix for path in archive.iterdir()}
    assert ".gz" in names
    for name, data in segments(archive).items():
        target = tmp_path / name
        run_pbkfs("wal-get", "-B", store, "--instance", "main", name, target)
        assert target.read_bytes() == data
        assert target.stat().st_mode & 0o777 == 0o600
        target.unlink()
        run_pbkfs("wal-get", "--archive", archive, name, target)
        assert target.read_bytes() == data


def fetch(archive: Path, name: str, target: Path) -> tuple[int, str]:
    """Run the program of restore_command as the server does."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", wal_file.__file__, "--archive", archive, name, target],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.stdout == ""
    assert not target.with_name(target.name + ".pbkfs").exists()
    return done.returncode, done.stderr


def test_partial_segments_and_their_order(store: Path, tmp_path: Path) -> None:
    archive = store / "wal" / "main"
    name, data = max(segments(archive).items())
    for path in archive.glob(f"{name}*"):
        path.unlink()
    target = tmp_path / "got"
    assert fetch(archive, name, target) == (wal_file.NOT_THERE, "")
    assert not target.exists()

    # Each of them wins over the one before; a partial one is filled up with zeros.
    half = len(data) // 2
    padded = data[:half] + bytes(half)
    (archive / f"{name}.part").write_bytes(b"junk")
    (archive / f"{name}.partial").write_bytes(data[:half])
    assert fetch(archive, name, target)[0] == 0
    assert target.read_bytes() == padded
    third = len(data) // 3
    (archive / f"{name}.gz.partial").write_bytes(gzip.compress(data[:third]))
    assert fetch(archive, name, target)[0] == 0
    assert target.read_bytes() == data[:third] + bytes(len(data) - third)
    # The writer of a partial one died while writing.
    (archive / f"{name}.gz.partial").write_bytes(gzip.compress(data, 1)[:-100])
    assert fetch(archive, name, target)[0] == 0
    assert len(target.read_bytes()) == len(data)
    (archive / f"{name}.gz").write_bytes(gzip.compress(data))
    (archive / f"{name}.gz.partial").write_bytes(b"junk")
    assert fetch(archive, name, target)[0] == 0
    assert target.read_bytes() == data
    (archive / name).write_bytes(data)
    (archive / f"{name}.gz").write_bytes(b"junk")
    assert fetch(archive, name, target)[0] == 0
    assert target.read_bytes() == data


def test_history_files_and_names_that_are_no_wal(store: Path, tmp_path: Path) -> None:
    archive = store / "wal" / "main"
    (archive / "00000002.history").write_bytes(b"1\t0/2000000\tno recovery target specified\n")
    (store / "secret").write_bytes(b"secret")
    target = tmp_path / "got"
    assert fetch(archive, "00000002.history", target)[0] == 0
    assert target.read_bytes().startswith(b"1\t0/2000000")
    target.unlink()
    for name in ("00000003.history", "../../secret", "", "pg_control", "00000002.HISTORY"):
        assert fetch(archive, name, target) == (wal_file.NOT_THERE, "")
        assert not target.exists()


@pytest.mark.parametrize(
    "damage", ["empty", "short", "long", "no header", "broken gzip", "cut gzip"]
)
def test_damage_stops_recovery(store: Path, tmp_path: Path, damage: str) -> None:
    archive = store / "wal" / "main"
    name, data = max(segments(archive).items())
    for path in archive.glob(f"{name}*"):
        path.unlink()
    packed = bytearray(gzip.compress(data))
    packed[len(packed) // 2] ^= 0xFF
    content = {
        "empty": (name, b""),
        "short": (name, data[:-512]),
        "long": (name, data + b"x"),
        "no header": (name, bytes(len(data))),
        "broken gzip": (f"{name}.gz", bytes(packed)),
        "cut gzip": (f"{name}.gz", gzip.compress(data)[:-20]),
    }[damage]
    (archive / content[0]).write_bytes(content[1])
    target = tmp_path / "got"
    target.write_bytes(b"old")
    code, said = fetch(archive, name, target)
    assert code == wal_file.STOP_RECOVERY > 125
    assert content[0] in said
    assert target.read_bytes() == b"old"


def test_an_archive_that_is_gone_is_not_the_end_of_wal(tmp_path: Path) -> None:
    code, said = fetch(tmp_path / "none", "000000010000000000000001", tmp_path / "got")
    assert code == wal_file.STOP_RECOVERY
    assert "No such file" in said
    done = run_pbkfs(
        "wal-get", "--archive", tmp_path / "none", "000000010000000000000001", "x", check=False
    )
    assert done.returncode == 4
    done = run_pbkfs("wal-get", "000000010000000000000001", "x", check=False)
    assert done.returncode == 2
    link = tmp_path / "link"
    link.mkdir()
    (link / "000000010000000000000001").symlink_to("/etc/passwd")
    assert fetch(link, "000000010000000000000001", tmp_path / "got")[0] == wal_file.STOP_RECOVERY
