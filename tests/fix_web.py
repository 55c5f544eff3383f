"""A daemon for tests: the real process, spoken to over real HTTP.

``daemon`` is one of its own for a test; ``served`` is shared by the tests of a module, which find
it with the default trunk and nothing else. Both end with nothing mounted and no process left, also
where a test failed.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from fix_mounts import run_pbkfs
from fix_postgres import Programs, free_port, is_running, kill_servers, wait_until
from fix_trunks import Heads, owner_setting
from machine import MAJORS, postgres_majors, session_directory

TOKEN = "open sesame"


@dataclass(frozen=True)
class Answer:
    """What the daemon answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def problem(self, status: int, code: str) -> str:
        """Check that it is this problem; returns its detail."""
        assert self.status == status, self.body
        assert self.headers["content-type"] == "application/problem+json"
        found = self.json
        assert found["type"] == found["code"] == code, found
        assert found["status"] == status
        assert found["title"]
        assert found["detail"]
        return str(found["detail"])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        # The directory's own descriptor, because the path may be too long for a socket.
        directory = os.open(self._path.parent, os.O_PATH)
        try:
            self.sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        finally:
            os.close(directory)


@dataclass
class Daemon:
    """``pbkfs server`` on a DATA directory."""

    heads: Heads
    port: int
    log: Path
    token: str = TOKEN
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    expected: list[str] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        """Its Unix socket."""
        return self.heads.layout.root / "pbkfs.sock"

    @property
    def running(self) -> subprocess.Popen[bytes]:
        """The process."""
        assert self.process is not None
        return self.process

    def start(self, *args: str, is_ready: bool = True, **env: str) -> None:
        """Start it and wait until it is ready."""
        self.env |= env
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pbkfs", "server", "--port", str(self.port), *args],
                env={
                    **os.environ,
                    **self.heads.env,
                    "PBKFS_API_TOKEN": self.token,
                    **self.env,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if is_ready:
            wait_until(self._is_ready, 90)

    def _is_ready(self) -> bool:
        assert self.running.poll() is None, self.log.read_text()
        try:
            return self.get("/readyz").status == 200
        except OSError:
            return False

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; returns its exit code."""
        self.running.send_signal(number)
        return self.running.wait(120)

    def kill_all(self) -> None:
        """Kill it with the processes of its operations, as the end of the machine would."""
        doomed = [psutil.Process(self.running.pid)]
        doomed += doomed[0].children(recursive=True)
        for process in doomed:
            process.suspend()
        for process in doomed:
            process.kill()
        self.running.wait(30)
        wait_until(lambda: not any(is_running(process.pid) for process in doomed))

    # --- requests -------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        unix: bool = False,
        headers: dict[str, str] | None = None,
        timeout: float = 150,
    ) -> Answer:
        """Send one request; with the token, unless ``headers`` are given."""
        connection = (
            _UnixConnection(self.socket, timeout)
            if unix
            else http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        )
        sent = {"Authorization": f"Bearer {self.token}"} if headers is None else dict(headers)
        content = None
        if body is not None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, got, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Answer:
        """GET a path; below /api/v1, unless it begins with a slash."""
        return self.request("GET", _full(path), **options)

    def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        """POST to a path."""
        return self.request("POST", _full(path), body, **options)

    def patch(self, path: str, body: Any) -> Answer:
        """PATCH a path."""
        return self.request("PATCH", _full(path), body)

    def delete(self, path: str) -> Answer:
        """DELETE a path."""
        return self.request("DELETE", _full(path))

    # --- short cuts -----------------------------------------------------------------------------

    def branch(self, name: str, parent: str = "main", **more: Any) -> dict[str, Any]:
        """Make a branch and wait until it is ready."""
        answer = self.post("branches?wait=true", {"name": name, "parent": parent, **more})
        assert answer.status == 201, answer.body
        found: dict[str, Any] = answer.json
        assert found["status"] == "running", found
        return found

    def wait_for(self, name: str, status: str, kind: str = "branches") -> dict[str, Any]:
        """Poll a head until it is in a state; ``gone`` is one."""
        found: dict[str, Any] = {}

        def look() -> bool:
            answer = self.get(f"{kind}/{quote(name)}")
            found.clear()
            found.update(answer.json)
            return answer.status == 404 if status == "gone" else found["status"] == status

        wait_until(look, 90)
        return found

    def sql(self, name: str, *statements: str, kind: str = "branches") -> str:
        """Run statements on a head, with what ``connection`` says; returns the last output."""
        uri = self.get(f"{kind}/{name}/connection").json["uri"]
        return self.heads.programs.sql(uri, *statements)

    def names(self, kind: str = "branches") -> list[str]:
        """The names of all branches or trunks."""
        return [head["name"] for head in self.get(kind).json[kind]]

    def leftovers(self) -> list[str]:
        """What the store does not know of, or is not as it says."""
        return self.heads.leftovers()

    # --- the end --------------------------------------------------------------------------------

    def clear(self) -> None:
        """Destroy all but the default trunk."""
        for kind in ("branches", "trunks"):
            for name in self.names(kind):
                if name != "main":
                    self.delete(f"{kind}/{name}?recursive=true&wait=true")

    def close(self) -> None:
        """End the daemon, and take away what it made."""
        try:
            if self.process is not None and self.process.poll() is None:
                assert self.stop() == 0, self.log.read_text()
            self.heads.close()
            bad = [
                line
                for line in self.log.read_text().splitlines()
                if any(f" {level} " in line for level in ("WARNING", "ERROR", "CRITICAL"))
                and not any(expected in line for expected in self.expected)
            ]
            assert not bad, bad
        finally:
            if self.process is not None and self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            clean(self.heads.root)


def _full(path: str) -> str:
    return path if path.startswith("/") else f"/api/v1/{path}"


def clean(root: Path) -> None:
    """Take away servers and mounts below a directory, whatever state they are in."""
    kill_servers(root)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split(" ")[4]
        if point.startswith(f"{root}/"):
            run_pbkfs("unmount", "-D", point, "--force", "--timeout", "5", check=False)


def make_daemon(root: Path, programs: Programs) -> Daemon:
    """A daemon that is not started yet, with ports of its own."""
    first = min(free_port(), 65300)
    env = {
        "PBKFS_DATA_DIR": str(root / "pbkfs"),
        "PBKFS_PORT_RANGE_START": str(first),
        "PBKFS_PORT_RANGE_END": str(first + 200),
        "PBKFS_DEFAULT_TRUNK_PORT": str(free_port()),
        "PBKFS_MAX_BRANCHES": "200",
        "PBKFS_PG_BIN_DIR": str(programs.bindir),
        **owner_setting(programs),
    }
    return Daemon(Heads(root, programs, env), free_port(), root / "daemon.log")


@pytest.fixture
def daemon(place: Path, newest_programs: Programs) -> Iterator[Daemon]:
    """A daemon for one test, to be started by it."""
    made = make_daemon(place, newest_programs)
    yield made
    made.close()


@pytest.fixture(scope="module")
def _shared_daemon(all_programs: Callable[[int], Programs]) -> Iterator[Daemon]:
    majors = postgres_majors()
    root = Path(tempfile.mkdtemp(prefix="d-", dir=session_directory()))
    root.chmod(0o755)
    made = make_daemon(root, all_programs(majors[-1] if majors else MAJORS[-1]))
    try:
        made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def served(_shared_daemon: Daemon) -> Iterator[Daemon]:
    """The module's daemon, running, with nothing but the default trunk."""
    yield _shared_daemon
    _shared_daemon.clear()
