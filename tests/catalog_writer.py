"""Writes pg_probackup catalogs: a stopped PGDATA, or several states of one, becomes a chain.

For tests and benchmarks that need a catalog which nobody shipped: a large one, a deep one, one with
a hundred thousand files, one with pages of every kind. The format is that of pg_probackup 2.2 to
2.5, described from its behaviour; ``tests/unit/test_catalog_writer.py`` holds what it writes
against what pg_probackup itself wrote from the same states.

::

    catalog = CatalogWriter(store)
    full = catalog.add(pgdata)
    ... start the server, change something, stop it ...
    last = catalog.add(pgdata, "DELTA", compress="none")

From the command line: ``python tests/catalog_writer.py STORE --full DIR --delta DIR …``.

A real backup is taken from a running server and ends with a WAL record that says so. This one is
taken from a stopped server, whose shutdown checkpoint is the last record; its backup_label names
that checkpoint and the method ``pg_start_backup``, which is the one for which PostgreSQL does not
ask for the record. A state that brings a backup_label (it was restored from a real backup) keeps
it.

Files are stored by one process a core; an instance belongs to one thread.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import os
import re
import shutil
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

from catalog_format import (
    BLCKSZ,
    NO_PAGE,
    RELATION_DIRECTORY,
    ControlFile,
    Entry,
    PageStream,
    crc32c,
    database_oid,
    format_control,
    format_id,
    format_lsn,
    is_main_fork,
    page_checksum,
    parse_lsn,
    parse_version,
    segment_number,
    wal_name,
)

CHUNK = 128 * BLCKSZ
FIRST_START = datetime(2026, 1, 1, tzinfo=UTC)
DIRECTORY = 0o40700
REGULAR = 0o100600

# Directories that are listed without their contents, and files that no backup has.
EMPTY_DIRECTORIES = {
    "pg_replslot", "pg_stat_tmp", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots",
    "pg_subtrans", "log", "pg_wal",
}  # fmt: skip
EXCLUDED_FILES = {
    "postmaster.pid", "postmaster.opts", "recovery.signal", "standby.signal", "recovery.conf",
    "postgresql.auto.conf.tmp", "current_logfiles.tmp", "pg_internal.init", "ptrack.map.mmap",
    "ptrack.map.tmp", "ptrack.map",
}  # fmt: skip
NOT_COPIED_FROM_ROOT = {"tablespace_map", "database_map"}  # made anew by every backup
TEMPORARY_RELATION = re.compile(r"t\d.*")
UNLOGGED_INIT = re.compile(r"([1-9]\d*)_init")
WAL_FILE = re.compile(r"[0-9A-F]{24}")
HISTORY_FILE = re.compile(r"[0-9A-F]{8}\.history")


# --- what a state holds ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file or directory of a state: where it is in PGDATA and where its bytes are."""

    path: str
    mode: int  # with the type bits
    size: int
    real: Path


def list_state(pgdata: Path, version: tuple[int, int, int] = (2, 5, 16)) -> Iterator[SourceFile]:
    """Everything that a backup of the state lists, but for WAL.

    Old versions let main forks of unlogged relations through (seen with 2.4.10).
    """
    stack = [("", pgdata)]
    while stack:
        prefix, directory = stack.pop()
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        unlogged = {
            match[1]
            for entry in entries
            if version >= (2, 5, 0)
            and (match := UNLOGGED_INIT.fullmatch(entry.name))
            and RELATION_DIRECTORY.fullmatch(prefix.rstrip("/"))
        }
        for entry in entries:
            path = prefix + entry.name
            real = Path(entry.path)
            status = entry.stat()  # follows the links of pg_tblspc and pg_wal
            if entry.name.startswith("."):
                continue
            if stat.S_ISDIR(status.st_mode):
                if entry.name == "pgsql_tmp":
                    yield SourceFile(path, status.st_mode, 0, real)
                    continue
                yield SourceFile(path, status.st_mode, 0, real)
                if path not in EMPTY_DIRECTORIES:
                    stack.append((path + "/", real))
                continue
            if not stat.S_ISREG(status.st_mode) or entry.name in EXCLUDED_FILES:
                continue
            if not prefix and entry.name in NOT_COPIED_FROM_ROOT | {"backup_label"}:
                continue
            if RELATION_DIRECTORY.fullmatch(prefix.rstrip("/")):
                relation = re.match(r"([1-9]\d*)(_fsm)?(\.\d+)?$", entry.name)
                if TEMPORARY_RELATION.fullmatch(entry.name):
                    continue
                if relation and relation[1] in unlogged:
                    continue
            yield SourceFile(path, status.st_mode, status.st_size, real)


