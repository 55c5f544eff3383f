"""Errors of the disk below a mount, while a server works on it.

Each time: the request gets its errno, the log names relation, block and layer, the counter counts,
the mount lives, and what comes later works.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg
import pytest
from catalog_writer import CatalogWriter
from faulty import Faulty
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Cluster, wait_until
from ledger import Ledger
from machine import postgres_bindir
from servers import MountedServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file system that fails")

TABLES = ("failing", "gone", "corrupt", "cut", "known")
N_ROWS = 6000


@dataclass
class Case:
    """A server on a mount, the base below it, and where each of its tables is."""

    mount: Mount
    server: MountedServer
    faulty: Faulty
    """Below the base's files."""
    files: dict[str, str]
    backup: str

    def query(self, table: str) -> str:
        """Read a whole table; returns what psql said, result or error."""
        return self.run(f"select count(pad) from {table}")

    def run(self, statement: str) -> str:
        """Run a statement that may fail."""
        done = subprocess.run(
            [self.server.bindir / "psql", "-XAtqc", statement],
            env=self.server.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return (done.stdout + done.stderr).strip()

    def counter(self, name: str) -> int:
        return self.mount.stat()["overlay"][name]

    def log(self) -> list[str]:
        return self.mount.worker_log.read_text().splitlines()

    def must_fail(self, table: str, layer: str, reason: str, *, file: str | None = None) -> None:
        """Reading the table is an error that is told and counted."""
        file = file or self.files[table]
        n_before = self.counter("read_errors")
        said = self.query(table)
        assert "could not read block" in said or "could not open file" in said
        assert "Input/output error" in said
        assert self.counter("read_errors") > n_before
        words = (f"{file} block=", f"layer={layer}", reason)
        wait_until(lambda: any(all(map(line.__contains__, words)) for line in self.log()))

    def must_work(self, table: str) -> None:
        assert self.query(table) == str(N_ROWS)


@pytest.fixture
def case(newest_cluster: Cluster, mounts: Mounts, place: Path) -> Iterator[Case]:
    """A server on a chain, and a load on it that must not notice anything."""
    cluster = newest_cluster
    cluster.start()
    cluster.sql(
        *(
            f"create table {name} with (autovacuum_enabled = off) as select n, "
            f"repeat(md5(n::text), 12) pad from generate_series(1, {N_ROWS}) n"
            for name in TABLES
        ),
        *(f"vacuum (freeze) {name}" for name in TABLES),
    )
    files = {name: cluster.sql(f"select pg_relation_filepath('{name}')") for name in TABLES}
    bindir = postgres_bindir(cluster.programs.major)
    cluster.programs.run("pgbench", "-i", "-q", "-d", cluster.uri)
    cluster.stop()
    store = place / "store"
    backup = CatalogWriter(store).add(cluster.pgdata)
    for directory, _, names in os.walk(store):
        os.chmod(directory, 0o755)
        for name in names:
            os.chmod(os.path.join(directory, name), 0o644)
    [base] = store.glob(f"backups/*/{backup}/database")
    faulty = Faulty(base)
    mount = mounts.prepare("-B", store, "-i", "latest")
    try:
        mount.mount()
        server = MountedServer(mount, bindir)
        server.start("-c", "autovacuum=off", "-c", "shared_buffers=64MB")
        yield Case(mount, server, faulty, files, backup)
        mounts.discard(mount)
    finally:
        if mount.is_mounted:
            faulty.fail()
            mounts.discard(mount)
        faulty.close()


def test_errors_of_the_store(case: Case) -> None:
    ledger = Ledger()
    ledger.create(case.server.uri)
    ledger.begin(case.server.uri)
    load = case.server.begin("pgbench", "-n", "-c", "2", "-T", "600")
    try:
        ledger.wait_for(200)
        faulty, layer = case.faulty, case.backup

        faulty.fail({"op": "read", "path": case.files["failing"], "errno": errno.EIO})
        case.must_fail("failing", layer, "stored file can't be read")
        faulty.fail()
        case.must_work("failing")

        # A store that is not there: what is open goes on, and what is not is there again later.
        with psycopg.connect(case.server.uri) as session:
            session.execute("select count(pad) from known where ctid < '(2,1)'")
            faulty.fail(
                *({"op": op, "path": "", "errno": errno.ESTALE} for op in ("open", "lookup"))
            )
            n_reads = case.counter("base_reads")
            found = session.execute("select count(pad) from known").fetchone()
            assert found == (N_ROWS,)
            assert case.counter("base_reads") > n_reads
            with pytest.raises(psycopg.OperationalError, match="Input/output error"):
                session.execute("select count(pad) from gone")
        # The log is written beside the answers.
        wait_until(lambda: any("ESTALE" in line for line in case.log()))
        faulty.fail()
        case.must_work("gone")

        path = faulty.path / case.files["corrupt"]
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(byte ^ 255 for byte in content[middle:]))
        case.must_fail("corrupt", layer, "")
        path.write_bytes(content)
        case.must_work("corrupt")

        path = faulty.path / case.files["cut"]
        content = path.read_bytes()
        os.truncate(path, len(content) // 2)
        case.must_fail("cut", layer, "shorter than listed")
        path.write_bytes(content)
        case.must_work("cut")

        ledger.wait_for(50)
        assert load.poll() is None
    finally:
        load.terminate()
        load.wait(30)
        ledger.end()
    ledger.check(case.server.uri)
    case.server.check_cluster()
    assert "PANIC" not in case.mount.server_log.read_text()
    case.server.stop()
    case.mount.unmount()


def test_no_descriptors_are_left(case: Case) -> None:
    worker = psutil.Process(int(str(case.mount.stat()["pid"])))
    ledger = Ledger()
    ledger.create(case.server.uri)
    ledger.begin(case.server.uri)
    load = case.server.begin("pgbench", "-n", "-c", "2", "-T", "600")
    try:
        ledger.wait_for(100)
        _, hard = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        # Not one more than now.
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (worker.num_fds(), hard))
        for table in TABLES:
            case.must_work(table)
        case.server.sql("checkpoint", "create table made as select 1 as n", "checkpoint")
        ledger.wait_for(100)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert load.poll() is None
    finally:
        load.terminate()
        load.wait(30)
        ledger.end()
    ledger.check(case.server.uri)
    assert case.server.sql("select n from made") == "1"
    case.server.check_cluster()
    assert "PANIC" not in case.mount.server_log.read_text()
    case.server.stop()
    case.mount.unmount()


