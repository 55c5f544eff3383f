"""Restacking: a tree in use goes over to a stack in which layers were folded into one.

Owns the switch: the superblock is replaced, and then whatever in memory refers to the old layers
refers to the new one. Nobody notices, as every file is in it what it was. Used by ``tree`` on its
thread; nothing here waits for more than the superblock.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from pbkfs.errors import BusyError, DiffError
from pbkfs.overlay.contents import Contents
from pbkfs.overlay.folding import Origins, put_into
from pbkfs.overlay.inode import File, Piece
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.sealing import BrokenSealError, write_switch
from pbkfs.overlay.stack import Stack
from pbkfs.overlay.superblock import LayerRef


class Restack:
    """Puts the open sealed layer ``new`` into the place of ``run`` (newest first).

    The layer belongs to the tree once ``switch`` has returned, and to the caller before.
    """

    def __init__(
        self,
        stack: Stack,
        namespace: Namespace,
        contents: Contents,
        run: Sequence[LayerRef],
        new: Layer,
        origins: Origins,
    ) -> None:
        self._stack = stack
        self._namespace = namespace
        self._contents = contents
        self._run = run
        self._new = new
        self._origins = origins

    def switch(self) -> bool:
        """Do it, on the disk and in memory. Returns False if the stack has no such run.

        Raises BusyError for files that are in use without a name, DiffError, OSError; then all is
        as before. Raises BrokenSealError, after which the process must not go on.
        """
        stack, nodes = self._stack, self._contents.nodes
        superblock = put_into(
            stack.diff.superblock,
            stack.diff.path,
            self._run,
            LayerRef(self._new.uuid, str(self._new.path)),
        )
        if superblock is None:
            return False
        old = stack.layers
        ids = [layer.uuid for layer in old]
        first, last = ids.index(self._run[-1].uuid), ids.index(self._run[0].uuid)
        moved = self._find_pieces(first, last)
        before = [(file, file.pieces) for file, _ in moved]

        def restore() -> None:
            nodes.cancel_restack()
            stack.layers = old
            for file, pieces in before:
                file.pieces = pieces

        with ExitStack() as undo:
            undo.callback(restore)
            stack.layers = [*old[:first], self._new, *old[last + 1 :]]
            for file, pieces in moved:
                file.pieces = pieces
            self._contents.prepare_restack(file for file, _ in moved)
            for file, _ in moved:
                if file.parent is None:
                    self._contents.note_orphan(file)
            try:
                write_switch(superblock, stack.diff.path, label="fold:superblock")
            except BrokenSealError:
                undo.pop_all()
                raise
            undo.pop_all()
        try:
            nodes.restack()
            stack.diff.superblock = superblock
            self._contents.forget_layers(old[first : last + 1])
            for layer in old[first : last + 1]:
                layer.retire()
        except BaseException as error:
            raise BrokenSealError(f"the stack of diff {stack.diff.path} is half changed") from error
        return True

    def _find_pieces(self, first: int, last: int) -> list[tuple[File, tuple[Piece, ...]]]:
        """Return the files with objects, and where these are to be found afterwards."""
        result = []
        for inode in self._namespace.inodes.values():
            if isinstance(inode, File) and inode.pieces:
                result.append((inode, tuple(self._move(inode, first, last))))
        return result

    def _move(self, file: File, first: int, last: int) -> list[Piece]:
        pieces: list[Piece] = []
        is_folded = False
        for piece in file.pieces:
            if piece.layer > last:
                pieces.append(piece._replace(layer=piece.layer - (last - first)))
            elif piece.layer < first:
                pieces.append(piece)
            elif not is_folded:
                is_folded = True
                found = self._origins.get((self._stack.layers[piece.layer].uuid, piece.object_id))
                if found is None:
                    raise BusyError(
                        f"a file of {self._stack.diff.path} is in use that has no name any more",
                        hint="Try again when it is closed.",
                    )
                object_id, is_mapped = found
                self._check(object_id)
                pieces.append(Piece(first, object_id, is_mapped))
                if not is_mapped:
                    break
        return pieces

    def _check(self, object_id: int) -> None:
        try:
            self._new.objects.stat(object_id)
        except OSError as error:
            raise DiffError(
                f"layer {self._new.path} does not hold what was folded: {error}",
                hint="Fold again.",
            ) from error
