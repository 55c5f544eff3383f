"""Attributes: read and changed where they live.

Those of a file with an object in the writable diff are the object's own; all others are in memory,
and a change of them is a record of the journal. Used by ``tree`` on its thread.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from dataclasses import dataclass

from pbkfs.overlay import journal as records
from pbkfs.overlay.inode import Attr, Directory, File, Inode, Piece, SymbolicLink
from pbkfs.overlay.namespace import Namespace, fail
from pbkfs.overlay.stack import Stack

_DIRECTORY_BYTES = 4096
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Change:
    """New values; None stays as it is. ``mode`` has permission bits only."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    def mask(self) -> int:
        """Return which values change, as a record says it."""
        values = (self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns)
        bits = (
            records.ATTR_MODE,
            records.ATTR_UID,
            records.ATTR_GID,
            records.ATTR_ATIME,
            records.ATTR_MTIME,
        )
        return sum(bit for bit, value in zip(bits, values, strict=True) if value is not None)


class Attributes:
    """See the module."""

    def __init__(self, stack: Stack, namespace: Namespace) -> None:
        self._stack = stack
        self._namespace = namespace

    def read(self, inode: Inode) -> Attr:
        """Return what stat(2) says of an inode. Raises OSError; a missing object is EIO."""
        if isinstance(inode, File):
            return self._read_file(inode)
        if isinstance(inode, Directory):
            self._namespace.children(inode)
            nlink = 0 if inode.parent is None else 2 + inode.n_directories
            size, blocks = _DIRECTORY_BYTES, _DIRECTORY_BYTES // _SECTOR_BYTES
        else:
            nlink, size, blocks = inode.n_names, len(self.target(inode)), 0
        return Attr(
            ino=inode.ino,
            mode=inode.mode,
            nlink=nlink,
            uid=inode.uid,
            gid=inode.gid,
            size=size,
            atime_ns=inode.atime_ns,
            mtime_ns=inode.mtime_ns,
            ctime_ns=inode.ctime_ns,
            blocks=blocks,
        )

    def _read_file(self, file: File) -> Attr:
        piece = self._stack.live_piece(file)
        if piece is None:
            self._stack.load(file)
            return Attr(
                ino=file.ino,
                mode=file.mode,
                nlink=file.n_names,
                uid=file.uid,
                gid=file.gid,
                size=file.size,
                atime_ns=file.atime_ns,
                mtime_ns=file.mtime_ns,
                ctime_ns=file.ctime_ns,
                blocks=-(-file.size // _SECTOR_BYTES),
            )
        found = self._stack.live.objects.stat(piece.object_id)
        # A mapped object is full of holes that are no holes of the file: a tool that looks at
        # the blocks would take it for sparse.
        blocks = -(-found.st_size // _SECTOR_BYTES) if piece.is_mapped else found.st_blocks
        return Attr(
            ino=file.ino,
            mode=found.st_mode,
            nlink=file.n_names,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size,
            atime_ns=found.st_atime_ns,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            blocks=blocks,
        )

    def target(self, inode: Inode) -> bytes:
        """Return a symbolic link's target. Raises OSError EINVAL."""
        if not isinstance(inode, SymbolicLink):
            raise fail(errno.EINVAL)
        if inode.target is None:
            return os.fsencode(self._stack.diff.wal_path)
        return inode.target

    def change(self, inode: Inode, change: Change) -> None:
        """Change attributes. Raises OSError, and then nothing has changed in memory."""
        if change.mask() == 0:
            return
        piece = self._stack.live_piece(inode) if isinstance(inode, File) else None
        if piece is not None:
            self._change_object(piece, change)
        else:
            self._change_memory(inode, change)

    def _change_object(self, piece: Piece, change: Change) -> None:
        objects = self._stack.live.objects
        with objects.pinned(piece.object_id) as path:
            found = objects.stat(piece.object_id)
            uid = found.st_uid if change.uid is None else change.uid
            gid = found.st_gid if change.gid is None else change.gid
            if (uid, gid) != (found.st_uid, found.st_gid):
                os.chown(path, uid, gid)
            # After the owner, because a change of owner clears the set-id bits.
            if change.mode is not None:
                os.chmod(path, change.mode)
            if change.atime_ns is not None or change.mtime_ns is not None:
                atime_ns = found.st_atime_ns if change.atime_ns is None else change.atime_ns
                mtime_ns = found.st_mtime_ns if change.mtime_ns is None else change.mtime_ns
                os.utime(path, ns=(atime_ns, mtime_ns))

    def _change_memory(self, inode: Inode, change: Change) -> None:
        if isinstance(inode, File):
            self._stack.load(inode)
        path = self._namespace.path_of(inode)
        if path is not None:
            record = records.SetAttr(
                change.mask(),
                change.mode or 0,
                change.uid or 0,
                change.gid or 0,
                change.atime_ns or 0,
                change.mtime_ns or 0,
                path,
            )
            self._stack.live.append(record.encode(), label="attr")
        if change.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | change.mode
        if change.uid is not None:
            inode.uid = change.uid
        if change.gid is not None:
            inode.gid = change.gid
        if change.atime_ns is not None:
            inode.atime_ns = change.atime_ns
        if change.mtime_ns is not None:
            inode.mtime_ns = change.mtime_ns
        inode.ctime_ns = time.time_ns()


def check_owner(before: Attr, uid: int | None, gid: int | None) -> None:
    """Raise OSError EPERM for a change of owner that this worker could not make to an object."""
    if os.geteuid() == 0:
        return
    if uid is not None and uid not in (before.uid, os.geteuid()):
        raise fail(errno.EPERM)
    if gid is not None and gid not in (before.gid, os.getegid()) and gid not in os.getgroups():
        raise fail(errno.EPERM)


def new_owner(uid: int, gid: int) -> tuple[int, int]:
    """Return the owner that something new gets when ``uid`` and ``gid`` ask for it.

    An unprivileged worker can give nothing away: then it is its own user's, whoever asked.
    """
    if os.geteuid() == 0:
        return uid, gid
    may_give = gid == os.getegid() or gid in os.getgroups()
    return os.geteuid(), gid if may_give else os.getegid()


def touch(directory: Directory) -> None:
    """Note that a directory's entries changed; its times need not outlive the mount."""
    directory.mtime_ns = directory.ctime_ns = time.time_ns()
