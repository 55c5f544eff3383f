"""A real file system loses its power under a load: ext4 is shut down, and replays its journal.

EXT4_IOC_SHUTDOWN without a flush of the log: from one moment on nothing reaches the disk any more,
neither dirty pages nor what the journal has not committed. What the kernel had written is there
after the next mount, in the order that ext4 gives and not in that of our model.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from crashes import check_content, check_pages, find_worker, run_load, run_server, wait_until_reaped
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Programs, kill_servers
from ledger import Ledger
from servers import MountedServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loop devices")

N_CUTS = 12
# Source: linux/fs.h: FS_IOC_SHUTDOWN, FS_SHUTDOWN_FLAGS_NOLOGFLUSH.
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2


class SmallDisk:
    """An ext4 in a file, on a loop device that ends with its mount."""

    def __init__(self, image: Path, where: Path) -> None:
        self._image = image
        self._where = where
        self._is_mounted = False
        self.worker: psutil.Process | None = None
        """Of the mount whose diff is here; its record can't be read any more after a cut."""
        with image.open("wb") as file:
            file.truncate(2 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self._image, self._where], check=True)
        self._is_mounted = True

    def cut(self) -> None:
        """Let nothing reach the disk any more."""
        fd = os.open(self._where, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        if self._is_mounted:
            subprocess.run(["umount", self._where], check=True)
            self._is_mounted = False


@pytest.fixture
def on_disk(mounts: Mounts, stopped_cluster: Path) -> Iterator[tuple[Mount, SmallDisk]]:
    """A mount that is to be made, its diff on a disk of its own."""
    mount = mounts.prepare("--base", stopped_cluster)
    mount.diff.mkdir()
    disk = SmallDisk(mount.diff.parent / "disk.img", mount.diff)
    try:
        disk.mount()
        mount.diff.chmod(0o711)
        yield mount, disk
    finally:
        power_off(mount, disk.worker)
        disk.unmount()


def power_off(mount: Mount, worker: psutil.Process | None) -> None:
    """End worker and server as they are, and the mount."""
    if worker is not None:
        worker.kill()
        psutil.wait_procs([worker], timeout=30)
    kill_servers(mount.pgdata, patience_s=0)
    if mount.is_mounted:
        subprocess.run(["umount", "--lazy", mount.pgdata], check=True)
        mount.is_mounted = False


@pytest.mark.timeout(1800)
def test_power_is_cut_under_load(
    on_disk: tuple[Mount, SmallDisk], newest_programs: Programs
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    mount, disk = on_disk
    ledger = Ledger()
    for number in range(N_CUTS):
        mount.mount()
        disk.worker = find_worker(mount)
        wait_until_reaped(mount)
        server = MountedServer(mount, newest_programs.bindir)
        assert run_server(server)
        if number == 0:
            ledger.create(server.uri)
        else:
            ledger.check(server.uri)
            check_content(server)
        ledger.begin(server.uri)
        if number % 3 == 1:
            run_load(server, number)
        clients = [server.begin("pgbench", "-n", "-c", "3", "-T", "600")]
        try:
            ledger.wait_for(chance.randrange(20, 400))
            if number % 2:
                clients.append(server.begin("psql", "-XAtqc", "checkpoint"))
                if number % 4 == 1:
                    assert clients[-1].wait(60) == 0
            disk.cut()
        finally:
            power_off(mount, disk.worker)
            for client in clients:
                client.kill()
                client.wait(30)
            ledger.end()
        print(f"cut {number}, {ledger.acknowledged} commits acknowledged")
        disk.unmount()
        disk.mount()
        unsynced = mount.diff / "log" / "unsynced"
        assert not unsynced.exists() or unsynced.read_bytes() == b"", "the cut was none"
        unsynced.unlink(missing_ok=True)
        run_pbkfs("check", "-d", mount.diff)
    mount.mount()
    disk.worker = find_worker(mount)
    wait_until_reaped(mount)
    server = MountedServer(mount, newest_programs.bindir)
    server.start()
    ledger.check(server.uri)
    server.check_cluster()
    server.stop()
    check_pages(server)
    mount.unmount()
    run_pbkfs("check", "-d", mount.diff)
