"""System calls that wait for the mount itself, made by a process of their own.

A thread of a worker that waits for an answer of its own mount can't be ended, not even by SIGKILL:
a worker that dies then would never be gone, and nobody could take over what the thread waits for.
So the worker has these calls made aside. Any thread but the one that serves names.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

# Source: setup.py. It is the keeper, too, see pbkfs.mount.keeping.
PROGRAM = str(Path(__file__).with_name("pbkfs-keeper"))


def sync(mountpoint: Path) -> None:
    """Have the kernel write back what is dirty on the mount. Raises OSError."""
    number = _call("sync", os.fspath(mountpoint))
    if number:
        raise OSError(number, os.strerror(number))


def unmount(mountpoint: Path, flags: int) -> int:
    """Call umount2(2); returns 0 or the errno."""
    return _call("umount", os.fspath(mountpoint), str(flags))


def _call(*args: str) -> int:
    null = subprocess.DEVNULL
    done = subprocess.run([PROGRAM, *args], stdin=null, stdout=null, stderr=null, check=False)
    return done.returncode if done.returncode >= 0 else errno.EINTR
