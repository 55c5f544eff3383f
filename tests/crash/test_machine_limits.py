"""Groups of processes with little memory and little processor time, by the kernel's controllers.

In a virtual machine, because the controllers of this one may be another hierarchy's, or not there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import pytest
from crashes import check_sums
from fix_postgres import Programs, wait_until
from fix_vm import BASE, DATA, Guest, GuestServer
from ledger import Ledger

CGROUPS = Path("/sys/fs/cgroup")
PGDATA, DIFF = DATA / "pgdata", DATA / "diff"

GROUP = CGROUPS / "small"
_GROUP_BYTES = 128 << 20
_N_TURNS = 2
# 1 KiB each, twice, to the mount and to WAL.
_N_ROWS = 50_000


@pytest.mark.timeout(1800)
def test_little_memory(guest: Guest, newest_programs: Programs) -> None:
    """Worker and server share a group whose memory is far too small for what is written."""
    user = newest_programs.user
    guest.boot()
    guest.run("mkdir", PGDATA, GROUP)
    guest.write(CGROUPS / "cgroup.subtree_control", "+memory")
    guest.write(GROUP / "memory.max", str(_GROUP_BYTES))
    guest.pbkfs(
        "mount", "--base", BASE, "-D", PGDATA, "-d", DIFF,
        "--owner", f"{user.uid}:{user.gid}", "--wait", cgroup=GROUP,
    )  # fmt: skip
    server = GuestServer(guest, PGDATA, newest_programs.bindir)
    server.start("-c", "max_wal_size=64MB", "-c", "shared_buffers=16MB", cgroup=GROUP)
    ledger = Ledger()
    ledger.create(server.uri)
    ledger.begin(server.uri)
    load = server.begin("pgbench", "-n", "-c", "1", "-T", "1800")
    try:
        for turn in range(_N_TURNS):
            before = ledger.acknowledged
            server.sql(
                "create table large as select n, repeat('x', 1000) as s "
                f"from generate_series(1, {_N_ROWS}) n",
                "update large set n = n + 1",
                "checkpoint",
                "select sum(n) from large",
                "drop table large",
            )
            ledger.wait_for(5)
            print(
                f"turn {turn}: {ledger.acknowledged - before} commits beside it; "
                f"peak {guest.read(GROUP / 'memory.peak')} {events(guest, GROUP)}"
            )
        assert load.poll() is None, "pgbench has ended"
    finally:
        load.kill()
        load.wait(30)
        ledger.end()
    found = events(guest, GROUP)
    assert found["max"] > 0, "there was memory enough"
    assert found["oom_kill"] == 0
    ledger.check(server.uri)
    check_sums(server)
    server.check_cluster()
    server.stop()
    guest.pbkfs("unmount", "-D", PGDATA)
    guest.pbkfs("check", "-d", DIFF)
    guest.shut_down()


def events(guest: Guest, group: Path) -> dict[str, int]:
    """How often a group came to the limit of its memory, and what followed."""
    words = guest.read(group / "memory.events").split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.timeout(1800)
def test_limits_of_a_branch(guest: Guest, newest_programs: Programs) -> None:
    user = newest_programs.user
    guest.boot()
    guest.pbkfs(
        "trunk", "create", "trunk", "--from-dir", BASE, "--owner", f"{user.uid}:{user.gid}",
        "--no-start",
    )  # fmt: skip
    guest.pbkfs(
        "branch", "create", "branch", "--from", "trunk", "--trust",
        "--cpu", "500m", "--memory", "128Mi",
    )  # fmt: skip
    (group,) = groups(guest)
    assert limits(guest, group) == ("50000 100000", str(128 << 20))
    wait_until(lambda: is_whole_server_in(guest, group))

    server = GuestServer(guest, PGDATA, newest_programs.bindir)
    assert server.sql("select count(*) from generate_series(1, 1000000) n") == "1000000"
    words = guest.read(group / "cpu.stat").split()
    cpu = {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}
    print(cpu)
    assert cpu["nr_throttled"] > 0
    # Of two processors a half of one in each period of 0.1 s, and a little beyond it now and then.
    assert cpu["usage_usec"] < cpu["nr_periods"] * 75_000

    rows = "select n, repeat('x', 1000) as s from generate_series(1, 400000) n order by s, n"
    greedy = subprocess.run(
        [
            newest_programs.bindir / "psql", "-XAtqc", "set work_mem = '1GB'",
            "-c", f"select count(*) from ({rows}) as sorted",
        ],
        env=server.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    print(greedy.stderr, events(guest, group), guest.read(group / "memory.peak"))
    assert "server closed the connection unexpectedly" in greedy.stderr
    assert events(guest, group)["oom_kill"] == 1
    # The kernel ends one session; the server recovers by itself.
    wait_until(lambda: answers(server), timeout_s=120)
    wait_until(lambda: is_whole_server_in(guest, group))

    guest.pbkfs("branch", "stop", "branch")
    assert groups(guest) == []
    guest.pbkfs("branch", "start", "branch")
    assert groups(guest) == [group]
    assert limits(guest, group) == ("50000 100000", str(128 << 20))
    guest.pbkfs("branch", "destroy", "branch", "--yes")
    assert groups(guest) == []


def groups(guest: Guest) -> list[Path]:
    """The groups of the servers of branches."""
    found = guest.run("find", CGROUPS / "pbkfs.slice", "-mindepth", "1", "-type", "d")
    return [Path(line) for line in found.split()]


def is_whole_server_in(guest: Guest, group: Path) -> bool:
    """Whether the group is that of all processes of the server, and of no others."""
    inside = set(guest.read(group / "cgroup.procs").split())
    return inside == set(guest.run("pidof", "postgres").split())


def limits(guest: Guest, group: Path) -> tuple[str, str]:
    """What the kernel says of the limits of a group."""
    return guest.read(group / "cpu.max").strip(), guest.read(group / "memory.max").strip()


def answers(server: GuestServer) -> bool:
    """Whether the server takes questions."""
    try:
        with psycopg.connect(server.uri, connect_timeout=10):
            return True
    except psycopg.Error:
        return False
