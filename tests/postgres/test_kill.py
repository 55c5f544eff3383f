"""The worker is killed under load, again and again: committed rows stay, the cluster sound."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Programs
from ledger import Ledger
from servers import MountedServer

ROUNDS = 20


def kill_worker(mount: Mount) -> None:
    """SIGKILL the process that serves the mount, and wait until it is gone."""
    status = json.loads(run_pbkfs("stat", "-D", mount.pgdata, "--format", "json").stdout)
    worker = psutil.Process(int(status["pid"]))
    worker.kill()
    psutil.wait_procs([worker], timeout=30)


@pytest.mark.timeout(900)
def test_worker_killed_under_load(
    mounts: Mounts, basebackup: Path, newest_programs: Programs
) -> None:
    """Twenty deaths of the worker, at random moments of a TPC-B load."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    mount = mounts.mount("--base", basebackup)
    server = MountedServer(mount, newest_programs.bindir)
    server.start()
    ledger = Ledger()
    ledger.create(server.uri)
    for round_ in range(ROUNDS):
        ledger.begin(server.uri)
        load = server.begin("pgbench", "-n", "-c", "4", "-T", "60")
        ledger.wait_for(moments.randrange(20, 300))
        if round_ % 3 == 0:
            server.sql("checkpoint")
        processes = [psutil.Process(server.pid)]
        processes += processes[0].children(recursive=True)
        kill_worker(mount)
        ledger.end()
        load.kill()
        load.wait(30)
        # A server without its files may hang on; it gets what a power cut would give it.
        for process in processes:
            if process.is_running():
                os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=30)
        assert not alive
        with pytest.raises(OSError, match="not connected"):
            os.listdir(mount.pgdata)

        mount.unmount("--force")
        mount.mount()
        server.start()
        ledger.check(server.uri)
        server.check_cluster()
        accounts, tellers, history = (
            server.sql(f"select coalesce(sum({column}), 0) from pgbench_{table}")
            for table, column in (
                ("accounts", "abalance"), ("tellers", "tbalance"), ("history", "delta")
            )
        )  # fmt: skip
        assert accounts == tellers
        assert tellers == history
    server.stop()
    mount.unmount()
