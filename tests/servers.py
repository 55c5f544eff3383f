"""A PostgreSQL server on a mount, driven through ``pbkfs start`` and ``pbkfs stop``.

Shared by the tests that run servers on mounts; the fixtures are in fix_mounts.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from fix_mounts import Mount, run_pbkfs


class Clients:
    """The programs in ``bindir`` as clients of a server at a port of the loopback."""

    bindir: Path
    uri: str
    port: int
    limit_s = 300
    """For each of them."""

    def environment(self) -> dict[str, str]:
        """The environment of a client tool."""
        return {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
        }

    def run(self, tool: str, *args: str) -> str:
        """Run a client tool to its end; it must succeed."""
        done = subprocess.run(
            [self.bindir / tool, *args],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=self.limit_s,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{tool} {args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def begin(self, tool: str, *args: str) -> subprocess.Popen[bytes]:
        """Start a client tool that the test ends."""
        return subprocess.Popen(
            [self.bindir / tool, *args],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def sql(self, *statements: str) -> str:
        """Run statements one by one, each a transaction of its own; return the last output."""
        out = ""
        for statement in statements:
            out = self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement)
        return out.strip()

    def check_cluster(self) -> None:
        """Let pg_amcheck look at every heap and index."""
        self.run("pg_amcheck", "-a", "--install-missing", "--heapallindexed")


@dataclass
class MountedServer(Clients):
    """A server on ``mount``, of the binaries in ``bindir``."""

    mount: Mount
    bindir: Path
    uri: str = ""
    port: int = 0
    pid: int = 0

    def start(self, *options: str) -> None:
        """Start it; commits are durable whatever the cluster's own configuration says."""
        run_pbkfs(
            "start", "-D", self.mount.pgdata, "--pg-bindir", self.bindir, "-c", "fsync=on", *options
        )
        status = json.loads(run_pbkfs("status", "-D", self.mount.pgdata, "--format", "json").stdout)
        assert status["uri"] is not None, "the server is gone already"
        self.uri, self.port, self.pid = status["uri"], status["port"], status["pid"]

    def stop(self, *options: str) -> None:
        """Stop it through the command line."""
        run_pbkfs("stop", "-D", self.mount.pgdata, *options)
