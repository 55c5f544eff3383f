"""Memory of workers: idle, after reading everywhere in a large backup, and ten side by side."""

from __future__ import annotations

import os
import random
import time

from benchmarks.dataset import Data
from benchmarks.measure import Figure, drop_caches, run_rounds
from benchmarks.server import SERVER_USER
from benchmarks.sides import Chain, PbkfsSide, Side


def memory_of(pid: int | None) -> dict[str, float]:
    """RSS, PSS and private memory of a process in MiB."""
    if pid is None:
        return {}
    found = {}
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        for line in lines:
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss", "Private_Dirty"):
                found[f"{key.lower()}_mib"] = round(int(rest.split()[0]) / 1024, 1)
    return found


def sectors_read() -> int:
    """Sectors read from all disks since boot."""
    with open("/proc/diskstats") as lines:
        fields = [line.split() for line in lines]
    return sum(int(f[5]) for f in fields if f[2].startswith(("vd", "sd", "nvme")))


class Memory:
    """Figures in MiB; less is better."""

    def __init__(
        self, data: Data, _sides: dict[str, Side], n_rounds: int, *, is_quick: bool
    ) -> None:
        self._data = data
        self._n_rounds = n_rounds
        self._gib = 16 if is_quick else 1024
        self._n_reads = 1000 if is_quick else 10000

    def _side(self, name: str, chain: Chain) -> PbkfsSide:
        return PbkfsSide(name, chain, self._data.place, SERVER_USER)

    def idle(self) -> Figure:
        figure = Figure("worker of an idle mount, 1,000 files, PSS", "MiB", True, wanted="<= 20")
        chain = self._data.many_files(1000)

        def measure(name: str, _number: int) -> None:
            side = self._side(name, chain)
            try:
                side.fresh()
                os.listdir(side.path)
                found = memory_of(side.worker_pid())
                figure.add(name, found["pss_mib"], **found)
            finally:
                side.close()

        run_rounds(["idle"], self._n_rounds, measure, what=figure.name)
        return figure

    def large(self) -> list[Figure]:
        """10,000 random pages all over 1 TiB: memory, and what a read costs then."""
        figure = Figure(
            f"{self._n_reads:,} random reads in {self._gib:,} GiB, RSS", "MiB", True,
            wanted="<= 256",
        )  # fmt: skip
        seconds = Figure("the same: time of a read, cold", "ms", True)
        chain = self._data.large(self._gib)

        def measure(name: str, number: int) -> None:
            side = self._side(name, chain)
            choose = random.Random(number)
            try:
                drop_caches()
                side.fresh()
                start = time.perf_counter()
                for _ in range(self._n_reads):
                    segno, block = choose.randrange(self._gib), choose.randrange(131072)
                    suffix = f".{segno}" if segno else ""
                    fd = os.open(side.path / f"base/16384/20000{suffix}", os.O_RDONLY)
                    page = os.pread(fd, 8192, block * 8192)
                    os.close(fd)
                    if int.from_bytes(page[24:28], "little") != block:
                        raise RuntimeError(f"block {block} of segment {segno} is wrong")
                each = (time.perf_counter() - start) / self._n_reads * 1000
                found = memory_of(side.worker_pid())
                figure.add(name, found["rss_mib"], **found)
                seconds.add(name, each)
            finally:
                side.close()

        run_rounds(["large"], min(self._n_rounds, 3), measure, what=figure.name)
        return [figure, seconds]

    def ten_mounts(self) -> list[Figure]:
        """Ten mounts of one chain: memory of all, and whether the base is read from disk once."""
        pss = Figure("ten mounts of one chain, PSS of all workers", "MiB", True, wanted="<= 200")
        disk = Figure("read from disk, of the stored size: a scan in each mount", "share", True)
        data = self._data.pages()
        chain = data.chains["raw"]
        stored = (data.native / Data.PAGE_FILE).stat().st_size
        sides = [self._side(f"ten-{number}", chain) for number in range(10)]
        try:
            for side in sides:
                side.fresh()
            found = [memory_of(side.worker_pid())["pss_mib"] for side in sides]
            pss.add("all ten", sum(found), each=found)
            drop_caches()
            for side in sides:
                before = sectors_read()
                with open(side.path / Data.PAGE_FILE, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass
                disk.add(side.name, (sectors_read() - before) * 512 / stored)
        finally:
            for side in sides:
                side.close()
        return [pss, disk]

    FIGURES = ("idle", "ten_mounts", "large")
