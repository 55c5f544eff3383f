"""Replay: the name records of one layer, applied to the names below it.

Uses the same checks and changes as the live operations of ``tree``, so a record that those would
not have written is recognised as damage. Runs at the start of a mount, on the thread that owns the
tree.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Collection, Iterable

from pbkfs.errors import DiffError, FormatError
from pbkfs.overlay import journal as records
from pbkfs.overlay.inode import NOT_LOADED, Directory, File, Inode, Piece, SymbolicLink
from pbkfs.overlay.journal import RENAME_EXCHANGE
from pbkfs.overlay.layer import Layer, Named
from pbkfs.overlay.namespace import Namespace, fail
from pbkfs.overlay.stack import LayerStack

WAL_NAME = b"pg_wal"


class Replay:
    """Applies the records of layer number ``layer``."""

    def __init__(self, namespace: Namespace, stack: LayerStack, layer: int) -> None:
        self._created: set[int] = set()
        self._next_id = 0
        self._namespace = namespace
        self._stack = stack
        self._layer = layer
        self._is_live = stack.is_live(layer)

    def run(self, layer: Layer, payloads: Iterable[bytes]) -> None:
        """Apply all records. Raises DiffError naming the first one that does not fit."""
        index = 0
        try:
            for index, payload in enumerate(payloads):  # noqa: B007
                self._apply(records.decode(payload))
        except (OSError, FormatError, UnicodeError) as error:
            reason = (
                (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            ).lower()
            record = _describe(payloads, index)
            raise DiffError(
                f"journal of diff {layer.path} does not fit what is below it: "
                f"record {index + 1}, {record}: {reason}",
                hint="Check that base and sealed layers are unchanged since the diff was made.",
            ) from error

    @property
    def created(self) -> set[int]:
        """Objects that were made by CREATE, but for those that are known to have been durable."""
        return {object_id for object_id in self._created if object_id >= self._next_id}

    def _apply(self, record: records.Record) -> None:
        names = self._namespace
        match record:
            case records.Create():
                parent, name = self._new_name(record.path)
                file = File(names.new_number(), 0, 0, 0, 0, 0)
                self._created.add(record.object_id)
                self._put_piece(file, Piece(self._layer, record.object_id, False))
                names.add(parent, name, file)
            case records.CopyUp():
                file = self._file(record.path)
                self._put_piece(file, Piece(self._layer, record.object_id, record.is_mapped))
            case records.Remove():
                parent, name = names.resolve_parent(record.path)
                inode = names.child(parent, name)
                if isinstance(inode, Directory):
                    names.check_rmdir(parent, name)
                self._end(names.drop(parent, name))
            case records.Rename():
                old_parent, old_name = names.resolve_parent(record.old)
                new_parent, new_name = names.resolve_parent(record.new)
                if not names.check_rename(old_parent, old_name, new_parent, new_name, record.flags):
                    raise fail(errno.EEXIST)
                replaced = names.rename(
                    old_parent,
                    old_name,
                    new_parent,
                    new_name,
                    is_exchange=bool(record.flags & RENAME_EXCHANGE),
                )
                if replaced is not None:
                    self._end(replaced)
            case records.Mkdir():
                parent, name = self._new_name(record.path)
                directory = Directory(
                    names.new_number(), record.mode, record.uid, record.gid, record.mtime_ns
                )
                names.add(parent, name, directory)
            case records.Symlink():
                parent, name = self._new_name(record.path)
                link = SymbolicLink(
                    names.new_number(), record.uid, record.gid, record.mtime_ns, record.target
                )
                names.add(parent, name, link)
            case records.Link():
                inode = names.resolve(record.existing)
                if isinstance(inode, Directory):
                    raise fail(errno.EPERM)
                names.add(*self._new_name(record.new), inode)
            case records.SetAttr():
                self._set_attributes(names.resolve(record.path), record)
            case records.WalOut():
                for inode in apply_wal_out(names):
                    self._end(inode)
            case records.Synced():
                self._next_id = record.next_id

    def _new_name(self, path: bytes) -> tuple[Directory, bytes]:
        parent, name = self._namespace.resolve_parent(path)
        self._namespace.check_new(parent, name)
        return parent, name

    def _file(self, path: bytes) -> File:
        inode = self._namespace.resolve(path)
        if not isinstance(inode, File):
            raise fail(errno.EISDIR)
        return inode

    def _put_piece(self, file: File, piece: Piece) -> None:
        if file.pieces and file.pieces[0].layer == self._layer:
            raise fail(errno.EEXIST)
        if self._is_live:
            file.pieces = (piece, *file.pieces)
            return
        file.pieces = (piece, *file.pieces) if piece.is_mapped else (piece,)
        file.size = NOT_LOADED

    def _set_attributes(self, inode: Inode, record: records.SetAttr) -> None:
        if isinstance(inode, File):
            self._stack.load(inode)
        if record.mask & records.ATTR_MODE:
            inode.mode = stat.S_IFMT(inode.mode) | record.mode
        if record.mask & records.ATTR_UID:
            inode.uid = record.uid
        if record.mask & records.ATTR_GID:
            inode.gid = record.gid
        if record.mask & records.ATTR_ATIME:
            inode.atime_ns = record.atime_ns
        if record.mask & records.ATTR_MTIME:
            inode.mtime_ns = record.mtime_ns

    def _end(self, inode: Inode) -> None:
        if inode.parent is None:
            self._namespace.inodes.pop(inode.ino, None)


def is_wal_out(namespace: Namespace) -> bool:
    """Return whether the root's pg_wal is the link to the diff's."""
    present = namespace.children(namespace.root).get(WAL_NAME)
    return isinstance(present, SymbolicLink) and present.target is None


def apply_wal_out(namespace: Namespace) -> list[Inode]:
    """Make the root's pg_wal the link to the diff's; returns the inodes that lost their name."""
    root = namespace.root
    gone: list[Inode] = []
    if WAL_NAME in namespace.children(root):
        gone = namespace.drop_subtree(root, WAL_NAME)
    link = SymbolicLink(namespace.new_number(), root.uid, root.gid, root.mtime_ns, None)
    namespace.add(root, WAL_NAME, link)
    return gone


def find_named(
    stack: LayerStack, namespace: Namespace, created: Collection[int]
) -> list[dict[int, Named]]:
    """Return, for each layer from the oldest on, the objects that a name leads to.

    ``created`` are the objects that records of the newest layer created.
    """
    named: list[dict[int, Named]] = [{} for _ in stack.layers]
    live = len(named) - 1
    for inode in namespace.inodes.values():
        if isinstance(inode, File) and inode.pieces:
            path = namespace.path_of(inode) or b""
            for layer, object_id, is_mapped in inode.pieces:
                is_created = layer == live and object_id in created
                named[layer][object_id] = Named(path, is_created, is_mapped)
    return named


def _describe(payloads: Iterable[bytes], index: int) -> str:
    for i, payload in enumerate(payloads):
        if i == index:
            try:
                return repr(records.decode(payload))
            except FormatError as error:
                return str(error)
    return "none"
