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
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from pbkfs import _native
from pbkfs.backup.base import Base
from pbkfs.overlay import journal as records
from pbkfs.overlay import ledger as ledgers
from pbkfs.overlay.attributes import Attributes, Change, check_owner, new_owner, touch
from pbkfs.overlay.contents import Contents
from pbkfs.overlay.detachment import Detachment
from pbkfs.overlay.diff import Diff, check_layers
from pbkfs.overlay.folding import Origins
from pbkfs.overlay.hydration import Hydration
from pbkfs.overlay.inode import PINNED, Attr, Directory, File, Inode, SymbolicLink
from pbkfs.overlay.journal import TARGET_MAX
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.ledger import Add, Drop, Ledger, Numbers, orphan_frame
from pbkfs.overlay.namespace import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ROOT_INO,
    Namespace,
    fail,
)
from pbkfs.overlay.replay import Replay, apply_wal_out, find_named, is_wal_out
from pbkfs.overlay.restacking import Restack
from pbkfs.overlay.revival import revive
from pbkfs.overlay.sealing import BrokenSealError, Child, Seal, Sealed
from pbkfs.overlay.stack import Stack
from pbkfs.overlay.superblock import LayerRef

# Of the kernel's number of a request. Source: linux/fuse.h, FUSE_UNIQUE_RESEND.
_IS_RESENT = 1 << 63

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "Attr", "Tree"]


