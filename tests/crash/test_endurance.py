"""What becomes of a mount in a long time: under PostgreSQL, mounted again and again, under random
operations, and read everywhere.

``PBKFS_TEST_ENDURANCE=N`` makes each test N times as long, up to its full length:
10 minutes of pgbench (N = 15), 1,000 mounts (25), an hour of random operations (90), an hour of
random reads (120). ``PBKFS_TEST_SEED=N`` has the random operations begin with the round that said
"seed N"; that round is then the same again.
"""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from catalog_writer import CatalogWriter
from conformance.file_machine import PAGE, hash_seed, pattern
from crashes import check_pages, check_sums, find_worker
from fix_catalogs import CatalogStore, manifests, truth
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_place import snapshot
from fix_postgres import is_running
from fuse.test_mount_machine import MountMachine
from machine import SESSION, postgres_bindir, postgres_majors, session_directory
from servers import MountedServer

_FACTOR = float(os.environ.get("PBKFS_TEST_ENDURANCE", "1"))

CATALOG = "b_full_delta_delta_zlib_stream"


def length(short: int, full: int) -> int:
    """How long a test is, in whatever it counts."""
    return min(full, round(short * _FACTOR))


LOAD_S = length(40, 600)
N_CYCLES = length(40, 1000)
OPERATIONS_S = length(40, 3600)
READS_S = length(30, 3600)


@pytest.fixture
def store(catalog_store: CatalogStore) -> Path:
    """A copy of a real catalog: a FULL and two DELTA."""
    if CATALOG not in manifests() or int(manifests()[CATALOG]["pg_major"]) not in postgres_majors():
        pytest.skip(f"catalog {CATALOG} or its PostgreSQL is not here")
    return catalog_store(CATALOG)


def chain(store: Path) -> list[str | Path]:
    """Arguments of a mount of the newest backup of it."""
    manifest = manifests()[CATALOG]
    newest = [name for name, backup in manifest["backups"].items() if truth(backup)][-1]
    return ["-B", store, "--instance", manifest["instance"], "-i", newest]


def state_of(store: Path) -> dict[str, tuple[int, int, bytes]]:
    """What a store holds. Directories have no time: pg_probackup's lock comes and goes in them."""
    return {
        path: (mode, 0 if stat.S_ISDIR(mode) else mtime_ns, content)
        for path, (mode, mtime_ns, content) in snapshot(store).items()
    }


# --- PostgreSQL under load ------------------------------------------------------------------------

N_CLIENTS = 64

# Transactions of one row of what lies in the backup: nobody waits for another row meanwhile, nor
# does VACUUM FULL of that table for somebody who waits for it.
_TOUCH_BACKUP = r"""
\set id random(1, 20300)
update t_heap set v = v + 1, pad = repeat('x', :id % 150) where id = :id;
select count(*), sum(length(pad)) from t_static where id < :id;
"""

# Each in a session of its own, over and over. VACUUM FULL has tables that a transaction comes to
# first or last, so that nobody who holds a row waits for it; and what is reindexed has no others.
_LOOPS = [
    [
        "create table made as select n, repeat('x', 300) as s from generate_series(1, 3000) n",
        "create index on made (n)",
        "delete from made where n % 3 = 0",
        "truncate made",
        "drop table made",
        "create unlogged table unlogged as select n from generate_series(1, 3000) n",
        "drop table unlogged",
    ],
    ["vacuum full t_heap", "vacuum full pgbench_history", "vacuum full t_tail"],
    [
        "reindex table concurrently pgbench_tellers",
        "reindex table concurrently pgbench_accounts",
        "reindex table concurrently t_static",
    ],
    ["checkpoint", "select pg_switch_wal()", "vacuum pgbench_branches"],
]

_EXPECTED_IN_LOG = [
    "canceling autovacuum task",  # in the way of VACUUM FULL
    "terminating autovacuum process due to administrator command",  # at the server's stop
    "the database system is (starting up|not yet accepting connections)",
    # Somebody else took the port; pbkfs takes another one then.
    "could not create (listen socket for|any TCP/IP sockets)",
]


