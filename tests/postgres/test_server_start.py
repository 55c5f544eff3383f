"""``pbkfs start | stop | status`` on plain copies of a PGDATA, every major."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from fix_mounts import run_pbkfs
from fix_postgres import ArchivedSource, Cluster, free_port, is_running
from machine import (
    ROOT,
    open_to_everybody,
    own_mounts,
    postgres_bindir,
    postgres_majors,
    session_directory,
)


def test_start_status_stop(cluster: Cluster) -> None:
    assert cluster.status(code=3) == {"data_directory": str(cluster.pgdata), "running": False}
    started = cluster.start()
    assert started["running"] is True
    assert cluster.uri == f"postgresql://postgres@127.0.0.1:{cluster.port}/postgres"
    assert cluster.sql("create table t as select 1 as n", "select n from t") == "1"

    status = cluster.status()
    assert (
        status["pid"]
        == cluster.pid
        == int((cluster.pgdata / "postmaster.pid").read_text().split()[0])
    )
    assert status["port"] == cluster.port
    assert status["uri"] == cluster.uri
    assert status["state"] == "ready"
    assert status["in_recovery"] is False
    assert "/" in status["lsn"]
    assert status["version"].startswith(str(cluster.programs.major))
    assert status["log"] == started["log"] == str(cluster.log)
    process = psutil.Process(cluster.pid)
    assert process.uids().effective == cluster.programs.user.uid
    assert abs(process.create_time() - _seconds(status["started_at"])) < 5

    text = run_pbkfs("status", "-D", cluster.pgdata).stdout
    assert f"port:        {cluster.port}" in text

    socket_dir = Path(status["socket_directory"])
    assert socket_dir.stat().st_mode & 0o777 == 0o700
    cluster.stop()
    assert not is_running(cluster.pid)
    assert not socket_dir.exists()
    assert cluster.status(code=3)["running"] is False
    assert run_pbkfs("status", "-D", cluster.pgdata, check=False).stdout == "not running\n"
    done = run_pbkfs("stop", "-D", cluster.pgdata, check=False)
    assert done.returncode == 3
    assert "no server runs on" in done.stderr


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_the_server_survives_its_starter_and_says_who_it_is(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    process = psutil.Process(cluster.pid)
    assert process.ppid() != os.getpid()
    assert os.getsid(cluster.pid) == cluster.pid
    assert cluster.setting("cluster_name").startswith("pbkfs ")
    assert len(cluster.setting("cluster_name")) < 64


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_stop_modes(newest_cluster: Cluster, mode: str) -> None:
    cluster = newest_cluster
    cluster.start()
    cluster.sql("create table t as select 1")
    cluster.stop("-m", mode)
    state = cluster.programs.run("pg_controldata", "-D", cluster.pgdata)
    assert ("in production" in state) == (mode == "immediate")
    cluster.start()
    assert cluster.sql("select count(*) from t") == "1"


def test_a_smart_stop_that_waits_for_a_client_times_out(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    client = subprocess.Popen(
        [cluster.programs.bindir / "psql", "-Xqw", "-d", cluster.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write("\\echo connected\n")
    client.stdin.flush()
    assert client.stdout.readline() == "connected\n"
    done = run_pbkfs("stop", "-D", cluster.pgdata, "-m", "smart", "--timeout", "0.3", check=False)
    assert done.returncode == 12
    assert f"pid {cluster.pid}" in done.stderr
    cluster.stop("-m", "fast")
    client.communicate()


def test_two_servers_take_two_ports(newest_cluster: Cluster) -> None:
    first = newest_cluster
    first.start()
    directory = first.pgdata.parent / "theirs"
    directory.mkdir()
    first.programs.user.give(directory)
    second = Cluster(directory / "data", first.programs)
    first.programs.run("pg_basebackup", "-d", first.uri, "-D", second.pgdata, "-c", "fast")
    second.start()
    assert second.port != first.port
    assert second.sql("select 1") == "1"
    # The copy has its own state and its own pid file, whatever the original's said.
    assert second.status()["pid"] != first.status()["pid"]


def test_a_named_port_that_is_taken(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        before = cluster.tree()
        message, hint = cluster.fail_to_start(8, "--port", str(port))
        assert message == f"port {port} is in use on 127.0.0.1"
        assert "--port" in hint
        assert cluster.tree() == before


def test_listening_on_the_socket_only(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    port = free_port()
    cluster.start("--listen", "", "--port", str(port))
    assert cluster.uri.startswith("postgresql://postgres@/postgres?host=/")
    assert cluster.sql("select 1") == "1"
    assert cluster.setting("listen_addresses") == ""


def test_options_reach_the_server(newest_cluster: Cluster, server_place: Path) -> None:
    cluster = newest_cluster
    log = server_place / "my.log"
    cluster.start(
        "-c", "work_mem=5MB", "-c", "archive-mode=on", "--pg-options", "-c 'application_name=a b'",
        "--shared-buffers", "16MB", "--log", log,
    )  # fmt: skip
    assert cluster.setting("work_mem") == "5120"
    assert cluster.setting("application_name") == "psql"
    assert cluster.sql("select reset_val from pg_settings where name = 'archive_mode'") == "on"
    assert cluster.setting("shared_buffers") == "2048"
    assert "database system is ready" in log.read_text()
    assert not cluster.log.exists()


def test_a_socket_directory_with_a_blank_and_one_too_long(
    newest_cluster: Cluster, server_place: Path
) -> None:
    cluster = newest_cluster
    directory = server_place / "a b"
    directory.mkdir()
    cluster.programs.user.give(directory)
    cluster.start("--listen", "", "--socket-dir", directory)
    assert cluster.sql("select 1") == "1"
    cluster.stop()
    long = server_place / ("x" * 90)
    long.mkdir()
    message, _ = cluster.fail_to_start(2, "--socket-dir", long)
    assert "too long" in message


def test_trust_local_trusts_the_socket_and_nothing_else(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    hba = cluster.pgdata / "pg_hba.conf"
    hba.write_text("local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n")
    before = hba.read_bytes()
    cluster.start()
    assert "password" in _refusal(cluster, cluster.uri)
    # Without a password nothing can be asked, but where it is and that it is ready is known.
    status = cluster.status()
    assert (status["lsn"], status["in_recovery"], status["state"]) == (None, False, "ready")
    cluster.stop()

    cluster.start("--trust-local")
    assert "?host=" in cluster.uri
    assert cluster.sql("select 1") == "1"
    tcp = f"postgresql://postgres@127.0.0.1:{cluster.port}/postgres"
    assert "password" in _refusal(cluster, tcp)
    status = cluster.status()
    assert "/" in status["lsn"]
    assert status["uri"] == cluster.uri
    assert hba.read_bytes() == before


def _refusal(cluster: Cluster, uri: str) -> str:
    done = subprocess.run(
        [cluster.programs.bindir / "psql", "-Xw", "-d", uri, "-c", "select 1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    return done.stderr


def test_connect_opens_psql(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    done = subprocess.run(
        [sys.executable, "-m", "pbkfs", "start", "-D", cluster.pgdata, "--connect"],
        input="select 6 * 7 as answer;\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout


# --- identity ---------------------------------------------------------------------------------


def test_a_running_server_is_not_started_twice(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    message, hint = cluster.fail_to_start(8)
    assert f"(pid {cluster.pid}, port {cluster.port})" in message
    assert "pbkfs stop" in hint
    # A pid file that is gone makes the server no less real.
    (cluster.pgdata / "postmaster.pid").rename(cluster.pgdata / "away")
    message, _ = cluster.fail_to_start(8)
    assert f"(pid {cluster.pid})" in message
    cluster.stop()
    assert not is_running(cluster.pid)


def test_a_stale_pid_file_with_a_dead_pid_is_no_server(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    children = psutil.Process(cluster.pid).children()
    os.kill(cluster.pid, signal.SIGKILL)
    psutil.wait_procs(children, timeout=30)
    assert (cluster.pgdata / "postmaster.pid").exists()
    assert cluster.status(code=3)["running"] is False
    assert run_pbkfs("stop", "-D", cluster.pgdata, check=False).returncode == 3
    cluster.start()
    assert cluster.sql("select 1") == "1"


def test_a_stale_pid_file_whose_pid_is_another_process_now(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    user = cluster.programs.user
    # PostgreSQL itself refuses to start here: a live process of its own user has this pid.
    other = subprocess.Popen(["sleep", "600"], cwd=cluster.pgdata, **user.identity)
    try:
        pid_file = cluster.pgdata / "postmaster.pid"
        pid_file.write_text(
            f"{other.pid}\n{cluster.pgdata}\n1700000000\n5432\n/tmp\n\n 1 2\nready\n"
        )
        user.give(pid_file)
        assert cluster.status(code=3)["running"] is False
        done = run_pbkfs("stop", "-D", cluster.pgdata, check=False)
        assert done.returncode == 3
        assert other.poll() is None
        cluster.start()
        assert cluster.status()["pid"] != other.pid
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_stale_pid_file_whose_pid_nobody_has_waited_for(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    # kill(pid, 0), by which PostgreSQL looks, finds a dead child until its parent waits for it.
    dead = subprocess.Popen(["true"], **cluster.programs.user.identity)
    try:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        pid_file = cluster.pgdata / "postmaster.pid"
        pid_file.write_text(
            f"{dead.pid}\n{cluster.pgdata}\n1700000000\n5432\n/tmp\n\n 1 2\nready\n"
        )
        cluster.programs.user.give(pid_file)
        cluster.start()
        assert cluster.status()["pid"] != dead.pid
    finally:
        dead.wait()


def test_backends_that_outlived_their_postmaster_block_a_start(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    children = psutil.Process(cluster.pid).children()
    stopped = children[0]
    stopped.suspend()
    try:
        os.kill(cluster.pid, signal.SIGKILL)
        psutil.wait_procs([child for child in children if child != stopped], timeout=30)
        assert cluster.status(code=3)["running"] is False
        message, _ = cluster.fail_to_start(8)
        assert f"pid {stopped.pid}" in message
    finally:
        stopped.resume()
    psutil.wait_procs([stopped], timeout=30)
    cluster.start()


# --- bad input --------------------------------------------------------------------------------


def test_no_binaries_of_the_major(newest_cluster: Cluster, tmp_path: Path) -> None:
    cluster = newest_cluster
    before = cluster.tree()
    message, hint = cluster.fail_to_start(10, PBKFS_PG_BINDIR=str(tmp_path), PATH="/nowhere")
    assert f"no PostgreSQL {cluster.programs.major} on this host" in message
    assert str(tmp_path) in message
    assert f"/usr/lib/postgresql/{cluster.programs.major}/bin" in message
    assert "--pg-bindir" in hint
    message, _ = cluster.fail_to_start(10, "--pg-bindir", str(tmp_path))
    assert f"no PostgreSQL server in {tmp_path}" in message
    assert cluster.tree() == before


def test_binaries_of_another_major(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    others = [major for major in postgres_majors() if major != cluster.programs.major]
    bindir = postgres_bindir(others[0])
    message, _ = cluster.fail_to_start(10, "--pg-bindir", str(bindir))
    assert f"{bindir} holds PostgreSQL {others[0]}" in message


def test_not_a_pgdata(newest_cluster: Cluster, server_place: Path) -> None:
    cluster = newest_cluster
    empty = server_place / "empty"
    empty.mkdir()
    for verb in ("start", "status", "stop"):
        done = run_pbkfs(verb, "-D", empty, check=False)
        assert done.returncode == 4, verb
        assert f"{empty} is not a PGDATA" in done.stderr
        assert "mount a backup on it" in done.stderr
        assert run_pbkfs(verb, "-D", server_place / "none", check=False).returncode == 4
    assert list(empty.iterdir()) == []
    (cluster.pgdata / "PG_VERSION").write_text("nonsense\n")
    assert "PG_VERSION says 'nonsense'" in cluster.fail_to_start(4)[0]
    (cluster.pgdata / "PG_VERSION").write_text("9.6\n")
    assert "9.6" in cluster.fail_to_start(11)[0]


def test_a_damaged_control_file(cluster: Cluster) -> None:
    control = cluster.pgdata / "global" / "pg_control"
    data = bytearray(control.read_bytes())
    data[100] ^= 1
    control.write_bytes(data)
    before = cluster.tree()
    message, hint = cluster.fail_to_start(6)
    assert "global/pg_control is damaged" in message
    assert hint
    control.write_bytes(b"")
    assert "global/pg_control is damaged" in cluster.fail_to_start(6)[0]
    assert {k: v for k, v in cluster.tree().items() if k != "global/pg_control"} == {
        k: v for k, v in before.items() if k != "global/pg_control"
    }


def test_modes_that_postgres_refuses(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.pgdata.chmod(0o755)
    message, hint = cluster.fail_to_start(9)
    assert "mode 0755" in message
    assert "chmod 0700" in hint


def run_as(uid: int, gid: int, *args: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """Run ``pbkfs ARGS`` as another user, to whom our checkout and interpreter may be closed."""
    way = Path(tempfile.mkdtemp(prefix="way-", dir=session_directory()))
    become = f"exec setpriv --reuid={uid} --regid={gid} --clear-groups"
    script = f'{open_to_everybody(way)}; {become} "$@"'
    command = [*own_mounts(), "sh", "-ec", script, "sh", sys.executable, "-m", "pbkfs"]
    environment = {k: v for k, v in os.environ.items() if k != "PBKFS_RUN_DIR"}
    return subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd="/",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="the whole session runs as an ordinary user")
def test_an_ordinary_user_starts_a_server_of_his_own(
    newest_archived: ArchivedSource, server_place: Path
) -> None:
    cluster = newest_archived.copy("bare", server_place)
    user = cluster.programs.user

    def run(*args: str) -> str:
        done = run_as(user.uid, user.gid, args[0], "-D", cluster.pgdata, *args[1:])
        assert done.returncode == 0, done.stderr
        return done.stdout

    # The log would lie beside PGDATA, where this user may not write.
    uri = run("start", "--recovery-target", "latest", "--wal-archive", str(newest_archived.archive))
    assert cluster.programs.sql(uri.strip(), "select max(n) from t") == "30"
    status = json.loads(run("status", "--format", "json"))
    directory = Path(status["socket_directory"])
    assert directory.parent == Path(f"/tmp/pbkfs-{user.uid}")
    assert directory.stat().st_uid == user.uid
    assert status["log"] == str(directory / "postgres.log")
    assert "/" in status["lsn"]
    # Root finds the same server.
    assert cluster.status()["pid"] == status["pid"]
    run("stop")
    assert not is_running(status["pid"])
    (directory / "postgres.log").unlink()
    directory.rmdir()
    if not os.listdir(directory.parent):
        directory.parent.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owners(newest_cluster: Cluster, server_place: Path) -> None:
    cluster = newest_cluster
    user = cluster.programs.user
    os.chown(cluster.pgdata, 0, 0)
    message, hint = cluster.fail_to_start(10)
    assert "owned by root" in message
    assert "--owner" in hint
    user.give(cluster.pgdata)
    done = run_as(12345, 12345, "start", "-D", cluster.pgdata)
    assert done.returncode == 9, done.stderr
    assert "Permission denied" in done.stderr
    # A directory above that only root may pass.
    server_place.chmod(0o700)
    message, hint = cluster.fail_to_start(9)
    assert f"{server_place} is closed to {user.name} (mode 0700, owner root)" in message
    server_place.chmod(0o755)


def test_a_server_that_does_not_come_up_shows_its_log(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    oldest = min((cluster.pgdata / "pg_wal").glob("0*"))
    oldest.unlink()
    message, hint = cluster.fail_to_start(10)
    assert "did not come up: " in message
    assert "could not locate a valid checkpoint record" in message
    assert len(message.splitlines()) <= 21
    assert str(cluster.log) in hint
    assert cluster.status(code=3)["running"] is False


def test_settings_that_postgres_does_not_know(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.configure(no_such_setting="1")
    message, _ = cluster.fail_to_start(10)
    assert "no_such_setting" in message
    done = run_pbkfs("start", "-D", cluster.pgdata, "-c", "nonsense", check=False)
    assert done.returncode == 2
