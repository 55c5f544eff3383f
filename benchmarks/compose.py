"""Composes a chain of a pg_probackup catalog into a plain directory: what a restore does.

The other side of two figures: the time until a restored cluster answers its first query, and
"native" wherever the state that the catalog was written from is not at hand any more. It reads
catalogs of the writer in tests/ (2.4 and later, no external directories) by the header-less record
walk, one process a core, and fsyncs every file, as pg_probackup does by default; what its restore
does beyond that (validation) is left out, so the figure is a lower bound.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

BLCKSZ = 8192
_FIELD = re.compile(r'"(\w+)":"([^"]*)"')
_HEADER = struct.Struct("<Ii")
_HIDDEN = {"tablespace_map", "database_map"}


@dataclass(frozen=True, slots=True)
class Listed:
    path: str
    mode: int
    size: int
    is_datafile: bool
    compress: str
    n_blocks: int | None


@dataclass(frozen=True, slots=True)
class Member:
    """One backup of the chain."""

    directory: Path
    parent: str | None
    entries: dict[str, Listed]


def read_member(directory: Path) -> Member:
    control = dict(
        re.findall(r"^([\w-]+) = '?([^'\n]*)'?$", (directory / "backup.control").read_text(), re.M)
    )
    entries = {}
    for line in (directory / "backup_content.control").open(errors="surrogateescape"):
        fields = dict(_FIELD.findall(line))
        if fields.get("external_dir_num", "0") == "0":
            entries[fields["path"]] = Listed(
                fields["path"],
                int(fields["mode"]),
                int(fields["size"]),
                fields["is_datafile"] == "1",
                fields["compress_alg"],
                int(fields["n_blocks"]) if "n_blocks" in fields else None,
            )
    return Member(directory, control.get("parent-backup-id"), entries)


def read_chain(store: Path, instance: str, backup_id: str) -> list[Member]:
    """The members of the chain, newest first."""
    chain, wanted = [], backup_id
    while wanted:
        member = read_member(store / "backups" / instance / wanted)
        chain.append(member)
        wanted = member.parent or ""
    return chain


def _records(data: bytes) -> Iterator[tuple[int, int, int]]:
    at = 0
    while at < len(data):
        block, length = _HEADER.unpack_from(data, at)
        yield block, at + 8, length
        at += 8 + length


def _compose_file(job: tuple[str, Path, list[tuple[Path, Listed]]]) -> int:
    path, target, layers = job
    listed = layers[0][1]
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IMODE(listed.mode))
    with open(fd, "wb", buffering=0) as out:
        if not listed.is_datafile:
            for database, entry in layers:
                if entry.size >= 0:
                    if entry.size:
                        out.write((database / path).read_bytes())
                    break
            os.fsync(out.fileno())
            return 0
        limit = 1 << 32
        done: set[int] = set()
        for number, (database, entry) in enumerate(layers):
            if entry.n_blocks is not None:
                limit = min(limit, entry.n_blocks)
            if entry.size == 0:
                break
            if entry.size == -1:
                continue
            is_last = number == len(layers) - 1
            data = (database / path).read_bytes()
            run: list[bytes] = []
            run_start = 0
            for block, at, length in _records(data):
                if block >= limit or block in done:
                    continue
                page = data[at : at + length]
                if length != BLCKSZ:
                    page = zlib.decompress(page)
                if run and (run_start + len(run) != block or len(run) >= 128):
                    os.pwrite(out.fileno(), b"".join(run), run_start * BLCKSZ)
                    run.clear()
                if not run:
                    run_start = block
                run.append(page)
                if not is_last:
                    done.add(block)
            if run:
                os.pwrite(out.fileno(), b"".join(run), run_start * BLCKSZ)
        out.truncate((listed.n_blocks or 0) * BLCKSZ)
        os.fsync(out.fileno())
    return 0


def compose(
    store: Path, instance: str, backup_id: str, target: Path, n_jobs: int | None = None
) -> None:
    """Make ``target``, the PGDATA of the backup. Tablespaces stay directories in pg_tblspc."""
    chain = read_chain(store, instance, backup_id)
    target.mkdir(mode=0o700)
    jobs = []
    for entry in sorted(chain[0].entries.values(), key=lambda entry: entry.path):
        if stat.S_ISDIR(entry.mode):
            (target / entry.path).mkdir(mode=stat.S_IMODE(entry.mode))
        elif entry.path not in _HIDDEN:
            layers = []
            for member in chain:
                if entry.path not in member.entries:
                    break
                layers.append((member.directory / "database", member.entries[entry.path]))
            jobs.append((entry.path, target / entry.path, layers))
    jobs.sort(key=lambda job: max(0, job[2][-1][1].size), reverse=True)
    with ProcessPoolExecutor(n_jobs or os.cpu_count(), mp_context=get_context("fork")) as pool:
        large = [job for job in jobs if job[2][-1][1].size >= 1 << 20]
        futures = [pool.submit(_compose_file, job) for job in large]
        list(pool.map(_compose_file, jobs[len(large) :], chunksize=64))
        for future in futures:
            future.result()


if __name__ == "__main__":
    compose(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