def begin_pgbench(
    server: MountedServer, name: str, script: str, *args: str
) -> subprocess.Popen[str]:
    """Begin to run a script over and over; its path is the last argument."""
    path = server.mount.pgdata.parent / f"{name}.sql"
    path.write_text(script)
    return subprocess.Popen(
        [server.bindir / "pgbench", "-n", "-T", str(LOAD_S), *args, path],
        env=server.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish_pgbench(process: subprocess.Popen[str]) -> int:
    """Wait for its end; returns the number of transactions, of which none may have failed."""
    said, _ = process.communicate(timeout=LOAD_S + 300)
    assert process.returncode == 0, said
    assert re.search(r"number of failed transactions: 0 ", said), said
    assert "ERROR" not in said, said
    found = re.search(r"transactions actually processed: (\d+)", said)
    assert found is not None, said
    return int(found[1])


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.mark.timeout(600 + 2 * LOAD_S)
def test_load(mounts: Mounts, store: Path) -> None:
    before = state_of(store)
    bindir = postgres_bindir(int(manifests()[CATALOG]["pg_major"]))
    mount = mounts.mount(*chain(store))
    run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", "500kB/s")
    server = MountedServer(mount, bindir)
    settings = {
        "max_connections": "100",
        "shared_buffers": "16MB",
        "max_wal_size": "48MB",
        "checkpoint_timeout": "30s",
        "autovacuum": "on",
        "autovacuum_naptime": "1s",
        "autovacuum_vacuum_scale_factor": "0.01",
        "autovacuum_vacuum_threshold": "20",
        "autovacuum_analyze_scale_factor": "0.01",
        "autovacuum_vacuum_cost_delay": "0",
        "deadlock_timeout": "100ms",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    server.start(*options)
    server.run("pgbench", "-i", "-q", "-s", "5")
    transactions = ["-c", str(N_CLIENTS), "-j", "2", "-b", "tpcb-like@3", "-f"]
    loads = [begin_pgbench(server, "touch", _TOUCH_BACKUP, *transactions)]
    try:
        for number, statements in enumerate(_LOOPS):
            loop = "".join(f"{each};\n" for each in statements)
            loads.append(begin_pgbench(server, f"loop{number}", loop, "-c", "1", "-f"))
        counts = [finish_pgbench(each) for each in loads]
    finally:
        for each in loads:
            kill(each)
    n_vacuums = int(server.sql("select sum(autovacuum_count) from pg_stat_all_tables"))
    print(f"{counts[0]} transactions, turns of the loops: {counts[1:]}, {n_vacuums} autovacuums")
    assert n_vacuums > 0
    assert all(counts)

    check_sums(server)
    rows = server.sql("select count(*) from t_heap"), server.sql("select count(*) from t_static")
    wanted = truth_of("t_heap"), truth_of("t_static")
    assert rows == wanted
    server.check_cluster()
    server.stop()
    assert not unexpected_errors(mount), "\n".join(unexpected_errors(mount))
    assert mount.unexpected_log_lines() == []
    check_pages(server)
    mount.unmount()
    run_pbkfs("check", "-d", mount.diff)
    assert state_of(store) == before

    mount.mount()
    server.start()
    check_sums(server)
    server.stop()
    mount.unmount()
    assert not unexpected_errors(mount), "\n".join(unexpected_errors(mount))


def truth_of(table: str) -> str:
    """How many rows the real tool restored."""
    backups = manifests()[CATALOG]["backups"]
    restore = [found for backup in backups.values() if (found := truth(backup))][-1]
    return str(restore["sql"]["postgres"]["tables"][f"public.{table}"]["rows"])


def unexpected_errors(mount: Mount) -> list[str]:
    """Lines of the server's log from WARNING up that the load does not explain."""
    lines = mount.server_log.read_text(errors="replace").splitlines()
    found = [line for line in lines if re.search(r"(WARNING|ERROR|FATAL|PANIC): ", line)]
    return [line for line in found if not any(re.search(e, line) for e in _EXPECTED_IN_LOG)]


# --- mounted again and again ----------------------------------------------------------------------

# A journal is rewritten by the next mount from 64 KiB on; each cycle writes one of 15.
_MAX_JOURNAL_BYTES = 128 << 10
_N_NAMES = 150


def my_processes() -> set[int]:
    """All processes that a test of this session has started and that still run."""
    needle = f"{SESSION}={os.environ[SESSION]}".encode()
    found = set()
    for process in psutil.process_iter():
        with suppress(OSError):  # ended meanwhile
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if needle in environment and is_running(process.pid):
                found.add(process.pid)
    return found


def my_mounts() -> list[str]:
    """Mount points below the directory of this session."""
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{session_directory()}/")]


def names_below(root: Path) -> list[str]:
    """All names, but for those of objects: new ones come for the same content."""
    paths = (path.relative_to(root) for path in root.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] != "objects")


def held(place: Path, store: Path) -> dict[str, Any]:
    """What one mount could leave behind."""
    return {
        "processes": my_processes(),
        "mounts": my_mounts(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "run": names_below(Path(os.environ["PBKFS_RUN_DIR"])),
        "temporary": names_below(place / "tmp"),
        "store": names_below(store),
    }


def held_by(worker: psutil.Process) -> tuple[int, int]:
    """Descriptors and threads of a worker."""
    return worker.num_fds(), worker.num_threads()


def change_names(pgdata: Path) -> None:
    """Write a page of the backup, and files that come and go, as those of temporary tables do."""
    with (pgdata / "base/5/1259").open("r+b") as file:
        page = file.read(PAGE)
        file.seek(0)
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    for number in range(_N_NAMES):
        name = pgdata / f"base/5/t{number}_16384"
        name.write_bytes(b"x" * 100)
        name.unlink()


@pytest.mark.timeout(300 + 10 * N_CYCLES)
def test_mounted_again_and_again(
    mounts: Mounts, store: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One diff many times over, and now and then a fresh one."""
    (place / "tmp").mkdir(mode=0o777)
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    before = held(place, store)
    content = state_of(store)
    kept = mounts.prepare(*chain(store), name="kept")
    workers: list[tuple[int, int]] = []
    journals: list[int] = []
    names: list[list[str]] = []
    n_objects: list[int] = []
    for cycle in range(N_CYCLES):
        is_fresh = cycle % 4 == 3
        mount = mounts.prepare(*chain(store), name=f"fresh{cycle}") if is_fresh else kept
        mount.mount()
        worker = find_worker(mount)
        assert worker is not None
        change_names(mount.pgdata)
        if not is_fresh:
            workers.append(held_by(worker))
        mount.unmount()
        assert not is_running(worker.pid)
        if is_fresh:
            mounts.discard(mount)
        else:
            journals.append((mount.diff / "journal").stat().st_size)
            names.append(names_below(mount.diff))
            n_objects.append(sum(p.is_file() for p in (mount.diff / "objects").rglob("*")))
        assert held(place, store) == before, f"after cycle {cycle}"
    print(
        f"{N_CYCLES} cycles; journal up to {max(journals)}, at the end {journals[-1]} bytes; "
        f"worker: descriptors and threads {workers[1]}, at the end {workers[-1]}"
    )
    assert names[-1] == names[0]
    assert n_objects[-1] == n_objects[0]
    assert max(journals) < _MAX_JOURNAL_BYTES
    # Threads come and go with the load; what one cycle leaked, the last one would have 30 of.
    for first, last in zip(workers[1], workers[-1], strict=True):
        assert last < first + 10
    assert kept.unexpected_log_lines() == []
    run_pbkfs("check", "-d", kept.diff)
    assert state_of(store) == content


# --- random operations ----------------------------------------------------------------------------

_N_OPERATIONS = 1500
_N_SHOWN = 40
_MAX_BYTES = 48 * PAGE

# What a rule of the machine gets, by the name of its argument; with the name of the rule before it
# where two of the same name differ.
_VALUES: dict[str, Callable[[random.Random], Any]] = {
    "choice": lambda chance: chance.randrange(1 << 16),
    "old": lambda chance: chance.randrange(1 << 16),
    "new": lambda chance: chance.randrange(1 << 16),
    "existing": lambda chance: chance.randrange(1 << 16),
    "seed": lambda chance: chance.randrange(256),
    "how": lambda chance: chance.randrange(8),
    "is_new": lambda chance: chance.random() < 0.5,
    "n_pages": lambda chance: chance.randint(1, 5),
    "time": lambda chance: chance.randrange(10**9, 1_009_843_199),
    "offset": lambda chance: near_page(chance, 0, _MAX_BYTES),
    "size": lambda chance: near_page(chance, 0, _MAX_BYTES),
    "length": lambda chance: near_page(chance, 1, 8 * PAGE),
    "symlink.length": lambda chance: chance.choice([1, 20, 4095, 4096]),
    "open.flags": lambda chance: chance.choice([os.O_RDONLY, os.O_WRONLY, *2 * [os.O_RDWR]]),
    "rename.flags": lambda chance: chance.choice([0, 0, 0, 1, 2, 3]),
    "chmod.mode": lambda chance: chance.choice([0o700, 0o750, 0o755]),
    "mkdir.mode": lambda chance: chance.choice([0o700, 0o750, 0o755]),
    "fallocate.mode": lambda chance: chance.choice([0, 1, 3, 16, 17]),
}

# How often a rule is taken. A kill is not: it costs what the kernel has not written, and it is
# part of the tests of crashes. Names may not become more and more.
_WEIGHTS = {
    "kill": 0.0, "remount": 0.02, "compare_all": 0.05, "drop_cached_data": 0.2, "sync": 0.2,
    "hydrate": 0.2, "open": 3.0, "close": 2.0, "write": 8.0, "read": 6.0, "write_mapped": 4.0,
    "read_mapped": 3.0, "mkdir": 0.3, "link": 0.5, "unlink": 0.7, "rename": 0.7,
}  # fmt: skip


def near_page(chance: random.Random, low: int, high: int) -> int:
    """A number with a liking for the ends of pages."""
    number = chance.randint(low, high)
    if chance.random() < 0.5:
        number = number // PAGE * PAGE + chance.choice([-1, 0, 0, 0, 1, 512, 4096])
    return min(high, max(low, number))


class EnduranceMachine(MountMachine):
    """Larger files below, and more of them open at once."""

    max_handles = 12

    def start(self) -> None:
        for name in ("base/5/20000", "base/5/20001.1", "base/6/20002_fsm", "larger"):
            content = pattern(hash_seed(name), _MAX_BYTES)
            for root in (self.lower, self.place / "oracle"):
                (root / name).write_bytes(content)
        super().start()


def run_round(seed: int) -> Counter[str]:
    """Do many operations on a new mount, all of them chosen by ``seed``."""
    chance = random.Random(seed)
    machine = EnduranceMachine()
    done: deque[str] = deque(maxlen=_N_SHOWN)
    counts: Counter[str] = Counter()
    rules = sorted(machine.rules, key=lambda each: str(each.function.__name__))
    weights = [_WEIGHTS.get(each.function.__name__, 1.0) for each in rules]
    try:
        for _ in range(_N_OPERATIONS):
            (rule,) = chance.choices(rules, weights)
            name = rule.function.__name__
            if not all(holds(machine) for holds in rule.preconditions):
                continue
            values = {
                key: _VALUES[f"{name}.{key}" if f"{name}.{key}" in _VALUES else key](chance)
                for key in sorted(rule.arguments)
            }
            done.append(f"{name} {values}")
            counts[name] += 1
            rule.function(machine, **values)
        done.append("compare")
        machine.compare()
    except BaseException:
        print(f"failed with seed {seed} after {sum(counts.values())} operations, the last ones:")
        print("\n".join(done))
        raise
    finally:
        machine.clean_up()
    return counts


@pytest.mark.timeout(600 + 2 * OPERATIONS_S)
def test_random_operations() -> None:
    seed = int(os.environ.get("PBKFS_TEST_SEED") or random.randrange(1 << 32))
    end = time.monotonic() + OPERATIONS_S
    counts: Counter[str] = Counter()
    n_rounds = 0
    while n_rounds == 0 or time.monotonic() < end:
        print(f"seed {seed + n_rounds}")
        counts += run_round(seed + n_rounds)
        n_rounds += 1
    print(f"{n_rounds} rounds, {sum(counts.values())} operations: {dict(counts)}")
    assert {"write_mapped", "hydrate", "rename", "fallocate", "truncate"} <= counts.keys()


# --- memory of the worker -------------------------------------------------------------------------

_N_SEGMENTS = 512
_SEGMENT_BLOCKS = 16384
_INDEX_BYTES = 8 << 20
# Interpreter, libraries, stacks and buffers of the threads, the names of the backup.
_FIXED_BYTES = 64 << 20
_GROWTH_BYTES = 4 << 20
_READS_PER_SAMPLE = 200
_N_SHOWN_SAMPLES = 20


@pytest.mark.timeout(600 + 2 * READS_S)
def test_memory_stays_flat(mounts: Mounts, place: Path) -> None:
    """Pages all over a backup whose indexes take eight times the memory that they may have."""
    backup = CatalogWriter(place / "store").add_large(
        _N_SEGMENTS, blocks_per_segment=_SEGMENT_BLOCKS
    )
    mount = mounts.prepare("-B", place / "store", "--instance", "main", "-i", backup)
    mount.mount("--index-memory", f"{_INDEX_BYTES >> 20}MB")
    worker = find_worker(mount)
    assert worker is not None
    paths = [
        mount.pgdata / f"base/16384/20000{f'.{number}' if number else ''}"
        for number in range(_N_SEGMENTS)
    ]
    chance = random.Random(1)
    for path in paths:  # all is known, and the indexes are full
        read_block(path, chance.randrange(_SEGMENT_BLOCKS))
    samples: list[int] = []
    threads: list[int] = []
    end = time.monotonic() + READS_S
    while len(samples) < 10 or time.monotonic() < end:
        for _ in range(_READS_PER_SAMPLE):
            read_block(chance.choice(paths), chance.randrange(_SEGMENT_BLOCKS))
        samples.append(worker.memory_info().rss)
        threads.append(worker.num_threads())
    half = len(samples) // 2
    first, second = max(samples[:half]), max(samples[half:])
    course = f"RSS in the course of {READS_S} s, KiB: {format_course(samples)}"
    print(
        f"{len(samples) * _READS_PER_SAMPLE} reads; RSS up to {first >> 10} KiB in the first half, "
        f"{second >> 10} in the second; threads {max(threads)}\n{course}"
    )
    mount.unmount()
    assert second <= first + _GROWTH_BYTES, course
    assert max(first, second) <= _INDEX_BYTES + _FIXED_BYTES, course
    assert threads[-1] <= max(threads[:half])
    assert mount.unexpected_log_lines() == []


def format_course(samples: list[int]) -> str:
    """The highest of each of 20 parts of the time, in KiB."""
    n = min(_N_SHOWN_SAMPLES, len(samples))
    bounds = [len(samples) * number // n for number in range(n + 1)]
    return " ".join(str(max(samples[begin:end]) >> 10) for begin, end in pairwise(bounds))


def read_block(path: Path, block: int) -> None:
    """Read a page of a synthetic segment, past the kernel's cache of it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        page = os.pread(fd, PAGE, block * PAGE)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    assert int.from_bytes(page[24:28], "little") == block