# --- storing one file --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoreJob:
    """What a process needs to store one file."""

    entry: Entry
    real: Path
    target: Path
    mode: str
    version: tuple[int, int, int]
    compress: str
    level: int
    since: int  # DELTA: pages with an LSN from here on
    previous: Path | None  # PAGE: the same file in the parent's state
    parent: Entry | None
    checksums: bool
    blocks_per_segment: int


def _store_data_file(job: StoreJob) -> tuple[Entry, bytes]:
    entry = job.entry
    n_blocks = job.real.stat().st_size // BLCKSZ
    if n_blocks == 0:
        return entry, b""
    is_full = job.mode == "FULL" or job.parent is None
    if job.version >= (2, 3, 0) or job.mode == "DELTA":
        entry.n_blocks = n_blocks
    first_blkno = segment_number(entry.path) * job.blocks_per_segment
    temporary = job.target.with_name(job.target.name + "_writing")
    previous = None
    if not is_full and job.mode == "PAGE" and job.previous is not None and job.previous.exists():
        previous = job.previous.open("rb")
    with job.real.open("rb") as source, temporary.open("wb", buffering=0) as out:
        os.fchmod(out.fileno(), 0o600)
        stream = PageStream(out.write, job.compress, job.level, job.version < (2, 4, 0))
        block = 0
        while chunk := source.read(CHUNK):
            before = previous.read(CHUNK) if previous else b""
            for at in range(0, len(chunk) - BLCKSZ + 1, BLCKSZ):
                page = chunk[at : at + BLCKSZ]
                if is_full:
                    is_wanted = True
                elif job.mode == "PAGE":
                    is_wanted = page != before[at : at + BLCKSZ]
                else:
                    high, low = struct.unpack_from("<II", page)
                    lsn = high << 32 | low
                    is_wanted = lsn >= job.since or lsn == 0
                if is_wanted:
                    checksum = None
                    if not job.checksums and page != NO_PAGE:
                        checksum = page_checksum(page, first_blkno + block)
                    stream.add(block, page, checksum)
                block += 1
        if previous:
            if job.version < (2, 3, 0) and os.fstat(previous.fileno()).st_size > n_blocks * BLCKSZ:
                stream.truncate(n_blocks)
            previous.close()
        stream.flush()
    if stream.size == 0:
        temporary.unlink()
        entry.size = -1
        return entry, b""
    temporary.rename(job.target)
    entry.size, entry.crc = stream.size, stream.crc
    entry.compress = job.compress if stream.n_pages else "none"
    entry.full_size = stream.n_pages * BLCKSZ
    if stream.n_pages == 0:
        return entry, b""
    entry.n_headers = stream.n_pages
    headers, entry.hdr_crc = stream.header_map()
    entry.hdr_size = len(headers)
    return entry, headers