class Moment(NamedTuple):
    """What was there at one time."""

    live: Layer
    synced: records.Synced


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
        numbers: Numbers | None = None,
    ) -> None:
        """Replay the journals of ``sealed`` (newest first) and of ``diff``, and recover ``diff``.

        ``owner`` (uid, gid) owns what comes from the base. ``log_fd`` takes the native half's log
        lines. ``verifies_pages``: look at pages of the base when they are first read. ``numbers``:
        what the kernel knows of a mount that is taken over, decided. The tree
        owns diff and layers from now on, also if this raises: DiffError if they do not fit each
        other or are damaged, HostError.
        """
        self._stack = Stack(base, diff, sealed)
        last = Tree.ROOT if numbers is None else numbers.last
        self._namespace = Namespace(base, owner, time.time_ns(), last)
        self._attributes = Attributes(self._stack, self._namespace)
        self._is_closed = False
        try:
            check_layers(diff, sealed)
            created = self._replay()
            doomed: dict[tuple[Layer, int], int] = {}
            if numbers is not None:
                self._namespace.adopt(numbers)
                doomed = revive(self._stack, self._namespace, numbers)
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
            for (layer, object_id), ino in doomed.items():
                self._contents.doom_object(layer, object_id, ino)
            self._is_taken_over = numbers is not None
            self._doubtful: set[int] = set()
            self._done = {} if numbers is None else numbers.done
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

    # --- for whoever takes over -------------------------------------------------------------

    def keep_ledger(self, ledger: Ledger, known: Container[int] = ()) -> None:
        """Write down in ``ledger`` what a process needs that takes over from this one.

        Before anybody is told a number; ``known`` are directories whose numbers it has already.
        """
        self._namespace.keep_ledger(ledger, known)
        ledger.on_rewrite(self._snapshot)

    def _snapshot(self) -> Iterator[bytes]:
        yield from self._namespace.snapshot()
        for inode in self._namespace.inodes.values():
            if inode.parent is None:
                yield orphan_frame(inode.ino, self._contents.describe(inode))

    def was_done(self, number: int) -> int | None:
        """Begin to carry out the kernel's request ``number`` to change names; 0 is one of our own.

        Returns None, or, if it is sent again and the worker that had it had done it already, the
        inode that got a name by it (0 if none): then the answer is all that is missing.
        """
        if self._namespace.ledger is not None:
            self._namespace.ledger.request = number & ~_IS_RESENT
        return self._done.get(number & ~_IS_RESENT) if number & _IS_RESENT else None

    def take_doubtful(self) -> set[int]:
        """Return the inodes without a name that the kernel has forgotten since the last call.

        It has most likely forgotten all lookups; that it has not, it alone can say. About others
        it must not be asked, because it might be about to write to them, and wait for us.
        """
        found, self._doubtful = self._doubtful, set()
        return found

    def abandon(self, ino: int) -> None:
        """Take note that the kernel does not know an inode without names: never again."""
        inode = self._namespace.inodes.get(ino)
        if inode is not None and inode.parent is None:
            self.forget(ino, inode.nlookup)

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
        elif inode.parent is None and inode.nlookup > PINNED // 2:
            self._doubtful.add(ino)

    def _let_go(self, inode: Inode) -> None:
        self._contents.close_unused(inode)
        if inode.parent is None:
            self._namespace.forget(inode)
            if isinstance(inode, File):
                self._contents.reap_newborn(inode)
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
        """Return the paths of the files that the kernel has open; without those without a name.

        After a takeover nobody has counted that: it is all that was ever looked up or listed.
        """
        inodes = self._namespace.inodes
        found = [inodes[ino] for ino in self.nodes.opened() if ino in inodes]
        if self._is_taken_over:
            found = [i for i in inodes.values() if isinstance(i, File) and i.nlookup > 0]
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
        if inode.parent is None:
            self._contents.note_orphan(inode)
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
        cookie = self._namespace.new_number()

        def append(record: records.Create) -> None:
            self._append(record, "create", lambda: [Add(parent, name, file.ino, cookie)])

        self._contents.create(file, mode, uid, gid, path, append)
        return self._added(directory, name, file, cookie)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory; counts a lookup."""
        directory, uid, gid = self._prepare_new(parent, name, uid, gid)
        # Source: inode_init_owner in Linux' fs/inode.c: a directory inherits the bit too.
        mode = stat.S_IMODE(mode) | directory.mode & stat.S_ISGID
        now = time.time_ns()
        made = Directory(self._namespace.new_number(), mode, uid, gid, now)
        path = self._namespace.path_in(directory, name)
        return self._add(directory, name, made, records.Mkdir(mode, uid, gid, now, path), "mkdir")

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link; counts a lookup."""
        directory, uid, gid = self._prepare_new(parent, name, uid, gid)
        if not target:
            raise fail(errno.ENOENT)
        if len(target) > TARGET_MAX:
            raise fail(errno.ENAMETOOLONG)
        now = time.time_ns()
        link = SymbolicLink(self._namespace.new_number(), uid, gid, now, target)
        path = self._namespace.path_in(directory, name)
        record = records.Symlink(uid, gid, now, path, target)
        return self._add(directory, name, link, record, "symlink")

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
        attr = self._add(directory, new_name, inode, records.Link(existing, path), "link")
        attr.ctime_ns = inode.ctime_ns = max(attr.ctime_ns, time.time_ns())
        return attr

    def _prepare_new(
        self, parent: int, name: bytes, uid: int, gid: int
    ) -> tuple[Directory, int, int]:
        """Check a new name; return its directory and the owner that the new inode will have."""
        directory = self._namespace.get_directory(parent)
        self._namespace.check_new(directory, name)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        return directory, *new_owner(uid, gid)

    def _add(
        self, directory: Directory, name: bytes, inode: Inode, record: records.Record, label: str
    ) -> Attr:
        cookie = self._namespace.new_number()
        self._append(record, label, lambda: [Add(directory.ino, name, inode.ino, cookie)])
        return self._added(directory, name, inode, cookie)

    def _added(self, directory: Directory, name: bytes, inode: Inode, cookie: int) -> Attr:
        self._namespace.add(directory, name, inode, cookie)
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
        record = records.Remove(self._namespace.path_in(directory, name))
        self._append(record, "remove", lambda: [self._dropped(directory, name)])
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
        moved = names.child(old_directory, old_name)
        is_exchange = bool(flags & RENAME_EXCHANGE)
        cookies = (names.new_number(), names.new_number())

        def changes() -> list[ledgers.Change]:
            found: list[ledgers.Change] = []
            replaced = names.children(new_directory).get(new_name)
            if replaced is not None:
                found.append(self._dropped(new_directory, new_name, is_kept=is_exchange))
            found.append(Drop(old_parent, old_name, None))
            found.append(Add(new_parent, new_name, moved.ino, cookies[0]))
            if is_exchange and replaced is not None:
                found.append(Add(old_parent, old_name, replaced.ino, cookies[1]))
            return found

        self._append(record, "rename", changes)
        replaced = names.rename(
            old_directory,
            old_name,
            new_directory,
            new_name,
            is_exchange=is_exchange,
            cookies=cookies,
        )
        for directory in (old_directory, new_directory):
            touch(directory)
            self._announce(directory)
        moved.ctime_ns = time.time_ns()
        if isinstance(moved, Directory):
            self.nodes.directory_changes(moved.ino)
        if replaced is not None:
            self._name_lost(replaced)

    def _dropped(self, directory: Directory, name: bytes, *, is_kept: bool = False) -> Drop:
        """Return what the ledger is told of a name that goes; ``is_kept``: it gets another one."""
        inode = self._namespace.child(directory, name)
        is_last = inode.n_names == 1 and not is_kept
        return Drop(directory.ino, name, self._contents.describe(inode) if is_last else None)

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

    def _append(
        self, record: records.Record, label: str, changes: Callable[[], Sequence[ledgers.Change]]
    ) -> None:
        """Append a record of names; what it changes is in the ledger before."""
        live, ledger = self._stack.live, self._namespace.ledger
        payload = record.encode()
        if ledger is None:
            live.append(payload, label=label)
            return
        ledger.intend(live.uuid, live.journal.end, payload, changes())
        try:
            live.append(payload, label=label)
        except BaseException:
            ledger.cancel()
            raise

    def sync(self) -> None:
        """Return when all names and attributes up to now are durable. Any thread may call."""
        self._stack.live.sync()

    def now(self) -> Moment:
        """Return what is there now, for ``mark`` once it is synced."""
        return Moment(self._stack.live, self._stack.live.now())

    def mark(self, moment: Moment) -> None:
        """Say on the disk that what was there then has been synced since. Raises OSError."""
        if moment.live is self._stack.live:  # else a seal has said it
            moment.live.mark(moment.synced)

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
        # The server must not run yet, and nobody has been told a number.
        assert self._namespace.ledger is None
        self._stack.live.append(records.WalOut().encode(), label="wal_out")
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

    def leave(self) -> None:
        """Close all descriptors and do nothing else: another process has the tree now."""
        self._is_closed = True
        self.nodes.close()
        for layer in self._stack.layers:
            layer.close()

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
            self._contents.reap(is_over=True)
            self._stack.live.end_session()
        finally:
            self.nodes.close()
            for layer in self._stack.layers:
                layer.close()
