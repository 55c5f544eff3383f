"""PostgreSQL on each side: pgbench, commits, cold scans, bulk loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.dataset import Data
from benchmarks.measure import Figure, drop_caches, run_rounds
from benchmarks.server import SERVER_USER, Server
from benchmarks.sides import Side


class Postgres:
    """The figures of this group. Servers of all sides are up at once, one of them is measured."""

    def __init__(
        self, data: Data, sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._sides = sides
        self._n_rounds = n_rounds
        self._seconds = 2 if is_quick else 5
        self._rows = 1_000_000 if is_quick else 8_000_000
        data.cluster()
        self._sockets = data.place / "sockets"
        self._sockets.mkdir(exist_ok=True)
        import shutil

        shutil.chown(self._sockets, SERVER_USER)
        self._servers = {
            name: Server(data.bindir, side.path, self._sockets, 5600 + number)
            for number, (name, side) in enumerate(sides.items())
        }

    def close(self) -> None:
        for server in self._servers.values():
            server.stop("immediate")

    def _start(self, side: str, **settings: str) -> Server:
        server = self._servers[side]
        if not server.pid:
            server.start(**settings)
        return server

    def _fresh(self, side: str, *, is_cold: bool = False) -> Server:
        """A server on unchanged data; recovered (a mounted backup has a label), then cold."""
        server = self._servers[side]
        server.stop("immediate")
        self._sides[side].fresh()
        if is_cold:
            drop_caches()
        server.start()
        return server

    def _rounds(
        self,
        name: str,
        unit: str,
        wanted: str,
        measure: Callable[[Figure, str, int], None],
        *,
        is_time: bool = False,
    ) -> Figure:
        figure = Figure(name, unit, is_time=is_time, wanted=wanted)
        run_rounds(list(self._sides), self._n_rounds, lambda s, n: measure(figure, s, n), what=name)
        return figure

    def _cpu_s(self, side: str) -> tuple[float, float]:
        return self._servers[side].cpu_s(), self._sides[side].worker_cpu_s()

    def _prewarm(self, server: Server) -> None:
        """Read pgbench's tables once, by index and by scan."""
        server.sql("select count(*) from pgbench_accounts")
        server.sql("set enable_seqscan = off; select count(aid) from pgbench_accounts")

    # --- pgbench ------------------------------------------------------------------------

    def select_warm(self) -> Figure:
        def measure(figure: Figure, side: str, number: int) -> None:
            server = self._start(side)
            if number == 0:
                self._prewarm(server)
                server.pgbench("-n", "-S", "-c", "4", "-j", "2", "-T", "3")
            seconds = str(self._seconds)
            figure.add(side, server.pgbench("-n", "-S", "-c", "4", "-j", "2", "-T", seconds))

        return self._rounds("pgbench -S, warm, 4 clients", "TPS", "0.97", measure)

    def tpcb_then_select(self) -> Figure:
        return self._tpcb_then_select("simple")

    def tpcb_then_select_prepared(self) -> Figure:
        return self._tpcb_then_select("prepared")

    def _tpcb_then_select(self, protocol: str) -> Figure:
        def measure(figure: Figure, side: str, number: int) -> None:
            server = self._start(side)
            if number == 0:
                self._prewarm(server)
            seconds = str(self._seconds)
            server.pgbench("-n", "-c", "4", "-j", "2", "-T", seconds)
            figure.add(
                side,
                server.pgbench("-n", "-S", "-M", protocol, "-c", "4", "-j", "2", "-T", seconds),
            )

        name = f"pgbench -S directly after TPC-B, {protocol}"
        return self._rounds(name, "TPS", "0.95", measure)

    def tpcb_warm(self) -> Figure:
        def measure(figure: Figure, side: str, number: int) -> None:
            server = self._start(side)
            if number == 0:
                self._prewarm(server)
                server.pgbench("-n", "-c", "4", "-j", "2", "-T", "5")
            server.sql("checkpoint")
            before = self._cpu_s(side)
            seconds = self._seconds + 3
            tps = server.pgbench("-n", "-c", "4", "-j", "2", "-T", str(seconds))
            after = self._cpu_s(side)
            n = tps * seconds
            figure.add(
                side,
                tps,
                server_cpu_us=round((after[0] - before[0]) / n * 1e6, 1),
                worker_cpu_us=round((after[1] - before[1]) / n * 1e6, 1),
            )

        return self._rounds("pgbench TPC-B, warm, 4 clients", "TPS", "0.95; cpu 1.10", measure)

    def tpcb_cold(self) -> list[Figure]:
        """The first 10 s of a fresh and cold side, and the 10 s after."""
        first = Figure("TPC-B, first 10 s of a cold fresh mount", "TPS", False, wanted="0.95")
        then = Figure("TPC-B, the next 10 s", "TPS", False, wanted="1.0")

        def measure(side: str, _number: int) -> None:
            server = self._fresh(side, is_cold=True)
            first.add(side, server.pgbench("-n", "-c", "4", "-j", "2", "-T", "10"))
            then.add(side, server.pgbench("-n", "-c", "4", "-j", "2", "-T", "10"))
            server.stop("immediate")

        run_rounds(list(self._sides), self._n_rounds, measure, what=first.name)
        return [first, then]

    # --- commits ------------------------------------------------------------------------

    def commits_1(self) -> Figure:
        return self._commits(1)

    def commits_4(self) -> Figure:
        return self._commits(4)

    def _commits(self, n_clients: int) -> Figure:
        script = self._sockets / "commit.sql"
        script.write_text("insert into tiny values (1);\n")

        def measure(figure: Figure, side: str, number: int) -> None:
            server = self._start(side)
            if number == 0:
                server.sql("drop table if exists tiny; create table tiny (i int)")
            figure.add(
                side,
                server.pgbench(
                    "-n", "-f", os.fspath(script), "-c", str(n_clients), "-j", "2",
                    "-T", str(self._seconds),
                ),
            )  # fmt: skip

        name = f"commits of one row, {n_clients} clients"
        return self._rounds(name, "commits/s", "0.98", measure)

    # --- names ----------------------------------------------------------------------------------

    def ddl(self) -> Figure:
        """A table with index and TOAST comes, is truncated and goes: some fifteen files."""
        script = self._sockets / "ddl.sql"
        script.write_text(
            "create table t:client_id (i int primary key, t text);\n"
            "insert into t:client_id values (1, 'a');\n"
            "truncate t:client_id;\n"
            "drop table t:client_id;\n"
        )

        def measure(figure: Figure, side: str, _number: int) -> None:
            server = self._start(side)
            seconds = str(self._seconds)
            before = self._cpu_s(side)
            tps = server.pgbench("-n", "-f", os.fspath(script), "-c", "1", "-T", seconds)
            after = self._cpu_s(side)
            n = tps * self._seconds
            figure.add(
                side,
                tps,
                server_cpu_us=round((after[0] - before[0]) / n * 1e6, 1),
                worker_cpu_us=round((after[1] - before[1]) / n * 1e6, 1),
            )

        return self._rounds("CREATE, TRUNCATE and DROP TABLE", "rounds/s", "", measure)

    def create_database(self) -> Figure:
        def measure(figure: Figure, side: str, _number: int) -> None:
            server = self._start(side)
            server.sql("drop database if exists made")
            figure.add(side, server.time_sql("create database made strategy wal_log"))
            server.sql("drop database made")

        return self._rounds("CREATE DATABASE", "s", "", measure, is_time=True)

    # --- scans and loads ----------------------------------------------------------------

    def count_cold(self) -> Figure:
        def measure(figure: Figure, side: str, _number: int) -> None:
            self._servers[side].stop()
            self._sides[side].cold()
            server = self._start(side)
            before = self._cpu_s(side)
            seconds = server.time_sql("select count(*) from big")
            after = self._cpu_s(side)
            figure.add(
                side,
                seconds,
                server_cpu_s=round(after[0] - before[0], 3),
                worker_cpu_s=round(after[1] - before[1], 3),
            )
            server.stop()

        wanted = "0.87 raw (time <= 1.15)"
        return self._rounds("cold count(*) of a 1+ GB table", "s", wanted, measure, is_time=True)

    def bulk_load(self) -> Figure:
        rows = self._sockets / "rows.txt"
        if not rows.exists():
            native = next(iter(self._servers))
            server = self._start(native)
            server.sql(f"copy (select * from big limit {self._rows}) to '{rows}'")

        def measure(figure: Figure, side: str, _number: int) -> None:
            server = self._start(side)
            server.sql("drop table if exists loaded; create table loaded (like big); checkpoint")
            drop_caches()
            Path(rows).read_bytes()
            before = self._cpu_s(side)
            copy = server.time_sql(f"copy loaded from '{rows}'")
            index = server.time_sql("create index on loaded (id)")
            checkpoint = server.time_sql("checkpoint")
            after = self._cpu_s(side)
            figure.add(
                side,
                copy + index,
                copy_s=round(copy, 2),
                index_s=round(index, 2),
                checkpoint_s=round(checkpoint, 2),
                server_cpu_s=round(after[0] - before[0], 2),
                worker_cpu_s=round(after[1] - before[1], 2),
            )
            server.sql("drop table loaded")

        name = "COPY of 1 GB + CREATE INDEX"
        return self._rounds(name, "s", "0.85", measure, is_time=True)

    FIGURES = (
        "count_cold", "select_warm", "tpcb_warm", "tpcb_then_select", "tpcb_then_select_prepared",
        "commits_1", "commits_4", "ddl", "create_database", "bulk_load", "tpcb_cold",
    )  # fmt: skip
