"""A server on a mount whose every write is recorded, and mounts of what a power cut would leave."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fix_mounts import Mount, Mounts, run_pbkfs
from iotrace import Event, Recorder
from ledger import Ledger
from power_cut import Disk, boot_anew
from servers import MountedServer

# Marks in the trace.
ACKNOWLEDGED, READY, LOADED = "a", "r", "l"


def record_run(mounts: Mounts, basebackup: Path, bindir: Path, *, n_turns: int) -> list[Event]:
    """Mount a new diff, run a load on it in ``n_turns``, end it; return all that was done."""
    mount = mounts.prepare("--base", basebackup, name="recorded")
    recorder = Recorder(mount.diff, mount.pgdata.parent)
    try:
        with recorder.recording():
            mount.mount()
            server = MountedServer(mount, bindir)
            server.start("-c", "max_wal_size=8MB", "-c", "wal_writer_delay=20ms")
        ledger = Ledger(lambda number: recorder.mark(ACKNOWLEDGED, number))
        ledger.create(server.uri)
        server.sql("checkpoint")
        recorder.mark(READY)
        ledger.begin(server.uri)
        for turn in range(n_turns):
            run_load(server, turn)
        ledger.end()
        assert ledger.acknowledged > 0, ledger.ended_by
        recorder.mark(LOADED)
        server.stop()
        mount.unmount()
        events = recorder.events()
        check_recording(events, mount, mount.pgdata.parent / "replayed")
        return events
    finally:
        recorder.close()
        mounts.discard(mount)


def run_load(server: MountedServer, turn: int) -> None:
    """Small transactions, and beside them what makes, cuts and removes files."""
    load = server.begin("pgbench", "-n", "-c", "3", "-t", "40")
    table = f"t{turn}"
    server.sql(
        f"create table {table} as select n, repeat('x', 300) as s from generate_series(1, 2000) n",
        f"create index on {table} (n)",
        f"delete from {table} where n > 200",
        # Sets hint bits only: pages are written that no record of WAL could bring back.
        "select count(*) from pgbench_history",
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


def check_recording(events: Sequence[Event], mount: Mount, place: Path) -> None:
    """What the trace leads to is what is there, or the trace has missed something."""
    disk = Disk()
    disk.play(events)
    disk.save_all(place)
    for part in ("journal", "superblock.json", "objects", "pg_wal"):
        done = subprocess.run(
            ["diff", "-r", place / part, mount.diff / part], capture_output=True, text=True
        )
        assert done.returncode == 0, f"the trace differs from {mount.diff / part}: {done.stdout}"


class PowerCuts:
    """Cuts of one recorded run, made in the order of time."""

    def __init__(
        self, events: Sequence[Event], mounts: Mounts, basebackup: Path, bindir: Path
    ) -> None:
        self._events = events
        self._mounts = mounts
        self._basebackup = basebackup
        self._bindir = bindir
        self._disk = Disk()
        self._acknowledged = 0

    def _play(self, moment: int) -> None:
        part = self._events[self._disk.now : moment]
        numbers = [event.a for event in part if event.kind == ACKNOWLEDGED]
        self._acknowledged = max([self._acknowledged, *numbers])
        self._disk.play(part)

    def check(self, moment: int, chance: random.Random, *, is_ordered: bool) -> None:
        """Cut the power after event number ``moment``; what is left must be a sound cluster."""
        self._play(moment)
        mount = self._mounts.prepare("--base", self._basebackup, name=f"cut{moment}")
        try:
            self._disk.save(mount.diff, chance, is_ordered=is_ordered)
            mount.diff.chmod(0o711)
            boot_anew(mount.diff)
            if (mount.diff / "binding.json").exists():
                run_pbkfs("check", "-d", mount.diff)
            mount.mount()
            server = MountedServer(mount, self._bindir)
            server.start()
            ledger = Ledger()
            ledger.acknowledged = self._acknowledged
            if self.is_ready(moment):
                ledger.check(server.uri)
            server.check_cluster()
            check_sums(server)
            server.stop("-m", "fast")
            mount.unmount()
            run_pbkfs("check", "-d", mount.diff)
        finally:
            self._mounts.discard(mount)

    def is_ready(self, moment: int) -> bool:
        """Whether the ledger existed then."""
        return moment > self.position(READY)

    def position(self, mark: str) -> int:
        """Return the number of the event that is this mark."""
        return next(i for i, event in enumerate(self._events) if event.kind == mark)


def check_sums(server: MountedServer) -> None:
    """The transactions of pgbench are there wholly or not at all."""
    accounts, tellers, history = (
        server.sql(f"select coalesce(sum({column}), 0) from pgbench_{table}")
        for table, column in (
            ("accounts", "abalance"), ("tellers", "tbalance"), ("history", "delta")
        )
    )  # fmt: skip
    assert accounts == tellers
    assert tellers == history
