"""A command that is killed at any step leaves nothing that the next one does not settle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fix_postgres import is_running, server_pids, wait_until
from fix_trunks import Heads
from machine import TESTS

from pbkfs.branch import serving
from pbkfs.branch.service import open_service
from pbkfs.branch.settings import read_settings

# Not every step: about this many of each command, evenly spread.
_N_TRIES = int(os.environ.get("PBKFS_TEST_KILLS", "5"))

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def prod(heads: Heads, pgdata_template: Path) -> Heads:
    """A running trunk ``prod`` with a table ``t``."""
    heads.trunk("prod", pgdata_template)
    heads.sql("prod", "create table t (n int)", "insert into t values (1)", kind="trunk")
    return heads


def _run_dying(heads: Heads, at: int, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TESTS / "dying_command.py", str(at), *args],
        env={**os.environ, **heads.env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _count_steps(heads: Heads, *args: str) -> int:
    done = _run_dying(heads, 0, *args)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


def _steps(n_steps: int) -> list[int]:
    assert n_steps > 10
    return sorted({1 + round(i * (n_steps - 1) / (_N_TRIES - 1)) for i in range(_N_TRIES)})


def _kill(heads: Heads, at: int, *args: str) -> None:
    done = _run_dying(heads, at, *args)
    assert done.returncode == -9, (at, done.returncode, done.stdout, done.stderr)


def test_create(prod: Heads) -> None:
    n_steps = _count_steps(prod, "branch", "create", "a", "--from", "prod")
    prod.sql("prod", "insert into t values (2)", kind="trunk")
    for number, at in enumerate(_steps(n_steps)):
        _kill(prod, at, "branch", "create", "b", "--from", "prod")
        # What it leaves is gone, or it was done.
        assert prod.names() in (["a"], ["a", "b"]), at
        assert prod.leftovers() == [], at
        if "b" in prod.names():
            assert prod.sql("b", "select count(*) from t") == str(number + 2)
            prod.run("branch", "destroy", "b", "--yes")
        # The trunk can still be branched: that is a seal the next time, too.
        prod.sql("prod", "insert into t values (2)", kind="trunk")
    prod.branch("c", "prod")
    assert prod.sql("c", "select count(*) from t") == prod.sql(
        "prod", "select count(*) from t", kind="trunk"
    )
    prod.check_cluster("c")
    used = {path.name for path in prod.layout.layers.iterdir()}
    assert len(used) <= 4 + len(_steps(n_steps))


def test_reset(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.sql("a", "insert into t values (2)")
    n_steps = _count_steps(prod, "branch", "reset", "a", "--yes")
    for at in _steps(n_steps):
        prod.sql("a", "insert into t values (2)", "create table junk ()")
        _kill(prod, at, "branch", "reset", "a", "--yes")
        status = prod.info("a")["status"]
        assert status in ("running", "stopped", "error"), at
        prod.run("branch", "start", "a")
        assert prod.leftovers() == [], at
        # Either it has begun, and then it is done, or it has not.
        found = prod.sql("a", "select count(*) || to_regclass('junk')::text from t") or "reset"
        if found == "reset":
            assert prod.sql("a", "select count(*) from t") == "1"
        else:
            prod.run("branch", "reset", "a", "--yes")
    prod.check_cluster("a")


def test_destroy(prod: Heads) -> None:
    prod.branch("a", "prod")
    n_steps = _count_steps(prod, "branch", "destroy", "a", "--yes")
    for at in _steps(n_steps):
        prod.branch("a", "prod")
        _kill(prod, at, "branch", "destroy", "a", "--yes")
        if "a" in prod.names():
            assert prod.sql("a", "select 1") == "1"
            prod.run("branch", "destroy", "a", "--yes")
        assert prod.leftovers() == [], at
    assert prod.sql("prod", "select count(*) from t", kind="trunk") == "1"


def test_stop_start_and_trunk(prod: Heads, pgdata_template: Path) -> None:
    prod.branch("a", "prod")
    for verb in ("stop", "start"):
        n_steps = _count_steps(prod, "branch", verb, "a")
        other = "start" if verb == "stop" else "stop"
        for at in _steps(n_steps)[::2]:
            prod.run("branch", other, "a")
            _kill(prod, at, "branch", verb, "a")
            assert prod.info("a")["status"] in ("running", "stopped"), (verb, at)
            assert prod.leftovers() == [], (verb, at)
            prod.run("branch", verb, "a")
    assert prod.sql("a", "select n from t") == "1"
    arguments = ("trunk", "create", "new", "--from-dir", str(pgdata_template))
    n_steps = _count_steps(prod, *arguments)
    for at in _steps(n_steps)[::2]:
        prod.run("trunk", "destroy", "new", "--yes", check=False)
        _kill(prod, at, *arguments)
        assert prod.leftovers() == [], at


def _is_bare_layer(path: str) -> bool:
    """Whether it is what stays of a trunk that was refreshed while a branch lies on it."""
    return set(os.listdir(path)) == {"journal", "objects"}


def test_refresh(prod: Heads, stopped_cluster: Path) -> None:
    prod.branch("a", "prod")
    arguments = ("trunk", "refresh", "prod", "--from-dir", str(stopped_cluster), "--yes")
    n_steps = _count_steps(prod, *arguments)
    for at in _steps(n_steps):
        prod.sql("prod", "create table mark ()", kind="trunk")
        port = prod.info("prod", "trunk")["port"]
        uri = prod.uri("prod", "trunk")
        _kill(prod, at, *arguments)
        assert prod.info("prod", "trunk")["status"] in ("running", "stopped"), at
        assert [path for path in prod.leftovers() if not _is_bare_layer(path)] == [], at
        # It is the old one with all that it had, or the new one; with its port and its password.
        prod.run("trunk", "start", "prod")
        assert prod.info("prod", "trunk")["port"] == port
        assert prod.uri("prod", "trunk") == uri
        if prod.sql("prod", "select to_regclass('mark') is null", kind="trunk") == "t":
            assert prod.sql("prod", "select count(*) from unhinted", kind="trunk") == "10000"
        else:
            prod.sql("prod", "drop table mark", kind="trunk")
        prod.branch("b", "prod")
        prod.run("branch", "destroy", "b", "--yes")
    # What was branched before lies on what it was made of.
    prod.run("branch", "restart", "a")
    assert prod.sql("a", "select n from t") == "1"
    prod.check_cluster("a")


def test_stop_of_a_server_that_does_not_end(prod: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    prod.branch("a", "prod")
    info = prod.info("a")
    (server,) = (
        int(prod.layout.mount(info["id"]).joinpath("postmaster.pid").read_text().split()[0]),
    )
    for name in ("_STOP_LIMIT_S", "_KILL_LIMIT_S"):
        monkeypatch.setattr(serving, name, 0.1)
    # What a stop leaves that has died.
    with open_service(read_settings({**os.environ, **prod.env})) as service:
        service.store.update(info["id"], operation="stop")
        os.kill(server, signal.SIGSTOP)
        try:
            (said,) = service.settle()
        finally:
            os.kill(server, signal.SIGCONT)
        head = service.store.get(info["id"])
    assert "branch a: can't be stopped" in said
    assert head is not None
    assert (head.status, head.operation, head.is_wanted) == ("error", "", False)
    assert "does not stop" in head.error
    assert (head.port, head.server_pid) == (info["port"], server)
    wait_until(lambda: not is_running(server))  # both signals have reached it by now
    prod.run("branch", "start", "a")
    assert prod.sql("a", "select n from t") == "1"
    assert prod.leftovers() == []


def test_worker_and_server_that_die(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.sql("a", "insert into t values (2)")
    head = prod.layout.head(prod.info("a")["id"])
    worker = int(head.joinpath("lock").read_text().split('"pid":')[1].split(",")[0])
    os.kill(worker, 9)
    wait_until(lambda: not is_running(worker))
    assert prod.info("a")["status"] == "error"
    prod.run("branch", "start", "a")
    assert prod.sql("a", "select count(*) from t") == "2"
    server = server_pids(prod.layout.mount(head.name))
    for pid in server:
        os.kill(pid, 9)
    wait_until(lambda: not server_pids(prod.layout.mount(head.name)))
    assert "its server or its mount had ended by itself" in prod.run("branch", "list").stderr
    assert prod.info("a")["status"] == "error"
    assert "ended by itself" in prod.run("branch", "info", "a").stdout
    prod.run("branch", "restart", "a")
    assert prod.sql("a", "select count(*) from t") == "2"
    assert prod.leftovers() == []


def test_two_commands_at_the_same_time(prod: Heads) -> None:
    both = [prod.spawn("branch", "create", name, "--from", "prod") for name in ("a", "b")]
    same = [prod.spawn("branch", "create", "c", "--from", "prod") for _ in range(2)]
    for process in (*both, *same):
        process.wait(timeout=120)
    for process in both:
        assert process.returncode == 0, process.communicate()
    assert sorted(process.returncode for process in same) == [0, 8]
    for process in (*both, *same):
        process.communicate()
    assert sorted(prod.names()) == ["a", "b", "c"]
    ports = {prod.info(name)["port"] for name in "abc"}
    assert len(ports) == 3
    for name in "abc":
        assert prod.sql(name, "select n from t") == "1"
    going = [prod.spawn("branch", "destroy", name, "--yes") for name in "abc"]
    for process in going:
        process.wait(timeout=120)
        assert process.returncode == 0, process.communicate()
        process.communicate()
    assert prod.leftovers() == []
