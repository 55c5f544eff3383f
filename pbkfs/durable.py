"""Durable changes to the file system: atomic replace, fsync of files and directories.

Owns every fsync that Python does on a diff, and most renames. Each call carries a label such as
``"superblock:replace"``; ``on_step`` is called with the label before each half-step, so that a test
can list the labels and kill the process at any of them. May be called from any thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator


def _no_step(label: str) -> None:
    """Do nothing; tests put their own function into ``on_step``."""


on_step: Callable[[str], None] = _no_step


def fsync_fd(fd: int, *, label: str) -> None:
    """Flush data and metadata of an open file to stable storage. Raises OSError."""
    on_step(f"{label}:fsync")
    os.fsync(fd)


def fsync_dir(path: str | os.PathLike[str], *, label: str) -> None:
    """Make the entries of directory ``path`` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        on_step(f"{label}:fsync_dir")
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(
    path: str | os.PathLike[str], data: bytes, *, label: str, mode: int = 0o600
) -> None:
    """Replace ``path`` by ``data``, see ``replacing``. Raises OSError."""
    with replacing(path, label=label, mode=mode) as fd:
        write_all(fd, data)


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the descriptor's position. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, label: str, mode: int = 0o600) -> Iterator[int]:
    """Replace ``path`` by what is written to the descriptor that this yields.

    After a crash it is wholly the old file or wholly the new; durable when it returns: fsync of a
    file with a temporary name, rename, fsync of the directory. The temporary file is removed when
    a step fails. Raises OSError.

    Nobody can guess its name, so in a directory where others may write, none of them can have put
    a file or a link there that we would write to.
    """
    path = os.fspath(path)
    directory, name = os.path.split(path)
    directory = directory or "."
    tmp = os.path.join(directory, f".{name}.{secrets.token_hex(8)}.tmp")
    on_step(f"{label}:create")
    fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        try:
            yield fd
            fsync_fd(fd, label=label)
        finally:
            os.close(fd)
        on_step(f"{label}:rename")
        os.rename(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    fsync_dir(directory, label=label)
