"""The stack of a mount: base, sealed layers, writable diff; and where a file's bytes are in it.

Owns the translation of a file's pieces into what the native half reads, and the attributes of
files whose newest version is a sealed object. Used on the thread that owns the tree.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Sequence
from typing import Any

from pbkfs.backup.base import Base, RawSource, Source
from pbkfs.errors import PbkfsError
from pbkfs.overlay.diff import Diff
from pbkfs.overlay.inode import NOT_LOADED, File, Piece
from pbkfs.overlay.journal import BLOCK_BYTES, NO_LIMIT
from pbkfs.overlay.layer import EMPTY_MAP, Layer
from pbkfs.overlay.namespace import fail
from pbkfs.overlay.superblock import Superblock

_log = logging.getLogger(__name__)


def count_blocks(size: int) -> int:
    """Return how many blocks a file of ``size`` bytes has, the last one perhaps in part."""
    return -(-size // BLOCK_BYTES)


class LayerStack:
    """``layers`` are oldest first. Here all of them are sealed; see ``Stack`` for a mount's."""

    def __init__(self, base: Base, layers: Sequence[Layer]) -> None:
        self.base = base
        self.layers = list(layers)

    def is_live(self, number: int) -> bool:  # noqa: ARG002 - the other kind of stack looks
        """Return whether the layer ``number`` is one that is written to."""
        return False

    def live_piece(self, file: File) -> Piece | None:
        """Return the file's object in the writable diff, or None."""
        if file.pieces and self.is_live(file.pieces[0].layer):
            return file.pieces[0]
        return None

    def load(self, file: File) -> None:
        """Fill the file's slots with the version below the writable diff. Raises OSError."""
        if file.size != NOT_LOADED:
            return
        below = file.pieces[1 if self.live_piece(file) else 0]
        found = self.layers[below.layer].objects.stat(below.object_id)
        file.mode = stat.S_IFREG | stat.S_IMODE(found.st_mode)
        file.uid, file.gid = found.st_uid, found.st_gid
        file.atime_ns, file.mtime_ns = found.st_atime_ns, found.st_mtime_ns
        file.ctime_ns = found.st_mtime_ns
        file.size = found.st_size

    def sources(self, file: File) -> list[tuple[Any, ...]]:
        """Return where the version below the writable diff has its bytes, newest first.

        In the form that ``Nodes.add`` takes. Raises OSError: EIO if the base's metadata of this
        file is damaged, which goes to the log.
        """
        result: list[tuple[Any, ...]] = []
        pieces = file.pieces[1:] if self.live_piece(file) else file.pieces
        for index, piece in enumerate(pieces):
            layer = self.layers[piece.layer]
            found = layer.page_maps.get(piece.object_id, EMPTY_MAP)
            head = ("object", layer.objects.fd, piece.object_id, layer.label)
            if not piece.is_mapped or found.is_whole:
                return [*result, (*head, None, NO_LIMIT)]
            size = layer.objects.stat(piece.object_id).st_size
            if index + 1 < len(pieces):
                lower = pieces[index + 1]
                below = self.layers[lower.layer].objects.stat(lower.object_id).st_size
            else:
                below = file.base_size
            limit = min(found.limit, count_blocks(below), count_blocks(size))
            result.append((*head, found.present, limit))
        origin = file.origin
        if origin is not None:
            try:
                for source in self.base.sources(origin):
                    result.append(_format_source(source, file.base_size))
            except PbkfsError as error:
                _log.error("%s: %s", self.base.describe(), error)
                raise fail(errno.EIO) from error
        return result


class Stack(LayerStack):
    """The stack of a mount: its last layer is the live one of ``diff``.

    A seal puts a new live layer at the end, a restack one layer in the place of several.
    """

    def __init__(self, base: Base, diff: Diff, sealed: Sequence[Layer]) -> None:
        """``sealed`` are newest first, as a superblock names them."""
        super().__init__(base, [*reversed(sealed), diff.live])
        self.diff = diff

    @property
    def live(self) -> Layer:
        """The layer that is written to."""
        return self.layers[-1]

    def is_live(self, number: int) -> bool:
        """Return whether the layer ``number`` is one that is written to."""
        return number == len(self.layers) - 1

    def push(self, superblock: Superblock, live: Layer) -> None:
        """Go on in another live layer: the old one is sealed, as the diff's superblock says now."""
        self.live.is_sealed = True
        self.diff.superblock = superblock
        self.diff.live = live
        self.layers.append(live)

    def live_limit(self, file: File, piece: Piece, size: int) -> int:
        """Return from which block on nothing comes from below the file's live object.

        ``size`` is the object's: it began with that of the version below, so one that is smaller
        was truncated, even if a crash came before the record of it.
        """
        self.load(file)
        recorded = self.live.page_maps.get(piece.object_id, EMPTY_MAP).limit
        return min(recorded, count_blocks(file.size), count_blocks(size))


def _format_source(source: Source, listed_bytes: int) -> tuple[Any, ...]:
    if isinstance(source, RawSource):
        # The size that was shown, not today's: what is missing of it is an error, never zeros.
        return ("raw", source.root_fd, source.path, listed_bytes, source.label)
    return (
        "pages",
        source.root_fd,
        source.path,
        source.stored_size,
        source.label,
        source.compress,
        source.limit,
        source.padded,
        source.old_zlib_8192,
        source.headers,
    )
