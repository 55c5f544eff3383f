"""Branches: seconds from the command to an answering server, of small and large trunks, idle or
written to, what a seal holds up, and what an idle branch costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.dataset import Data
from benchmarks.measure import Figure
from benchmarks.server import SERVER_USER, Server, as_server_user
from benchmarks.sides import Side, pbkfs_command, run


class Branches:
    """The figures of this group. Each trunk lies over an immutable copy of a cluster."""

    def __init__(
        self, data: Data, _sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._n_rounds = n_rounds * (1 if is_quick else 4)
        self._home = data.place / "branches"

    # --- the commands -------------------------------------------------------------------

    def _pbkfs(self, *arguments: str | os.PathLike[str]) -> str:
        environment = {
            "PBKFS_DATA_DIR": str(self._home / "pbkfs"),
            "PBKFS_PG_BIN_DIR": str(self._data.bindir),
        }
        assigned = [f"{name}={value}" for name, value in environment.items()]
        return run("env", *assigned, *pbkfs_command(), *arguments)

    def _info(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._pbkfs("branch", "info", name, "-o", "json"))
        return found

    @contextmanager
    def _trunk(self, base: Path) -> Iterator[None]:
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(mode=0o755)
        try:
            self._pbkfs("trunk", "create", "prod", "--from-dir", base, "--owner", SERVER_USER)
            yield
        finally:
            self._pbkfs("trunk", "destroy", "prod", "--yes")
            shutil.rmtree(self._home, ignore_errors=True)

    def _small(self) -> Path:
        """A cluster of some 100 MB; the usual one has more than a gigabyte."""
        made = self._data.place / "small-cluster"
        if not made.exists():
            making = self._data.place / "small-cluster.new"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            shutil.chown(making, SERVER_USER)
            pgdata = making / "source"
            initdb = self._data.bindir / "initdb"
            run(*as_server_user(initdb, "-k", "-A", "trust", "-U", SERVER_USER, "-D", pgdata))
            server = Server(self._data.bindir, pgdata, making, 5591, {"fsync": "off"})
            server.start()
            server.fill_pgbench(5)
            server.stop()
            making.rename(made)
        return made / "source"

    def _create(self, name: str, parent: str = "prod") -> float:
        start = time.perf_counter()
        self._pbkfs("branch", "create", name, "--from", parent, "--trust")
        return time.perf_counter() - start

    def _destroy(self, name: str) -> None:
        self._pbkfs("branch", "destroy", name, "--yes")

    # --- figures ------------------------------------------------------------------------

    def create(self) -> list[Figure]:
        """Trunks of three sizes, one after the other."""
        seconds = Figure("branch create to ready", "s", True, wanted="<= 1.0; sizes within 10 %")
        cost = Figure("disk of a fresh idle branch", "MiB", True, wanted="<= 1")
        for size, base in (
            ("0.1 GB", self._small()),
            ("2 GB", self._data.cluster().native),
            ("8 GB", self._data.large_cluster().native),
        ):
            with self._trunk(base):
                self._create("warm")
                self._destroy("warm")
                for _ in range(self._n_rounds):
                    seconds.add(size, self._create("b"))
                    cost.add(size, self._info("b")["own_bytes"] / (1 << 20))
                    self._destroy("b")
        return [seconds, cost]

    def create_under_load(self) -> list[Figure]:
        """Of a trunk under pgbench; the longest transaction while branches are made."""
        seconds = Figure("branch create to ready, parent under TPC-B", "s", True, wanted="<= 1.5")
        stall = Figure("longest transaction of the parent meanwhile", "ms", True, wanted="<= 200")
        with self._trunk(self._data.cluster().native):
            uri = self._pbkfs("trunk", "connect", "prod", "--uri").strip()
            log = self._home / "pgbench"
            load = subprocess.Popen(
                [self._data.bindir / "pgbench", "-n", "-c", "2", "-T", "3600", "-l",
                 f"--log-prefix={log}", uri],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                time.sleep(5)
                began = time.time()
                for _ in range(self._n_rounds):
                    seconds.add("2 GB", self._create("b"))
                    self._destroy("b")
            finally:
                load.terminate()
                load.wait()
            longest = 0.0
            for path in self._home.glob("pgbench*"):
                for line in path.read_text().splitlines():
                    # client, transaction, latency in µs, script, end: seconds and µs
                    fields = line.split()
                    if len(fields) >= 6 and int(fields[4]) >= began:
                        longest = max(longest, int(fields[2]) / 1000)
            stall.add("2 GB", longest)
        return [seconds, stall]

    def many(self) -> list[Figure]:
        """Fifty branches of one trunk, all running."""
        seconds = Figure("50 branches at once: create to ready", "s", True)
        listing = Figure("50 branches at once: list", "s", True)
        with self._trunk(self._small()):
            for number in range(50):
                seconds.add("of 0.1 GB", self._create(f"b{number}"))
            start = time.perf_counter()
            rows = json.loads(self._pbkfs("branch", "list", "-o", "json"))
            listing.add("of 0.1 GB", time.perf_counter() - start, n=len(rows))
        return [seconds, listing]

    FIGURES = ("create", "create_under_load", "many")