def test_errors_of_the_diff(case: Case) -> None:
    """A page that can't be written: fsync says so, PostgreSQL panics, and recovers from WAL."""
    mount, server = case.mount, case.server
    server.sql("update known set n = n + 1", "checkpoint")
    relation = mount.pgdata / case.files["known"]
    [written] = [
        path
        for path in (mount.diff / "objects").glob("*/*")
        if path.stat().st_size == relation.stat().st_size
    ]
    server.stop()
    mount.unmount()
    faulty = Faulty(mount.diff / "objects")
    try:
        mount.mount()
        server.start("-c", "autovacuum=off")
        name = f"{written.parent.name}/{written.name}"
        faulty.fail({"op": "read", "path": name, "errno": errno.EIO})
        case.must_fail("known", "diff", f"(of {case.files['known']!r})", file=name)
        faulty.fail()
        case.must_work("known")

        ledger = Ledger()
        ledger.create(server.uri)
        ledger.begin(server.uri)
        ledger.wait_for(20)
        faulty.fail({"op": "write", "path": name, "errno": errno.EIO})
        server.sql("update known set n = n + 1")
        assert "server" in case.run("checkpoint")  # it terminated
        wait_until(lambda: "PANIC" in mount.server_log.read_text())
        ledger.end()
        faulty.fail()
        wait_until(lambda: case.query("known") == str(N_ROWS), 60)
        assert case.counter("write_errors") > 0
        assert any("object can't be changed: EIO" in line for line in case.log())
        ledger.check(server.uri)
        assert server.sql("select sum(n) from known") == str(
            N_ROWS * (N_ROWS + 1) // 2 + 2 * N_ROWS
        )
        server.check_cluster()
        server.stop()
        mount.unmount()
        mount.mount()
        server.start("-c", "autovacuum=off")
        ledger.check(server.uri)
        server.check_cluster()
        server.stop()
        mount.unmount()
    finally:
        faulty.fail()
        if mount.is_mounted:
            run_pbkfs("stop", "-D", mount.pgdata, "-m", "immediate", check=False)
            mount.unmount("--force")
        faulty.close()