def _store_plain_file(job: StoreJob) -> tuple[Entry, bytes]:
    entry = job.entry
    data = job.real.read_bytes()
    entry.crc = crc32c(data, 0) if data else 0
    parent = job.parent
    name = entry.path.rpartition("/")[2]
    if (
        job.mode != "FULL"
        and parent is not None
        and data
        and (parent.size, parent.crc, parent.full_size)[1:] == (entry.crc, len(data))
        and entry.path != "global/pg_control"
        and (name != "pg_filenode.map" or job.version < (2, 5, 0))
        and not entry.path.startswith("pg_wal/")
    ):
        entry.size = -1
        entry.full_size = len(data)
        return entry, b""
    entry.size = entry.full_size = len(data)
    if entry.path == "global/pg_control":
        entry.crc = ControlFile.parse(data).crc
    if data:
        fd = os.open(job.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as out:
            out.write(data)
        job.target.chmod(stat.S_IMODE(entry.mode))
    return entry, b""


def _store(job: StoreJob) -> tuple[Entry, bytes]:
    return _store_data_file(job) if job.entry.is_datafile else _store_plain_file(job)


# --- one backup ---------------------------------------------------------------------------------


@dataclass
class Backup:
    """What a later backup needs to know of its parent."""

    backup_id: str
    start_lsn: int
    pgdata: Path | None
    entries: dict[str, Entry] = field(default_factory=dict)


class BackupDirectory:
    """One backup on its way into the catalog: database/, the header map and the lists."""

    def __init__(self, path: Path, version: str) -> None:
        self.path = path
        self.database = path / "database"
        self.version = parse_version(version)
        self.entries: dict[str, Entry] = {}
        path.mkdir(mode=0o700)
        self.database.mkdir(mode=0o700)
        self._map = None
        self._map_size = 0
        if self.version >= (2, 4, 0):
            self._map = (path / "page_header_map").open("wb")
            os.fchmod(self._map.fileno(), 0o600)

    def add_directory(self, path: str, mode: int = DIRECTORY) -> None:
        (self.database / path).mkdir(mode=0o700)
        self.entries[path] = Entry(path, mode)

    def add(self, entry: Entry, headers: bytes) -> None:
        """List a file that is stored already; ``headers`` is its part of the header map."""
        if headers and self._map is not None:
            entry.hdr_off = self._map_size
            self._map.write(headers)
            self._map_size += len(headers)
        self.entries[entry.path] = entry

    def add_bytes(self, path: str, data: bytes, mode: int = REGULAR) -> None:
        """Store and list one small file that is not a relation's main fork."""
        entry = Entry(path, mode, size=len(data), full_size=len(data))
        if data:
            (self.database / path).write_bytes(data)
            (self.database / path).chmod(stat.S_IMODE(mode))
            if path == "global/pg_control":
                entry.crc = ControlFile.parse(data).crc
            else:
                entry.crc = crc32c(data, 0)
        self.entries[path] = entry

    def finish(self, control: dict[str, object]) -> None:
        """Write the lists; ``control`` is what backup.control says beside sizes and CRC."""
        if self._map is not None:
            self._map.close()
        ordered = sorted(self.entries.values(), key=lambda entry: entry.size)
        text = "".join(entry.format(self.version) for entry in ordered)
        raw = text.encode("utf-8", "surrogateescape")
        self._write("backup_content.control", raw)

        files = [e for e in ordered if not e.is_directory]
        n_directories = len(ordered) - len(files)
        is_wal = [e.path.startswith("pg_wal/") for e in files]
        stored = [max(e.size, 0) for e in files]
        control = dict(control)
        status = control.pop("status")
        tail = {key: control.pop(key) for key in ("parent-backup-id",) if key in control}
        control["data-bytes"] = n_directories * 4096 + sum(
            size for size, wal in zip(stored, is_wal, strict=True) if not wal
        )
        control["wal-bytes"] = sum(size for size, wal in zip(stored, is_wal, strict=True) if wal)
        control["uncompressed-bytes"] = n_directories * 4096 + sum(
            e.full_size if e.size > 0 else 0
            for e, wal in zip(files, is_wal, strict=True)
            if not wal
        )
        control["pgdata-bytes"] = n_directories * 4096 + sum(
            e.n_blocks * BLCKSZ if e.is_datafile else e.full_size
            for e, wal in zip(files, is_wal, strict=True)
            if not wal
        )
        control |= {"status": status} | tail
        if self.version >= (2, 3, 2):
            control["content-crc"] = crc32c(raw, 0)
        self._write("backup.control", format_control(control).encode())

    def _write(self, name: str, data: bytes) -> None:
        (self.path / name).write_bytes(data)
        (self.path / name).chmod(0o600)


# --- the catalog --------------------------------------------------------------------------------


class CatalogWriter:
    """One instance of a catalog; backups are added to it, oldest first.

    ``store`` and the instance's directories are made; an instance that exists is an error.
    """

    def __init__(
        self, store: str | os.PathLike[str], instance: str = "main", *, n_jobs: int | None = None
    ) -> None:
        self.store = Path(store)
        self.instance = instance
        self.backups = self.store / "backups" / instance
        self.wal = self.store / "wal" / instance
        self.backups.mkdir(mode=0o700, parents=True)
        self.wal.mkdir(mode=0o700, parents=True)
        self._n_jobs = n_jobs or os.cpu_count() or 1
        self._made: dict[str, Backup] = {}
        self.last: str | None = None

    def _next_start(self) -> datetime:
        return FIRST_START + timedelta(hours=len(self._made))

    def add(
        self,
        pgdata: str | os.PathLike[str],
        mode: str = "FULL",
        *,
        compress: str = "zlib",
        level: int = 1,
        version: str = "2.5.16",
        is_stream: bool = True,
        gzip_wal: bool = False,
        parent: str | None = None,
        start_time: datetime | None = None,
        stop_lsn: int | None = None,
        status: str = "OK",
        control: dict[str, object] | None = None,
    ) -> str:
        """Back up a stopped PGDATA and return the backup's id.

        ``mode`` is FULL, DELTA (pages by LSN: the state must come from a server that wrote WAL)
        or PAGE (pages that differ from the parent's state, whose directory must still be there).
        ``parent`` is the backup before this one unless named. ``control`` overrides values of
        backup.control. Archived WAL goes to the catalog's archive with ``is_stream=False``.
        """
        pgdata = Path(pgdata)
        above = None
        if mode != "FULL":
            above = self._made[parent or self.last or ""]
            if mode == "PAGE" and above.pgdata in (None, pgdata):
                raise ValueError("a PAGE backup needs the parent's state in another directory")
        start_time = start_time or self._next_start()
        backup_id = format_id(start_time)
        cluster = ControlFile.parse((pgdata / "global/pg_control").read_bytes())
        label = self._label(pgdata, cluster, start_time)
        start_lsn = parse_lsn(re.search(r"START WAL LOCATION: (\S+)", label)[1])  # type: ignore[index]
        tli = int(re.search(r"START TIMELINE: (\d+)", label)[1])  # type: ignore[index]
        self._write_instance(pgdata, cluster)

        made = BackupDirectory(self.backups / backup_id, version)
        jobs = []
        tablespaces: list[str] = []
        for source in list_state(pgdata, made.version):
            if stat.S_ISDIR(source.mode):
                made.add_directory(source.path, source.mode)
                top, _, name = source.path.partition("/")
                if top == "pg_tblspc" and name.isdigit() and (pgdata / source.path).is_symlink():
                    tablespaces.append(f"{name} {os.readlink(pgdata / source.path)}\n")
                continue
            entry = Entry(source.path, source.mode, is_datafile=is_main_fork(source.path))
            jobs.append(
                StoreJob(
                    entry=entry,
                    real=source.real,
                    target=made.database / source.path,
                    mode=mode,
                    version=made.version,
                    compress=compress,
                    level=level,
                    since=above.start_lsn if above else 0,
                    previous=above.pgdata / source.path if above and above.pgdata else None,
                    parent=above.entries.get(source.path) if above else None,
                    checksums=cluster.checksum_version != 0,
                    blocks_per_segment=cluster.blocks_per_segment,
                )
            )
        self._run(jobs, made)
        made.add_bytes("backup_label", label.encode(), 0o100644)
        if tablespaces:
            made.add_bytes("tablespace_map", "".join(tablespaces).encode(), 0o100644)
        made.add_bytes("database_map", _database_map(made.entries), 0o100644)
        newest = self._store_wal(pgdata, cluster, start_lsn, made, is_stream, gzip_wal)
        values: dict[str, object] = {
            "backup-mode": mode,
            "stream": is_stream,
            "compress-alg": compress,
            "compress-level": level,
            "from-replica": False,
            "block-size": BLCKSZ,
            "xlog-block-size": 8192,
            "checksum-version": cluster.checksum_version,
            "program-version": version,
            "server-version": (pgdata / "PG_VERSION").read_text().strip(),
            "timelineid": tli,
            "start-lsn": format_lsn(start_lsn),
            "stop-lsn": format_lsn(stop_lsn or newest),
            "start-time": start_time,
            "end-time": start_time + timedelta(minutes=1),
            "recovery-xid": cluster.next_xid,
            "recovery-time": start_time + timedelta(seconds=50),
            "status": status,
        }
        if above:
            values["parent-backup-id"] = above.backup_id
        made.finish(values | (control or {}))
        self._made[backup_id] = Backup(backup_id, start_lsn, pgdata, made.entries)
        self.last = backup_id
        return backup_id

    def _run(self, jobs: list[StoreJob], made: BackupDirectory) -> None:
        # Largest first, so that no process is left alone with a big one at the end.
        jobs.sort(key=lambda job: job.real.stat().st_size, reverse=True)
        total = sum(job.real.stat().st_size for job in jobs)
        if self._n_jobs == 1 or total < 8 << 20:
            for job in jobs:
                made.add(*_store(job))
            return
        with ProcessPoolExecutor(self._n_jobs, mp_context=get_context("fork")) as pool:
            large = [job for job in jobs if job.real.stat().st_size >= 1 << 20]
            small = jobs[len(large) :]
            done = [pool.submit(_store, job) for job in large]
            for entry, headers in pool.map(_store, small, chunksize=64):
                made.add(entry, headers)
            for future in done:
                made.add(*future.result())

    def _write_instance(self, pgdata: Path, cluster: ControlFile) -> None:
        path = self.backups / "pg_probackup.conf"
        if path.exists():
            return
        path.write_text(
            "# Backup instance information\n"
            f"pgdata = {pgdata}\n"
            f"system-identifier = {cluster.system_identifier}\n"
            f"xlog-seg-size = {cluster.wal_segment_size}\n"
            "# Connection parameters\n"
            "pgdatabase = postgres\n"
        )
        path.chmod(0o600)

    @staticmethod
    def _label(pgdata: Path, cluster: ControlFile, start: datetime) -> str:
        existing = pgdata / "backup_label"
        if existing.exists():
            return existing.read_text()
        segment = wal_name(cluster.tli, cluster.redo, cluster.wal_segment_size)
        return (
            f"START WAL LOCATION: {format_lsn(cluster.redo)} (file {segment})\n"
            f"CHECKPOINT LOCATION: {format_lsn(cluster.checkpoint)}\n"
            "BACKUP METHOD: pg_start_backup\n"
            "BACKUP FROM: primary\n"
            f"START TIME: {start:%Y-%m-%d %H:%M:%S UTC}\n"
            f"LABEL: {start:%Y-%m-%d %H:%M:%S+00} with pg_probackup\n"
            f"START TIMELINE: {cluster.tli}\n"
        )

    def _store_wal(
        self,
        pgdata: Path,
        cluster: ControlFile,
        start_lsn: int,
        made: BackupDirectory,
        is_stream: bool,
        gzip_wal: bool,
    ) -> int:
        """Store the segments from ``start_lsn`` on and return the LSN where WAL ends.

        The checkpoint record is the last one of a stopped server; its length is not known here, so
        what is returned lies somewhere inside of it or behind it, in the same segment.
        """
        size = cluster.wal_segment_size
        newest = start_lsn
        for path in sorted((pgdata / "pg_wal").iterdir()):
            is_history = HISTORY_FILE.fullmatch(path.name)
            if WAL_FILE.fullmatch(path.name):
                log, segment = int(path.name[8:16], 16), int(path.name[16:], 16)
                start = (log << 32) + segment * size
                if start + size <= start_lsn:
                    continue
                with path.open("rb") as wal:
                    page = wal.read(16)
                # A recycled segment still holds old pages: its first page names another address.
                if len(page) < 16 or struct.unpack_from("<Q", page, 8)[0] != start:
                    continue
                newest = max(newest, start + 0x168 if start > start_lsn else start_lsn + 0x78)
            elif not is_history:
                continue
            data = path.read_bytes()
            if is_stream:
                made.add_bytes(f"pg_wal/{path.name}", data)
            elif gzip_wal and not is_history:
                (self.wal / f"{path.name}.gz").write_bytes(gzip.compress(data, 1))
            else:
                (self.wal / path.name).write_bytes(data)
        return newest

    # --- large catalogs that need no cluster ------------------------------------------------------

    def add_many_files(self, n_files: int, *, compress: str = "zlib") -> str:
        """A FULL with ``n_files`` relations of one page each; no server could run on it."""
        start = self._next_start()
        made = self._synthetic(start)
        per_directory = 2000
        oids = range(16384, 16384 + -(-n_files // per_directory))
        for oid in oids:
            made.add_directory(f"base/{oid}")
        page = synthetic_page(7)
        records: list[bytes] = []
        stream = PageStream(records.append, compress, 1, False)
        stream.add(0, page)
        stream.flush()
        headers, hdr_crc = stream.header_map()
        record = b"".join(records)
        for number in range(n_files):
            path = f"base/{oids[number // per_directory]}/{20000 + number % per_directory}"
            fd = os.open(made.database / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, record)
            os.close(fd)
            entry = Entry(
                path, REGULAR, len(record), True, stream.crc, compress, BLCKSZ, 1, 1, hdr_crc, 0,
                len(headers),
            )  # fmt: skip
            made.add(entry, headers)
        return self._finish_synthetic(made, start, compress)

    def add_large(self, n_segments: int, *, blocks_per_segment: int = 131072) -> str:
        """A FULL with ``n_segments`` full segments (1024 are 1 TiB), all the same few megabytes.

        The stored file of every segment is a hard link to the first, and all have the same part of
        the header map, so the size on disk is that of one segment. Block *b* of each holds
        ``synthetic_page(b)``.
        """
        start = self._next_start()
        made = self._synthetic(start)
        made.add_directory("base/16384")
        first = made.database / "base/16384/20000"
        with first.open("wb") as out:
            os.fchmod(out.fileno(), 0o600)
            stream = PageStream(out.write, "zlib", 9, False)
            for block in range(blocks_per_segment):
                stream.add(block, synthetic_page(block))
            stream.flush()
        headers, hdr_crc = stream.header_map()
        made.add(
            Entry(
                "base/16384/20000", REGULAR, stream.size, True, stream.crc, "zlib",
                blocks_per_segment * BLCKSZ, blocks_per_segment, blocks_per_segment, hdr_crc, 0,
                len(headers),
            ),
            headers,
        )  # fmt: skip
        shared = made.entries["base/16384/20000"]
        for segno in range(1, n_segments):
            path = f"base/16384/20000.{segno}"
            os.link(first, made.database / path)
            made.entries[path] = Entry(
                path, REGULAR, shared.size, True, shared.crc, "zlib", shared.full_size,
                shared.n_blocks, shared.n_headers, hdr_crc, shared.hdr_off, shared.hdr_size,
            )  # fmt: skip
        return self._finish_synthetic(made, start, "zlib")

    def _synthetic(self, start: datetime) -> BackupDirectory:
        made = BackupDirectory(self.backups / format_id(start), "2.5.16")
        for path in ("base", "global", "pg_tblspc", "pg_wal", "pg_xact"):
            made.add_directory(path)
        made.add_bytes("PG_VERSION", b"15\n")
        made.add_bytes("global/pg_control", synthetic_control_file())
        made.add_bytes("pg_xact/0000", NO_PAGE)
        cluster = ControlFile.parse(synthetic_control_file())
        made.add_bytes("backup_label", self._label(self.store, cluster, start).encode(), 0o100644)
        self._write_instance(Path("/var/lib/postgresql/15/main"), cluster)
        return made

    def _finish_synthetic(self, made: BackupDirectory, start: datetime, compress: str) -> str:
        cluster = ControlFile.parse(synthetic_control_file())
        segment = wal_name(cluster.tli, cluster.redo, cluster.wal_segment_size)
        made.add_bytes(f"pg_wal/{segment}", bytes(cluster.wal_segment_size))
        made.finish(
            {
                "backup-mode": "FULL",
                "stream": True,
                "compress-alg": compress,
                "compress-level": 1,
                "from-replica": False,
                "block-size": BLCKSZ,
                "xlog-block-size": 8192,
                "checksum-version": 1,
                "program-version": "2.5.16",
                "server-version": "15",
                "timelineid": 1,
                "start-lsn": format_lsn(cluster.redo),
                "stop-lsn": format_lsn(cluster.redo + 0x78),
                "start-time": start,
                "end-time": start + timedelta(minutes=1),
                "recovery-xid": cluster.next_xid,
                "recovery-time": start + timedelta(seconds=50),
                "status": "OK",
            }
        )
        backup_id = made.path.name
        self._made[backup_id] = Backup(backup_id, cluster.redo, None, made.entries)
        self.last = backup_id
        return backup_id


def _database_map(entries: dict[str, Entry]) -> bytes:
    oids = sorted({database_oid(path) for path in entries} - {0, 1, 4})
    names = {5: "postgres"}
    return "".join(
        f'{{"dbOid":"{oid}", "datname":"{names.get(oid, f"db{oid}")}"}}\n' for oid in oids
    ).encode()


def synthetic_page(number: int, lsn: int = 0x1500028) -> bytes:
    """A page that PostgreSQL would take for sane, empty but for ``number``; no pd_checksum."""
    page = bytearray(BLCKSZ)
    struct.pack_into(
        "<IIHHHHHHI", page, 0, lsn >> 32, lsn & 0xFFFFFFFF, 0, 0, 28, 8192, 8192, 0x2004, 0
    )
    struct.pack_into("<I", page, 24, number)
    return bytes(page)


def synthetic_control_file(
    system_identifier: int = 7710333599451486906, redo: int = 0x1500028
) -> bytes:
    """global/pg_control of a PostgreSQL 15 after a clean shutdown. Source: catalog/pg_control.h."""
    raw = bytearray(BLCKSZ)
    struct.pack_into("<QIIIxxxxqQQIIB", raw, 0, system_identifier, 1300, 202209061, 1,
                     1767225600, redo, redo, 1, 1, 1)  # fmt: skip
    struct.pack_into("<Q", raw, 64, 800)
    struct.pack_into("<IxxxxdIIIIIIIIBxxxI", raw, 200, 8, 1234567.0, BLCKSZ, 131072, 8192, 16 << 20,
                     64, 32, 1996, 2048, 1, 1)  # fmt: skip
    struct.pack_into("<I", raw, 288, crc32c(bytes(raw[:288]), 0))
    return bytes(raw)


def synthetic_pgdata(pgdata: Path, files: dict[str, Sequence[bytes] | bytes]) -> None:
    """Make a directory that looks like a stopped cluster to the writer.

    ``files`` maps a path to its content, bytes or a sequence of pages.
    """
    for name in ("base/1", "global", "pg_wal/archive_status", "pg_xact", "pg_tblspc", "pg_notify"):
        (pgdata / name).mkdir(parents=True, exist_ok=True)
    (pgdata / "PG_VERSION").write_text("15\n")
    (pgdata / "global/pg_control").write_bytes(synthetic_control_file())
    wal = bytearray(16 << 20)
    struct.pack_into("<HHIQ", wal, 0, 0xD110, 2, 1, 0x1000000)
    (pgdata / "pg_wal/000000010000000000000001").write_bytes(wal)
    for path, content in files.items():
        target = pgdata / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else b"".join(content))
    for directory, _, names in os.walk(pgdata):
        os.chmod(directory, 0o700)
        for name in names:
            os.chmod(os.path.join(directory, name), 0o600)


def _step(mode: str, pgdata: str) -> tuple[str, Path]:
    return mode, Path(pgdata)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--instance", default="main")
    parser.add_argument("--compress", default="zlib", choices=("none", "zlib", "pglz"))
    parser.add_argument("--level", type=int, default=1)
    parser.add_argument("--version", default="2.5.16")
    parser.add_argument("--archive", action="store_true", help="WAL goes to the archive, gzipped")
    for mode in ("FULL", "DELTA", "PAGE"):
        parser.add_argument(
            f"--{mode.lower()}", dest="steps", action="append", metavar="PGDATA",
            type=functools.partial(_step, mode),
        )  # fmt: skip
    parser.add_argument("--many-files", type=int, metavar="N")
    parser.add_argument("--large", type=int, metavar="GIB")
    args = parser.parse_args(argv)
    if shutil.disk_usage(args.store.resolve().parent).free < 1 << 28:
        parser.error("less than 256 MiB are free there")
    catalog = CatalogWriter(args.store, args.instance)
    for mode, pgdata in args.steps or ():
        made = catalog.add(
            pgdata, mode, compress=args.compress, level=args.level, version=args.version,
            is_stream=not args.archive, gzip_wal=args.archive,
        )  # fmt: skip
        print(made)
    if args.many_files:
        print(catalog.add_many_files(args.many_files))
    if args.large:
        print(catalog.add_large(args.large))
    return 0


if __name__ == "__main__":
    sys.exit(main())
