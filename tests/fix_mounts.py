"""Mounts for tests, always made and ended through the real command line.

``mounts`` is a factory: ``mounts.mount("-B", store, …)`` gives a ``Mount``. Whatever a test leaves
running is stopped by id at teardown: server first, then the mount, then the files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from machine import session_directory

from pbkfs.errors import HostError
from pbkfs.mount import keeping


def _takeover_obstacle() -> str | None:
    try:
        keeping.check_host()
    except HostError as error:
        return error.message
    return None


needs_takeovers = pytest.mark.skipif(
    _takeover_obstacle() is not None, reason=_takeover_obstacle() or ""
)


def run_pbkfs(
    *args: str | os.PathLike[str], check: bool = True, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``pbkfs ARGS`` as a user does; on an unexpected exit code show what it printed."""
    command = [sys.executable, "-m", "pbkfs", *map(str, args)]
    done = subprocess.run(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode != 0:
        words = " ".join(map(str, args))
        raise AssertionError(f"pbkfs {words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@dataclass
class Mount:
    """One mount of a test: its mount point, its diff and the arguments that made it."""

    pgdata: Path
    diff: Path
    args: tuple[str, ...]
    owner: str
    is_mounted: bool = False
    start_args: list[str] = field(default_factory=list)

    def mount(self, *more: str) -> None:
        """Mount, or mount again on the same diff."""
        run_pbkfs(
            "mount", *self.args, "-D", self.pgdata, "-d", self.diff, "--owner", self.owner,
            "--wait", *more,
        )  # fmt: skip
        self.is_mounted = True

    def unmount(self, *more: str) -> None:
        """Unmount gracefully."""
        run_pbkfs("unmount", "-D", self.pgdata, *more)
        self.is_mounted = False

    def stat(self) -> dict[str, dict[str, int]]:
        """Return the worker's counters."""
        found: dict[str, dict[str, int]] = json.loads(
            run_pbkfs("stat", "-D", self.pgdata, "--format", "json").stdout
        )
        return found

    @property
    def worker_log(self) -> Path:
        """The worker's log file."""
        return self.diff / "log" / "worker.log"

    @property
    def server_log(self) -> Path:
        """PostgreSQL's log file."""
        return self.diff / "log" / "postgres.log"

    def unexpected_log_lines(self) -> list[str]:
        """Lines of the worker's log at WARNING or above."""
        if not self.worker_log.exists():
            return []
        lines = self.worker_log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(w in line for w in ("WARNING", "ERROR", "CRITICAL"))]


class Mounts:
    """Factory of mounts below one directory that every user may enter."""

    def __init__(self, root: Path, owner: str) -> None:
        self.root = root
        self.owner = owner
        self.made: list[Mount] = []

    def prepare(self, *args: str | os.PathLike[str], name: str | None = None) -> Mount:
        """Make the directories of a mount without mounting it."""
        name = name or f"m{len(self.made)}"
        pgdata = self.root / name / "pgdata"
        pgdata.mkdir(parents=True)
        made = Mount(pgdata, self.root / name / "diff", tuple(map(str, args)), self.owner)
        self.made.append(made)
        return made

    def mount(self, *args: str | os.PathLike[str], name: str | None = None) -> Mount:
        """Mount with the given base arguments on a new diff."""
        made = self.prepare(*args, name=name)
        made.mount()
        return made

    def discard(self, made: Mount) -> None:
        """Stop the server, unmount and remove the files of one mount."""
        if made.is_mounted:
            run_pbkfs("stop", "-D", made.pgdata, "-m", "immediate", check=False)
            done = run_pbkfs("unmount", "-D", made.pgdata, check=False)
            if done.returncode != 0:
                run_pbkfs("unmount", "-D", made.pgdata, "--force", check=False)
            made.is_mounted = False
        assert not os.path.ismount(made.pgdata), f"{made.pgdata} is still mounted"
        shutil.rmtree(made.pgdata.parent)
        self.made.remove(made)

    def close(self) -> None:
        """Discard whatever is left; every mount is tried, the first failure is raised."""
        failures: list[BaseException] = []
        for made in list(self.made):
            try:
                self.discard(made)
            except BaseException as problem:
                failures.append(problem)
        shutil.rmtree(self.root, ignore_errors=True)
        if failures:
            raise failures[0]


@pytest.fixture
def mounts(server_owner: str) -> Iterator[Mounts]:
    """A factory of mounts, all gone at teardown."""
    session_directory().mkdir(exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="mounts-", dir=session_directory()))
    root.chmod(0o755)
    made = Mounts(root, server_owner)
    try:
        yield made
    finally:
        made.close()
