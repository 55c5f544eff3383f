"""Where trunks and branches lie on disk: the paths below DATA, and their modes.

    DATA/                     0711: the servers' user has to get through
      metadata.db             the store (SQLite)
      lock                    the locks of operations (``locks``)
      heads/ID/               a head: the diff of a trunk or branch, with its pg_wal and logs
      layers/ID/              a layer: sealed, or the live one of a head
      points/ID/              a branch point: which layers, and the WAL that goes with them
      mounts/ID/              the mount point of a head: its PGDATA
      backups/ID/             what a trunk was copied from (``--from-url``)
      secrets/ID              the password of a head, 0600

Mount points have ids and not names, because a server keeps the path of its PGDATA for as long as
it runs, and a rename must not stop it.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import HostError

_OPEN = ("heads", "layers", "points", "mounts", "backups")


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths below one DATA directory."""

    root: Path

    def prepare(self) -> None:
        """Make the directories that are missing. Raises HostError."""
        try:
            if not self.root.is_dir():
                self.root.mkdir(parents=True, exist_ok=True)
                self.root.chmod(0o711)
            for name in _OPEN:
                self._make(self.root / name, 0o711)
            self._make(self.root / "secrets", 0o700)
        except OSError as error:
            raise HostError(
                f"cannot make {error.filename or self.root}: "
                f"{(error.strerror or str(error)).lower()}",
                hint="Name a directory that this user can write to with PBKFS_DATA_DIR.",
            ) from error

    @staticmethod
    def _make(path: Path, mode: int) -> None:
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            path.chmod(mode)

    @property
    def lock(self) -> Path:
        """The file of the locks."""
        return self.root / "lock"

    @property
    def heads(self) -> Path:
        """The directory of all heads."""
        return self.root / "heads"

    @property
    def layers(self) -> Path:
        """The directory of all layers."""
        return self.root / "layers"

    @property
    def points(self) -> Path:
        """The directory of all branch points."""
        return self.root / "points"

    @property
    def mounts(self) -> Path:
        """The directory of all mount points."""
        return self.root / "mounts"

    def head(self, head_id: str) -> Path:
        """The diff directory of a head."""
        return self.heads / head_id

    def layer(self, layer_id: str) -> Path:
        """The directory of a layer."""
        return self.layers / layer_id

    def point(self, point_id: str) -> Path:
        """The directory of a branch point."""
        return self.points / point_id

    def mount(self, head_id: str) -> Path:
        """The mount point of a head, its PGDATA."""
        return self.mounts / head_id

    def backup(self, head_id: str) -> Path:
        """The directory that a trunk's base was copied to."""
        return self.root / "backups" / head_id

    def secret(self, head_id: str) -> Path:
        """The file of a head's password."""
        return self.root / "secrets" / head_id

    def server_log(self, head_id: str) -> Path:
        """The log of a head's server."""
        return self.head(head_id) / "log" / "postgres.log"


Inode = tuple[int, int]
"""Device and number: what several hard links have in common."""


def disk_bytes(path: Path, seen: set[Inode] | None = None) -> int:
    """Return what ``path`` and all below it take on the disk, as ``du`` counts it; 0 if it is gone.

    A file with several names counts once, and not at all if it is in ``seen``, to which it is
    added.
    """
    seen = set() if seen is None else seen
    total, linked = measure(path)
    total += sum(n_bytes for inode, n_bytes in linked.items() if inode not in seen)
    seen.update(linked)
    return total


def measure(path: Path) -> tuple[int, dict[Inode, int]]:
    """Return what ``path`` and all below it take on the disk: what has one name, and the rest.

    The rest is files with several names, perhaps elsewhere: layers that were folded share objects.
    """
    total, linked = 0, {}
    try:
        found = os.lstat(path)
        is_directory = stat.S_ISDIR(found.st_mode)
        entries = list(os.scandir(path)) if is_directory else []
    except FileNotFoundError:
        return 0, {}
    if is_directory or found.st_nlink == 1:
        total = found.st_blocks * 512
    else:
        linked[found.st_dev, found.st_ino] = found.st_blocks * 512
    for entry in entries:
        below, more = measure(Path(entry.path))
        total += below
        linked.update(more)
    return total, linked
