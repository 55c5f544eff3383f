"""Regular files at names that a user chose: a worker's log, its pid file.

Whoever may write to their directory can put something else there at any time. A fifo would make
who opens it wait for another process, opening a device may do something, and a symbolic link leads
anywhere; all of them are an OSError. Any thread may call.
"""

from __future__ import annotations

import errno
import os
import stat

_WORDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check(path: str | os.PathLike[str]) -> None:
    """Raise OSError if there is something at ``path`` that is no regular file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    _check_mode(mode)


def open_plain(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """Open or make a regular file like ``os.open``; never waits. Raises OSError."""
    check(path)
    # It may be another one by now; then without a wait, and without becoming our terminal.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags, mode)
    try:
        _check_mode(os.fstat(fd).st_mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def _check_mode(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ELOOP
        raise OSError(number, os.strerror(number))
    what = _WORDS.get(stat.S_IFMT(mode), "something else")
    raise OSError(errno.EINVAL, f"it is {what} and no regular file")
