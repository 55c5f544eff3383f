"""Branches that are stopped when nobody uses them, and started by the next client."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fix_postgres import wait_until
from fix_web import Daemon


@pytest.fixture
def tidy(served: Daemon) -> Iterator[Daemon]:
    """The module's daemon, which has nothing left over at the end."""
    yield served
    # One of them may be falling asleep just now.
    wait_until(lambda: served.leftovers() == [])


def _uri(daemon: Daemon, name: str) -> str:
    return str(daemon.get(f"branches/{name}/connection").json["uri"])


def _wait_asleep(daemon: Daemon, name: str) -> dict[str, Any]:
    """Wait until a branch is asleep and its port takes clients."""
    found: dict[str, Any] = {}

    def look() -> bool:
        found.update(daemon.get(f"branches/{name}").json)
        return bool(
            found["asleep"]
            and found["status"] in ("stopped", "error")
            and daemon.get(f"branches/{name}/connection").status == 200
        )

    wait_until(look, 90)
    return found


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def _psql(daemon: Daemon, uri: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [daemon.heads.programs.bindir / "psql", "-XAtq", *words, uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sleep_and_wake(tidy: Daemon) -> None:
    made = tidy.branch("a", idle_stop="1s")
    assert (made["idle_stop_seconds"], made["asleep"]) == (1.0, False)
    uri = _uri(tidy, "a")
    # A session that does nothing is a client, too.
    with _psql(tidy, uri) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write("create table t (n int); select 'made';\n")
        session.stdin.flush()
        assert session.stdout.readline() == "made\n"

        def n_sessions() -> int:
            session.stdin.write("select sum(sessions) from pg_stat_database;\n")
            session.stdin.flush()
            return int(session.stdout.readline())

        # The daemon asks every half second, so it has had time enough to stop it.
        before = n_sessions()
        wait_until(lambda: n_sessions() >= before + 5)
        assert tidy.get("branches/a").json["status"] == "running"
    found = _wait_asleep(tidy, "a")
    assert (found["status"], found["port"]) == ("stopped", made["port"])
    assert "stopped, asleep" in tidy.heads.run("branch", "list").stdout
    assert "stopped, asleep" in tidy.heads.run("branch", "list", "--tree").stdout
    assert "after 1s without a client" in tidy.heads.run("branch", "info", "a").stdout
    assert tidy.leftovers() == []
    # One that only looks whether somebody is there wakes nobody.
    assert _is_listening(made["port"])
    # The old URI is right, and the session that wakes it is like any other.
    with _psql(tidy, uri) as session:
        said, complaints = session.communicate(
            "insert into t select generate_series(1, 50000);\n"
            "select count(*), repeat('x', 2000000) from t;\n"
        )
    assert session.returncode == 0, complaints
    assert said == "50000|" + "x" * 2000000 + "\n"
    assert tidy.get("branches/a").json["asleep"] is False
    # And again.
    _wait_asleep(tidy, "a")
    assert tidy.heads.programs.sql(uri, "select count(*) from t") == "50000"
    assert tidy.patch("branches/a", {"idle_stop": "never"}).json["idle_stop_seconds"] is None
    events = tidy.heads.run("branch", "log", "a", "--events").stdout
    assert events.count("fell asleep") == 2, events


def test_many_clients_at_once(tidy: Daemon) -> None:
    tidy.branch("a", idle_stop="1s")
    uri = _uri(tidy, "a")
    _wait_asleep(tidy, "a")
    assert tidy.patch("branches/a", {"idle_stop": "1h"}).status == 200
    port = tidy.get("branches/a").json["port"]
    before = tidy.log.read_text()
    # All of them are there before the first one says a word: so none comes in the moment in which
    # the port changes hands.
    silent = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(30)]

    def ask(connection: socket.socket) -> bytes:
        with connection:
            connection.settimeout(60)
            connection.sendall(struct.pack("!II", 8, 80877103))  # SSLRequest
            return connection.recv(1)

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(ask, silent))
    assert set(answers) == {b"N"}, answers
    assert tidy.get("branches/a").json["status"] == "running"
    assert tidy.heads.programs.sql(uri, "select 1") == "1"
    log = tidy.log.read_text()[len(before) :]
    assert log.count("a client wakes it") == 1


