"""A PostgreSQL server on one side of a comparison, with the same settings on every side."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sides import process_cpu_s, run

SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "128MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "30min",
    "autovacuum": "off",  # it would run on one side and not on the other
    "archive_mode": "off",
    "max_parallel_workers_per_gather": "0",
    "track_io_timing": "off",
    "logging_collector": "off",
}
SERVER_USER = "postgres"


def as_server_user(*command: str | os.PathLike[str]) -> list[str]:
    """The command as the server's user: PostgreSQL refuses to run as root."""
    user = ["setpriv", f"--reuid={SERVER_USER}", f"--regid={SERVER_USER}", "--clear-groups"]
    return [*user, *(os.fspath(part) for part in command)]


@dataclass
class Server:
    """One server; ``start`` and ``stop`` may alternate. The socket lies in ``sockets``."""

    bindir: Path
    pgdata: Path
    sockets: Path
    port: int
    settings: dict[str, str] = field(default_factory=dict)
    pid: int = 0

    def start(self, **settings: str) -> None:
        wanted = SETTINGS | {"unix_socket_directories": os.fspath(self.sockets)}
        wanted |= self.settings | settings
        options = " ".join(f"-c {name}='{value}'" for name, value in wanted.items())
        log = self.sockets / f"server-{self.port}.log"
        run(
            *as_server_user(
                self.bindir / "pg_ctl", "-D", self.pgdata, "-w", "-t", "120", "-l", log,
                "-o", f"-p {self.port} {options}", "start",
            )
        )  # fmt: skip
        self.pid = int((self.pgdata / "postmaster.pid").read_text().split()[0])

    def stop(self, mode: str = "fast") -> None:
        if self.pid:
            run(
                *as_server_user(self.bindir / "pg_ctl", "-D", self.pgdata, "-w", "-m", mode, "stop")
            )
            self.pid = 0

    def _client(self, tool: str, *arguments: str) -> list[str]:
        return [
            os.fspath(self.bindir / tool), "-h", os.fspath(self.sockets), "-p", str(self.port),
            "-U", SERVER_USER, *arguments,
        ]  # fmt: skip

    def sql(self, statement: str, database: str = "postgres") -> str:
        return run(
            *self._client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, database)
        ).strip()

    def time_sql(self, statement: str) -> float:
        """Seconds of the statement inside of an open session."""
        script = f"select 1;\n\\timing on\n{statement};\n"
        done = subprocess.run(
            self._client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "postgres"),
            input=script, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        found = re.findall(r"Time: ([\d.]+) ms", done.stdout)
        if done.returncode or not found:
            raise RuntimeError(f"{statement}: {done.stdout}{done.stderr}")
        return float(found[-1]) / 1000

    def fill_pgbench(self, scale: int) -> None:
        run(*self._client("pgbench", "-i", "-q", "-s", str(scale), "postgres"))

    def pgbench(self, *arguments: str) -> float:
        """Run pgbench and return its TPS (without the connections' time); no failed transaction."""
        done = subprocess.run(
            self._client("pgbench", *arguments, "postgres"),
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
        if done.returncode or not found:
            raise RuntimeError(f"pgbench {arguments}: {done.stdout}{done.stderr}")
        return float(found[1])

    def cpu_s(self) -> float:
        """CPU seconds of the server and of all its finished and living children."""
        deadline = time.monotonic() + 5
        while True:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            titles = []
            for child in children:
                try:
                    titles.append(Path(f"/proc/{child}/cmdline").read_bytes())
                except OSError:
                    continue
            # A backend that is still on its way out is in neither sum for a moment.
            if not any(b"[local]" in title for title in titles) or time.monotonic() > deadline:
                return process_cpu_s(self.pid) + sum(process_cpu_s(int(c)) for c in children)
            time.sleep(0.02)
