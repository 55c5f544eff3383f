"""PostgreSQL 14 … 18 on a mount over nothing: initdb, work, crash, recovery."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from fix_mounts import Mounts
from ledger import Ledger
from machine import MAJORS, postgres_bindir
from servers import MountedServer


def initdb(bindir: Path, pgdata: Path, owner: str) -> None:
    """Run initdb as ``owner`` ("UID:GID")."""
    uid, _, gid = owner.partition(":")
    done = subprocess.run(
        [bindir / "initdb", "-D", pgdata, "-U", "postgres", "-A", "trust", "-k", "--locale=C",
         "-E", "UTF8"],
        user=int(uid) if os.geteuid() == 0 else None,
        group=int(gid) if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
        cwd="/", capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("major", MAJORS)
def test_initdb_crash_and_recovery_on_an_empty_base(major: int, mounts: Mounts) -> None:
    bindir = postgres_bindir(major)
    if not (bindir / "postgres").exists():
        pytest.skip(f"PostgreSQL {major} is not here")
    mount = mounts.mount("--empty")
    initdb(bindir, mount.pgdata, mounts.owner)
    server = MountedServer(mount, bindir)
    server.start()
    server.run("pgbench", "-i", "-q", "-s", "1")
    ledger = Ledger()
    ledger.create(server.uri)
    ledger.begin(server.uri)
    server.run("pgbench", "-c", "2", "-t", "200")
    ledger.wait_for(20)

    postmaster = psutil.Process(server.pid)
    backends = postmaster.children(recursive=True)
    os.kill(server.pid, signal.SIGKILL)
    ledger.end()
    gone, alive = psutil.wait_procs([postmaster, *backends], timeout=30)
    assert not alive, gone

    server.start()
    assert "database system was interrupted" in mount.server_log.read_text()
    ledger.check(server.uri)
    server.check_cluster()
    server.stop()
    mount.unmount()

    mount.mount()
    # From the second mount on, WAL lies outside of FUSE.
    assert os.readlink(mount.pgdata / "pg_wal") == str(mount.diff / "pg_wal")
    server.start()
    ledger.check(server.uri)
    server.check_cluster()
    server.run("pgbench", "-c", "2", "-t", "100")
    server.stop()
    mount.unmount()
    assert mount.unexpected_log_lines() == []
