"""The worker dies, or is replaced, and nobody on the mount notices but for a pause."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from crashes import check_pages, check_sums, trouble_in
from fix_mounts import Mount, Mounts, needs_takeovers, run_pbkfs
from fix_postgres import Programs, wait_until
from ledger import Ledger
from servers import MountedServer

from pbkfs.mount import control

ROUNDS = int(os.environ.get("PBKFS_TAKEOVER_ROUNDS", "6"))

pytestmark = [needs_takeovers, pytest.mark.timeout(900)]


def worker_of(mount: Mount) -> int:
    """The process that serves the mount now; waits while there is none."""
    done = run_pbkfs("stat", "-D", mount.pgdata, "--format", "json")
    return int(json.loads(done.stdout)["pid"])


def kill_worker(mount: Mount) -> float:
    """SIGKILL the process that serves the mount, and wait until another one does; returns how long
    that took."""
    pid = worker_of(mount)
    # Five deaths in a row with less service are taken for a fault that stays.
    time.sleep(1.1)
    worker = psutil.Process(pid)
    began = time.monotonic()
    worker.send_signal(signal.SIGKILL)
    psutil.wait_procs([worker], timeout=30)
    assert control.call(mount.diff, "ping", timeout_s=60)["pid"] != pid
    return time.monotonic() - began


@contextmanager
def loaded_server(mounts: Mounts, base: Path, programs: Programs) -> Iterator[MountedServer]:
    """A server under TPC-B and with an external ledger, none of which may see an error."""
    mount = mounts.mount("--base", base, "--supervised")
    server = MountedServer(mount, programs.bindir)
    server.start("-c", "shared_buffers=16MB", "-c", "checkpoint_timeout=30s")
    # A port that somebody else took first is no fault of the mount's.
    before = trouble_in(mount.server_log)
    ledger = Ledger()
    ledger.create(server.uri)
    ledger.begin(server.uri)
    load = server.begin("pgbench", "-n", "-c", "4", "-T", "600")
    try:
        ledger.wait_for(20)
        yield server
        ledger.wait_for(20)
        assert load.poll() is None, "pgbench ended by itself"
        assert trouble_in(mount.server_log) == before
    finally:
        ledger.end()
        load.send_signal(signal.SIGINT)
        load.wait(60)
    assert ledger.ended_by is None
    ledger.check(server.uri)
    server.check_cluster()
    check_sums(server)
    server.stop()
    check_pages(server)
    mount.unmount()
    done = run_pbkfs("check", "-d", mount.diff)
    assert done.returncode == 0


def test_killed_workers_cost_no_error(
    mounts: Mounts, basebackup: Path, newest_programs: Programs
) -> None:
    seed = int(os.environ.get("PBKFS_TAKEOVER_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    moments = random.Random(seed)
    with loaded_server(mounts, basebackup, newest_programs) as server:
        pauses = []
        for round_ in range(ROUNDS):
            if round_ % 3 == 0:
                server.sql("checkpoint")
            server.sql(
                "drop table if exists comes",
                "create table comes as select g, md5(g::text) from generate_series(1, 5000) g",
                "create index on comes (md5)",
                "vacuum full comes",
            )
            for _ in range(moments.randrange(4)):
                server.sql("select count(*) from pgbench_accounts")
            pauses.append(kill_worker(server.mount))
        print(f"pauses: median {statistics.median(pauses):.2f} s, max {max(pauses):.2f} s")


def test_upgrade_costs_no_error(
    mounts: Mounts, basebackup: Path, newest_programs: Programs
) -> None:
    with loaded_server(mounts, basebackup, newest_programs) as server:
        before = worker_of(server.mount)
        said = run_pbkfs("upgrade", "-D", server.mount.pgdata).stdout
        after = worker_of(server.mount)
        assert f"(pid {after})" in said
        assert after != before


_HOLDER = """
import os, sys
os.chdir(sys.argv[1])
os.makedirs("held", exist_ok=True)
for name in range(500):
    open(f"held/file{name:03}", "w").close()
