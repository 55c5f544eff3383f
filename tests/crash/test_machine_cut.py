"""A whole machine loses its power under a load: kernel, worker, server and the disk's own cache.

A virtual machine is killed, and booted again on what its disk has kept.
"""

from __future__ import annotations

import random

import pytest
from crashes import check_content, sql_arguments
from fix_postgres import Programs
from fix_vm import BASE, DATA, Guest, GuestServer
from ledger import Ledger

PGDATA, DIFF = DATA / "pgdata", DATA / "diff"
N_CUTS = 4


@pytest.mark.timeout(1800)
def test_power_is_cut(guest: Guest, newest_programs: Programs) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    user = newest_programs.user
    ledger = Ledger()
    for number in range(N_CUTS + 1):
        guest.boot()
        server = GuestServer(guest, PGDATA, newest_programs.bindir)
        if number == 0:
            guest.run("mkdir", PGDATA)
        else:
            guest.pbkfs("check", "-d", DIFF)
        guest.pbkfs(
            "mount", "--base", BASE, "-D", PGDATA, "-d", DIFF,
            "--owner", f"{user.uid}:{user.gid}", "--wait",
            *(["--hydrate", "1MB"] if number == 2 else []),
        )  # fmt: skip
        server.start("-c", "max_wal_size=16MB", "-c", "shared_buffers=16MB")
        if number == 0:
            ledger.create(server.uri)
        else:
            ledger.check(server.uri)
            check_content(server)
        if number == N_CUTS:
            break
        ledger.begin(server.uri)
        loads = [server.begin("pgbench", "-n", "-c", "3", "-T", "600")]
        try:
            if number % 2:
                # Files are made and removed, and a checkpoint's pages wait for a flush.
                guest.disk.freeze(chance.randrange(1, 6), chance.choice([4, 10, 20]))
                loads.append(server.begin("psql", "-XAtq", *sql_arguments(number)))
                guest.disk.wait_until_frozen(300)
            else:
                ledger.wait_for(chance.randrange(20, 200), timeout_s=300)
            held, lost = guest.cut(chance.choice([0, chance.random()]))
        finally:
            guest.kill()
            for load in loads:
                load.kill()
                load.wait(30)
            ledger.end()
        print(
            f"cut {number}: {ledger.acknowledged} commits acknowledged; "
            f"the disk held {held} pieces and lost {lost}"
        )
    server.stop()
    guest.run(newest_programs.bindir / "pg_checksums", "--check", "-D", PGDATA)
    guest.pbkfs("unmount", "-D", PGDATA)
    guest.pbkfs("check", "-d", DIFF)
    guest.shut_down()
