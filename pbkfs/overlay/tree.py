"""The tree of files of one mount: base, sealed layers and the writable diff as one.

Owns what a request for names or attributes means, and what it leaves in the journal; knows nothing
of FUSE. The bytes of files are the native half's (``nodes``). Called by ``fuse`` (requests) and
``mount`` (start, wal_out, sync, reap, close). One thread owns a tree; only ``sync``, ``fsyncdir``
and ``statfs`` may run in others.

Every change goes: check, make the object if one is needed, append the record, change memory. What
fails before the last step leaves all as it was. Errors are OSError.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pbkfs import _native
from pbkfs.backup.base import Base
from pbkfs.overlay import journal as records
from pbkfs.overlay.attributes import Attributes, Change, check_owner, new_owner, touch
from pbkfs.overlay.contents import Contents
from pbkfs.overlay.detachment import Detachment
from pbkfs.overlay.diff import Diff, check_layers
from pbkfs.overlay.folding import Origins
from pbkfs.overlay.hydration import Hydration
from pbkfs.overlay.inode import Attr, Directory, File, Inode, SymbolicLink
from pbkfs.overlay.journal import TARGET_MAX
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.namespace import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ROOT_INO,
    Namespace,
    fail,
)
from pbkfs.overlay.replay import Replay, apply_wal_out, find_named, is_wal_out
from pbkfs.overlay.restacking import Restack
from pbkfs.overlay.sealing import BrokenSealError, Child, Seal, Sealed
from pbkfs.overlay.stack import Stack
from pbkfs.overlay.superblock import LayerRef

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "Attr", "Tree"]


class Tree:
    """See the module. ``nodes`` is the native half; fuse's dispatcher works on it directly."""

    ROOT: ClassVar[int] = ROOT_INO

    def __init__(
        self,
        base: Base,
        diff: Diff,
        sealed: Sequence[Layer] = (),
        *,
        owner: tuple[int, int],
        log_fd: int,
        index_bytes: int = 64 << 20,
        verifies_pages: bool = False,
    ) -> None:
        """Replay the journals of ``sealed`` (newest first) and of ``diff``, and recover ``diff``.

        ``owner`` (uid, gid) owns what comes from the base. ``log_fd`` takes the native half's log
        lines. ``verifies_pages``: look at pages of the base when they are first read. The tree
        owns diff and layers from now on, also if this raises: DiffError if they do not fit each
        other or are damaged, HostError.
        """
        self._stack = Stack(base, diff, sealed)
        self._namespace = Namespace(base, owner, time.time_ns())
        self._attributes = Attributes(self._stack, self._namespace)
        self._is_closed = False
        try:
            check_layers(diff, sealed)
            created = self._replay()
            named = find_named(self._stack, self._namespace, created)
            for layer, found in zip(self._stack.layers[:-1], named[:-1], strict=True):
                layer.check_objects(found)
            diff.live.start(named[-1], owner)
            self._reserve_bytes = 0
            self._contents = Contents(
                self._stack,
                self._namespace,
                log_fd=log_fd,
                index_bytes=index_bytes,
                verifies_pages=verifies_pages,
            )
            self._contents.finish_truncations(named[-1])
            self.hydration = Hydration(self._stack, self._namespace, self._contents)
        except BaseException:
            for layer in self._stack.layers:
                layer.close()
            raise

    def _replay(self) -> set[int]:
        """Apply all journals; returns the objects that records of the writable diff created."""
        created: set[int] = set()
        for number, layer in enumerate(self._stack.layers):
            replay = Replay(self._namespace, self._stack, number)
            replay.run(layer, layer.names)
            created = replay.created
        return created

    @property
    def nodes(self) -> _native.Nodes:
        """The native half: the data of all registered files."""
        return self._contents.nodes

    # --- lookups ----------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return what ``name`` is, and count one more lookup of it."""
        inode = self._namespace.child(self._namespace.get_directory(parent), name)
        attr = self._attributes.read(inode)
        inode.nlookup += 1
        return attr

    def remember(self, ino: int) -> None:
        """Count one more lookup (an entry handed out by readdirplus)."""
        self._namespace.get(ino).nlookup += 1

    def forget(self, ino: int, n: int) -> None:
        """Take back ``n`` lookups. An inode without lookups and names is gone for good."""
        inode = self._namespace.inodes.get(ino)
        if inode is None:
            return
        inode.nlookup = max(0, inode.nlookup - n)
        if inode.nlookup == 0:
            self._let_go(inode)

    def _let_go(self, inode: Inode) -> None:
        self._contents.close_unused(inode)
        if inode.parent is None:
            self._namespace.forget(inode)
            if isinstance(inode, Directory):
                self.nodes.directory_changes(inode.ino)

    def readdir(self, ino: int, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, cookie) of the entries after cookie ``start`` (0: all).

        No "." and "..", no lookup is counted.
        """
        directory = self._namespace.get_directory(ino)
        for name, inode, cookie in self._namespace.entries(directory, start):
            yield name, self._attributes.read(inode), cookie

    def path_of(self, ino: int) -> bytes | None:
        """Return the path of an inode's first name; None if it has none any more."""
        return self._namespace.path_of(self._namespace.get(ino))

    def paths_in_use(self) -> list[bytes]:
        """Return the paths of the files that the kernel has open; without those without a name."""
        inodes = self._namespace.inodes
        found = [inodes[ino] for ino in self.nodes.opened() if ino in inodes]
        paths = [self._namespace.path_of(inode) for inode in found]
        return [path for path in paths if path is not None]

    def may_appear(self, parent: int, name: bytes) -> bool:
        """Tell whether a name that is missing may be made without the kernel asking for it."""
        return self._namespace.may_appear(self._namespace.get_directory(parent), name)

    # --- attributes -------------------------------------------------------------------------

    def getattr(self, ino: int) -> Attr:
        """Return the attributes of an inode, also of one without a name."""
        inode = self._namespace.get(ino)
        if isinstance(inode, Directory):
            return self._announce(inode)
        return self._attributes.read(inode)

    def _announce(self, directory: Directory) -> Attr:
        """Let the native half answer for the attributes of a directory; returns them.

        After every change, before the kernel hears of it: it asks again after each.
        """
        attr = self._attributes.read(directory)
        self.nodes.directory_is(
            attr.ino,
            attr.mode,
            attr.nlink,
            attr.uid,
            attr.gid,
            attr.size,
            attr.atime_ns,
            attr.mtime_ns,
            attr.ctime_ns,
            attr.blocks,
        )
        return attr

    def setattr(
        self,
        ino: int,
        *,
        size: int | None = None,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
    ) -> Attr:
        """Change what is not None; returns the new attributes.

        ``mode``'s type bits are ignored. A size costs a copy-up unless it is the present one.
        """
        inode = self._namespace.get(ino)
        before = self._attributes.read(inode)
        check_owner(before, uid, gid)
        if size is not None:
            if isinstance(inode, Directory):
                raise fail(errno.EISDIR)
            if not isinstance(inode, File):
                raise fail(errno.EINVAL)
            self._contents.resize(inode, before.size, size)
            if mtime_ns is None and self._stack.live_piece(inode) is None:
                mtime_ns = time.time_ns()
        permissions = None if mode is None else stat.S_IMODE(mode)
        self._attributes.change(inode, Change(permissions, uid, gid, atime_ns, mtime_ns))
        return self.getattr(ino)

    def readlink(self, ino: int) -> bytes:
        """Return a symbolic link's target."""
        return self._attributes.target(self._namespace.get(ino))

    # --- new names --------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a regular file, ready to be written; counts a lookup. Raises FileExistsError."""
        directory, uid, gid = self._prepare_new(parent, name, uid, gid)
        mode = stat.S_IMODE(mode)
        file = File(self._namespace.new_number(), mode, uid, gid, time.time_ns(), 0)
        path = self._namespace.path_in(directory, name)
        self._contents.create(file, mode, uid, gid, path)
        return self._added(directory, name, file)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory; counts a lookup."""
        directory, uid, gid = self._prepare_new(parent, name, uid, gid)
        # Source: inode_init_owner in Linux' fs/inode.c: a directory inherits the bit too.
        mode = stat.S_IMODE(mode) | directory.mode & stat.S_ISGID
        now = time.time_ns()
        path = self._namespace.path_in(directory, name)
        self._append(records.Mkdir(mode, uid, gid, now, path), "mkdir")
        made = Directory(self._namespace.new_number(), mode, uid, gid, now)
        return self._added(directory, name, made)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link; counts a lookup."""
        directory, uid, gid = self._prepare_new(parent, name, uid, gid)
        if not target:
            raise fail(errno.ENOENT)
        if len(target) > TARGET_MAX:
            raise fail(errno.ENAMETOOLONG)
        now = time.time_ns()
        path = self._namespace.path_in(directory, name)
        self._append(records.Symlink(uid, gid, now, path, target), "symlink")
        link = SymbolicLink(self._namespace.new_number(), uid, gid, now, target)
        return self._added(directory, name, link)

    def link(self, ino: int, new_parent: int, new_name: bytes) -> Attr:
        """Give a file one more name; counts a lookup."""
        inode = self._namespace.get(ino)
        directory = self._namespace.get_directory(new_parent)
        self._namespace.check_new(directory, new_name)
        if isinstance(inode, Directory):
            raise fail(errno.EPERM)
        existing = self._namespace.path_of(inode)
        if existing is None:
            raise fail(errno.ENOENT)
        if isinstance(inode, File) and not inode.pieces:
            # Names of one file meet in its object, whoever reads the diff without this tree.
            self._contents.copy_up(inode)
        path = self._namespace.path_in(directory, new_name)
        self._append(records.Link(existing, path), "link")
        inode.ctime_ns = time.time_ns()
        return self._added(directory, new_name, inode)

    def _prepare_new(
        self, parent: int, name: bytes, uid: int, gid: int
    ) -> tuple[Directory, int, int]:
        """Check a new name; return its directory and the owner that the new inode will have."""
        directory = self._namespace.get_directory(parent)
        self._namespace.check_new(directory, name)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        return directory, *new_owner(uid, gid)

    def _added(self, directory: Directory, name: bytes, inode: Inode) -> Attr:
        self._namespace.add(directory, name, inode)
        touch(directory)
        self._announce(directory)
        self._contents.note_names(inode)
        inode.nlookup += 1
        return self._attributes.read(inode)

    # --- removal and renaming ---------------------------------------------------------------

    def unlink(self, parent: int, name: bytes) -> None:
        """Take away the name of a file or symbolic link; a file in use lives on without it."""
        directory = self._namespace.get_directory(parent)
        self._namespace.check_unlink(directory, name)
        self._remove(directory, name)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        directory = self._namespace.get_directory(parent)
        self._namespace.check_rmdir(directory, name)
        self._remove(directory, name)

    def _remove(self, directory: Directory, name: bytes) -> None:
        self._append(records.Remove(self._namespace.path_in(directory, name)), "remove")
        inode = self._namespace.drop(directory, name)
        touch(directory)
        self._announce(directory)
        self._name_lost(inode)

    def rename(
        self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Move a name, as renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE in ``flags``.

        One record, whatever is moved or replaced: a crash finds the old names or the new ones.
        """
        names = self._namespace
        old_directory = names.get_directory(old_parent)
        new_directory = names.get_directory(new_parent)
        if not names.check_rename(old_directory, old_name, new_directory, new_name, flags):
            return
        record = records.Rename(
            flags & RENAME_EXCHANGE,
            names.path_in(old_directory, old_name),
            names.path_in(new_directory, new_name),
        )
        self._append(record, "rename")
        moved = names.child(old_directory, old_name)
        replaced = names.rename(
            old_directory,
            old_name,
            new_directory,
            new_name,
            is_exchange=bool(flags & RENAME_EXCHANGE),
        )
        for directory in (old_directory, new_directory):
            touch(directory)
            self._announce(directory)
        moved.ctime_ns = time.time_ns()
        if isinstance(moved, Directory):
            self.nodes.directory_changes(moved.ino)
        if replaced is not None:
            self._name_lost(replaced)

    def _name_lost(self, inode: Inode) -> None:
        inode.ctime_ns = time.time_ns()
        self._contents.note_names(inode)
        if isinstance(inode, Directory):
            self.nodes.directory_changes(inode.ino)
        if inode.parent is not None:
            return
        self._contents.doom(inode)
        if inode.nlookup == 0:
            self._let_go(inode)

    def reap(self) -> int:
        """Unlink the objects that nobody needs any more; returns how many have to wait.

        An object waits until its file is forgotten and the record that took its last name is
        durable: call this after a sync. Never raises OSError.
        """
        self._contents.reap()
        return self._contents.n_doomed

    # --- file content -----------------------------------------------------------------------

    def open(self, ino: int) -> None:
        """Make the native half able to read (and, with an object, write) a file. Idempotent."""
        self._contents.open(self._file(ino))

    def copy_up(self, ino: int) -> None:
        """Make sure that a file has an object to be written to. Idempotent.

        Raises OSError, and then all is as before.
        """
        self._contents.copy_up(self._file(ino))

    def _file(self, ino: int) -> File:
        inode = self._namespace.get(ino)
        if isinstance(inode, Directory):
            raise fail(errno.EISDIR)
        if not isinstance(inode, File):
            raise fail(errno.EINVAL)
        return inode

    # --- durability and the whole -----------------------------------------------------------

    def _append(self, record: records.Record, label: str) -> None:
        self._stack.live.append(record.encode(), label=label)

    def sync(self) -> None:
        """Return when all names and attributes up to now are durable. Any thread may call."""
        self._stack.live.sync()

    def fsyncdir(self, ino: int) -> None:  # noqa: ARG002 - one journal serves all
        """Return when the entries of a directory are durable; all others are then too."""
        self.sync()

    def find_object(self, object_id: int, *, is_live: bool) -> bytes | None:
        """Return a path of the file that has this object, or None. For log lines: it looks at
        every file."""
        for inode in self._namespace.inodes.values():
            if isinstance(inode, File) and any(
                piece.object_id == object_id and self._stack.is_live(piece.layer) == is_live
                for piece in inode.pieces
            ):
                return self._namespace.path_of(inode)
        return None

    @property
    def reserve_bytes(self) -> int:
        """Free space that is kept for what the kernel has taken for written without asking."""
        return self._reserve_bytes

    @reserve_bytes.setter
    def reserve_bytes(self, n_bytes: int) -> None:
        self._reserve_bytes = n_bytes
        self.nodes.set_reserve(n_bytes)

    def statfs(self) -> os.statvfs_result:
        """Return what statvfs(2) says of the file system that the diff is on, reserve and all."""
        return os.fstatvfs(self._stack.live.objects.fd)

    def wal_out(self) -> None:
        """Make the root's pg_wal a link to the diff's plain directory, whatever it was before."""
        if is_wal_out(self._namespace):
            return
        self._append(records.WalOut(), "wal_out")
        for inode in apply_wal_out(self._namespace):
            self._name_lost(inode)
        touch(self._namespace.root)
        self._announce(self._namespace.root)

    def begin_seal(self, new_live: Path, child: Child | None = None) -> Seal:
        """Begin to seal what is written so far; see ``sealing``. Hydration must not be at work.

        Raises OSError.
        """
        return Seal(self._stack, self._namespace, self._contents, new_live, child)

    def seal(self, new_live: Path, child: Child | None = None) -> Sealed:
        """Do all of a seal here and now. Raises OSError, HostError, BrokenSealError.

        The first two leave all as it was, or, if the child could not be finished, no child.
        """
        seal = self.begin_seal(new_live, child)
        try:
            seal.prepare()
            sealed = seal.switch()
            seal.finish()
        except BrokenSealError:
            raise
        except BaseException:
            seal.cancel()
            raise
        self.hydration.forget()
        return sealed

    def restack(self, run: Sequence[LayerRef], new: Layer, origins: Origins) -> bool:
        """Go over to the sealed layer ``new``, which was folded of ``run``; see ``restacking``.

        Returns False if the stack has no such run. ``new`` is the tree's if this returns True.
        Hydration must not be at work. Raises BusyError, DiffError, OSError, BrokenSealError.
        """
        restack = Restack(self._stack, self._namespace, self._contents, run, new, origins)
        if not restack.switch():
            return False
        self.hydration.forget()
        return True

    def link_out(self, target: Path) -> None:
        """Make the empty directory ``target`` this tree in plain files, linked to the objects.

        All has to be hydrated. Nothing is durable on return. Raises OSError.
        """
        Detachment(self._stack, self._namespace, self._attributes, target).run()

    def counters(self) -> dict[str, int]:
        """Return what this half counts; the native half has its own counters."""
        return {
            **self._contents.counters,
            "inodes": len(self._namespace.inodes),
            "directories_listed": self._namespace.n_loaded,
            "objects_to_reap": self._contents.n_doomed,
            "journal_bytes": self._stack.live.journal.end,
            "journal_synced_bytes": self._stack.live.journal.synced,
            "layers": len(self._stack.layers) - 1,
        }

    def close(self) -> None:
        """Make everything durable and end; the kernel must not send requests any more. Idempotent.

        All descriptors are closed also when something could not be made durable: then raises the
        first OSError.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            try:
                self._contents.sync_all()
            finally:
                self.sync()
            self.reap()
            self._stack.live.end_session()
        finally:
            self.nodes.close()
            for layer in self._stack.layers:
                layer.close()
