"""System calls that wait for the mount itself.

A thread of a worker that waits for an answer of its own mount can't be ended, not even by SIGKILL:
a worker that dies then would never be gone, and nobody could take over what the thread waits for.
So where somebody is to take over (``is_aside``), a process of its own makes these calls. Any thread
but the one that serves names.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
from pathlib import Path

logger = logging.getLogger(__name__)

# Source: setup.py. It is the keeper, too, see pbkfs.mount.keeping.
PROGRAM = str(Path(__file__).with_name("pbkfs-keeper"))


def sync(mountpoint: Path, *, is_aside: bool) -> None:
    """Have the kernel write back what is dirty on the mount. Raises OSError."""
    number = _call("sync", os.fspath(mountpoint)) if is_aside else None
    if number is None:
        fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # syncfs(2) is not in the os module of 3.11; sync_file_range is no substitute.
            number = _errno_of("syncfs", fd)
        finally:
            os.close(fd)
    if number:
        raise OSError(number, os.strerror(number))


def unmount(mountpoint: Path, flags: int, *, is_aside: bool) -> int:
    """Call umount2(2); returns 0 or the errno."""
    number = _call("umount", os.fspath(mountpoint), str(flags)) if is_aside else None
    if number is None:
        number = _errno_of("umount2", os.fsencode(mountpoint), ctypes.c_int(flags))
    return number


def _errno_of(name: str, *args: object) -> int:
    """Call a function of libc without the interpreter's lock; returns 0 or the errno."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    return ctypes.get_errno() if function(*args) != 0 else 0


def _call(*args: str) -> int | None:
    """Have the program do it; returns 0 or the errno, or None where the program can't be run."""
    null = subprocess.DEVNULL
    try:
        done = subprocess.run([PROGRAM, *args], stdin=null, stdout=null, stderr=null, check=False)
    except OSError as error:
        # Taken away with a version that is served on, or there is no memory.
        logger.warning("%s is called without %s: %s", args[0], PROGRAM, error.strerror)
        return None
    return done.returncode if done.returncode >= 0 else errno.EINTR
