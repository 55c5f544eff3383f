"""Bases: reading what others wrote, as immutable trees of files.

``base`` is the interface; ``probackup``, ``directory`` and ``empty`` are what there is.
"""

from __future__ import annotations

from pbkfs.backup.base import (
    NO_LIMIT,
    Base,
    BaseEntry,
    Kind,
    PageSource,
    RawSource,
    Source,
    WalSeed,
)
from pbkfs.backup.directory import open_directory
from pbkfs.backup.empty import EmptyBase
from pbkfs.backup.probackup.base import open_probackup
from pbkfs.backup.probackup.chain import BackupSummary, list_backups
from pbkfs.backup.probackup.wal_archive import WalArchive, open_archive

__all__ = [
    "NO_LIMIT",
    "BackupSummary",
    "Base",
    "BaseEntry",
    "EmptyBase",
    "Kind",
    "PageSource",
    "RawSource",
    "Source",
    "WalArchive",
    "WalSeed",
    "list_backups",
    "open_archive",
    "open_directory",
    "open_probackup",
]
