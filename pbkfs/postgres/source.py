"""Which WAL archive belongs to a PGDATA: what the diff's superblock says of its base."""

from __future__ import annotations

import json
from pathlib import Path

from pbkfs.postgres.cluster import Cluster


def archive_of(cluster: Cluster) -> Path | None:
    """Return the archive of the store from which ``cluster`` is mounted, or None.

    Only a base in a store of backups has one; for a directory the user has to name it.
    """
    if cluster.diff is None:
        return None
    try:
        superblock = json.loads((cluster.diff / "superblock.json").read_text(encoding="utf-8"))
        base = superblock["base"]
        if base["kind"] != "probackup":
            return None
        return Path(base["store"]) / "wal" / str(base["instance"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
