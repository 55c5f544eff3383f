"""The data that is measured: clusters, the chains written from them, and bare page files.

Everything is made once below one directory and found again by name, so that several runs (with
``--keep``) share it. Nothing in it is changed by a run: sides work on copies and diffs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from catalog_format import BLCKSZ
from catalog_writer import CatalogWriter, synthetic_control_file, synthetic_pgdata

from benchmarks.measure import say
from benchmarks.server import SERVER_USER, Server, as_server_user
from benchmarks.sides import Chain, run


@dataclass(frozen=True, slots=True)
class Dataset:
    """The same data in several forms."""

    native: Path  # a plain directory; to be copied, or used as an immutable lower layer
    chains: dict[str, Chain]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much data; ``quick`` is for trying out."""

    scale: int  # of pgbench; 15 MB each
    table_mib: int  # the table that is scanned
    page_file_mib: int
    large_scale: int  # of pgbench, in the cluster that is restored

    @classmethod
    def of(cls, *, is_quick: bool) -> Sizes:
        return cls(10, 128, 128, 20) if is_quick else cls(50, 1152, 1024, 500)


def _remember(path: Path, chains: dict[str, Chain]) -> None:
    path.write_text(json.dumps({n: [os.fspath(c.store), c.backup_id] for n, c in chains.items()}))


def _recall(path: Path) -> dict[str, Chain] | None:
    if not path.exists():
        return None
    return {n: Chain(Path(s), i) for n, (s, i) in json.loads(path.read_text()).items()}


