"""The daemon's life: limits, background work, signals, crashes, many clients at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from fix_mounts import run_pbkfs
from fix_postgres import wait_until
from fix_trunks import owner_setting
from fix_web import Daemon

# With 200 of them it takes some minutes; no more than there are ports and branches allowed.
_N_CLIENTS = int(os.environ.get("PBKFS_TEST_CLIENTS", "50"))


@pytest.fixture
def prod(daemon: Daemon, pgdata_template: Path) -> Iterator[Daemon]:
    """A daemon that is running, with a trunk ``prod`` of a directory beside the default one."""
    daemon.start()
    answer = daemon.post(
        "trunks?wait=true", {"name": "prod", "directory": str(pgdata_template), "start": False}
    )
    assert answer.status == 201, answer.body
    assert answer.json["status"] == "stopped"
    yield daemon
    assert daemon.leftovers() == []


# --- start --------------------------------------------------------------------------------------


def test_first_start_makes_the_default_trunk(daemon: Daemon) -> None:
    daemon.start(PBKFS_TRUNK_AUTO_START="false", PGBRANCH_DEFAULT_WAL_LEVEL="logical")
    main = daemon.get("trunks/main").json
    assert (main["status"], main["wal_level"]) == ("stopped", "logical")
    answer = daemon.post("trunks/main/start")
    assert answer.json["port"] == int(daemon.heads.env["PBKFS_DEFAULT_TRUNK_PORT"])
    assert daemon.stop() == 0
    # The second start finds it, with its server running.
    daemon.start()
    found = daemon.get("trunks/main").json
    assert found == answer.json | {key: found[key] for key in found if key.endswith("_bytes")}


def test_start_brings_up_what_is_meant_to_run(prod: Daemon) -> None:
    prod.branch("a", "prod")
    prod.branch("b", "prod")
    prod.post("branches/b/stop")
    assert prod.stop() == 0
    a = prod.heads.info("a")
    server = psutil.Process(int(Path(_pid_file(prod, a["id"])).read_text().split()[0]))
    server.kill()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    prod.start()
    assert prod.wait_for("a", "running")["port"] == a["port"]
    assert prod.sql("a", "select 1") == "1"
    assert prod.get("branches/b").json["status"] == "stopped"
    assert prod.get("trunks/prod").json["status"] == "stopped"


def _pid_file(daemon: Daemon, head_id: str) -> Path:
    return daemon.heads.layout.mount(head_id) / "postmaster.pid"


def test_refusals_to_start(daemon: Daemon, tmp_path: Path) -> None:
    def fail(code: int, *args: str, **env: str) -> str:
        return daemon.heads.fail(code, "server", *args, **{"PBKFS_API_PORT": "0", **env})

    assert "without a token" in fail(2, "--bind", "0.0.0.0")
    assert "without a token" in fail(2, "--bind", "::")
    (tmp_path / "empty").touch()
    assert "empty" in fail(2, "--token-file", str(tmp_path / "empty"))
    assert "REAPER_INTERVAL" in fail(2, PGBRANCH_REAPER_INTERVAL="often")
    assert "not part of this version" in fail(11, PGBRANCH_STORAGE_BACKEND="zfs")
    daemon.start(PBKFS_TRUNK_AUTO_START="false")
    assert f"pid {daemon.running.pid}" in fail(8)
    elsewhere = {"PBKFS_DATA_DIR": str(daemon.heads.root / "other")}
    assert "in use" in fail(8, "--port", str(daemon.port), **elsewhere)


def test_pgbranchd_is_configured_by_its_environment(daemon: Daemon) -> None:
    token, data = "from the environment", daemon.heads.root / "seed"
    environment = {
        "PGBRANCH_API_PORT": str(daemon.port),
        "PGBRANCH_API_TOKEN": token,
        "PGBRANCH_DATA_DIR": str(data),
        "PGBRANCH_METADATA_PATH": str(daemon.heads.root / "metadata.db"),
        "PGBRANCH_MAIN_AUTO_START": "false",
        "PGBRANCH_MAIN_PORT": daemon.heads.env["PBKFS_DEFAULT_TRUNK_PORT"],
        "PGBRANCH_PG_BIN_DIR": str(daemon.heads.programs.bindir),
        "PGBRANCH_LOG_LEVEL": "warn",
        "PGBRANCH_STORAGE_BACKEND": "auto",
        **owner_setting(daemon.heads.programs, "PGBRANCH"),
    }
    daemon.token = token
    with open(daemon.log, "ab") as log:
        daemon.process = subprocess.Popen(
            [sys.executable, "-c", "from pbkfs.cli.main import pgbranchd; pgbranchd()"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def is_ready() -> bool:
        try:
            return daemon.get("/readyz").status == 200
        except OSError:
            return False

    wait_until(is_ready, 90)
    assert daemon.get("trunks/main").json["status"] == "stopped"
    assert (data / "pbkfs.sock").is_socket()
    assert (daemon.heads.root / "metadata.db").exists()
    assert daemon.stop() == 0
    assert not (data / "pbkfs.sock").exists()
    assert daemon.log.read_text() == ""


# --- limits -------------------------------------------------------------------------------------


def test_limits(daemon: Daemon) -> None:
    first = daemon.heads.env["PBKFS_PORT_RANGE_START"]
    daemon.start(
        PBKFS_MAX_BRANCHES="3",
        PBKFS_MAX_DEPTH="2",
        PBKFS_PORT_RANGE_START=first,
        PBKFS_PORT_RANGE_END=str(int(first) + 1),
    )
    daemon.branch("a")
    daemon.branch("b", "a")
    daemon.post("branches", {"parent": "b"}).problem(422, "max_depth_exceeded")
    answer = daemon.post("branches", {"name": "c"})
    answer.problem(503, "insufficient_resources")
    assert answer.headers["retry-after"]
    assert daemon.names() == ["a", "b"]
    daemon.post("branches/b/stop")  # which frees its port
    daemon.branch("c")
    daemon.post("branches", {"name": "d"}).problem(422, "max_branches_exceeded")
    daemon.post("branches/b/start").problem(503, "insufficient_resources")
    assert daemon.leftovers() == []


def test_without_a_token_web_pages_are_kept_out(daemon: Daemon) -> None:
    daemon.token = ""
    daemon.start(PBKFS_TRUNK_AUTO_START="false")
    local = f"127.0.0.1:{daemon.port}"
    for headers in (
        {},
        {"Origin": f"http://{local}"},
        {"Host": "localhost"},
        {"Host": "[::1]:80"},
    ):
        assert daemon.get("trunks", headers=headers).status == 200
    for headers in (
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Host": "rebound.example.com"},
        {"Host": "192.168.0.1"},
    ):
        daemon.get("trunks", headers=headers).problem(403, "forbidden")
        daemon.post("trunks/main/stop", headers=headers).problem(403, "forbidden")


# --- in the background --------------------------------------------------------------------------


def test_reaper_removes_what_has_expired(daemon: Daemon) -> None:
    daemon.start(PGBRANCH_REAPER_INTERVAL="200ms")
    assert daemon.post("branches", {"name": "a", "ttl": "2s"}).status == 201
    daemon.branch("b", "main", ttl="1h")
    daemon.wait_for("a", "gone")
    assert daemon.names() == ["b"]
    wait_until(lambda: b"\npbkfs_reaped_total 1\n" in daemon.get("/metrics").body)
    assert daemon.leftovers() == []


def test_server_that_ended_is_found(daemon: Daemon) -> None:
    daemon.start(PBKFS_REAPER_INTERVAL="200ms")
    made = daemon.branch("a")
    pid = int(_pid_file(daemon, made["id"]).read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    daemon.wait_for("a", "error")

    def is_settled() -> bool:
        return "ended by itself" in (daemon.get("branches/a").json["error"] or "")

    wait_until(is_settled)
    answer = daemon.post("branches/a/start")
    assert answer.json["status"] == "running", answer.body


# --- the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_during_a_creation(prod: Daemon, number: signal.Signals) -> None:
    prod.branch("a", "prod")
    assert prod.post("branches", {"name": "b", "parent": "prod"}).status == 201
    assert prod.stop(number) == 0
    assert not prod.socket.exists()
    # What was under way has ended before it did, and servers run on.
    assert prod.heads.info("b")["status"] == "running"
    assert prod.heads.sql("a", "select 1") == "1"
    prod.start()
    assert prod.names() == ["a", "b"]
    assert prod.sql("b", "select 1") == "1"


def test_requests_while_it_ends(prod: Daemon) -> None:
    answers = []

    def create() -> None:
        answers.append(prod.post("branches?wait=true", {"name": "b", "parent": "prod"}))

    client = threading.Thread(target=create)
    client.start()
    wait_until(lambda: prod.names() == ["b"])
    assert prod.stop() == 0
    client.join()
    assert answers[0].status == 201, answers[0].body
    assert answers[0].json["status"] == "running"
    prod.start()


def test_death_of_the_daemon_alone(prod: Daemon) -> None:
    """An operation has a process of its own, and goes on to its end."""
    assert prod.post("branches", {"name": "b", "parent": "prod"}).status == 201
    prod.stop(signal.SIGKILL)
    prod.start()  # in the place of the dead socket
    prod.wait_for("b", "running")
    assert prod.sql("b", "select 1") == "1"


def test_the_same_request_after_the_death_of_the_daemon(prod: Daemon) -> None:
    wish = {"name": "b", "parent": "prod", "tags": ["x"], "ttl": "1h"}
    made = prod.post("branches", wish).json
    prod.stop(signal.SIGKILL)
    prod.start()
    again = prod.post("branches", wish)
    if again.status != 409:  # it was quick
        assert again.json["id"] == made["id"]
    prod.wait_for("b", "running")


def test_death_of_all_during_a_creation(prod: Daemon) -> None:
    for pause in (0.0, 0.1, 0.4):
        assert prod.post("branches", {"name": "b", "parent": "prod"}).status == 201
        threading.Event().wait(pause)
        prod.kill_all()
        prod.start()
        # What was left of it is gone; or only its start was missing, and is made up for.
        if "b" in prod.names():
            prod.wait_for("b", "running")
            assert prod.sql("b", "select 1") == "1"
            prod.delete("branches/b?wait=true")
        assert prod.leftovers() == []
        prod.branch("c", "prod")
        assert prod.delete("branches/c?wait=true").json["status"] == "deleted"


def test_death_of_all_during_a_destroy(prod: Daemon) -> None:
    prod.branch("a", "prod")
    prod.branch("b", "a")
    assert prod.delete("branches/a?recursive=true").status == 202
    prod.kill_all()
    prod.start()
    prod.wait_for("b", "gone")
    # What was not begun yet may be there still.
    prod.delete("branches/a?wait=true")
    assert prod.names() == []


# --- beside each other --------------------------------------------------------------------------


def test_command_line_beside_the_daemon(prod: Daemon) -> None:
    prod.branch("a", "prod")
    assert prod.heads.branch("b", "a")["status"] == "running"
    assert prod.get("branches/a").json["children"] == ["b"]
    prod.heads.run("branch", "stop", "b")
    assert prod.get("branches/b").json["status"] == "stopped"
    prod.delete("branches/b?wait=true")
    assert prod.heads.names() == ["a"]


@pytest.mark.timeout(60 + 20 * _N_CLIENTS)
def test_many_clients(prod: Daemon) -> None:
    def work(number: int) -> list[int]:
        name = f"b{number}"
        statuses = []
        made = prod.post("branches?wait=10m", {"name": name, "parent": "prod"}, timeout=600)
        statuses.append(made.status)
        for path in ("branches", f"branches/{name}", "health", f"branches?tag={number}"):
            statuses.append(prod.get(path, timeout=600).status)
        if made.status == 201:
            assert made.json["status"] == "running", made.json
            assert prod.get(f"branches/{name}/connection", timeout=600).status == 200
        gone = prod.request("DELETE", f"/api/v1/branches/{name}?wait=10m", timeout=600)
        return [*statuses, gone.status]

    with ThreadPoolExecutor(_N_CLIENTS) as pool:
        done = pool.map(work, range(_N_CLIENTS))
        found = Counter(status for statuses in done for status in statuses)
    assert set(found) <= {200, 201, 202}, found
    assert found[201] == found[202] == _N_CLIENTS, found
    assert prod.names() == []
    run_pbkfs("branch", "list", **prod.heads.env)  # settles, which here finds nothing to do
    assert prod.leftovers() == []
    for place in (prod.heads.layout.layers, prod.heads.layout.points):
        wait_until(lambda place=place: len(list(place.iterdir())) <= 4)
