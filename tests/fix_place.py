"""One place to mount, below the command line: for the tests of mount, unmount, stat, list, cleanup.

``at`` mounts an empty base unless told otherwise, as the user who runs the tests; ``base`` is a
small directory that passes for a PGDATA. No server is involved.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from handmade import control_file

from pbkfs.mount import lock
from pbkfs.mount.owner import Owner

_BAD = r" (WARNING|ERROR|CRITICAL) +\["


class Place:
    """One mount point and one diff; whatever is mounted at the end of the test is taken away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mnt = root / "mnt"
        self.diff = root / "diff"
        self.mnt.mkdir()
        self.expected: list[str] = []

    def mount(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Mount an empty base, or what the arguments name."""
        base = () if any(str(a) in ("--base", "-B", "--reuse") for a in args) else ("--empty",)
        rest = [a for a in args if a != "--reuse"]
        owner = f"{os.geteuid()}:{os.getegid()}"
        return run_pbkfs(
            "mount", *base, "-D", self.mnt, "-d", self.diff, "--owner", owner, *rest, check=check
        )

    def owner(self) -> Owner:
        """Return the worker on record."""
        found = lock.read_owner(self.diff)
        assert found is not None
        return found

    def kill(self) -> Owner:
        """Kill the worker and wait until it is gone."""
        worker = self.owner()
        pidfd = os.pidfd_open(worker.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 30)
        os.close(pidfd)
        return worker

    def log(self) -> str:
        """Return the worker's log."""
        return (self.diff / "log" / "worker.log").read_text()

    def unexpected(self) -> list[str]:
        """Return the log's lines from WARNING up that match none of ``expected``."""
        if not (self.diff / "log" / "worker.log").exists():
            return []
        found = [line for line in self.log().splitlines() if re.search(_BAD, line)]
        return [line for line in found if not any(re.search(e, line) for e in self.expected)]

    def is_dead(self) -> bool:
        """Return whether the mount point answers ENOTCONN."""
        try:
            os.listdir(self.mnt)
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False

    def close(self) -> None:
        """Leave nothing mounted."""
        if os.path.ismount(self.mnt) or self.is_dead():
            run_pbkfs("unmount", "-D", self.mnt, "--force", "--timeout", "5", check=False)


@pytest.fixture
def at(place: Path) -> Iterator[Place]:
    """A place to mount."""
    made = Place(place)
    try:
        yield made
    finally:
        made.close()
    assert made.unexpected() == [], made.log()


@pytest.fixture
def base(place: Path) -> Path:
    """A small directory that passes for a PGDATA."""
    path = place / "base"
    for name in ("base/1", "global", "pg_wal/archive_status", "pg_tblspc"):
        (path / name).mkdir(parents=True)
    (path / "PG_VERSION").write_text("15\n")
    (path / "global" / "pg_control").write_bytes(control_file())
    (path / "base/1/1259").write_bytes(b"page" * 2048 * 3)
    (path / "postgresql.conf").write_text("port = 5432\n")
    (path / "pg_wal" / "000000010000000000000001").write_bytes(bytes(range(256)) * 4096)
    return path


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return mode, mtime and content of everything below ``root``."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def fill(path: Path) -> None:
    """Take what a file system has left."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)


def mine(at: Place) -> list[dict[str, object]]:
    """Return what ``pbkfs list`` says of this place."""
    rows = json.loads(run_pbkfs("list", "-o", "json").stdout)
    return [row for row in rows if row["mountpoint"] == str(at.mnt)]
