"""Limits of a server's processors and memory, by a cgroup (version 2) of its own.

``Cgroups`` knows the place below which these groups are made: for root a ``pbkfs.slice`` at the top
of the hierarchy, for others one in the part of it that is delegated to them. A server is started
from inside of its group, so that all its processes are in it. Source: the kernel's
Documentation/admin-guide/cgroup-v2.rst. Called while a server starts and after it has ended;
``entered`` moves the calling process for an instant, so one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import HostError, UnsupportedError

SLICE = "pbkfs.slice"

_PERIOD_US = 100_000
_entering = threading.Lock()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server may have at most; None: as much as there is."""

    cpus: float | None = None
    memory_bytes: int | None = None

    def controllers(self) -> list[str]:
        """Return the kernel's controllers that these limits need."""
        wanted = {"cpu": self.cpus, "memory": self.memory_bytes}
        return [name for name, value in wanted.items() if value is not None]


class Cgroups:
    """The groups of the servers of this user. ``proc`` and ``own`` are replaced by tests."""

    def __init__(self, proc: Path = Path("/proc/self"), *, is_root: bool | None = None) -> None:
        self._proc = proc
        self._is_root = os.geteuid() == 0 if is_root is None else is_root

    def check(self, limits: Limits) -> None:
        """Raise UnsupportedError where these limits can't be set here; makes nothing."""
        wanted = limits.controllers()
        if wanted:
            self._find_place(wanted)

    def make(self, name: str, limits: Limits) -> Path | None:
        """Make the group ``name`` with these limits, or change it; None if there are none.

        Raises UnsupportedError, HostError.
        """
        wanted = limits.controllers()
        if not wanted:
            return None
        place = self._find_place(wanted)
        try:
            _enable(place, wanted)
            slice_ = place / SLICE
            slice_.mkdir(exist_ok=True)
            _enable(slice_, wanted)
            group = slice_ / name
            group.mkdir(exist_ok=True)
            if limits.cpus is not None:
                quota = max(1000, round(limits.cpus * _PERIOD_US))
                _write(group / "cpu.max", f"{quota} {_PERIOD_US}")
            if limits.memory_bytes is not None:
                _write(group / "memory.max", str(limits.memory_bytes))
        except OSError as error:
            raise HostError(
                f"cannot set limits in {error.filename}: {(error.strerror or str(error)).lower()}",
                hint="As a service, it needs Delegate=cpu memory and DelegateSubgroup= (systemd).",
            ) from error
        return group

    @contextlib.contextmanager
    def entered(self, group: Path | None) -> Iterator[None]:
        """Let this process be in ``group``, for what it starts meanwhile. Raises HostError."""
        if group is None:
            yield
            return
        with _entering:
            before = self._hierarchy() / self._own().lstrip("/")
            self._move(group)
            try:
                yield
            finally:
                self._move(before)

    def remove(self, name: str) -> None:
        """Remove a group whose processes have ended, if there is one."""
        for place in self._places():
            with contextlib.suppress(OSError):  # not there, or not empty: then it is in use
                (place / SLICE / name).rmdir()

    def _move(self, group: Path) -> None:
        try:
            _write(group / "cgroup.procs", str(os.getpid()))
        except OSError as error:
            raise HostError(
                f"cannot move a process to {group}: {(error.strerror or str(error)).lower()}"
            ) from error

    # --- where ----------------------------------------------------------------------------------

    def _find_place(self, wanted: list[str]) -> Path:
        """Return the group below which ours are made. Raises UnsupportedError."""
        limit = " and ".join(wanted)
        places = list(self._places())
        if not places:
            why = "no cgroup of version 2 is delegated to this user"
            if not self._hierarchies():
                why = "no cgroup2 file system is mounted"
            raise UnsupportedError(f"a limit of {limit} is not available here: {why}", hint=_ADVICE)
        for place in places:
            if set(wanted) <= set(_read(place / "cgroup.controllers").split()):
                return place
        lacking = sorted(set(wanted) - set(_read(places[0] / "cgroup.controllers").split()))
        raise UnsupportedError(
            f"a limit of {limit} is not available here: {places[0]} lacks the "
            f"{' and '.join(lacking)} controller",
            hint=_ADVICE,
        )

    def _places(self) -> Iterator[Path]:
        """Yield where groups can be made, the best place first."""
        for root in self._hierarchies()[:1]:
            if self._is_root:
                yield root
                return
            group = root / self._own().lstrip("/")
            writable = []
            while os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK):
                writable.append(group)
                if group == root:
                    break
                group = group.parent
            yield from reversed(writable)

    def _hierarchy(self) -> Path:
        return self._hierarchies()[0]

    def _hierarchies(self) -> list[Path]:
        found = []
        for line in _read(self._proc / "mountinfo").splitlines():
            fields, _, more = line.partition(" - ")
            if more.startswith("cgroup2 "):
                found.append(Path(fields.split(" ")[4]))
        return found

    def _own(self) -> str:
        """Return the group of this process, from the top of the hierarchy."""
        for line in _read(self._proc / "cgroup").splitlines():
            if line.startswith("0::"):
                return line[3:]
        return "/"


_ADVICE = (
    "Leave it out, or limit the whole of pbkfs, with systemd-run for example. It needs the "
    "kernel's cgroups of version 2, with these controllers."
)


def _enable(group: Path, wanted: list[str]) -> None:
    """Let the groups below ``group`` have these controllers. Raises OSError."""
    path = group / "cgroup.subtree_control"
    missing = [name for name in wanted if name not in _read(path).split()]
    if missing:
        _write(path, " ".join(f"+{name}" for name in missing))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    """Write to a file of the kernel: one write(2)."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
