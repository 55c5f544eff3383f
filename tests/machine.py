"""What this machine offers to the tests: servers, catalogs, FUSE, and where to put things.

Imported by conftest.py and by the fixtures (``fix_*.py``); holds no fixture itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
MAJORS = (14, 15, 16, 17, 18)
IS_CI = os.environ.get("CI") == "true"
SESSION = "PBKFS_TEST_SESSION"  # every process that a test starts inherits it
RECORDING = "PBKFS_TEST_RECORDING"  # a directory that a failed test of power cuts has kept


def session_directory() -> Path:
    """Everything of this session lies below it; 0755, for servers of another user."""
    return Path(tempfile.gettempdir()) / f"pbkfs-test-{os.environ[SESSION]}"


def kept_recording() -> Path | None:
    """What the tests of power cuts are to make again instead of what they do else."""
    named = os.environ.get(RECORDING)
    return Path(named).resolve() if named else None


def postgres_root() -> Path:
    """Where ``./run test`` puts PostgreSQL: one directory a major, readable by everybody."""
    return Path(os.environ.get("PBKFS_TEST_POSTGRES", "/var/tmp/pbkfs-tests/pg"))


def postgres_bindir(major: int) -> Path:
    return postgres_root() / str(major) / "bin"


def postgres_majors() -> list[int]:
    """The majors that are there, oldest first."""
    return [major for major in MAJORS if (postgres_bindir(major) / "postgres").exists()]


def catalogs_directory() -> Path:
    """The catalogs: a checkout's neighbour, or else the small one that is kept in tests/data."""
    named = os.environ.get("PBKFS_TEST_CATALOGS")
    if named:
        return Path(named)
    shared = ROOT.parent / "shared" / "catalogs"
    return shared if shared.is_dir() else TESTS / "data" / "catalogs"


def own_mounts() -> list[str]:
    """The start of a command that runs in a mount namespace of its own. Needs root.

    Mounts in it stay in it, except where the root directory is no mount point (a bare chroot):
    there, nothing can be made private, and it is as private as what the chroot lies on.
    """
    command = ["unshare", "--mount", "--propagation"]
    can = subprocess.run([*command, "private", "true"], stderr=subprocess.DEVNULL, check=False)
    return [*command, "private" if can.returncode == 0 else "unchanged"]


def mounts_of(pid: int) -> list[str]:
    """The start of a command that runs in the mount namespace of a process, in its root."""
    root = f"/proc/{pid}/root"
    return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--root={root}", f"--wd={root}", "--"]


def open_to_everybody(place: Path) -> str:
    """A shell script for a mount namespace of root's own, after which every user gets to
    /dev/fuse, to this checkout and to its Python.

    Whatever closed directory of root's lies on the way (a checkout or an environment in /root) is
    covered by an open one that holds nothing but the way.
    """
    lines = [
        f"test -e {place}/fuse || mknod -m 666 {place}/fuse c 10 229",
        f"mount --bind {place}/fuse /dev/fuse",
    ]
    needed = [
        path for path in (ROOT, Path(sys.prefix), Path(sys.base_prefix)) if _first_closed(path)
    ]
    for number, path in enumerate(needed):
        lines.append(f"mkdir -p {place}/way{number}; mount --rbind {path} {place}/way{number}")
    for closed in {_first_closed(path) for path in needed}:
        lines.append(f"mount -t tmpfs -o mode=755 none {closed}")
    for number, path in enumerate(needed):
        lines.append(f"mkdir -p {path}; mount --rbind {place}/way{number} {path}")
    return "; ".join(lines)


def _first_closed(path: Path) -> Path | None:
    """The first directory on the way to ``path`` that others may not pass."""
    for parent in reversed(path.parents):
        if not parent.stat().st_mode & 0o001:
            return parent
    return None


def fuse_obstacle() -> str | None:
    """Why nothing can be mounted here, or None."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "fusermount3 is missing (package fuse3)"
    return None
