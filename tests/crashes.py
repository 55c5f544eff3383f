"""A server on a mount whose every write is recorded, and mounts of what a power cut would leave."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import psycopg
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import copy_tree, is_running, kill_servers, wait_until
from iotrace import Event, Recorder
from ledger import Ledger
from machine import RECORDING, TESTS
from power_cut import Disk
from servers import Clients, MountedServer

from pbkfs.errors import PbkfsError
from pbkfs.mount import control, lock
from pbkfs.mount.sealing import Child, seal

# Marks in the trace.
ACKNOWLEDGED, HINTING, HINTED, READY, LOADED = "a", "h", "i", "r", "l"
SEALING, SEALED = "s", "t"

# In the diff of a recorded run, all that is recorded: its new layer after a seal, and the child.
_NEW_LIVE, _CHILD, _CHILD_LIVE = "live1", "child", "child.live"
# Of 100 MB; so slow that it goes on for as long as a load, on a busy machine too.
_HYDRATION_RATE = "3MB"


@dataclass(frozen=True, slots=True)
class Recording:
    """All that was done to the diff of a mount in ``place``, over the cluster ``base``."""

    events: list[Event]
    place: Path
    base: Path

    def save(self, directory: Path) -> None:
        """Keep it, with the base."""
        directory.mkdir()
        copy_tree(self.base, directory / "base")
        with (directory / "events").open("wb") as file:
            pickle.dump(self, file)

    def move(self, diff: Path, place: Path, base: Path) -> None:
        """Have the files of a replayed diff name its own place and base, not the recorded ones."""
        for path in (*diff.glob("*.json"), *diff.glob("*/*.json")):
            content = path.read_bytes()
            content = content.replace(os.fsencode(self.place), os.fsencode(place))
            path.write_bytes(content.replace(os.fsencode(self.base), os.fsencode(base)))


@dataclass(frozen=True, slots=True)
class Cut:
    """One of the states that a power cut after event number ``moment`` can leave."""

    seed: int
    moment: int
    subset: int
    is_ordered: bool

    def chance(self) -> random.Random:
        """What decides about the rest: the same for the same cut."""
        return random.Random(f"{self.seed} {self.moment} {self.subset}")


def load_cut(directory: Path) -> tuple[Recording, Cut]:
    """Return what ``PowerCuts.check`` has kept of a failure."""
    with (directory / "events").open("rb") as file:
        recording: Recording = pickle.load(file)
    return recording, Cut(**json.loads((directory / "cut.json").read_text()))


def record_run(
    mounts: Mounts, stopped_cluster: Path, bindir: Path, *, n_turns: int, is_sealed: bool = False
) -> Recording:
    """Mount a new diff, run a load on it in ``n_turns``, end it; return all that was done.

    ``is_sealed``: it is hydrated meanwhile, and sealed in the first turn.
    """
    mount = mounts.prepare("--base", stopped_cluster, name="recorded")
    recorder = Recorder(mount.diff, mount.pgdata.parent)
    try:
        with recorder.recording():
            mount.mount()
            # With checksums, WAL has an image of each page that gets hint bits.
            subprocess.run(
                [bindir / "pg_checksums", "--disable", "-D", mount.pgdata],
                check=True, capture_output=True, **owner_identity(mount),
            )  # fmt: skip
            server = MountedServer(mount, bindir)
            server.start("-c", "max_wal_size=8MB", "-c", "wal_writer_delay=20ms")
        ledger = Ledger(lambda number: recorder.mark(ACKNOWLEDGED, number))
        ledger.create(server.uri)
        server.sql("checkpoint", "select count(*) from unhinted")
        # Pages of the base are written for the first time, and no WAL could bring them back.
        recorder.mark(HINTING)
        server.sql("checkpoint")
        recorder.mark(HINTED)
        recorder.mark(READY)
        if is_sealed:
            run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", _HYDRATION_RATE)
        ledger.begin(server.uri)
        for turn in range(n_turns):
            is_now = is_sealed and turn == 0
            run_load(server, turn, partial(seal_recorded, mount, recorder) if is_now else None)
        ledger.end()
        assert ledger.acknowledged > 0, ledger.ended_by
        assert (hydration(mount)["state"] in ("looking", "running")) == is_sealed
        recorder.mark(LOADED)
        server.stop()
        mount.unmount()
        events = recorder.events()
        check_recording(events, mount, mount.pgdata.parent / "replayed", is_sealed=is_sealed)
        return Recording(events, mount.pgdata.parent, stopped_cluster)
    finally:
        recorder.close()
        mounts.discard(mount)


def owner_identity(mount: Mount) -> dict[str, Any]:
    """Arguments of subprocess that make a child run as the user of the server."""
    if os.geteuid() != 0:
        return {}
    uid, gid = map(int, mount.owner.split(":"))
    return {"user": uid, "group": gid, "extra_groups": []}


def seal_recorded(mount: Mount, recorder: Recorder) -> None:
    """Seal a mount that is recorded and hydrated, with a child."""
    wait_until(lambda: hydration(mount)["bytes_done"] > 0)
    recorder.mark(SEALING)
    child = Child(mount.diff / _CHILD, mount.diff / _CHILD_LIVE)
    assert seal(mount.diff, new_live=mount.diff / _NEW_LIVE, child=child).note is None
    recorder.mark(SEALED)
    wait_until(lambda: hydration(mount)["state"] == "running")


def hydration(mount: Mount) -> dict[str, Any]:
    """How far it is."""
    found: dict[str, Any] = control.call(mount.diff, "hydration")["hydration"]
    return found


def run_load(server: MountedServer, turn: int, meanwhile: Callable[[], None] | None = None) -> None:
    """Small transactions, and beside them what makes, cuts and removes files."""
    load = server.begin("pgbench", "-n", "-c", "3", "-t", "40")
    table = f"t{turn}"
    server.sql(
        f"create table {table} as select n, repeat('x', 300) as s from generate_series(1, 2000) n",
        f"create index on {table} (n)",
        f"delete from {table} where n > 200",
    )
    if meanwhile is not None:
        meanwhile()
    server.sql(
        f"vacuum {table}",
        "checkpoint",
        f"update {table} set s = 'y'",
        f"drop table {table}" if turn % 2 else f"truncate {table}",
        "select pg_switch_wal()",
    )
    try:
        assert load.wait(120) == 0
    except subprocess.TimeoutExpired:
        load.kill()
        raise


def check_recording(events: Sequence[Event], mount: Mount, place: Path, *, is_sealed: bool) -> None:
    """What the trace leads to is what is there, or the trace has missed something."""
    disk = Disk()
    disk.play(events)
    disk.save_all(place)
    parts = ["journal", "superblock.json", "objects", "pg_wal"]
    parts += [_NEW_LIVE, _CHILD, _CHILD_LIVE] if is_sealed else []
    for part in parts:
        done = subprocess.run(
            ["diff", "-r", place / part, mount.diff / part], capture_output=True, text=True
        )
        assert done.returncode == 0, f"the trace differs from {mount.diff / part}: {done.stdout}"


class PowerCuts:
    """Cuts of one recorded run, made in the order of time."""

    def __init__(
        self, recording: Recording, mounts: Mounts, base: Path, bindir: Path, kept: Path
    ) -> None:
        """``base``: the recording's, or a copy. ``kept`` is made at a failure, see ``load_cut``."""
        self._recording = recording
        self._events = recording.events
        self._mounts = mounts
        self._base = base
        self._bindir = bindir
        self._kept = kept
        self._disk = Disk()

    def check(
        self, moment: int, seed: int, *, is_ordered: bool, subsets: Sequence[int] = (0,)
    ) -> None:
        """Cut the power after event number ``moment``; what is left must be a sound cluster.

        Each of ``subsets`` is another part of what was not durable. They are checked at the same
        time, as a check waits for much of its own. At a failure the recording is kept, and named.
        """
        self._disk.play(self._events[self._disk.now : moment])
        cuts = [Cut(seed, moment, subset, is_ordered) for subset in subsets]
        with ThreadPoolExecutor(len(cuts)) as pool:
            for cut, checked in [(cut, pool.submit(self._check, cut)) for cut in cuts]:
                try:
                    checked.result()
                except BaseException as error:
                    self._keep(cut)
                    again = f"{RECORDING}={self._kept} ./run test tests/crash/test_power_cuts.py"
                    error.add_note(f"{cut}\nonce more: {again}")
                    raise

    def _keep(self, cut: Cut) -> None:
        self._recording.save(self._kept)
        (self._kept / "cut.json").write_text(json.dumps(asdict(cut)))

    def _check(self, cut: Cut) -> None:
        mount = self._mounts.prepare("--base", self._base, name=f"cut{cut.moment}-{cut.subset}")
        try:
            self._disk.save(mount.diff, cut.chance(), is_ordered=cut.is_ordered)
            mount.diff.chmod(0o711)
            self._recording.move(mount.diff, mount.pgdata.parent, self._base)
            if (mount.diff / "binding.json").exists():
                run_pbkfs("check", "-d", mount.diff)
            mount.mount()
            wait_until_reaped(mount)
            server = MountedServer(mount, self._bindir)
            server.start()
            ledger = Ledger()
            ledger.acknowledged = self._acknowledged(cut.moment)
            if self._is_after(READY, cut.moment):
                ledger.check(server.uri)
            check_content(server)
            server.stop("-m", "fast")
            mount.unmount()
            run_pbkfs("check", "-d", mount.diff)
            if self._is_after(SEALED, cut.moment):
                self._check_child(mount)
        finally:
            self._mounts.discard(mount)

    def _check_child(self, parent: Mount) -> None:
        """The child of the seal has what was acknowledged before, and nothing that came after."""
        pgdata = parent.pgdata.parent / "child" / "pgdata"
        pgdata.mkdir(parents=True)
        child = Mount(pgdata, parent.diff / _CHILD, parent.args, parent.owner)
        self._mounts.made.append(child)
        try:
            child.mount()
            wait_until_reaped(child)
            server = MountedServer(child, self._bindir)
            server.start()
            ledger = Ledger()
            ledger.acknowledged = self._acknowledged(self.position(SEALING))
            n_beside = self._acknowledged(self.position(SEALED)) - ledger.acknowledged
            ledger.check(server.uri, n_more=n_beside + 1)
            check_content(server)
            server.stop("-m", "fast")
            child.unmount()
        finally:
            self._mounts.discard(child)

    def _acknowledged(self, moment: int) -> int:
        """The newest number that was acknowledged before that."""
        events = self._events[:moment]
        return max((event.a for event in events if event.kind == ACKNOWLEDGED), default=0)

    def moments(self, chance: random.Random, first: str, last: str, n: int) -> list[int]:
        """Return ``n`` moments between two marks, in order.

        Half of them, or all in a short time, are after a page was written and before anything was
        made durable since: there is most to lose.
        """
        everywhere = range(self.position(first) + 1, self.position(last))
        dangerous = []
        has_page = False
        for moment in everywhere:
            if moment > everywhere.start and has_page:
                dangerous.append(moment)
            event = self._events[moment]
            has_page = event.kind != "E" and (has_page or len(event.data) >= 8192)
        n_dangerous = min(n if len(everywhere) < 100 else n // 2, len(dangerous))
        chosen = set(chance.sample(dangerous, n_dangerous))
        rest = sorted(set(everywhere) - chosen)
        return sorted([*chosen, *chance.sample(rest, n - n_dangerous)])

    def _is_after(self, mark: str, moment: int) -> bool:
        """Whether that is in the trace, and before this moment."""
        return any(event.kind == mark for event in self._events[:moment])

    def position(self, mark: str) -> int:
        """Return the number of the event that is this mark."""
        return next(i for i, event in enumerate(self._events) if event.kind == mark)


def check_content(server: Clients) -> None:
    """What a crash of ``stopped_cluster``'s server under a load must not have changed is there."""
    server.check_cluster()
    check_sums(server)
    assert server.sql("select count(*), sum(n) from unhinted") == "10000|50005000"


def check_sums(server: Clients) -> None:
    """The transactions of pgbench are there wholly or not at all."""
    accounts, tellers, history = (
        server.sql(f"select coalesce(sum({column}), 0) from pgbench_{table}")
        for table, column in (
            ("accounts", "abalance"), ("tellers", "tbalance"), ("history", "delta")
        )
    )  # fmt: skip
    assert accounts == tellers
    assert tellers == history


def check_pages(server: MountedServer) -> None:
    """Let pg_checksums look at every page of a server that was stopped cleanly."""
    done = subprocess.run(
        [server.bindir / "pg_checksums", "--check", "-D", server.mount.pgdata],
        capture_output=True, text=True, **owner_identity(server.mount),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


_TROUBLE = re.compile(r"PANIC|FATAL|ERROR|could not|terminated by signal|invalid page")
# Whoever needs the table's lock has it end; it comes again.
_NO_TROUBLE = "canceling autovacuum task"


def trouble_in(server_log: Path) -> list[str]:
    """Lines of a server's log that a server on a sound disk would not write."""
    lines = server_log.read_text(errors="replace").splitlines()
    return [line for line in lines if _TROUBLE.search(line) and _NO_TROUBLE not in line]


# --- labelled steps -------------------------------------------------------------------------------

_NO_LABEL = "-"
# Slow enough that it goes on for as long as the load.
HYDRATION_RATE = "4MB"


@dataclass
class LabelledRuns:
    """Mounts whose worker dies at a labelled step, and what is left then.

    Where they are supervised, another worker takes over, and nobody may see an error.
    """

    mounts: Mounts
    stopped_cluster: Path
    bindir: Path
    log: Path
    is_supervised: bool = False
    how: str = "kill"
    """``kill`` for SIGKILL or ``exit`` for _exit(2)."""

    def mount(self, mount: Mount, label: str, n: int) -> bool:
        """Mount, to die at the ``n``-th ``label``; returns whether the mount is up before that."""
        done = subprocess.run(
            [
                sys.executable, TESTS / "labelled.py", self.log, label, str(n), self.how,
                "mount", *mount.args, "-D", mount.pgdata, "-d", mount.diff,
                "--owner", mount.owner, "--wait", "--hydrate", HYDRATION_RATE,
                *(["--supervised"] if self.is_supervised else []),
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        mount.is_mounted = done.returncode == 0
        if done.returncode != 0:
            assert label != _NO_LABEL, done.stderr
        return mount.is_mounted

    def labels(self, *, is_first: bool) -> Counter[str]:
        """Return how often each label is reached on a new diff, or on one after a crash."""
        mount, ledger = self._prepare(is_first=is_first)
        self.log.unlink(missing_ok=True)
        self.mount(mount, _NO_LABEL, 1)
        self._load(mount, ledger)
        self._end(mount)
        self.mounts.discard(mount)
        return Counter(self.log.read_text().split())

    def _prepare(self, *, is_first: bool) -> tuple[Mount, Ledger]:
        """Return a mount of a new diff, or of one whose worker was killed, to be mounted."""
        mount, ledger = self.mounts.prepare("--base", self.stopped_cluster), Ledger()
        if not is_first:
            self.mount(mount, _NO_LABEL, 1)
            self._load(mount, ledger, n_commits=30)
            self._end(mount)
        return mount, ledger

    def check(self, label: str, n: int, *, is_first: bool) -> bool:
        """Die at a label; what is left must be a sound cluster. Returns whether it was reached."""
        mount, ledger = self._prepare(is_first=is_first)
        self.log.unlink(missing_ok=True)
        if self.mount(mount, label, n):
            self._load(mount, ledger)
            self._end(mount)
        is_reached = self.log.read_text().split().count(label) >= n
        if (mount.diff / "binding.json").exists():
            run_pbkfs("check", "-d", mount.diff)
        mount.mount()
        wait_until_reaped(mount)
        server = MountedServer(mount, self.bindir)
        server.start()
        if server.sql("select to_regclass('ledger') is not null") == "t":
            ledger.check(server.uri)
        else:
            assert ledger.acknowledged == 0
        server.check_cluster()
        check_sums(server)
        server.stop()
        check_pages(server)
        mount.unmount()
        run_pbkfs("check", "-d", mount.diff)
        self.mounts.discard(mount)
        return is_reached

    def _load(self, mount: Mount, ledger: Ledger, *, n_commits: int | None = None) -> None:
        """Run a server until its worker is dead, or the load is done.

        ``n_commits``: kill the worker after as many commits of the ledger.
        """
        worker = find_worker(mount)
        if worker is None:
            return
        server = MountedServer(mount, self.bindir)
        started = run_server(server)
        if started and ledger.acknowledged == 0:
            try:
                ledger.create(server.uri)
            except psycopg.Error:
                started = False
        if started:
            ledger.begin(server.uri)
            loads = [
                server.begin("pgbench", "-n", "-c", "3", "-t", "60"),
                server.begin("psql", "-XAtq", *sql_arguments(len(self.mounts.made))),
            ]
            is_sealed = False
            while is_running(worker.pid) and any(load.poll() is None for load in loads):
                psutil.wait_procs([worker], timeout=0.1)
                if n_commits is not None and ledger.acknowledged >= n_commits:
                    worker.kill()
                if n_commits is None and not is_sealed and ledger.acknowledged >= 20:
                    seal_beside(mount)
                    is_sealed = True
            if is_running(worker.pid):
                if self.is_supervised:
                    self._check_nobody_noticed(server, ledger, loads)
                # Its end has labels too.
                ledger.end()
                run_pbkfs("stop", "-D", mount.pgdata, check=False)
                run_pbkfs("unmount", "-D", mount.pgdata, check=False)
                mount.is_mounted = os.path.ismount(mount.pgdata)
            for load in loads:
                load.kill()
                load.wait(30)
        elif is_running(worker.pid):
            worker.kill()
        gone, _ = psutil.wait_procs([worker], timeout=30)
        assert gone
        kill_servers(mount.pgdata, patience_s=0)
        ledger.end()

    def _check_nobody_noticed(
        self, server: MountedServer, ledger: Ledger, loads: list[subprocess.Popen[bytes]]
    ) -> None:
        ledger.wait_for(5)
        assert [load.wait(60) for load in loads] == [0 for _ in loads]
        trouble = trouble_in(server.mount.server_log)
        assert trouble == [], "\n".join(trouble)

    def _end(self, mount: Mount) -> None:
        if mount.is_mounted or is_dead_mount(mount.pgdata):
            mount.unmount("--force")
        mount.is_mounted = False


def seal_beside(mount: Mount) -> None:
    """Seal a diff that is in use, with a second head on what is sealed; the worker may die in it.

    The server stands still meanwhile.
    """
    place = mount.pgdata.parent
    child = Child(head=place / "child", live=place / "child.live")
    with suppress(PbkfsError):
        seal(mount.diff, new_live=place / "live", child=child, timeout_s=60)


def find_worker(mount: Mount) -> psutil.Process | None:
    """Return the worker on record, if it lives."""
    owner = lock.read_owner(mount.diff)
    assert owner is not None
    try:
        return psutil.Process(owner.pid)
    except psutil.NoSuchProcess:
        return None


def wait_until_reaped(mount: Mount) -> None:
    """Wait until the postmaster that the cluster names is no zombie either.

    PostgreSQL takes one for alive, and init may take its time.
    """
    try:
        pid = int((mount.pgdata / "postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, IndexError, ValueError):
        return
    wait_until(lambda: not psutil.pid_exists(pid))


def run_server(server: MountedServer) -> bool:
    """Start a server whose worker may die meanwhile; returns whether it is up."""
    try:
        server.start("-c", "max_wal_size=8MB")
    except AssertionError:
        return False
    return True


def is_dead_mount(path: Path) -> bool:
    """Whether there is a mount whose worker is gone."""
    try:
        os.listdir(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def sql_arguments(number: int) -> list[str]:
    """What makes, cuts and removes files, as arguments of psql."""
    table = f"u{number}"
    statements = [
        f"create table {table} as select n, repeat('x', 300) s from generate_series(1, 2000) n",
        f"create index on {table} (n)",
        f"delete from {table} where n > 200",
        f"vacuum {table}",
        "vacuum pgbench_history",
        "checkpoint",
        "reindex index pgbench_accounts_pkey",
        "checkpoint",
        f"truncate {table}",
        f"drop table {table}",
        "alter system set work_mem = '5MB'",
        "create database d template template0",
        "checkpoint",
        "drop database d",
        "select pg_switch_wal()",
    ]
    return [word for each in statements for word in ("-c", each)]
