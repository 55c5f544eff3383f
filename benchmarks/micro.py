"""File-system operations one by one: reads cold and warm, overwrites, commits, names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.dataset import Data
from benchmarks.measure import NATIVE, Figure, drop_caches, run_rounds
from benchmarks.sides import Side, run

SOURCE = Path(__file__).with_name("micro.c")


def build_driver(place: Path) -> Path:
    """Compile micro.c, with libdeflate where its header is."""
    driver = place / "micro"
    base = ["gcc", "-O2", "-std=c11", "-pthread", "-o", os.fspath(driver), os.fspath(SOURCE)]
    done = subprocess.run([*base, "-DHAVE_LIBDEFLATE", "-ldeflate"], capture_output=True)
    if done.returncode:
        run(*base)
    return driver


class Micro:
    """The figures of this group, over the sides that the driver of the benchmarks made."""

    def __init__(
        self, data: Data, sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._dataset = data.pages()
        self._driver = build_driver(data.place)
        self._sides = sides
        self._n_rounds = n_rounds
        self._share = 10 if is_quick else 1

    def _run(self, figure: Figure, side: Side, mode: str, *arguments: object) -> None:
        before = side.worker_cpu_s()
        done = json.loads(run(self._driver, mode, *map(str, arguments)))
        cpu = done["cpu"] + side.worker_cpu_s() - before
        figure.add(
            side.name,
            done["ops"] / done["seconds"],
            us=round(done["seconds"] / done["ops"] * 1e6, 2),
            cpu_us=round(cpu / done["ops"] * 1e6, 2),
            p50=done["p50"],
            p99=done["p99"],
        )

    def _file(self, side: Side) -> Path:
        return side.path / Data.PAGE_FILE

    def _rounds(
        self, name: str, wanted: str, measure: Callable[[Figure, Side, int], None]
    ) -> Figure:
        figure = Figure(name, "ops/s", is_time=False, wanted=wanted)
        run_rounds(
            list(self._sides),
            self._n_rounds,
            lambda side, number: measure(figure, self._sides[side], number),
            what=name,
        )
        return figure

    # --- reads --------------------------------------------------------------------------

    def cold_seq_8k(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            side.cold()
            self._run(figure, side, "seqread", self._file(side), 8192)

        return self._rounds("cold sequential read, 8 KiB", "0.87 raw", measure)

    def cold_seq_128k(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            side.cold()
            self._run(figure, side, "seqread", self._file(side), 131072)

        return self._rounds("cold sequential read, 128 KiB", "", measure)

    def cold_random(self) -> Figure:
        def measure(figure: Figure, side: Side, number: int) -> None:
            side.cold()
            self._run(figure, side, "randread", self._file(side), 8000 // self._share, 1, number)

        return self._rounds("cold random 8 KiB read, 1 thread", "0.85 raw, 0.60 zlib", measure)

    def cold_random_4(self) -> Figure:
        def measure(figure: Figure, side: Side, number: int) -> None:
            side.cold()
            self._run(figure, side, "randread", self._file(side), 16000 // self._share, 4, number)

        return self._rounds("cold random 8 KiB read, 4 threads", "0.60 raw, 0.45 zlib", measure)

    def warm_random(self) -> Figure:
        def measure(figure: Figure, side: Side, number: int) -> None:
            if number == 0:
                run(self._driver, "seqread", self._file(side), "1048576")
            self._run(figure, side, "randread", self._file(side), 400000 // self._share, 1, number)

        return self._rounds("warm random 8 KiB read", "0.97", measure)

    def inflate_alone(self) -> list[Figure]:
        """Cold zlib pages through libdeflate in plain threads, against the mount's cold scan."""
        zlib_side = self._sides.get("zlib")
        if zlib_side is None:
            return []
        figure = Figure("cold scan of zlib pages", "pages/s", is_time=False, wanted="0.85")
        chain = self._dataset.chains["zlib"]
        stored = (
            chain.store / "backups" / chain.instance / chain.backup_id / "database" / Data.PAGE_FILE
        )
        n_threads = os.cpu_count() or 1

        def measure(name: str, _number: int) -> None:
            if name == NATIVE:
                drop_caches()
                done = json.loads(run(self._driver, "inflate", str(n_threads), stored))
            else:
                zlib_side.cold()
                done = json.loads(run(self._driver, "seqread", self._file(zlib_side), "131072"))
            figure.add(name, done["bytes"] / 8192 / done["seconds"])

        run_rounds([NATIVE, "zlib"], self._n_rounds, measure, what=figure.name)
        return [figure]

    # --- writes -------------------------------------------------------------------------

    def overwrite(self) -> Figure:
        n_writes = self._data.sizes.page_file_mib * 128 * 3 // 4

        def measure(figure: Figure, side: Side, number: int) -> None:
            side.fresh()
            drop_caches()
            self._run(figure, side, "overwrite", self._file(side), n_writes, number, 0)

        return self._rounds("random 8 KiB overwrite, into the cache", "0.30", measure)

    def overwrite_synced(self) -> Figure:
        n_writes = self._data.sizes.page_file_mib * 128 * 3 // 4

        def measure(figure: Figure, side: Side, number: int) -> None:
            side.fresh()
            drop_caches()
            self._run(figure, side, "overwrite", self._file(side), n_writes, number, 1)

        return self._rounds("random 8 KiB overwrite, then fsync", "0.30", measure)

    def commit(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            self._run(figure, side, "commit", self._file(side), 1000 // self._share)

        return self._rounds("8 KiB write + fdatasync", "", measure)

    # --- names --------------------------------------------------------------------------

    def create(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            self._run(figure, side, "create", side.path / "base/5", 3000 // self._share)

        return self._rounds("create + write 8 KiB + close + unlink", "0.20", measure)

    def openclose(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            self._run(figure, side, "openclose", self._file(side), 10000 // self._share)

        return self._rounds("open + close", "", measure)

    def list_cold(self) -> Figure:
        def measure(figure: Figure, side: Side, _number: int) -> None:
            side.cold()
            self._run(figure, side, "list", side.path / Data.LISTED)

        return self._rounds("readdir + stat of 1,000 files, cold", "", measure)

    def list_warm(self) -> Figure:
        def measure(figure: Figure, side: Side, number: int) -> None:
            if number == 0:
                run(self._driver, "list", side.path / Data.LISTED)
            self._run(figure, side, "list", side.path / Data.LISTED)

        return self._rounds("readdir + stat of 1,000 files, warm", "", measure)

    FIGURES = (
        "cold_seq_8k", "cold_seq_128k", "cold_random", "cold_random_4", "inflate_alone",
        "warm_random", "list_cold", "list_warm", "openclose", "create", "overwrite",
        "overwrite_synced", "commit",
    )  # fmt: skip
