"""Tablespaces that a server makes on the mount: their files belong into it.

CREATE TABLESPACE makes a directory PG_… at the location that was named, somewhere on the host, and
links pg_tblspc/OID to that location. What is written there would be no part of the diff: a branch
would share it with its source, and the replay of a backup's WAL on the host that it came from would
write to the original. So pg_tblspc/OID is always made a link to TABLESPACE_ROOT/OID in the mount,
as it is in a base, and the location stays empty.

Called by ``operations`` on the trio thread; ``find_directories`` and ``remove_empty`` are for
another one: the location may lie on the mount itself.
Source: src/backend/commands/tablespace.c (create_tablespace_directories, of a replay, too).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from pbkfs.backup.base import TABLESPACE_ROOT
from pbkfs.pgdata import PG_TBLSPC

if TYPE_CHECKING:
    from pbkfs.overlay.tree import Tree

logger = logging.getLogger(__name__)

# Source: src/include/common/relpath.h (TABLESPACE_VERSION_DIRECTORY).
_VERSION_PREFIX = b"PG_"


class VersionDirectory(NamedTuple):
    """A directory PG_… of a location."""

    name: bytes
    mode: int
    uid: int
    gid: int


def is_tablespace_link(tree: Tree, parent: int, name: bytes, target: bytes) -> bool:
    """Tell whether a link ``name`` to ``target`` would lead a tablespace out of the mount."""
    return target.startswith(b"/") and is_tablespace_name(tree, parent, name)


def is_tablespace_name(tree: Tree, parent: int, name: bytes) -> bool:
    """Tell whether a server takes ``name`` for that of a tablespace's link."""
    return name.isdigit() and tree.path_of(parent) == PG_TBLSPC


def find_directories(location: bytes, pid: int) -> list[VersionDirectory]:
    """Return what is to be shown in the mount, too, as process ``pid`` sees ``location``.

    Raises OSError: PermissionError for a location inside of pg_tblspc, which waits for the link.
    """
    if PG_TBLSPC in location.split(b"/"):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    fd = _open(location, pid)
    try:
        found = []
        for name in os.listdir(fd):
            shown = os.fsencode(name)
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if shown.startswith(_VERSION_PREFIX) and stat.S_ISDIR(info.st_mode):
                mode = stat.S_IMODE(info.st_mode)
                found.append(VersionDirectory(shown, mode, info.st_uid, info.st_gid))
        return found
    finally:
        os.close(fd)


def keep(
    tree: Tree, oid: bytes, directories: list[VersionDirectory], uid: int, gid: int
) -> list[int]:
    """Make, below TABLESPACE_ROOT, what the link of a tablespace leads to and is not there yet.

    Returns the directories whose listing has changed.
    """
    changed: list[int] = []
    shown = _directory(tree, tree.ROOT, VersionDirectory(TABLESPACE_ROOT, 0o700, uid, gid), changed)
    own = _directory(tree, shown, VersionDirectory(oid, 0o700, uid, gid), changed)
    for directory in directories:
        _directory(tree, own, directory, changed)
    return changed


def shown_target(oid: bytes) -> bytes:
    """Return what the link of a tablespace leads to."""
    return b"../%s/%s" % (TABLESPACE_ROOT, oid)


def find_listings(tree: Tree) -> list[int]:
    """Return the directories that ``keep`` may have changed without the kernel having asked."""
    found = [tree.ROOT]
    try:
        shown = tree.lookup(tree.ROOT, TABLESPACE_ROOT)
    except FileNotFoundError:
        return found
    tree.forget(shown.ino, 1)
    return [*found, shown.ino, *(attr.ino for _, attr, _ in tree.readdir(shown.ino, 0))]


def remove_empty(location: bytes, pid: int, directories: list[VersionDirectory], uid: int) -> None:
    """Remove the server's directories at ``location``, so that the next one finds it unused.

    Only empty ones of user ``uid``, who has asked for the link. Raises OSError.
    """
    fd = _open(location, pid)
    try:
        for directory in directories:
            if directory.uid != uid:
                continue
            try:
                os.rmdir(directory.name, dir_fd=fd)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                logger.warning(
                    "%s is in use by others; nothing in it is shown on the mount",
                    os.fsdecode(location + b"/" + directory.name),
                )
    finally:
        os.close(fd)


def _open(location: bytes, pid: int) -> int:
    """Open a directory as a process sees it, which may be in a container; else as we do."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(b"/proc/%d/root%s" % (pid, location), flags)
    except OSError:
        return os.open(location, flags)


def _directory(tree: Tree, parent: int, wanted: VersionDirectory, changed: list[int]) -> int:
    """Return the inode of a directory, made if it is missing."""
    try:
        attr = tree.lookup(parent, wanted.name)
    except FileNotFoundError:
        attr = tree.mkdir(parent, wanted.name, wanted.mode, wanted.uid, wanted.gid)
        changed.append(parent)
    # The kernel did not ask for it.
    tree.forget(attr.ino, 1)
    return attr.ino