file = open("held/gone", "w+b")
file.write(b"a" * 20000)
os.fsync(file.fileno())
file.seek(5000)
file.write(b"b" * 10000)
os.unlink("held/gone")
base = open("PG_VERSION", "rb")
os.unlink("PG_VERSION")
os.mkdir("left")
left = os.open("left", os.O_RDONLY)
os.rmdir("left")
listing = os.scandir("held")
names = {next(listing).name for _ in range(40)}
print("ready", flush=True)
sys.stdin.readline()
file.flush()
file.seek(0)
assert file.read() == b"a" * 5000 + b"b" * 10000 + b"a" * 5000
file.write(b"c" * 9000)
os.fsync(file.fileno())
file.seek(0)
assert file.read()[20000:] == b"c" * 9000
assert os.fstat(file.fileno()).st_nlink == 0
assert base.read().strip().isdigit()
assert os.listdir(left) == []
rest = [entry.name for entry in listing]
assert len(rest) == len(set(rest)) and not names & set(rest)
assert len(names) + len(rest) == 500
os.rename("held/file000", "held/file001")
assert len(os.listdir("held")) == 499
print("done", flush=True)
sys.stdin.readline()
"""


def test_what_is_open_stays_open(mounts: Mounts, basebackup: Path) -> None:
    """Files without a name, a directory without one, and a listing that is half read."""
    mount = mounts.mount("--base", basebackup, "--supervised")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(mount.pgdata)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "ready\n"
        kill_worker(mount)
        kill_worker(mount)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "done\n"
        kill_worker(mount)
        objects = list((mount.diff / "objects").glob("*/*"))
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.wait(30) == 0
    finally:
        holder.kill()
        holder.wait(30)
        holder.stdin.close()
        holder.stdout.close()
    assert len(objects) >= 500
    mount.unmount()
    done = run_pbkfs("check", "-d", mount.diff, "--format", "json", check=False)
    assert done.returncode == 0, done.stdout


def test_unmount_ends_worker_and_keeper(mounts: Mounts, basebackup: Path) -> None:
    mount = mounts.mount("--base", basebackup, "--supervised")
    kill_worker(mount)
    worker = psutil.Process(worker_of(mount))
    keeper = worker.parent()
    assert keeper is not None
    assert keeper.pid == json.loads((mount.diff / "lock").read_text())["pid"]
    mount.unmount()
    _, alive = psutil.wait_procs([worker, keeper], timeout=30)
    assert not alive
    assert (mount.diff / "lock").read_text() == ""


def test_removed_files_give_their_space_back(mounts: Mounts, basebackup: Path) -> None:
    """Nobody has counted what the kernel knows from before; it is asked; the end takes all."""
    mount = mounts.mount("--base", basebackup, "--supervised")
    old = [mount.pgdata / f"old{number}" for number in range(20)]
    for path in old:
        path.write_bytes(b"x" * 9000)
    before = set((mount.diff / "objects").glob("*/*"))
    kill_worker(mount)
    for path in old[:10]:
        path.unlink()
    wait_until(lambda: len(before - set((mount.diff / "objects").glob("*/*"))) == 10)
    for path in old[10:]:
        path.unlink()
    mount.unmount()
    assert not before & set((mount.diff / "objects").glob("*/*"))


@pytest.mark.parametrize("is_taken_over", [False, True])
def test_dead_keeper_is_a_dead_mount(
    mounts: Mounts, basebackup: Path, *, is_taken_over: bool
) -> None:
    mount = mounts.mount("--base", basebackup, "--supervised")
    if is_taken_over:
        kill_worker(mount)
    worker = psutil.Process(worker_of(mount))
    keeper = worker.parent()
    assert keeper is not None
    keeper.kill()
    _, alive = psutil.wait_procs([keeper, worker], timeout=30)
    assert not alive
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mount.pgdata)
    mount.mount()
    assert os.listdir(mount.pgdata)
    mount.unmount()
