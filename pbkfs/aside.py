"""System calls that wait for the mount itself.

A thread of a worker that waits for an answer of its own mount can't be ended, not even by SIGKILL:
a worker that dies then would never be gone, its connection would stay open, and all who use the
mount would wait for ever. So a process of its own makes these calls. Any thread but the one that
serves names.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

# Source: setup.py. It is the keeper, too, see pbkfs.mount.keeping.
PROGRAM = str(Path(__file__).with_name("pbkfs-keeper"))


def write_back(mountpoint: Path, paths: Sequence[bytes]) -> None:
    """Have the kernel write back what it holds of these files of the mount, and make it durable.

    With the files that are open (``Tree.paths_in_use``) that is all it holds: a file is written
    back when it is closed. syncfs(2) of a FUSE mount only begins that, and waits for nothing
    (fs/fuse: SB_I_NO_DATA_INTEGRITY). Raises the first OSError, after trying all.
    """
    number = _call("sync", os.fspath(mountpoint), said=b"".join(path + b"\0" for path in paths))
    if number is not None:
        if number:
            raise OSError(number, os.strerror(number))
        return
    first: OSError | None = None
    root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in paths:
            try:
                _sync_file(root, path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:
                first = first or error
    finally:
        os.close(root)
    if first is not None:
        raise first


def _sync_file(root: int, path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def unmount(mountpoint: Path, flags: int) -> int:
    """Call umount2(2); returns 0 or the errno."""
    number = _call("umount", os.fspath(mountpoint), str(flags))
    if number is None:
        number = errno_of("umount2", os.fsencode(mountpoint), ctypes.c_int(flags))
    return number


def errno_of(name: str, *args: object) -> int:
    """Call a function of libc without the interpreter's lock; returns 0 or the errno."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    return ctypes.get_errno() if function(*args) != 0 else 0


def _call(*args: str, said: bytes = b"") -> int | None:
    """Have the program do it; returns 0 or the errno, or None where the program can't be run."""
    null = subprocess.DEVNULL
    try:
        done = subprocess.run([PROGRAM, *args], input=said, stdout=null, stderr=null, check=False)
    except OSError as error:
        # Taken away with a version that is served on, or there is no memory.
        logger.warning("%s is called without %s: %s", args[0], PROGRAM, error.strerror)
        return None
    return done.returncode if done.returncode >= 0 else errno.EINTR
