"""A hydrated tree as plain files: directories, links, and every object under its own name.

Used by ``tree`` for ``mount.detaching``, on the thread that owns the tree, with nobody else at it.
No byte is copied: a file of the new tree *is* the object, by a hard link, so both must be on one
file system. Nothing here is durable on return.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pbkfs import durable
from pbkfs.overlay.attributes import Attributes
from pbkfs.overlay.inode import Attr, Directory, File, Inode, SymbolicLink
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.objects import object_path
from pbkfs.overlay.stack import Stack


class Detachment:
    """Links the files of one tree into the empty directory ``target``."""

    def __init__(
        self, stack: Stack, namespace: Namespace, attributes: Attributes, target: Path
    ) -> None:
        self._objects = stack.live.objects
        self._wal = os.fsencode(stack.diff.wal_path)
        self._stack = stack
        self._namespace = namespace
        self._attributes = attributes
        self._target = os.fsencode(target)
        # Symbolic links may have several names too.
        self._links: dict[int, bytes] = {}

    def run(self) -> None:
        """Link everything. Every file must be whole in the diff already. Raises OSError."""
        root = self._namespace.root
        self._fill_directory(root, self._target)
        # Last of all: until now nobody but us can look inside.
        _finish_directory(self._target, self._attributes.read(root))

    def _fill_directory(self, directory: Directory, path: bytes) -> None:
        for name, inode in self._namespace.children(directory).items():
            self._put(inode, path + b"/" + name)

    def _put(self, inode: Inode, path: bytes) -> None:
        durable.on_step("detach:link")
        if isinstance(inode, Directory):
            os.mkdir(path, 0o700)
            self._fill_directory(inode, path)
            _finish_directory(path, self._attributes.read(inode))
        elif isinstance(inode, SymbolicLink) and inode.target is None:
            _link_directory(self._wal, path)
        elif isinstance(inode, File):
            piece = self._stack.live_piece(inode)
            assert piece is not None, path
            os.link(
                object_path(piece.object_id),
                path,
                src_dir_fd=self._objects.fd,
                follow_symlinks=False,
            )
        elif inode.ino in self._links:
            os.link(self._links[inode.ino], path, follow_symlinks=False)
        else:
            self._links[inode.ino] = path
            attr = self._attributes.read(inode)
            os.symlink(self._attributes.target(inode), path)
            os.lchown(path, attr.uid, attr.gid)
            os.utime(path, ns=(attr.atime_ns, attr.mtime_ns), follow_symlinks=False)


def _finish_directory(path: bytes, attr: Attr) -> None:
    os.chown(path, attr.uid, attr.gid)
    os.chmod(path, stat.S_IMODE(attr.mode))
    os.utime(path, ns=(attr.atime_ns, attr.mtime_ns))


def _link_directory(source: bytes, path: bytes) -> None:
    """Make a directory like the plain one at ``source``, with the same files."""
    os.mkdir(path, 0o700)
    for entry in os.scandir(source):
        there = path + b"/" + entry.name
        if entry.is_dir(follow_symlinks=False):
            _link_directory(entry.path, there)
        else:
            os.link(entry.path, there, follow_symlinks=False)
    found = os.lstat(source)
    os.chown(path, found.st_uid, found.st_gid)
    os.chmod(path, stat.S_IMODE(found.st_mode))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
