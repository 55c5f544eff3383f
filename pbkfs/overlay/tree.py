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
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pbkfs import _native
from pbkfs.backup.base import Base
from pbkfs.overlay import journal as records
from pbkfs.overlay.diff import EMPTY_MAP, Diff, Named, check_layers
from pbkfs.overlay.inode import Attr, Directory, File, Inode, Piece, SymbolicLink
from pbkfs.overlay.journal import BLOCK_BYTES, TARGET_MAX
from pbkfs.overlay.namespace import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ROOT_INO,
    Namespace,
    fail,
)
from pbkfs.overlay.replay import WAL_NAME, Replay, apply_wal_out
from pbkfs.overlay.stack import Stack, count_blocks
from pbkfs.pgdata import is_relation_file

__all__ = ["RENAME_EXCHANGE", "RENAME_NOREPLACE", "Attr", "Tree"]

# Up to this size a file that is no relation is copied whole at its first write.
MAX_WHOLE_BYTES = 1 << 20

_DIRECTORY_BYTES = 4096
_SECTOR_BYTES = 512

_log = logging.getLogger(__name__)


class Tree:
    """See the module. ``nodes`` is the native half; fuse's dispatcher works on it directly."""

    ROOT: ClassVar[int] = ROOT_INO

    def __init__(
        self,
        base: Base,
        diff: Diff,
        sealed: Sequence[Diff] = (),
        *,
        owner: tuple[int, int],
        log_fd: int,
        index_bytes: int = 64 << 20,
    ) -> None:
        """Replay the journals of ``sealed`` (newest first) and of ``diff``, and recover ``diff``.

        ``owner`` (uid, gid) owns what comes from the base. ``log_fd`` takes the native half's log
        lines. The tree owns diff and layers from now on, also if this raises: DiffError if they
        do not fit each other or are damaged, HostError.
        """
        self._diff = diff
        self._stack = Stack(base, [*reversed(sealed), diff])
        self._owner = owner
        self._namespace = Namespace(base, owner, time.time_ns())
        self._doomed: dict[int, tuple[int, int]] = {}
        self._counters = dict.fromkeys(
            ("copied_up_whole", "copied_up_mapped", "copied_up_bytes", "objects_reaped"), 0
        )
        self._is_closed = False
        try:
            check_layers(diff, sealed)
            created = self._replay()
            named = self._find_named(created)
            for layer, found in zip(self._stack.layers[:-1], named[:-1], strict=True):
                layer.check_objects(found)
            diff.start(named[-1], owner)
            self.nodes = _native.Nodes(
                diff.journal, diff.objects.fd, log_fd, index_bytes=index_bytes
            )
            self._finish_truncations(named[-1])
        except BaseException:
            for layer in self._stack.layers:
                layer.close()
            raise

    def _replay(self) -> set[int]:
        created: set[int] = set()
        for number, layer in enumerate(self._stack.layers):
            replay = Replay(self._namespace, self._stack, number)
            replay.run(layer, layer.names)
            created = replay.created
        return created

    def _find_named(self, created: set[int]) -> list[dict[int, Named]]:
        """Return, for each layer, the objects that a name leads to."""
        named: list[dict[int, Named]] = [{} for _ in self._stack.layers]
        live = len(named) - 1
        for inode in self._namespace.inodes.values():
            if isinstance(inode, File) and inode.pieces:
                path = self._namespace.path_of(inode) or b""
                for layer, object_id, is_mapped in inode.pieces:
                    is_created = layer == live and object_id in created
                    named[layer][object_id] = Named(path, is_created, is_mapped)
        return named

    def _finish_truncations(self, named: dict[int, Named]) -> None:
        """Record the limits that a crash between truncation and LIMIT record left out.

        Without it, the old content would come back from below once the file grows again. The cut
        block, if it is one, is made the object's own first, because its tail must not come back
        either.
        """
        for object_id, found in named.items():
            if not found.is_mapped:
                continue
            page_map = self._diff.page_maps.get(object_id, EMPTY_MAP)
            if page_map.is_whole:
                continue
            file = self._namespace.resolve(found.path)
            assert isinstance(file, File)
            size = self._diff.objects.stat(object_id).st_size
            self._stack.load(file)
            if count_blocks(size) >= min(page_map.limit, count_blocks(file.size)):
                continue
            self.open(file.ino)
            block, n_bytes = divmod(size, BLOCK_BYTES)
            if n_bytes:
                start = block * BLOCK_BYTES
                self.nodes.write(file.ino, start, self.nodes.read(file.ino, start, n_bytes))
                self.nodes.fsync(file.ino, False)
            self._append(records.encode_limit(object_id, count_blocks(size)), "limit")

    # --- lookups ----------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Attr:
        """Return what ``name`` is, and count one more lookup of it."""
        inode = self._namespace.child(self._namespace.get_directory(parent), name)
        attr = self._attr(inode)
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
        if inode.nlookup:
            return
        if inode.parent is None:
            self._release(inode)
        elif (
            isinstance(inode, File)
            and self._stack.live_piece(inode) is None
            and self.nodes.has(ino)
        ):
            # Only a node with an object knows what nobody else knows: its page map.
            self.nodes.remove(ino)

    def _release(self, inode: Inode) -> None:
        if self.nodes.has(inode.ino):
            self.nodes.remove(inode.ino)
        self._namespace.inodes.pop(inode.ino, None)

    def readdir(self, ino: int, start: int) -> Iterator[tuple[bytes, Attr, int]]:
        """Yield (name, attributes, cookie) of the entries after cookie ``start`` (0: all).

        No "." and "..", no lookup is counted.
        """
        directory = self._namespace.get_directory(ino)
        for name, inode, cookie in self._namespace.entries(directory, start):
            yield name, self._attr(inode), cookie

    # --- attributes -------------------------------------------------------------------------

    def getattr(self, ino: int) -> Attr:
        """Return the attributes of an inode, also of one without a name."""
        return self._attr(self._namespace.get(ino))

    def _attr(self, inode: Inode) -> Attr:
        if isinstance(inode, File):
            return self._file_attr(inode)
        if isinstance(inode, Directory):
            self._namespace.children(inode)
            nlink = 0 if inode.parent is None else 2 + inode.n_directories
            size, blocks = _DIRECTORY_BYTES, _DIRECTORY_BYTES // _SECTOR_BYTES
        else:
            nlink, size, blocks = inode.n_names, len(self._target(inode)), 0
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

    def _file_attr(self, file: File) -> Attr:
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
        found = self._diff.objects.stat(piece.object_id)
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
        before = self._attr(inode)
        _check_owner(before, uid, gid)
        if size is not None:
            if isinstance(inode, Directory):
                raise fail(errno.EISDIR)
            if not isinstance(inode, File):
                raise fail(errno.EINVAL)
            self._resize(inode, before.size, size)
            if mtime_ns is None and self._stack.live_piece(inode) is None:
                mtime_ns = time.time_ns()
        if (mode, uid, gid, atime_ns, mtime_ns) != (None,) * 5:
            piece = self._stack.live_piece(inode) if isinstance(inode, File) else None
            if piece is not None:
                self._set_object_attributes(piece, mode, uid, gid, atime_ns, mtime_ns)
            else:
                self._set_memory_attributes(inode, mode, uid, gid, atime_ns, mtime_ns)
        return self._attr(inode)

    def _resize(self, file: File, old_size: int, size: int) -> None:
        if self._stack.live_piece(file) is None:
            if size == old_size:
                return
            if size == 0:
                self._copy_up(file, is_emptied=True)
                return
            self._copy_up(file)
        self.open(file.ino)
        self.nodes.truncate(file.ino, size)

    def _set_object_attributes(
        self,
        piece: Piece,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        atime_ns: int | None,
        mtime_ns: int | None,
    ) -> None:
        objects = self._diff.objects
        with objects.pinned(piece.object_id) as path:
            found = objects.stat(piece.object_id)
            new_uid = found.st_uid if uid is None else uid
            new_gid = found.st_gid if gid is None else gid
            if (new_uid, new_gid) != (found.st_uid, found.st_gid):
                os.chown(path, new_uid, new_gid)
            # After the owner, because a change of owner clears the set-id bits.
            if mode is not None:
                os.chmod(path, stat.S_IMODE(mode))
            if atime_ns is not None or mtime_ns is not None:
                times = (
                    found.st_atime_ns if atime_ns is None else atime_ns,
                    found.st_mtime_ns if mtime_ns is None else mtime_ns,
                )
                os.utime(path, ns=times)

    def _set_memory_attributes(
        self,
        inode: Inode,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        atime_ns: int | None,
        mtime_ns: int | None,
    ) -> None:
        path = self._namespace.path_of(inode)
        if path is not None:
            mask = sum(
                bit
                for bit, value in (
                    (records.ATTR_MODE, mode),
                    (records.ATTR_UID, uid),
                    (records.ATTR_GID, gid),
                    (records.ATTR_ATIME, atime_ns),
                    (records.ATTR_MTIME, mtime_ns),
                )
                if value is not None
            )
            record = records.SetAttr(
                mask,
                stat.S_IMODE(mode or 0),
                uid or 0,
                gid or 0,
                atime_ns or 0,
                mtime_ns or 0,
                path,
            )
            self._append(record.encode(), "attr")
        if mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
        if uid is not None:
            inode.uid = uid
        if gid is not None:
            inode.gid = gid
        if atime_ns is not None:
            inode.atime_ns = atime_ns
        if mtime_ns is not None:
            inode.mtime_ns = mtime_ns
        inode.ctime_ns = time.time_ns()

    def readlink(self, ino: int) -> bytes:
        """Return a symbolic link's target."""
        return self._target(self._namespace.get(ino))

    def _target(self, inode: Inode) -> bytes:
        if not isinstance(inode, SymbolicLink):
            raise fail(errno.EINVAL)
        if inode.target is None:
            return os.fsencode(self._diff.wal_path)
        return inode.target

    # --- new names --------------------------------------------------------------------------

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a regular file, ready to be written; counts a lookup. Raises FileExistsError.

        An unprivileged worker can give nothing away: then the file is its own user's, whoever
        asked.
        """
        directory, uid, gid, mode = self._prepare_new(parent, name, uid, gid, mode)
        path = self._namespace.path_in(directory, name)
        objects = self._diff.objects
        object_id = objects.make(mode, uid, gid)
        try:
            now = time.time_ns()
            file = File(self._namespace.new_number(), mode, uid, gid, now, 0)
            file.pieces = (self._live_piece(object_id, is_mapped=False),)
            # Before the record, because it can fail; nobody knows this inode yet.
            self.nodes.add(file.ino, 0, ())
            try:
                self.nodes.attach(
                    file.ino, object_id, bitmap=None, limit=0, mapped=False, fresh=True
                )
                self._append(records.Create(object_id, path).encode(), "create")
            except BaseException:
                self.nodes.remove(file.ino)
                raise
        except BaseException:
            objects.remove(object_id)
            raise
        return self._added(directory, name, file)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attr:
        """Make a directory; counts a lookup."""
        directory, uid, gid, mode = self._prepare_new(parent, name, uid, gid, mode)
        # Source: inode_init_owner in Linux' fs/inode.c: a directory inherits the bit too.
        mode |= directory.mode & stat.S_ISGID
        now = time.time_ns()
        path = self._namespace.path_in(directory, name)
        self._append(records.Mkdir(mode, uid, gid, now, path).encode(), "mkdir")
        made = Directory(self._namespace.new_number(), mode, uid, gid, now)
        return self._added(directory, name, made)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Attr:
        """Make a symbolic link; counts a lookup."""
        directory, uid, gid, _ = self._prepare_new(parent, name, uid, gid, 0)
        if not target:
            raise fail(errno.ENOENT)
        if len(target) > TARGET_MAX:
            raise fail(errno.ENAMETOOLONG)
        now = time.time_ns()
        path = self._namespace.path_in(directory, name)
        self._append(records.Symlink(uid, gid, now, path, target).encode(), "symlink")
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
            # Names of one file meet in its object, whatever later reads the diff on its own.
            self._copy_up(inode)
        path = self._namespace.path_in(directory, new_name)
        self._append(records.Link(existing, path).encode(), "link")
        inode.ctime_ns = time.time_ns()
        return self._added(directory, new_name, inode)

    def _prepare_new(
        self, parent: int, name: bytes, uid: int, gid: int, mode: int
    ) -> tuple[Directory, int, int, int]:
        """Check a new name; return its directory and the owner and mode it will have."""
        directory = self._namespace.get_directory(parent)
        self._namespace.check_new(directory, name)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        if os.geteuid() != 0:
            uid = os.geteuid()
            gid = gid if gid == os.getegid() or gid in os.getgroups() else os.getegid()
        return directory, uid, gid, stat.S_IMODE(mode)

    def _added(self, directory: Directory, name: bytes, inode: Inode) -> Attr:
        self._namespace.add(directory, name, inode)
        _touch(directory)
        inode.nlookup += 1
        return self._attr(inode)

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
        path = self._namespace.path_in(directory, name)
        self._append(records.Remove(path).encode(), "remove")
        inode = self._namespace.drop(directory, name)
        _touch(directory)
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
        self._append(record.encode(), "rename")
        moved = names.child(old_directory, old_name)
        replaced = names.rename(
            old_directory,
            old_name,
            new_directory,
            new_name,
            is_exchange=bool(flags & RENAME_EXCHANGE),
        )
        _touch(old_directory)
        _touch(new_directory)
        moved.ctime_ns = time.time_ns()
        if replaced is not None:
            self._name_lost(replaced)

    def _name_lost(self, inode: Inode) -> None:
        inode.ctime_ns = time.time_ns()
        if inode.parent is not None:
            return
        piece = self._stack.live_piece(inode) if isinstance(inode, File) else None
        if piece is not None:
            self._doomed[piece.object_id] = (self._diff.journal.end, inode.ino)
        if inode.nlookup == 0:
            self._release(inode)

    def reap(self) -> int:
        """Unlink the objects that nobody needs any more; returns how many have to wait.

        An object waits until its file is forgotten and the record that took its last name is
        durable: call this after a sync. Never raises OSError; what cannot be unlinked is left to
        the next mount.
        """
        synced = self._diff.journal.synced
        for object_id, (end, ino) in list(self._doomed.items()):
            if end > synced or ino in self._namespace.inodes:
                continue
            del self._doomed[object_id]
            try:
                self._diff.objects.remove(object_id)
                self._counters["objects_reaped"] += 1
            except OSError as error:
                _log.warning("%s: cannot remove object %x: %s", self._diff.path, object_id, error)
        return len(self._doomed)

    # --- file content -----------------------------------------------------------------------

    def open(self, ino: int) -> None:
        """Make the native half able to read (and, with an object, write) a file. Idempotent."""
        file = self._file(ino)
        if self.nodes.has(ino):
            return
        piece = self._stack.live_piece(file)
        if piece is not None and not piece.is_mapped:
            self.nodes.add(ino, 0, ())
        else:
            self._stack.load(file)
            self.nodes.add(ino, file.size, self._stack.sources(file))
        if piece is not None:
            try:
                self._attach(file, piece)
            except BaseException:
                self.nodes.remove(ino)
                raise

    def _attach(self, file: File, piece: Piece) -> None:
        page_map = self._diff.page_maps.get(piece.object_id, EMPTY_MAP)
        if not piece.is_mapped or page_map.is_whole:
            self.nodes.attach(
                file.ino, piece.object_id, bitmap=None, limit=0, mapped=False, fresh=False
            )
        else:
            size = self._diff.objects.stat(piece.object_id).st_size
            self.nodes.attach(
                file.ino,
                piece.object_id,
                bitmap=page_map.bitmap,
                limit=self._stack.live_limit(file, piece, size),
                mapped=True,
                fresh=False,
            )
        # The node has it now, and keeps it: a node with an object stays until the file is gone.
        self._diff.page_maps.pop(piece.object_id, None)

    def copy_up(self, ino: int) -> None:
        """Make sure that a file has an object to be written to. Idempotent.

        Durable on return, but for the record: a crash finds the lower version or the copy, never
        a part. Raises OSError, and then all is as before.
        """
        self._copy_up(self._file(ino))

    def _copy_up(self, file: File, *, is_emptied: bool = False) -> None:
        """``is_emptied``: the copy is empty, because the file is being truncated to nothing."""
        piece = self._stack.live_piece(file)
        if piece is not None:
            self.open(file.ino)
            if not self.nodes.has_object(file.ino):
                self._attach(file, piece)
            return
        self.open(file.ino)
        self._stack.load(file)
        path = self._namespace.path_of(file)
        is_mapped = not is_emptied and file.size > 0 and self._is_mapped(file, path)
        now = time.time_ns()

        def fill(fd: int) -> None:
            if is_mapped:
                # A size that is not durable would lose the whole file to a power cut.
                os.ftruncate(fd, file.size)
            elif not is_emptied:
                self.nodes.copy_to(file.ino, fd)

        objects = self._diff.objects
        object_id = objects.make_filled(
            fill,
            attributes=(stat.S_IMODE(file.mode), file.uid, file.gid),
            times_ns=(file.atime_ns, now if is_emptied else file.mtime_ns),
        )
        piece = self._live_piece(object_id, is_mapped=is_mapped)
        if path is not None:
            try:
                self._append(records.CopyUp(object_id, is_mapped, path).encode(), "copy_up")
            except BaseException:
                objects.remove(object_id)
                raise
        else:
            self._doomed[object_id] = (0, file.ino)
        file.pieces = (piece, *file.pieces)
        self._counters["copied_up_mapped" if is_mapped else "copied_up_whole"] += 1
        if not is_mapped and not is_emptied:
            self._counters["copied_up_bytes"] += file.size
        self._attach(file, piece)

    def _is_mapped(self, file: File, path: bytes | None) -> bool:
        return file.size > MAX_WHOLE_BYTES or is_relation_file(path or file.origin or b"")

    def _file(self, ino: int) -> File:
        inode = self._namespace.get(ino)
        if isinstance(inode, Directory):
            raise fail(errno.EISDIR)
        if not isinstance(inode, File):
            raise fail(errno.EINVAL)
        return inode

    def _live_piece(self, object_id: int, *, is_mapped: bool) -> Piece:
        return Piece(len(self._stack.layers) - 1, object_id, is_mapped)

    # --- durability and the whole -----------------------------------------------------------

    def _append(self, payload: bytes, label: str) -> None:
        self._diff.append(payload, label=label)

    def sync(self) -> None:
        """Return when all names and attributes up to now are durable. Any thread may call."""
        self._diff.sync()

    def fsyncdir(self, ino: int) -> None:  # noqa: ARG002 - one journal serves all
        """Return when the entries of a directory are durable; all others are then too."""
        self.sync()

    def statfs(self) -> os.statvfs_result:
        """Return what statvfs(2) says of the file system that the diff is on."""
        return os.fstatvfs(self._diff.objects.fd)

    def wal_out(self) -> None:
        """Make the root's pg_wal a link to the diff's plain directory, whatever it was before."""
        present = self._namespace.children(self._namespace.root).get(WAL_NAME)
        if isinstance(present, SymbolicLink) and present.target is None:
            return
        self._append(records.WalOut().encode(), "wal_out")
        for inode in apply_wal_out(self._namespace):
            self._name_lost(inode)
        _touch(self._namespace.root)

    def counters(self) -> dict[str, int]:
        """Return what this half counts; the native half has its own counters."""
        return {
            **self._counters,
            "inodes": len(self._namespace.inodes),
            "directories_listed": self._namespace.n_loaded,
            "objects_to_reap": len(self._doomed),
            "journal_bytes": self._diff.journal.end,
            "journal_synced_bytes": self._diff.journal.synced,
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
        first: OSError | None = None
        for inode in self._namespace.inodes.values():
            if isinstance(inode, File) and self._stack.live_piece(inode) is not None:
                try:
                    if self.nodes.has(inode.ino) and self.nodes.has_object(inode.ino):
                        self.nodes.fsync(inode.ino, False)
                except OSError as error:
                    _log.error("%s: cannot sync inode %d: %s", self._diff.path, inode.ino, error)
                    first = first or error
        try:
            self.sync()
            self.reap()
        except OSError as error:
            first = first or error
        self.nodes.close()
        for layer in self._stack.layers:
            layer.close()
        if first is not None:
            raise first


def _touch(directory: Directory) -> None:
    directory.mtime_ns = directory.ctime_ns = time.time_ns()


def _check_owner(before: Attr, uid: int | None, gid: int | None) -> None:
    """Raise EPERM for a change of owner that this worker could not make to an object."""
    if os.geteuid() == 0:
        return
    if uid is not None and uid not in (before.uid, os.geteuid()):
        raise fail(errno.EPERM)
    if gid is not None and gid not in (before.gid, os.getegid()) and gid not in os.getgroups():
        raise fail(errno.EPERM)
