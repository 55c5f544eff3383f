"""The content of files: registering them with the native half, copying up, removing objects.

Owns the native ``Nodes`` and the life of the diff's objects after their making. A file without an
object is read from below; its first change copies it up: whole if it is small and no relation, else
*mapped*, which costs an empty object of the file's size. Used by ``tree`` on its thread.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from pbkfs import _native
from pbkfs.overlay import journal as records
from pbkfs.overlay.inode import NOT_LOADED, File, Inode, Piece
from pbkfs.overlay.journal import BLOCK_BYTES, NO_LIMIT
from pbkfs.overlay.layer import EMPTY_MAP, Layer, Named, PageMap
from pbkfs.overlay.ledger import Orphan
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.revival import describe
from pbkfs.overlay.stack import Stack, count_blocks
from pbkfs.pgdata import first_block_of, is_relation_file

# Up to this size a file that is no relation is copied whole at its first write.
MAX_WHOLE_BYTES = 1 << 20

# Files from which on the end of a mount syncs the file system instead of each of them.
_SYNCFS_FROM = 2000

_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
# Said by the dispatcher, which lets the page wait.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


class Contents:
    """See the module. ``diff`` has to be started."""

    def __init__(
        self,
        stack: Stack,
        namespace: Namespace,
        *,
        log_fd: int,
        index_bytes: int,
        verifies_pages: bool = False,
    ) -> None:
        self._stack = stack
        self._namespace = namespace
        self._verified_by = stack.base.control if verifies_pages else None
        # Layer, object -> (end of the record that took its last name, its inode).
        self._doomed: dict[tuple[Layer, int], tuple[int, int]] = {}
        # Objects of the live layer -> end of the record that made them, until that is durable.
        self._newborn: dict[int, int] = {}
        self._is_syncing = False
        self.counters = dict.fromkeys(
            ("copied_up_whole", "copied_up_mapped", "copied_up_bytes", "objects_reaped"), 0
        )
        self.nodes = _native.Nodes(
            stack.live.journal, stack.live.objects.fd, log_fd, index_bytes=index_bytes
        )
        namespace.tell(self.nodes)

    @property
    def n_doomed(self) -> int:
        """How many objects wait for ``reap``."""
        return len(self._doomed)

    # --- the native half --------------------------------------------------------------------

    def open(self, file: File) -> None:
        """Make the native half able to read (and, with an object, write) a file. Idempotent."""
        if self.nodes.has(file.ino):
            return
        piece = self._stack.live_piece(file)
        if piece is not None and not piece.is_mapped:
            self.nodes.add(file.ino, 0, ())
        else:
            self._stack.load(file)
            self.nodes.add(file.ino, file.size, self._stack.sources(file))
        try:
            self._verify(file)
            self.note_names(file)
            if piece is not None:
                self._attach(file, piece)
            self.nodes.publish(file.ino)
        except BaseException:
            self.nodes.remove(file.ino)
            raise

    def _verify(self, file: File) -> None:
        """Let pages that come from the base be looked at when they are read."""
        control = self._verified_by
        if control is None or file.origin is None:
            return
        first = first_block_of(file.origin, control.relation_segment_blocks)
        if first is not None:
            self.nodes.verify(file.ino, first, control.data_checksum_version == 1)

    def note_names(self, inode: Inode) -> None:
        """Tell the native half how many names a file has: it answers for its attributes, too."""
        if isinstance(inode, File) and self.nodes.has(inode.ino):
            self.nodes.set_links(inode.ino, inode.n_names)

    def _attach(self, file: File, piece: Piece, *, is_fresh: bool = False) -> None:
        page_map = self._stack.live.page_maps.get(piece.object_id, EMPTY_MAP)
        self.nodes.attach(
            file.ino,
            piece.object_id,
            bitmap=page_map.changed,
            # As recorded: an object that is shorter was cut, and the native half records that.
            limit=page_map.limit,
            mapped=piece.is_mapped,
            fresh=is_fresh,
            hydrated=page_map.hydrated,
            whole=page_map.is_whole,
        )
        # The node has it now, and keeps it: a node with an object stays until the file is gone.
        self._stack.live.page_maps.pop(piece.object_id, None)

    def close_unused(self, inode: Inode) -> None:
        """Give back what an inode without lookups costs here.

        Only a node with an object knows what nobody else knows, its page map: that one stays for
        as long as the file has a name.
        """
        if not self.nodes.has(inode.ino):
            return
        has_object = isinstance(inode, File) and self._stack.live_piece(inode) is not None
        if inode.parent is None or not has_object:
            self.nodes.remove(inode.ino)

    def finish_truncations(self, named: Mapping[int, Named]) -> None:
        """Record the truncations that a crash between the object and its records left out.

        Without that, the old content would come back from below once the file grows again, be it in
        a layer above. Opening does it, and holds growth back until it is durable.
        """
        for object_id, found in named.items():
            page_map = self._stack.live.page_maps.get(object_id, EMPTY_MAP)
            if not found.is_mapped or page_map.is_whole or not found.path:
                # Without a path: in use, but removed; opening it does this, too.
                continue
            file = self._namespace.resolve(found.path)
            assert isinstance(file, File)
            self._stack.load(file)
            size = self._stack.live.objects.stat(object_id).st_size
            if _is_cut_unrecorded(page_map, size, file.size):
                self.open(file)

    # --- making and changing ----------------------------------------------------------------

    def create(
        self,
        file: File,
        mode: int,
        uid: int,
        gid: int,
        path: bytes,
        append: Callable[[records.Create], None],
    ) -> None:
        """Make the object of the new file ``file`` and ``append`` the record of it as ``path``.

        Registered before the record is appended, because that can fail; nobody knows the inode
        yet. Raises OSError and leaves nothing.
        """
        objects = self._stack.live.objects
        object_id = self._make(path, lambda: objects.make(mode, uid, gid))
        try:
            self.nodes.add(file.ino, 0, ())
            try:
                piece = self._piece(object_id, is_mapped=False)
                self._attach(file, piece, is_fresh=True)
                append(records.Create(object_id, path))
                self._newborn[object_id] = self._stack.live.journal.end
                self.nodes.publish(file.ino)
            except BaseException:
                self.nodes.remove(file.ino)
                raise
        except BaseException:
            objects.remove(object_id)
            raise
        file.pieces = (piece,)

    def copy_up(self, file: File, *, is_emptied: bool = False) -> None:
        """Make sure that a file has an object to be written to. Idempotent.

        ``is_emptied``: the copy is empty, because the file is being truncated to nothing. Object
        and size are durable before the record is appended: a crash finds the lower version or the
        copy. Raises OSError, and then all is as before.
        """
        self.open(file)
        piece = self._stack.live_piece(file)
        if piece is not None:
            if not self.nodes.has_object(file.ino):
                self._attach(file, piece)
            return
        self._stack.load(file)
        path = self._namespace.path_of(file)
        is_mapped = not is_emptied and self._is_to_be_mapped(file, path)

        def fill(fd: int) -> None:
            if is_mapped:
                # Were this size not durable, a power cut would leave an empty file.
                os.ftruncate(fd, file.size)
            elif not is_emptied:
                self.nodes.copy_to(file.ino, fd)

        objects = self._stack.live.objects
        object_id = self._make(
            path,
            lambda: objects.make_filled(
                fill,
                attributes=(stat.S_IMODE(file.mode), file.uid, file.gid),
                times_ns=(file.atime_ns, time.time_ns() if is_emptied else file.mtime_ns),
            ),
        )
        piece = self._piece(object_id, is_mapped=is_mapped)
        if path is not None:
            try:
                record = records.CopyUp(object_id, is_mapped, path)
                self._stack.live.append(record.encode(), label="copy_up")
            except BaseException:
                objects.remove(object_id)
                raise
        else:
            self._doomed[self._stack.live, object_id] = (0, file.ino)
        file.pieces = (piece, *file.pieces)
        if path is None:
            self.note_orphan(file)
        self.counters["copied_up_mapped" if is_mapped else "copied_up_whole"] += 1
        if not is_mapped and not is_emptied:
            self.counters["copied_up_bytes"] += file.size
        self._attach(file, piece)

    def _make(self, path: bytes | None, make: Callable[[], int]) -> int:
        """Make an object; where descriptors have run out, the native half gives some back.

        A written-back page must not fail for that: its fsync would. Raises OSError.
        """
        while True:
            try:
                return make()
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS and self.nodes.give_back_files():
                    continue
                if error.errno not in _NO_SPACE:
                    _log.error("no object can be made for %r: %s", os.fsdecode(path or b""), error)
                raise

    def adopt(self, file: File, object_id: int, *, is_whole: bool) -> None:
        """Make an object that is durable already the mapped one of a file that has none.

        ``is_whole``: it holds all that is below. Takes the object away where its record can't be
        appended. Raises OSError.
        """
        path = self._namespace.path_of(file)
        assert path is not None
        try:
            record = records.CopyUp(object_id, True, path)
            self._stack.live.append(record.encode(), label="hydrate")
        except BaseException:
            self._stack.live.objects.remove(object_id)
            raise
        piece = self._piece(object_id, is_mapped=True)
        file.pieces = (piece, *file.pieces)
        try:
            if is_whole:
                self._stack.live.append(records.encode_whole(object_id), label="whole")
                self._stack.live.page_maps[object_id] = PageMap(b"", NO_LIMIT, True)
        finally:
            if is_whole and file.nlookup == 0:
                # Nobody uses it, and nobody has to remember pages of it.
                self.close_idle(file)
            elif self.nodes.has(file.ino):  # else it was forgotten meanwhile, and is opened later
                self._attach(file, piece)

    def close_idle(self, file: File) -> None:
        """Let the native half forget a file whose page map is known here."""
        if self.nodes.has(file.ino):
            self.nodes.remove(file.ino)

    def _is_to_be_mapped(self, file: File, path: bytes | None) -> bool:
        if file.size == 0:
            return False
        return file.size > MAX_WHOLE_BYTES or is_relation_file(path or file.origin or b"")

    def _piece(self, object_id: int, *, is_mapped: bool) -> Piece:
        return Piece(len(self._stack.layers) - 1, object_id, is_mapped)

    def resize(self, file: File, old_size: int, size: int) -> None:
        """Truncate or extend a file. One without an object that has the size already stays so."""
        if self._stack.live_piece(file) is None:
            if size == old_size:
                return
            if size == 0:
                self.copy_up(file, is_emptied=True)
                return
        self.copy_up(file)
        self.nodes.truncate(file.ino, size)

    # --- the end of objects -----------------------------------------------------------------

    def doom(self, inode: Inode) -> None:
        """Note that the newest record took the last name of ``inode`` away."""
        piece = self._stack.live_piece(inode) if isinstance(inode, File) else None
        if piece is not None:
            live = self._stack.live
            self._doomed[live, piece.object_id] = (live.journal.end, inode.ino)

    def doom_object(self, layer: Layer, object_id: int, ino: int) -> None:
        """Note that an object is to go with the inode ``ino``, whose removal is durable."""
        self._doomed[layer, object_id] = (0, ino)

    def note_orphan(self, inode: Inode) -> None:
        """Write down for whoever takes over what an inode without names consists of now."""
        if self._namespace.ledger is not None:
            self._namespace.ledger.orphaned(inode.ino, self.describe(inode))

    def describe(self, inode: Inode) -> Orphan:
        """Return what an inode that has lost its names, or is about to, consists of."""
        doomed: list[list[str | int]] = []
        if inode.parent is None:
            doomed = [
                [layer.uuid.hex, object_id]
                for (layer, object_id), (_, ino) in self._doomed.items()
                if ino == inode.ino
            ]
        elif isinstance(inode, File) and (piece := self._stack.live_piece(inode)) is not None:
            doomed = [[self._stack.live.uuid.hex, piece.object_id]]
        return describe(self._stack, inode, doomed)

    def reap(self, *, is_over: bool = False) -> None:
        """Unlink the objects of forgotten files whose removal is durable; ``is_over``: of all that
        have lost their names, because nobody can use them any more.

        Never raises OSError: what can't be unlinked is left to the next mount. While ``sync_open``
        runs, everything is left to the next call: it may be about to open an object by its path.
        """
        if self._is_syncing and not is_over:
            return
        synced = self._stack.live.journal.synced
        self._newborn = {key: end for key, end in self._newborn.items() if end > synced}
        for (layer, object_id), (end, ino) in list(self._doomed.items()):
            is_used = not is_over and ino in self._namespace.inodes
            # Without an end, its removal was durable before.
            is_durable = not end or end <= layer.journal.synced
            if is_durable and not is_used:
                self._remove_doomed(layer, object_id)

    def reap_newborn(self, file: File) -> None:
        """Unlink the object of a forgotten file at once, where its making is not durable either.

        It was never fsynced then, so a power cut may leave its name with nothing in it. Most files
        that live so short a time never get blocks on the disk below that way.
        """
        piece = self._stack.live_piece(file)
        live = self._stack.live
        if (
            piece is not None
            and not self._is_syncing
            and self._newborn.get(piece.object_id, 0) > live.journal.synced
            and (live, piece.object_id) in self._doomed
        ):
            self._remove_doomed(live, piece.object_id)

    def _remove_doomed(self, layer: Layer, object_id: int) -> None:
        del self._doomed[layer, object_id]
        try:
            layer.objects.remove(object_id)
            self.counters["objects_reaped"] += 1
        except OSError as error:
            _log.warning("%s: cannot remove object %x: %s", layer.path, object_id, error)

    # --- sealing ----------------------------------------------------------------------------

    def live_files(self) -> list[tuple[File, Piece]]:
        """Return the files with an object in the live layer, and that object."""
        return [
            (inode, piece)
            for inode in self._namespace.inodes.values()
            if isinstance(inode, File) and (piece := self._stack.live_piece(inode)) is not None
        ]

    def export_maps(self, files: Iterable[tuple[File, Piece]]) -> dict[int, PageMap]:
        """Return the page maps that only the native half knows, by object."""
        maps = {}
        for file, piece in files:
            if piece.is_mapped and self.nodes.has(file.ino):
                found = self.nodes.page_map(file.ino)
                if found is not None:
                    maps[piece.object_id] = PageMap(*found)
        return maps

    def reseat(self, files: Iterable[tuple[File, Piece]]) -> None:
        """Take note that the objects of ``files`` are no longer live, but sealed."""
        for file, piece in files:
            if not piece.is_mapped:
                file.pieces = (piece,)
            file.size = NOT_LOADED
            if file.nlookup == 0:
                self.close_idle(file)
        self._newborn.clear()
        # Their removal is durable: the sealed journal is.
        self._doomed = {key: (0, ino) for key, (_, ino) in self._doomed.items()}

    def prepare_restack(self, files: Iterable[File]) -> None:
        """Take what the native half needs to read below ``files`` what their pieces say now.

        Raises OSError; ``nodes.cancel_restack`` gives it back.
        """
        for file in files:
            if not self.nodes.has(file.ino):
                continue
            piece = self._stack.live_piece(file)
            if piece is not None and not piece.is_mapped:
                self.nodes.prepare_restack(file.ino, 0, ())
            else:
                self._stack.load(file)
                self.nodes.prepare_restack(file.ino, file.size, self._stack.sources(file))

    def forget_layers(self, layers: Collection[Layer]) -> None:
        """Take note that nothing refers to these sealed layers any more."""
        self._doomed = {key: found for key, found in self._doomed.items() if key[0] not in layers}

    def sync_open(self) -> None:
        """Make what the native half has open durable. Any thread, one at a time. OSError."""
        self._is_syncing = True
        try:
            self.nodes.sync()
        finally:
            self._is_syncing = False

    def sync_all(self) -> None:
        """Make all contents durable. Raises the first OSError, after trying all files.

        Beyond some thousand files one syncfs is faster than a flush of the disk's cache for each;
        below, it would wait for what others wrote to the same file system. Page maps are left to
        be recorded either way. An object whose own sync has failed before is an error for good: the
        kernel may have told of it then, and syncfs does not know.
        """
        first: OSError | None = None
        open_pieces = [
            (file.ino, piece) for file, piece in self.live_files() if self.nodes.has(file.ino)
        ]
        is_synced = False
        if len(open_pieces) > _SYNCFS_FROM:
            try:
                self._stack.live.sync_file_system()
                is_synced = True
            except OSError as error:
                first = error
        for ino, piece in open_pieces:
            try:
                if is_synced and not piece.is_mapped:
                    self.nodes.check_synced(ino)
                else:
                    self.nodes.fsync(ino, True)
            except OSError as error:
                _log.error(
                    "%s: cannot sync object %x: %s", self._stack.live.path, piece.object_id, error
                )
                first = first or error
        if first is not None:
            raise first


def _is_cut_unrecorded(page_map: PageMap, size: int, below: int) -> bool:
    """Return whether an object of ``size`` was truncated and the journal does not say all of that.

    ``below`` is the size of what is below it. pbk_node_attach looks for the same.
    """
    n_blocks, limit = count_blocks(size), min(page_map.limit, count_blocks(below))
    if size >= below or n_blocks > limit:
        return False
    block, n_bytes = divmod(size, BLOCK_BYTES)
    is_changed = int.from_bytes(page_map.changed, "little") >> block & 1
    return n_blocks < limit or (n_bytes > 0 and not is_changed)
