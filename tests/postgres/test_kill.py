"""The worker is killed under load, again and again: committed rows stay, the cluster sound.

The server has next to no buffers of its own, so that the kernel always holds pages that the worker
has not seen; and two of three deaths come in the middle of a checkpoint, which asks for them.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from crashes import check_pages, check_sums, find_worker
from fix_mounts import Mounts
from fix_postgres import Programs, wait_until
from ledger import Ledger
from servers import MountedServer

ROUNDS = 20
OPTIONS = ("-c", "shared_buffers=1MB", "-c", "log_checkpoints=on")


def n_checkpoints(server: MountedServer) -> tuple[int, int]:
    """How many checkpoints have begun, and how many of them have not ended, or never will."""
    log = server.mount.server_log.read_text(errors="replace")
    n_begun = log.count("checkpoint starting: ")
    return n_begun, n_begun - log.count("checkpoint complete: ")


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
    server.start(*OPTIONS)
    ledger = Ledger()
    ledger.create(server.uri)
    n_cut_short = 0
    for round_ in range(ROUNDS):
        worker = find_worker(mount)
        assert worker is not None
        ledger.begin(server.uri)
        load = server.begin("pgbench", "-n", "-c", "4", "-T", "60")
        ledger.wait_for(moments.randrange(20, 300))
        processes = [psutil.Process(server.pid)]
        processes += processes[0].children(recursive=True)
        clients = [load]
        n_begun, n_open = n_checkpoints(server)
        if round_ % 3:
            clients.append(server.begin("psql", "-Xqc", "checkpoint"))
            wait_until(lambda: n_checkpoints(server)[0] > n_begun)  # noqa: B023 - called at once
            ledger.wait_for(moments.randrange(10))
        worker.kill()
        psutil.wait_procs([worker], timeout=30)
        n_cut_short += n_checkpoints(server)[1] > n_open
        ledger.end()
        for client in clients:
            client.kill()
            client.wait(30)
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
        server.start(*OPTIONS)
        ledger.check(server.uri)
        server.check_cluster()
        check_sums(server)
    server.stop()
    check_pages(server)
    mount.unmount()
    print(f"{n_cut_short} checkpoints were cut short")
    assert n_cut_short > 0
