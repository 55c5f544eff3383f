"""How long it takes until a mount is there: absolute figures, nothing native compares."""

from __future__ import annotations

import os
import time

from benchmarks.dataset import Data
from benchmarks.measure import Figure, drop_caches, run_rounds
from benchmarks.memory import memory_of
from benchmarks.server import SERVER_USER
from benchmarks.sides import Chain, PbkfsSide, Side, run


class Mounting:
    """Mount to the first ``ls``, by number of files and of pages."""

    def __init__(
        self, data: Data, _sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._n_rounds = n_rounds
        self._many = 10_000 if is_quick else 100_000
        self._gib = 16 if is_quick else 1024

    def _measure(self, chains: dict[str, Chain], *, is_cold: bool) -> list[Figure]:
        state = "cold" if is_cold else "warm"
        first = Figure(f"mount to the first ls, {state}", "s", True, wanted="0.2; 2 (100,000)")
        walk = Figure(f"find over everything after that, {state}", "s", True)
        sides = {
            name: PbkfsSide(name, chain, self._data.place, SERVER_USER)
            for name, chain in chains.items()
        }

        def measure(name: str, _number: int) -> None:
            side = sides[name]
            try:
                side.unmount()
                if is_cold:
                    drop_caches()
                start = time.perf_counter()
                side.fresh()
                os.listdir(side.path)
                seconds = time.perf_counter() - start
                pid = side.worker_pid()
                first.add(name, seconds, **memory_of(pid))
                start = time.perf_counter()
                run("find", side.path, "-size", "+1")
                walk.add(name, time.perf_counter() - start, **memory_of(pid))
            finally:
                side.close()

        run_rounds(list(sides), self._n_rounds, measure, what=first.name)
        return [first, walk]

    def _chains(self) -> dict[str, Chain]:
        return {
            "1,000 files": self._data.many_files(1000),
            f"{self._many:,} files": self._data.many_files(self._many),
            f"{self._gib:,} GiB": self._data.large(self._gib),
        }

    def warm(self) -> list[Figure]:
        return self._measure(self._chains(), is_cold=False)

    def cold(self) -> list[Figure]:
        return self._measure(self._chains(), is_cold=True)

    def command_line(self) -> Figure:
        """Commands that need no mount."""
        figure = Figure("command line without a mount", "s", True, wanted="0.15")
        commands = {"--help": ["--help"], "list": ["list"]}

        def measure(name: str, _number: int) -> None:
            from benchmarks.sides import pbkfs_command

            start = time.perf_counter()
            run(*pbkfs_command(), *commands[name])
            figure.add(name, time.perf_counter() - start)

        run_rounds(list(commands), self._n_rounds, measure, what=figure.name)
        return figure

    FIGURES = ("warm", "cold", "command_line")
