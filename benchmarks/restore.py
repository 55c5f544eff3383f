"""A mount against a restore: seconds until PostgreSQL answers the first query."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compose import compose
from benchmarks.dataset import Data, Dataset
from benchmarks.measure import NATIVE, Figure, drop_caches, run_rounds
from benchmarks.server import SERVER_USER, Server
from benchmarks.sides import Chain, PbkfsSide, Side, pbkfs_command, run

QUERY = "select count(*) from pgbench_branches"


def _read_programs(bindir: Path) -> None:
    """The backup is cold, the programs are not: neither side shall wait for its own code."""
    run(*pbkfs_command(), "mount", "--help")
    run(sys.executable, "-c", "import pyfuse3, trio, pbkfs.mount.launch, pbkfs.postgres.safe_start")
    for tool in ("postgres", "pg_ctl", "psql"):
        run(bindir / tool, "--version")


class Restore:
    """Mount, start, first query; beside it: compose the whole chain, start, first query."""

    def __init__(
        self, data: Data, _sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._n_rounds = n_rounds
        self._is_quick = is_quick

    def _restore(self, chain: Chain) -> float:
        target = self._data.place / "restored"
        sockets = self._data.place / "sockets"
        sockets.mkdir(exist_ok=True)
        shutil.chown(sockets, SERVER_USER)
        shutil.rmtree(target, ignore_errors=True)
        drop_caches()
        _read_programs(self._data.bindir)
        server = Server(self._data.bindir, target, sockets, 5595)
        try:
            start = time.perf_counter()
            compose(chain.store, chain.instance, chain.backup_id, target)
            run("chown", "-R", f"{SERVER_USER}:", target)
            server.start()
            server.sql(QUERY)
            return time.perf_counter() - start
        finally:
            server.stop("immediate")
            shutil.rmtree(target, ignore_errors=True)

    def _mount(self, name: str, chain: Chain) -> float:
        side = PbkfsSide(f"restore-{name}", chain, self._data.place, SERVER_USER)
        try:
            drop_caches()
            _read_programs(self._data.bindir)
            start = time.perf_counter()
            side.fresh()
            started = run(
                *pbkfs_command(), "start", "-D", side.path, "--pg-bindir", self._data.bindir
            )
            uri = started.split()[0]
            run(self._data.bindir / "psql", "-XAtq", "-c", QUERY, uri)
            return time.perf_counter() - start
        finally:
            run(*pbkfs_command(), "stop", "-D", side.path, "-m", "immediate", check=False)
            side.close()

    def first_query(self) -> list[Figure]:
        return self._compare("2 GB", self._data.cluster(), ("zlib", "chain5-zlib", "raw"))

    def first_query_large(self) -> list[Figure]:
        return self._compare("8 GB", self._data.large_cluster(), ("zlib", "raw"))

    def _compare(self, size: str, dataset: Dataset, names: Sequence[str]) -> list[Figure]:
        figures = []
        for name in names:
            chain = dataset.chains[name]
            figure = Figure(
                f"first query: mount against composing {size}, {name}", "s", True, wanted="20"
            )

            def measure(
                side: str, _number: int, figure: Figure = figure, chain: Chain = chain
            ) -> None:
                seconds = self._restore(chain) if side == NATIVE else self._mount("m", chain)
                figure.add(side, seconds)

            run_rounds([NATIVE, "pbkfs"], self._n_rounds, measure, what=figure.name)
            figures.append(figure)
        return figures

    FIGURES = ("first_query", "first_query_large")
