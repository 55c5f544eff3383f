"""A server under load whose diff is sealed again and again, and the children of these seals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psycopg
import pytest
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Cluster
from machine import postgres_bindir, postgres_majors
from servers import MountedServer

from pbkfs.mount.sealing import Child, SealReport, seal

N_WRITERS = 3
N_SEALS = 3


@dataclass
class Ledger:
    """Commits of several clients: when each was begun, and when it was acknowledged."""

    uri: str
    begun: dict[tuple[int, int], float] = field(default_factory=dict)
    acknowledged: dict[tuple[int, int], float] = field(default_factory=dict)
    is_ending: bool = False
    threads: list[threading.Thread] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        with psycopg.connect(self.uri, autocommit=True) as connection:
            connection.execute("create table if not exists ledger (client int, n int, filler text)")
        self.threads = [threading.Thread(target=self._write, args=(i,)) for i in range(N_WRITERS)]
        for thread in self.threads:
            thread.start()

    def _write(self, client: int) -> None:
        try:
            with psycopg.connect(self.uri, autocommit=True) as connection:
                n = 0
                while not self.is_ending:
                    self.begun[client, n] = time.monotonic()
                    connection.execute(
                        "insert into ledger values (%s, %s, repeat('x', %s))",
                        (client, n, 10 + n % 900),
                    )
                    self.acknowledged[client, n] = time.monotonic()
                    n += 1
        except BaseException as error:
            self.failures.append(error)

    def end(self) -> None:
        self.is_ending = True
        for thread in self.threads:
            thread.join(60)
        assert not self.failures

    def check(self, uri: str, began: float, ended: float) -> int:
        """Every commit acknowledged before ``began`` is there, and none begun after ``ended``."""
        with psycopg.connect(uri) as connection:
            rows = connection.execute("select client, n from ledger").fetchall()
        found = {(client, n) for client, n in rows}
        assert len(found) == len(rows)
        lost = {key for key, at in self.acknowledged.items() if at < began} - found
        assert not lost, f"{len(lost)} commits were acknowledged and are lost"
        early = {key for key in found if self.begun[key] > ended}
        assert not early, f"{len(early)} commits are from the future"
        return len(found)


@pytest.fixture
def server(newest_cluster: Cluster, mounts: Mounts) -> Iterator[MountedServer]:
    """A server on a mount of a stopped cluster, with pgbench's tables."""
    mount = mounts.mount("--base", newest_cluster.pgdata)
    made = MountedServer(mount, postgres_bindir(postgres_majors()[-1]))
    made.start("-c", "max_wal_size=64MB", "-c", "checkpoint_timeout=30s")
    made.run("pgbench", "-i", "-q", "-s", "3")
    yield made
    for log in mount.unexpected_log_lines():
        raise AssertionError(log)


def take(mount: Mount, number: int, *, hold: bool) -> tuple[SealReport, Mount]:
    """Seal a mount; returns the report and its child, which is not mounted yet."""
    root = mount.pgdata.parent
    child = Child(root / f"child{number}", root / f"child{number}.live")
    report = seal(mount.diff, new_live=root / f"live{number}", child=child, hold=hold)
    print(
        f"seal {number}: gate_ms {report.gate_ms:.1f} held_ms {report.held_ms:.1f} "
        f"total_ms {report.total_ms:.1f} wal_bytes {report.wal_bytes}"
    )
    return report, Mount(root / f"pgdata{number}", child.head, mount.args, mount.owner)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("hold", [True, False], ids=["held", "running"])
def test_children_of_a_server_under_load(server: MountedServer, mounts: Mounts, hold: bool) -> None:
    """With fsync=on a child is right also where the server is not held for the instant."""
    mount = server.mount
    pgbench = server.begin("pgbench", "-T", "600", "-c", "3", "-j", "2")
    ledger = Ledger(server.uri)
    ledger.start()
    children: list[tuple[Mount, float, float]] = []
    try:
        for number in range(1, N_SEALS + 1):
            time.sleep(1.5)  # some work between two seals
            began = time.monotonic()
            report, child = take(mount, number, hold=hold)
            children.append((child, began, time.monotonic()))
            assert report.note is None
            assert (report.held_ms > 0) == hold
            assert pgbench.poll() is None
        time.sleep(1)
    finally:
        pgbench.terminate()
        pgbench.wait(60)
        ledger.end()
    n_before = 0
    for child, began, ended in children:
        child.pgdata.mkdir()
        mounts.made.append(child)
        child.mount()
        branch = MountedServer(child, server.bindir)
        branch.start()
        n_rows = ledger.check(branch.uri, began, ended)
        assert n_rows > n_before
        n_before = n_rows
        branch.check_cluster()
        branch.sql("insert into ledger values (-1, -1, '')", "checkpoint")
        assert run_pbkfs("check", "-d", child.diff, check=False).returncode in (0, 8)
        assert child.unexpected_log_lines() == []
        branch.stop()
        child.unmount()
        mounts.made.remove(child)
    # The parent has lost nothing, and none of its children's changes; also after a remount.
    assert ledger.check(server.uri, time.monotonic(), time.monotonic()) >= len(ledger.acknowledged)
    server.check_cluster()
    server.stop()
    mount.unmount()
    run_pbkfs("check", "-d", mount.diff)
    mount.mount()
    server.start()
    assert ledger.check(server.uri, time.monotonic(), time.monotonic()) >= len(ledger.acknowledged)
    server.stop()
