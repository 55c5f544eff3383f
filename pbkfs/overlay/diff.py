"""One diff directory: the head of a stack of layers. Opened, checked, made.

Owns the superblock and the place of pg_wal; what is written goes to the diff's *live layer*, which
is the same directory or another one (``layer``). The lock, the binding, sockets and logs in DIFF
are ``mount``'s. Called by ``mount`` before it serves and by ``tree``, on the thread that owns the
tree.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from pbkfs import durable
from pbkfs.backup.base import Base
from pbkfs.errors import DiffError
from pbkfs.overlay import journal as records
from pbkfs.overlay.layer import JOURNAL, OBJECTS, Layer, fill_layer, host_errors
from pbkfs.overlay.superblock import (
    NAME as SUPERBLOCK,
)
from pbkfs.overlay.superblock import (
    LayerRef,
    Superblock,
    check_base,
    new_superblock,
    read_superblock,
)

WAL = "pg_wal"

# What may lie in a directory that is to become a diff: made by the mount, or by mkfs.
_HARMLESS = frozenset({"lock", "binding.json", "control.sock", "log", "lost+found"})


class Diff:
    """A diff directory, see the module. ``live`` is the layer that is written to."""

    def __init__(self, path: Path, superblock: Superblock, live: Layer) -> None:
        self.path = path
        self.superblock = superblock
        self.live = live

    @classmethod
    def open(
        cls,
        path: Path,
        base: Base,
        *,
        layers: Sequence[LayerRef] = (),
        session: bytes | None = None,
    ) -> Diff:
        """Open the diff at ``path`` for ``base``, to write to it; makes it if there is none.

        ``layers`` (newest first) are those of a new diff. Raises DiffError if it can't be used
        for this base or is damaged, HostError if this machine or user can't.
        """
        path = Path(os.path.abspath(path))
        with host_errors(path):
            try:
                superblock = read_superblock(path)
            except FileNotFoundError:
                superblock = _make(path, base, layers)
            except NotADirectoryError:
                raise _not_a_directory(path) from None
            if superblock.detached_to is not None:
                raise DiffError(
                    f"diff {path} was detached to {superblock.detached_to}",
                    hint=f"Use the PGDATA there; delete the diff with: pbkfs cleanup -d {path}",
                )
            check_base(superblock, base.identity, base.system_identifier, path)
            # Who switched the superblock may have died before that was durable. What is written
            # from here on lies in what it names now.
            durable.fsync_dir(path, label="diff:open")
            return cls._open(path, superblock, session, is_sealed=False)

    @classmethod
    def read(cls, path: Path, *, session: bytes | None = None) -> Diff:
        """Open the existing diff at ``path`` only to look at it. Raises DiffError, HostError."""
        path = Path(os.path.abspath(path))
        with host_errors(path):
            return cls._open(path, read_superblock(path), session, is_sealed=True)

    @classmethod
    def _open(
        cls, path: Path, superblock: Superblock, session: bytes | None, *, is_sealed: bool
    ) -> Diff:
        where = live_path(path, superblock)
        if not where.is_dir():
            raise DiffError(
                f"live layer {where} of diff {path} is missing",
                hint="Put it back to where the diff's superblock names it.",
            )
        live = Layer.open(where, superblock.live_id, session=session, is_sealed=is_sealed)
        return cls(path, superblock, live)

    @property
    def wal_path(self) -> Path:
        """Where pg_wal is; computed, because a diff may be moved."""
        return self.path / WAL

    def layer_path(self, ref: LayerRef) -> Path:
        """Return where a sealed layer of this diff lies."""
        return Path(os.path.normpath(self.path / ref.path))

    def close(self) -> None:
        """Close the live layer; makes nothing durable. Idempotent."""
        self.live.close()


def live_path(diff: Path, superblock: Superblock) -> Path:
    """Return the directory of the live layer of ``diff``."""
    return Path(os.path.normpath(diff / superblock.live))


def open_layers(diff: Diff) -> list[Layer]:
    """Open the sealed layers below ``diff``, newest first. Raises DiffError, HostError."""
    layers: list[Layer] = []
    try:
        for ref in diff.superblock.layers:
            layers.append(Layer.sealed(diff.layer_path(ref), ref.uuid))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def check_layers(diff: Diff, layers: Sequence[Layer]) -> None:
    """Raise DiffError unless ``layers`` (newest first) are those that ``diff`` was made upon."""
    expected = [ref.uuid for ref in diff.superblock.layers]
    found = [layer.uuid for layer in layers]
    if expected != found:
        raise DiffError(
            f"diff {diff.path} lies on the layers {_format_uuids(expected)}, "
            f"not on {_format_uuids(found)}",
            hint="Put the sealed layers back to where the diff's superblock names them.",
        )


def is_free_place(path: Path) -> bool:
    """Return whether a new diff can be made in the existing directory ``path``.

    True for an empty one, one that holds only what a mount puts there before, and one where the
    making of a diff was cut short before its superblock. Raises OSError.
    """
    for name in os.listdir(path):
        if name in _HARMLESS or (name.startswith(".") and name.endswith(_TMP)):
            continue
        if name == JOURNAL and os.lstat(path / name).st_size <= records.HEADER_BYTES:
            continue
        if name == OBJECTS and not any(files for _, _, files in os.walk(path / name)):
            continue
        return False
    return True


_TMP = ".tmp"


def _make(path: Path, base: Base, layers: Sequence[LayerRef]) -> Superblock:
    """Make a diff. Its superblock comes last: without one, the next attempt begins anew."""
    try:
        os.mkdir(path, 0o711)
        os.chmod(path, 0o711)
        durable.fsync_dir(path.parent, label="diff:mkdir")
    except FileExistsError:
        if not path.is_dir():
            raise _not_a_directory(path) from None
        if not is_free_place(path):
            raise DiffError(
                f"directory {path} is not empty and is no diff (no {SUPERBLOCK})",
                hint="Name the directory of a diff, an empty one, or one that does not exist yet.",
            ) from None
    for name in os.listdir(path):
        if name.startswith((f".{JOURNAL}.", f".{SUPERBLOCK}.")) and name.endswith(_TMP):
            os.unlink(path / name)
    superblock = new_superblock(base.identity, base.system_identifier, layers)
    fill_layer(path, superblock.live_id)
    superblock.write(path)
    return superblock


def _format_uuids(uuids: Sequence[uuid.UUID]) -> str:
    return "[" + ", ".join(map(str, uuids)) + "]"


def _not_a_directory(path: Path) -> DiffError:
    return DiffError(
        f"diff {path} is not a directory",
        hint="Name the directory of a diff, or one that does not exist yet.",
    )
