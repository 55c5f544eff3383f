"""Delete a diff: all that pbkfs put into its directory, and nothing that it did not.

Called by ``cleanup``, and by a ``mount`` that failed after it had made a new diff. The caller has
the diff's lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from pbkfs.errors import DiffError
from pbkfs.mount import binding, control, lock
from pbkfs.mount.request import SUPERBLOCK

if TYPE_CHECKING:
    from pbkfs.overlay.superblock import Superblock

DETACH = "detach.json"

# The journal goes first: without it the rest can't be mounted by mistake when the deletion is
# interrupted. The superblock goes last but for the lock: with it, cleanup still knows a diff.
_LAYER = ("journal", "objects")
LAYERS = "layers"
_ORDER = (
    "journal",
    DETACH,
    "objects",
    LAYERS,
    "pg_wal.new",
    "pg_wal",
    "log",
    control.NAME,
    binding.NAME,
)


def wipe(diff: Path, *, keeps_layer: bool = False) -> list[str]:
    """Delete the diff's content; returns the names in its directory that are not ours, untouched.

    The layer that it writes to goes, too, wherever it lies; sealed layers elsewhere stay.
    ``keeps_layer``: a layer in the directory itself stays. Follows no symbolic link. Raises
    OSError.
    """
    superblock = _read_superblock(diff)
    if superblock is not None and superblock.live != ".":
        _wipe_layer(diff / superblock.live)
    kept = (*_LAYER, LAYERS) if keeps_layer else ()
    for name in _ORDER:
        if name not in kept:
            _remove(diff / name)
    for name in os.listdir(diff):
        if _is_temporary(name):
            _remove(diff / name)
    _remove(diff / SUPERBLOCK)
    _remove(diff / lock.NAME)
    return sorted(name for name in os.listdir(diff) if name not in kept)


def holds_layer(diff: Path) -> bool:
    """Return whether a sealed layer lies inside of the diff's directory: others may lie upon it."""
    superblock = _read_superblock(diff)
    if superblock is None:
        return False
    return any(
        Path(os.path.normpath(diff / ref.path)).is_relative_to(diff) for ref in superblock.layers
    )


def _read_superblock(diff: Path) -> Superblock | None:
    from pbkfs.overlay.superblock import read_superblock

    with contextlib.suppress(DiffError, OSError):
        return read_superblock(diff)
    return None


def _wipe_layer(path: Path) -> None:
    for name in _LAYER:
        _remove(path / name)
    with contextlib.suppress(OSError):
        os.rmdir(path)


def remove_made(directories: list[Path]) -> None:
    """Remove directories, innermost first, as far as they are empty."""
    for directory in directories:
        try:
            os.rmdir(directory)
        except OSError:
            return


def _is_temporary(name: str) -> bool:
    # durable.replace_file's names, and a journal that was being compacted.
    return (name.startswith(".") and name.endswith(".tmp")) or name.startswith("journal.")


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def is_ours(names: list[str]) -> bool:
    """Return whether a directory with these names holds nothing but parts of a diff."""
    return all(name in (*_ORDER, SUPERBLOCK, lock.NAME) or _is_temporary(name) for name in names)