class Data:
    """Makes data sets on demand below ``place``, which the server's user may enter."""

    def __init__(self, place: Path, bindir: Path, sizes: Sizes) -> None:
        self.place = place
        self.bindir = bindir
        self.sizes = sizes
        place.mkdir(parents=True, exist_ok=True)
        place.chmod(0o755)

    # --- a cluster ----------------------------------------------------------------------

    def cluster(self) -> Dataset:
        """A cluster with pgbench's tables and a large one, as FULL and as a chain of five."""
        return self._cluster("cluster", self._make_cluster)

    def large_cluster(self) -> Dataset:
        """A cluster of pgbench's tables alone, as FULL."""
        return self._cluster("large-cluster", self._make_large_cluster)

    def _cluster(self, name: str, make: Callable[[Path, Path], dict[str, Chain]]) -> Dataset:
        home = self.place / name
        source = home / "source"
        done = home / "chains.json"
        chains = _recall(done)
        if chains is None:
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            shutil.chown(home, SERVER_USER)
            chains = make(home, source)
            _remember(done, chains)
        return Dataset(source, chains)

    def _start_new(self, home: Path, source: Path) -> Server:
        initdb = self.bindir / "initdb"
        run(*as_server_user(initdb, "-k", "-A", "trust", "-U", SERVER_USER, "-D", source))
        server = Server(self.bindir, source, home, 5590, {"max_wal_size": "16GB", "fsync": "off"})
        server.start()
        return server

    def _make_large_cluster(self, home: Path, source: Path) -> dict[str, Chain]:
        say(f"making a cluster: pgbench scale {self.sizes.large_scale}")
        server = self._start_new(home, source)
        try:
            server.fill_pgbench(self.sizes.large_scale)
            server.stop()
        finally:
            server.stop("immediate")
        return _write_full(home, source)

    def _make_cluster(self, home: Path, source: Path) -> dict[str, Chain]:
        say(f"making a cluster: pgbench scale {self.sizes.scale}, {self.sizes.table_mib} MiB table")
        server = self._start_new(home, source)
        try:
            server.fill_pgbench(self.sizes.scale)
            # Hexadecimal digests: 1.7:1 with zlib, about what real tables give.
            n_rows = self.sizes.table_mib * 6400
            server.sql(
                "create table big (id int, payload text);"
                " insert into big select i, md5(i::text) || md5((i * 3)::text)"
                f" || md5((i * 5)::text) || md5((i * 7)::text) from generate_series(1, {n_rows}) i;"
            )
            server.sql("vacuum (freeze)")
            server.stop()
            five = CatalogWriter(home / "store-chain5")
            five_zlib = CatalogWriter(home / "store-chain5-zlib")
            five.add(source, compress="none")
            five_zlib.add(source, compress="zlib")
            for number in range(4):
                say(f"chain of five: increment {number + 1}")
                server.start()
                server.pgbench("-n", "-c", "4", "-t", "1000")
                server.sql(
                    f"select setseed(0.{number + 1});"
                    " update big set payload = reverse(payload) where id in (select"
                    f" (random() * {n_rows})::int from generate_series(1, {n_rows // 400}))"
                )
                server.sql("vacuum (freeze)")
                server.stop()
                five.add(source, "DELTA", compress="none")
                five_zlib.add(source, "DELTA", compress="zlib")
        finally:
            server.stop("immediate")
        return _write_full(home, source) | {
            "chain5": Chain(five.store, five.last or ""),
            "chain5-zlib": Chain(five_zlib.store, five_zlib.last or ""),
        }

    # --- a bare file of pages -----------------------------------------------------------

    PAGE_FILE = "base/5/16384"
    LISTED = "base/16385"  # a directory of a thousand files

    def pages(self) -> Dataset:
        """One relation of full pages (1.7:1 with zlib) and a directory of a thousand small ones."""
        home = self.place / "pages"
        source = home / "source"
        done = home / "chains.json"
        chains = _recall(done)
        if chains is None:
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            chains = self._make_pages(home, source)
            _remember(done, chains)
        return Dataset(source, chains)

    def _make_pages(self, home: Path, source: Path) -> dict[str, Chain]:
        n_blocks = self.sizes.page_file_mib * (1 << 20) // BLCKSZ
        say(f"making a file of {n_blocks} pages")
        source.mkdir()
        synthetic_pgdata(source, {f"{self.LISTED}/{20000 + n}": _page(n, 1) for n in range(1000)})
        path = source / self.PAGE_FILE
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as out:
            for block in range(n_blocks):
                out.write(_page(block, 0x1400028))
        five = CatalogWriter(home / "store-chain5")
        five_zlib = CatalogWriter(home / "store-chain5-zlib")
        five.add(source, compress="none")
        five_zlib.add(source, compress="zlib")
        choose = random.Random(5)
        for number in range(1, 5):
            redo = 0x1500028 + (number << 20)
            control = synthetic_control_file(redo=redo)
            (source / "global/pg_control").write_bytes(control)
            with path.open("r+b") as out:
                for block in choose.sample(range(n_blocks), n_blocks // 20):
                    os.pwrite(out.fileno(), _page(block + number, redo - 8), block * BLCKSZ)
            five.add(source, "DELTA", compress="none")
            five_zlib.add(source, "DELTA", compress="zlib")
        return _write_full(home, source) | {
            "chain5": Chain(five.store, five.last or ""),
            "chain5-zlib": Chain(five_zlib.store, five_zlib.last or ""),
        }

    # --- catalogs without data ----------------------------------------------------------

    def many_files(self, n_files: int) -> Chain:
        store = self.place / f"store-files-{n_files}"
        done = self.place / f"files-{n_files}.json"
        chains = _recall(done)
        if chains is None:
            say(f"making a catalog of {n_files} files")
            shutil.rmtree(store, ignore_errors=True)
            chains = {"files": Chain(store, CatalogWriter(store).add_many_files(n_files))}
            _remember(done, chains)
        return chains["files"]

    def large(self, n_gib: int) -> Chain:
        store = self.place / f"store-large-{n_gib}"
        done = self.place / f"large-{n_gib}.json"
        chains = _recall(done)
        if chains is None:
            say(f"making a catalog of {n_gib} GiB")
            shutil.rmtree(store, ignore_errors=True)
            chains = {"large": Chain(store, CatalogWriter(store).add_large(n_gib))}
            _remember(done, chains)
        return chains["large"]


def _write_full(home: Path, source: Path) -> dict[str, Chain]:
    """The state of ``source`` as a FULL, raw and zlib."""
    say("the state as a FULL, raw and zlib")
    raw = CatalogWriter(home / "store-raw")
    packed = CatalogWriter(home / "store-zlib")
    return {
        "raw": Chain(raw.store, raw.add(source, compress="none")),
        "zlib": Chain(packed.store, packed.add(source, compress="zlib")),
    }


def _page(seed: int, lsn: int) -> bytes:
    """A full page of hexadecimal digits."""
    header = struct.pack("<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 28, 40, 8192, 0x2004, 0)
    body = random.Random(seed).randbytes(4076).hex().encode()
    return (header + bytes(16) + body)[:BLCKSZ]