def test_commands_on_one_that_is_asleep(tidy: Daemon) -> None:
    made = tidy.branch("a", idle_stop="1s")
    uri = _uri(tidy, "a")
    tidy.sql("a", "create table t (n int)")
    _wait_asleep(tidy, "a")
    # Branched, renamed, reset: it sleeps on, and wakes as what it is by then.
    tidy.branch("b", "a")
    assert tidy.sql("b", "select count(*) from t") == "0"
    assert tidy.patch("branches/a", {"name": "c"}).json["asleep"] is True
    assert tidy.post("branches/c/reset").json["status"] == "stopped"
    _wait_asleep(tidy, "c")
    assert tidy.heads.programs.sql(uri, "select to_regclass('t') is null") == "t"
    _wait_asleep(tidy, "c")
    # Started and restarted by the command line, beside the daemon: the port is its own.
    tidy.heads.run("branch", "idle-stop", "c", "1h")
    assert tidy.heads.json("branch", "start", "c")["port"] == made["port"]
    tidy.heads.run("branch", "idle-stop", "c", "1s")
    _wait_asleep(tidy, "c")
    tidy.heads.run("branch", "idle-stop", "c", "1h")
    assert tidy.heads.json("branch", "restart", "c")["port"] == made["port"]
    # Stopped by hand it is stopped.
    tidy.heads.run("branch", "idle-stop", "c", "1s")
    _wait_asleep(tidy, "c")
    stopped = tidy.post("branches/c/stop").json
    assert (stopped["status"], stopped["asleep"]) == ("stopped", False)
    wait_until(lambda: not _is_listening(made["port"]))
    tidy.get("branches/c/connection").problem(409, "wrong_state")
    # Asleep, and destroyed, by its time to live.
    tidy.post("branches/c/start")
    _wait_asleep(tidy, "c")
    tidy.delete("branches/b?wait=true")
    assert tidy.delete("branches/c?wait=true").json["status"] == "deleted"
    wait_until(lambda: not _is_listening(made["port"]))


def test_start_that_fails(tidy: Daemon) -> None:
    tidy.branch("a", idle_stop="1s")
    uri = _uri(tidy, "a")
    found = _wait_asleep(tidy, "a")
    wal = tidy.heads.layout.head(found["id"]) / "pg_wal"
    hidden = wal.rename(wal.with_name("hidden"))
    for mode in ("prefer", "disable"):
        with _psql(tidy, f"{uri}?sslmode={mode}", "-c", "select 1") as session:
            _, complaints = session.communicate()
        assert session.returncode == 2
        assert "FATAL:  the branch cannot be started: " in complaints, complaints
        # The front is there again.
        assert _wait_asleep(tidy, "a")["status"] == "error"
    hidden.rename(wal)
    assert tidy.heads.programs.sql(uri, "select 1") == "1"


def test_end_of_the_daemon(daemon: Daemon) -> None:
    daemon.start()
    made = daemon.branch("a", idle_stop="1s")
    uri = _uri(daemon, "a")
    _wait_asleep(daemon, "a")
    assert daemon.stop() == 0
    # Without it the branch is one that is stopped.
    assert not _is_listening(made["port"])
    assert "is stopped" in daemon.heads.fail(8, "branch", "connect", "a", "--uri")
    # Its port is kept for it, and taken by somebody else meanwhile.
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", made["port"]))
        other.listen()
        daemon.expected.append("can't be woken by clients")
        daemon.start()
        wait_until(lambda: "can't be woken by clients" in daemon.log.read_text())
    _wait_asleep(daemon, "a")
    assert daemon.heads.programs.sql(uri, "select 1") == "1"
    _wait_asleep(daemon, "a")
    daemon.kill_all()
    daemon.start()
    _wait_asleep(daemon, "a")
    assert daemon.heads.programs.sql(uri, "select 1") == "1"
    # A start that dies half-way leaves it asleep.
    _wait_asleep(daemon, "a")
    with _psql(daemon, uri, "-c", "select 1") as session:
        wait_until(lambda: daemon.get("branches/a").json["status"] == "starting")
        daemon.kill_all()
        session.communicate()
    daemon.start()
    wait_until(lambda: daemon.get("branches/a").json["status"] in ("stopped", "running"), 90)
    wait_until(lambda: daemon.get("branches/a/connection").status == 200, 90)
    assert daemon.heads.programs.sql(uri, "select 1") == "1"
    wait_until(lambda: daemon.leftovers() == [])


def test_refusals(tidy: Daemon) -> None:
    tidy.post("branches", {"idle_stop": "soon"}).problem(400, "invalid_request")
    tidy.post("branches", {"idle_stop": "0s"}).problem(400, "invalid_request")
    tidy.patch("branches/nobody", {"idle_stop": "1h"}).problem(404, "not_found")
    assert "idle time" in tidy.heads.fail(2, "branch", "create", "a", "--idle-stop", "0s")
