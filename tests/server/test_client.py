"""The command line with a daemon elsewhere: ``--api-url``, and ``pgbranch``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from fix_postgres import free_port, wait_until
from fix_web import TOKEN, Daemon

from pbkfs.cli.pgbranch import translate

pytestmark = pytest.mark.xdist_group("client")


class Remote:
    """The command line, in a place of its own: what it makes, the daemon has made."""

    def __init__(self, served: Daemon, place: Path) -> None:
        self.served = served
        self.env = {
            "PBKFS_DATA_DIR": str(place / "here"),
            "PBKFS_API_URL": f"http://127.0.0.1:{served.port}",
            "PBKFS_API_TOKEN": TOKEN,
        }

    def run(self, *args: str, **env: str) -> str:
        """Run ``pbkfs ARGS``; returns what it printed."""
        return run_pbkfs(*args, **{**self.env, **env}).stdout

    def fail(self, code: int, *args: str, **env: str) -> str:
        """Run what has to fail; returns the message."""
        done = run_pbkfs(*args, check=False, **{**self.env, **env})
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "\nhint: " in done.stderr
        return done.stderr

    def pgbranch(self, *args: str) -> str:
        """Run ``pgbranch ARGS``."""
        done = subprocess.run(
            [sys.executable, "-c", "from pbkfs.cli.pgbranch import main; main()", *args],
            env={"PATH": "/usr/bin:/bin", "PGBRANCH_DATA_DIR": self.env["PBKFS_DATA_DIR"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def remote(served: Daemon, tmp_path: Path) -> Iterator[Remote]:
    """The command line for the module's daemon."""
    made = Remote(served, tmp_path)
    yield made
    assert not (tmp_path / "here").exists()


def test_branches(remote: Remote) -> None:
    made = json.loads(remote.run("branch", "create", "a", "--ttl", "2h", "-t", "x", "-o", "json"))
    assert (made["name"], made["status"], made["tags"]) == ("a", "running", ["x"])
    assert remote.served.names() == ["a"]
    uri = remote.run("branch", "connect", "a", "--uri").strip()
    assert uri == remote.served.get("branches/a/connection").json["uri"]
    assert "ready" in remote.run("branch", "restart", "a")
    assert "Flattened branch 'a'" in remote.run("branch", "flatten", "a")
    assert "done" in remote.run("branch", "stop", "a")
    assert remote.run("branch", "list", "-s", "stopped").splitlines()[1].split()[:3] == [
        "a", "stopped", "main",
    ]  # fmt: skip
    assert "Connection: " in remote.run("branch", "start", "a")
    remote.run("branch", "tag", "a", "y")
    remote.run("branch", "extend", "a", "never")
    remote.run("branch", "rename", "a", "b")
    info = remote.run("branch", "info", "b")
    assert "x, y" in info
    assert "never" in info
    remote.run("branch", "create", "c", "--from", "b", "--no-wait")
    remote.served.wait_for("c", "running")
    tree = remote.run("branch", "list", "--tree").splitlines()
    assert [line.split(" (")[0] for line in tree] == ["main", "└── b", "    └── c"]
    assert "created" in remote.run("branch", "log", "b", "--events")
    remote.run("branch", "reset", "c", "--yes")
    assert "Destroyed" in remote.run("branch", "destroy", "b", "-r", "-y")
    assert remote.served.names() == []


def test_trunks_and_status(remote: Remote, pgdata_template: Path) -> None:
    remote.run(
        "trunk", "create", "prod", "--from-dir", str(pgdata_template), "--port", str(free_port())
    )
    assert remote.run("trunk", "list").splitlines()[2].split()[:2] == ["prod", "running"]
    assert "logical" not in remote.run("trunk", "info", "prod")
    remote.run("trunk", "stop", "prod")
    status = remote.run("status").splitlines()
    assert status[0].startswith("Controller: healthy (v")
    assert "uptime" in status[0]
    assert status[1] == "Trunks: 1 running / 2 total"
    remote.run("trunk", "start", "prod")
    remote.run("trunk", "destroy", "prod", "--yes")
    assert remote.served.names("trunks") == ["main"]


def test_what_it_shows_is_what_is_shown_without_a_daemon(remote: Remote) -> None:
    remote.served.branch("a")
    remote.served.post("branches/a/stop")  # sizes stay as they are, then
    remote.served.post("trunks/main/stop")
    for command in (["status"], ["branch", "list"], ["branch", "info", "a"], ["trunk", "info"]):

        def is_the_same(words: list[str] = command) -> bool:
            found = json.loads(remote.run(*words, "-o", "json"))
            found.pop("uptime_seconds", None)
            return bool(found == remote.served.heads.json(*words))

        wait_until(is_the_same)  # the daemon's sizes may be of some seconds ago
    remote.served.post("trunks/main/start")


def test_over_the_socket(remote: Remote) -> None:
    url = f"unix:{remote.served.socket}"
    assert "main" in remote.run("trunk", "--api-url", url, "list", PBKFS_API_URL="")


def test_errors_come_back_as_what_they_were(remote: Remote) -> None:
    assert "does not exist" in remote.fail(4, "branch", "info", "none")
    assert "exists already" in remote.fail(8, "branch", "create", "main")
    assert "no name" in remote.fail(2, "branch", "create", "A")
    assert "duration" in remote.fail(2, "branch", "create", "a", "--ttl", "soon")
    assert "does not exist" in remote.fail(4, "branch", "create", "a", "--from", "none")
    assert "token" in remote.fail(9, "branch", "list", PBKFS_API_TOKEN="wrong")
    assert "no daemon" in remote.fail(
        3, "branch", "list", PBKFS_API_URL=f"http://127.0.0.1:{free_port()}"
    )
    assert "no address" in remote.fail(2, "branch", "list", PBKFS_API_URL="here")


def test_pgbranch(remote: Remote) -> None:
    url, token = remote.env["PBKFS_API_URL"], remote.env["PBKFS_API_TOKEN"]
    place = ["--api-url", url, f"--api-token={token}"]
    assert "Created" in remote.pgbranch(*place, "create", "a", "-f", "main", "-t", "x", "-w")
    (found,) = json.loads(remote.pgbranch(*place, "-o", "json", "list"))["branches"]
    assert found["name"] == "a"
    assert 'name: "main"' in remote.pgbranch("trunk", "list", *place, "--output", "yaml")
    assert "Branches: 1 running" in remote.pgbranch(*place, "--no-color", "-v", "status")
    assert json.loads(remote.pgbranch(*place, "status", "-o", "json"))["branches_running"] == 1
    remote.pgbranch(*place, "rm", "a", "-y")
    remote.pgbranch(*place, "create", "b", "--wait=false")
    remote.served.wait_for("b", "running")
    remote.pgbranch(*place, "delete", "b", "--yes")
    assert remote.served.names() == []


def test_translation_of_pgbranch() -> None:
    output = {"PBKFS_OUTPUT": "json"}
    assert translate(["create", "a", "--output=json"]) == (["branch", "create", "a"], output)
    for word, expected in (("--wait=false", "--no-wait"), ("-w=0", "--no-wait"), ("-w", "-w")):
        assert translate(["create", word]) == (["branch", "create", expected], {})
    assert translate(["trunk", "info"]) == (["trunk", "info"], {})
    assert translate(["--help"]) == (["--help"], {})
    assert translate(["info", "--", "-o", "x"]) == (["branch", "info", "--", "-o", "x"], {})
