"""Trunks and branches for tests, driven through the real command line.

``heads`` is one DATA directory of its own; whatever is left in it at the end of the test is
destroyed, and what can't be is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fix_mounts import run_pbkfs
from fix_postgres import Programs, free_port, kill_servers

from pbkfs.branch.layout import Layout


@dataclass
class Heads:
    """Trunks and branches in ``root/data``."""

    root: Path
    programs: Programs
    env: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The paths."""
        return Layout(self.root / "pbkfs")

    def run(
        self, *args: str | os.PathLike[str], check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run ``pbkfs ARGS`` on this DATA directory."""
        return run_pbkfs(*args, check=check, **{**self.env, **env})

    def json(self, *args: str | os.PathLike[str]) -> Any:
        """Run a command and return its JSON."""
        return json.loads(self.run(*args, "-o", "json").stdout)

    def fail(self, code: int, *args: str | os.PathLike[str], **env: str) -> str:
        """Run a command that has to fail like this; returns the error line without the hint."""
        done = self.run(*args, check=False, **env)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        message, _, hint = done.stderr.partition("\nhint: ")
        assert hint.strip(), done.stderr
        assert message.count("\n") == 0, done.stderr
        return message.removeprefix("pbkfs: error: ")

    def trunk(self, name: str, directory: Path, *options: str) -> dict[str, Any]:
        """Make a trunk of a directory; it runs."""
        made: dict[str, Any] = self.json(
            "trunk", "create", name, "--from-dir", directory, "--port", str(free_port()), *options
        )
        return made

    def branch(self, name: str, parent: str, *options: str) -> dict[str, Any]:
        """Make a branch."""
        made: dict[str, Any] = self.json("branch", "create", name, "--from", parent, *options)
        return made

    def info(self, name: str, kind: str = "branch") -> dict[str, Any]:
        """What is known of a head."""
        found: dict[str, Any] = self.json(kind, "info", name)
        return found

    def names(self) -> list[str]:
        """The names of all branches."""
        return [branch["name"] for branch in self.json("branch", "list")["branches"]]

    def uri(self, name: str, kind: str = "branch") -> str:
        """The URI of a head, with its password."""
        return self.run(kind, "connect", name, "--uri").stdout.strip()

    def sql(self, name: str, *statements: str, kind: str = "branch") -> str:
        """Run statements on a head over TCP, with its password; returns the last output."""
        return self.programs.sql(self.uri(name, kind), *statements)

    def check_cluster(self, name: str) -> None:
        """Let pg_amcheck look at every heap and index."""
        found = self.uri(name).removeprefix("postgresql://")
        password, port = re.split("[:@/]", found)[1], re.split("[:@/]", found)[3]
        done = subprocess.run(
            [
                self.programs.bindir / "pg_amcheck", "-h", "127.0.0.1", "-p", port,
                "-U", "postgres", "-a", "--install-missing", "--heapallindexed",
            ],
            env={**os.environ, "PGPASSWORD": password},
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def spawn(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """Start ``pbkfs ARGS`` beside the test."""
        return subprocess.Popen(
            [sys.executable, "-m", "pbkfs", *args],
            env={**os.environ, **self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def on_terminal(self, answer: str, *args: str, **env: str) -> tuple[int, str]:
        """Run ``pbkfs ARGS`` on a terminal, where ``answer`` is typed if it asks something.

        Returns the exit code and what the terminal showed.
        """
        ours, theirs = pty.openpty()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "pbkfs", *args],
                env={**os.environ, "TERM": "dumb", **self.env, **env},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 65536):
                shown += chunk
                if b"[y/N]:" in chunk:
                    os.write(ours, f"{answer}\n".encode())
        os.close(ours)
        return process.wait(60), shown.decode()

    def spawn_program(self, program: str, *args: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a program of PostgreSQL beside the test."""
        return subprocess.Popen(
            [self.programs.bindir / program, *args],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def disk_bytes(self) -> int:
        """What ``du`` says of all heads, layers and points."""
        places = [self.layout.root / name for name in ("heads", "layers", "points")]
        done = subprocess.run(
            ["du", "-s", "-B1", "-c", *places], capture_output=True, text=True, check=True
        )
        return int(done.stdout.splitlines()[-1].split()[0])

    def leftovers(self) -> list[str]:
        """Directories and mounts of heads that the store does not know of."""
        if not self.layout.root.exists():
            return []
        views = [
            *self.json("branch", "list")["branches"],
            *self.json("trunk", "list")["trunks"],
        ]
        known = {view["id"] for view in views}
        found = []
        for place in ("heads", "mounts", "secrets"):
            for path in (self.layout.root / place).iterdir():
                if path.name not in known:
                    found.append(str(path))
        mounted = Path("/proc/self/mountinfo").read_text()
        for view in views:
            is_mounted = str(self.layout.mount(view["id"])) + " " in mounted
            if is_mounted != (view["status"] == "running"):
                found.append(f"{view['name']} is {view['status']}, mounted: {is_mounted}")
        return found

    def close(self) -> None:
        """Destroy everything."""
        if not self.layout.root.exists():
            return
        for branch in reversed(self.json("branch", "list")["branches"]):
            self.run("branch", "destroy", branch["name"], "--yes", "-r", check=False)
        for trunk in self.json("trunk", "list")["trunks"]:
            if trunk["name"] == "main":
                self.run("trunk", "stop", "main")
            else:
                self.run("trunk", "destroy", trunk["name"], "--yes")
        mounted = Path("/proc/self/mountinfo").read_text()
        assert str(self.layout.mounts) not in mounted, mounted
        rows = [p for p in self.layout.heads.iterdir() if p.name.startswith(".")]
        assert not rows, rows
        shutil.rmtree(self.layout.root)


def owner_setting(programs: Programs, prefix: str = "PBKFS") -> dict[str, str]:
    """Who is to run the servers of trunks: not every host has a user postgres."""
    return {f"{prefix}_OWNER": f"{programs.user.uid}:{programs.user.gid}"}


@pytest.fixture
def heads(place: Path, newest_programs: Programs) -> Iterator[Heads]:
    """An empty DATA directory, with ports of its own."""
    first = free_port()
    made = Heads(
        place,
        newest_programs,
        {
            "PBKFS_DATA_DIR": str(place / "pbkfs"),
            "PBKFS_PORT_RANGE_START": str(min(first, 65400)),
            "PBKFS_PORT_RANGE_END": str(min(first, 65400) + 100),
            "PBKFS_DEFAULT_TRUNK_PORT": str(free_port()),
            **owner_setting(newest_programs),
        },
    )
    try:
        yield made
        made.close()
    finally:
        kill_servers(place)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command that was started beside the test, and wait for it."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
