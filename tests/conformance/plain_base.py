"""A base that is just a directory of files, for tests that need no PGDATA."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from pbkfs.backup.base import Base, BaseEntry, Kind, RawSource, Source


class PlainBase(Base):
    """Shows ``root`` as it is: files, directories, symbolic links."""

    kind = "directory"

    def __init__(self, root: Path) -> None:
        self.identity = {"kind": self.kind, "path": str(root)}
        self.system_identifier = None
        self.pg_major = None
        self.owner = (os.geteuid(), os.getegid())
        self.notes = []
        self._root = root
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.n_scans = 0

    def scandir(self, path: bytes) -> Iterable[BaseEntry]:
        self.n_scans += 1
        with os.scandir(os.path.join(os.fsencode(self._root), path)) as found:
            return [self._entry(entry) for entry in found]

    def _entry(self, entry: os.DirEntry[bytes]) -> BaseEntry:
        info = entry.stat(follow_symlinks=False)
        mode = stat.S_IMODE(info.st_mode)
        if stat.S_ISLNK(info.st_mode):
            target = os.readlink(entry.path)
            return BaseEntry(entry.name, Kind.LINK, mode, len(target), info.st_mtime_ns, target)
        if stat.S_ISDIR(info.st_mode):
            return BaseEntry(entry.name, Kind.DIR, mode, 0, info.st_mtime_ns)
        return BaseEntry(entry.name, Kind.FILE, mode, info.st_size, info.st_mtime_ns)

    def sources(self, path: bytes) -> tuple[Source, ...]:
        size = os.stat(path, dir_fd=self._fd).st_size
        return (RawSource(self._fd, path, size, "base"),)

    def describe(self) -> str:
        return f"the directory {self._root}"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
