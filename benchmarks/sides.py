"""The sides of a comparison: native ext4, pbkfs on several chains, and the kernel's overlayfs.

A side shows one PGDATA at ``path``. ``fresh()`` starts from unchanged data, ``cold()`` keeps what
was written and forgets every cache. All sides of a run lie on the same file system. A side belongs
to one thread; ``close()`` leaves nothing mounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import drop_caches

CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def run(*command: str | os.PathLike[str], timeout: float = 600, check: bool = True) -> str:
    """Run a command to its end; its output when it fails is in the exception."""
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode
    done = subprocess.run(
        [os.fspath(part) for part in command],
        env=environment, capture_output=True, text=True, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if check and done.returncode:
        raise RuntimeError(f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_tree(source: Path, target: Path) -> None:
    run("cp", "-a", "--reflink=never", source, target)


def process_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its finished children; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / CLOCK_TICKS


class Side(ABC):
    """One way to have the data."""

    name: str
    path: Path

    @abstractmethod
    def fresh(self) -> None:
        """Show the unchanged data; what was written to this side is gone."""

    @abstractmethod
    def mount(self) -> None:
        """Show it again after ``unmount``."""

    @abstractmethod
    def unmount(self) -> None:
        """Stop showing it, where that makes sense."""

    def cold(self) -> None:
        """Forget all caches, above and below."""
        self.unmount()
        drop_caches()
        self.mount()

    def worker_cpu_s(self) -> float:
        """CPU seconds of the process that serves the side, so far."""
        return 0.0

    def worker_pid(self) -> int | None:
        return None

    @abstractmethod
    def close(self) -> None: ...


class NativeSide(Side):
    """A plain copy."""

    def __init__(self, name: str, source: Path, place: Path) -> None:
        self.name = name
        self._source = source
        self.path = place / name

    def fresh(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        copy_tree(self._source, self.path)

    def mount(self) -> None: ...

    def unmount(self) -> None: ...

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class OverlaySide(Side):
    """The kernel's overlayfs, or fuse-overlayfs, over a composed copy."""

    def __init__(self, name: str, lower: Path, place: Path, *, in_kernel: bool) -> None:
        self.name = name
        self._lower = lower
        self._in_kernel = in_kernel
        self._place = place / f"{name}-layers"
        self.path = place / name
        self._is_mounted = False
        self._pid: int | None = None

    def fresh(self) -> None:
        self.unmount()
        shutil.rmtree(self._place, ignore_errors=True)
        owner = self._lower.stat()
        for directory in (self._place / "upper", self._place / "work", self.path):
            directory.mkdir(parents=True, exist_ok=True)
            os.chown(directory, owner.st_uid, owner.st_gid)
            directory.chmod(0o700)
        self._place.chmod(0o755)
        self.mount()

    def mount(self) -> None:
        layers = f"lowerdir={self._lower},upperdir={self._place}/upper,workdir={self._place}/work"
        if self._in_kernel:
            run("mount", "-t", "overlay", "overlay", "-o", layers, self.path)
        else:
            # In the foreground, to know its process.
            daemon = subprocess.Popen(
                ["fuse-overlayfs", "-f", "-o", f"{layers},allow_other", self.path],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._daemon = daemon
            self._pid = daemon.pid
            deadline = time.monotonic() + 10
            while not os.path.ismount(self.path):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("fuse-overlayfs did not mount")
                time.sleep(0.01)
        self._is_mounted = True

    def unmount(self) -> None:
        if not self._is_mounted:
            return
        run("umount", self.path)
        if self._pid is not None:
            self._daemon.wait(30)
            self._pid = None
        self._is_mounted = False

    def worker_cpu_s(self) -> float:
        return process_cpu_s(self._pid) if self._pid else 0.0

    def worker_pid(self) -> int | None:
        return self._pid

    def close(self) -> None:
        self.unmount()
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Chain:
    """A backup in a catalog."""

    store: Path
    backup_id: str
    instance: str = "main"

    def arguments(self) -> list[str]:
        return ["-B", str(self.store), "--instance", self.instance, "-i", self.backup_id]


def pbkfs_command() -> list[str]:
    return [sys.executable, "-m", "pbkfs"]


class PbkfsSide(Side):
    """A mount of a chain, with a diff."""

    def __init__(
        self,
        name: str,
        chain: Chain,
        place: Path,
        owner: str,
        options: Sequence[str] = (),
        *,
        is_hydrated: bool = False,
    ) -> None:
        self.name = name
        self._chain = chain
        self._owner = owner
        self._options = list(options)
        self._is_hydrated = is_hydrated
        self.diff = place / f"{name}-diff"
        self.path = place / name
        self._is_mounted = False

    def fresh(self) -> None:
        self.unmount()
        shutil.rmtree(self.diff, ignore_errors=True)
        self.mount()
        if self._is_hydrated:
            self.hydrate()

    def mount(self) -> None:
        self.path.mkdir(exist_ok=True)
        run(
            *pbkfs_command(), "mount", *self._chain.arguments(), "-D", self.path, "-d", self.diff,
            "--owner", self._owner, "--wait", *self._options,
        )  # fmt: skip
        self._is_mounted = True

    def unmount(self) -> None:
        if self._is_mounted:
            run(*pbkfs_command(), "unmount", "-D", self.path)
            self._is_mounted = False

    def worker_pid(self) -> int | None:
        """The process that holds the diff, found by its lock file."""
        wanted = os.fspath(self.diff / "lock")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                for fd in (entry / "fd").iterdir():
                    if os.readlink(fd) == wanted:
                        return int(entry.name)
            except OSError:
                continue
        return None

    def worker_cpu_s(self) -> float:
        pid = self.worker_pid()
        return process_cpu_s(pid) if pid else 0.0

    def hydrate(self) -> None:
        """Bring everything into the diff, and wait for it."""
        run(*pbkfs_command(), "hydrate", "-D", self.path, "--watch", "--rate", "0")

    def counters(self) -> str:
        return run(*pbkfs_command(), "stat", "-D", self.path, "--format", "json", check=False)

    def close(self) -> None:
        if self._is_mounted:
            try:
                self.unmount()
            except RuntimeError:
                run(*pbkfs_command(), "unmount", "-D", self.path, "--force", check=False)
        shutil.rmtree(self.diff, ignore_errors=True)
        if not os.path.ismount(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
