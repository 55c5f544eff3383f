"""PostgreSQL on a mount whose diff has no space left: it waits or says so, and never panics."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import psutil
import pytest
from fix_mounts import Mount, Mounts, needs_takeovers, run_pbkfs
from fix_postgres import Cluster, wait_until
from machine import postgres_bindir
from servers import MountedServer

from pbkfs.mount import control

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a small file system")


def resize(mount: Mount, n_mib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_mib}m", mount.diff], check=True)


@pytest.fixture
def full(newest_cluster: Cluster, mounts: Mounts) -> Iterator[Mount]:
    """A mount with a table of some 40 MiB below, and room for 16 MiB above; WAL is elsewhere."""
    cluster = newest_cluster
    cluster.start()
    cluster.sql(
        "create table t (i int, pad text) with (fillfactor = 40, autovacuum_enabled = off)",
        "insert into t select n, repeat('x', 400) from generate_series(1, 40000) n",
        "create extension amcheck",
        "create table u as select 1 as i",
    )
    cluster.stop()
    mount = mounts.prepare("--base", cluster.pgdata)
    mount.diff.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", mount.diff], check=True)
    wal = mount.diff / "pg_wal"
    elsewhere = mount.diff.parent / "elsewhere"
    try:
        mount.mount()
        mount.unmount()
        subprocess.run(["cp", "-a", wal, elsewhere], check=True)
        subprocess.run(["mount", "--bind", elsewhere, wal], check=True)
        mount.mount()
        yield mount
    finally:
        if mount.is_mounted:
            run_pbkfs("stop", "-D", mount.pgdata, "-m", "immediate", check=False)
            run_pbkfs("unmount", "-D", mount.pgdata, "--force", check=False)
            mount.is_mounted = False
        subprocess.run(["umount", wal], check=False)
        subprocess.run(["umount", mount.diff], check=True)


def waiting(mount: Mount) -> int:
    return mount.stat()["fuse"]["waiting_for_space"]


def fill(mount: Mount, left_mib: int) -> None:
    """Leave so much space on the diff's file system."""
    free = os.statvfs(mount.diff)
    used = (free.f_blocks - free.f_bfree) * free.f_frsize >> 20
    resize(mount, used + left_mib)


def test_a_checkpoint_waits_for_space(full: Mount) -> None:
    server = MountedServer(full, postgres_bindir(newest_major(full)))
    server.start("-c", "shared_buffers=128MB", "-c", "max_wal_size=4GB", "-c", "autovacuum=off")
    fill(full, 8)
    # In place, so only pages that are there already are written: nothing that asks for space.
    server.sql("update t set i = i + 1")
    checkpoint = server.begin("psql", "-XAtqc", "checkpoint")
    wait_until(lambda: waiting(full) > 0, 60)
    assert checkpoint.poll() is None
    # The server goes on meanwhile, and commits: its WAL has room. Only the file being synced can't
    # be asked for its size, by the kernel's lock.
    assert server.sql("insert into u values (2)", "select sum(i) from u") == "3"
    resize(full, 256)
    assert checkpoint.wait(60) == 0
    wait_until(lambda: waiting(full) == 0)
    log = full.server_log.read_text()
    assert "PANIC" not in log
    assert "No space" not in log
    server.check_cluster()
    server.stop()
    full.unmount()
    full.mount()
    server.start()
    assert server.sql("select sum(i) from t") == str(40000 * 40001 // 2 + 40000)
    server.stop()


@needs_takeovers
def test_another_worker_takes_over_while_writes_wait(full: Mount) -> None:
    full.unmount()
    full.mount("--supervised")
    server = MountedServer(full, postgres_bindir(newest_major(full)))
    server.start("-c", "shared_buffers=128MB", "-c", "max_wal_size=4GB", "-c", "autovacuum=off")
    fill(full, 8)
    server.sql("update t set i = i + 1")
    checkpoint = server.begin("psql", "-XAtqc", "checkpoint")
    wait_until(lambda: waiting(full) > 0, 60)

    worker = psutil.Process(control.call(full.diff, "ping")["pid"])
    worker.kill()
    assert control.call(full.diff, "ping", timeout_s=60)["pid"] != worker.pid
    wait_until(lambda: waiting(full) > 0, 60)
    assert checkpoint.poll() is None
    assert server.sql("insert into u values (2)", "select sum(i) from u") == "3"
    resize(full, 256)
    assert checkpoint.wait(60) == 0
    wait_until(lambda: waiting(full) == 0)
    assert "PANIC" not in full.server_log.read_text()
    server.check_cluster()
    server.stop()
    full.unmount()


def test_growth_is_refused_honestly(full: Mount) -> None:
    server = MountedServer(full, postgres_bindir(newest_major(full)))
    server.start("-c", "autovacuum=off")
    fill(full, 8)
    large = "create unlogged table g as select n, repeat('y', 500) from generate_series(1, 60000) n"
    done = subprocess.run(
        [server.bindir / "psql", "-XAtqc", large],
        env=server.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "PANIC" not in full.server_log.read_text()
    assert server.sql("select count(*) from t") == "40000"
    resize(full, 256)
    server.sql("create unlogged table g as select n from generate_series(1, 60000) n", "checkpoint")
    server.check_cluster()
    server.stop()


def newest_major(mount: Mount) -> int:
    return int((mount.pgdata / "PG_VERSION").read_text())
