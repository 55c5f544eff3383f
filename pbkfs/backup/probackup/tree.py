"""The names of a chain: one tree, made of the destination's list and nothing else.

Adds what a mount needs and a list does not have: tablespaces as links to a directory inside of the
mount. Leaves out what must not be seen. Used by ``probackup.base``; belongs to one thread.
"""

from __future__ import annotations

import os
import re

from pbkfs.backup.base import TABLESPACE_ROOT
from pbkfs.backup.probackup.content import DIRECTORY, LINK, Name
from pbkfs.errors import FormatError, UnsupportedError
from pbkfs.pgdata import HIDDEN_IN_ROOT, PG_TBLSPC

_TABLESPACE = re.compile(rb"pg_tblspc/([0-9]+)")
_CFS_HINT = "Compressed tablespaces of Postgres Pro Enterprise cannot be used by this PostgreSQL."
_DAMAGED_HINT = "The backup is damaged; take another one."

# A directory that is only implied by a name below it has no line in the list.
IMPLIED = -1


class NameTree:
    """Names by number: ``paths[number]``; ``children`` of each directory, as numbers."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.paths: list[bytes] = []
        self.numbers: dict[bytes, int] = {}
        self.children: dict[bytes, list[int]] = {b"": []}
        self.implied: dict[bytes, list[bytes]] = {}
        self.tablespaces: list[bytes] = []
        self._states = bytearray()

    def add(self, name: Name) -> int:
        """Take in one line of the destination's list; returns the number of the name.

        Raises UnsupportedError for a file of a compressed tablespace.
        """
        _, path, state, is_cfs, _, _ = name
        if is_cfs or (path.endswith(b"/pg_compression") and path.startswith(b"pg_tblspc/")):
            raise UnsupportedError(
                f"{os.fsdecode(path)} belongs to a compressed tablespace (CFS)", hint=_CFS_HINT
            )
        number = self.numbers.get(path)
        if number is None:
            number = self.numbers[path] = len(self.paths)
            self.paths.append(path)
            self._states.append(state)
        return number

    def find(self, path: bytes) -> int:
        """Number of a name of the destination's list, -1 for another."""
        return self.numbers.get(path, -1)

    def __len__(self) -> int:
        return len(self.paths)

    def build(self) -> None:
        """Arrange the names into directories once all are in.

        Raises FormatError when a name is a file and also a directory, or is of a type that cannot
        be shown.
        """
        children = self.children
        for path, state in zip(self.paths, self._states, strict=True):
            if state == DIRECTORY:
                children.setdefault(path, [])
            elif state == LINK:
                if not _TABLESPACE.fullmatch(path):
                    raise FormatError(
                        f"{self.origin} lists the link {os.fsdecode(path)!r} outside of pg_tblspc"
                    )
                children.setdefault(path, [])
            if _TABLESPACE.fullmatch(path) and state in (DIRECTORY, LINK):
                self.tablespaces.append(path.rpartition(b"/")[2])
        for number, path in enumerate(self.paths):
            directory = path.rpartition(b"/")[0]
            siblings = children.get(directory)
            if siblings is None:
                siblings = self._imply(directory)
            siblings.append(number)
        if self.tablespaces and TABLESPACE_ROOT in self.numbers:
            raise FormatError(
                f"{self.origin} lists {os.fsdecode(TABLESPACE_ROOT)!r}, where tablespaces are shown"
            )

    def _imply(self, directory: bytes) -> list[int]:
        """Make a directory that has no line; real lists have one for each, damaged ones may not."""
        if directory in self.numbers:
            raise FormatError(
                f"{self.origin} lists {os.fsdecode(directory)!r} as a file and as a directory",
                hint=_DAMAGED_HINT,
            )
        parent, _, name = directory.rpartition(b"/")
        if parent not in self.children:
            self._imply(parent)
        self.implied.setdefault(parent, []).append(name)
        if _TABLESPACE.fullmatch(directory):
            self.tablespaces.append(name)
        siblings = self.children[directory] = []
        return siblings

    def resolve(self, shown: bytes) -> bytes | None:
        """Path in the list of a path as it is shown; None when nothing of the list is there.

        ``.tblspc/OID/…`` is ``pg_tblspc/OID/…``; pg_tblspc/OID itself is a link with nothing below.
        """
        if self.tablespaces:
            prefix = TABLESPACE_ROOT + b"/"
            if shown.startswith(prefix):
                oid, _, rest = shown[len(prefix) :].partition(b"/")
                if oid not in self.tablespaces:
                    return None
                return PG_TBLSPC + b"/" + oid + (b"/" + rest if rest else b"")
            match = _TABLESPACE.match(shown)
            if match and match[1] in self.tablespaces and shown[match.end() :][:1] in (b"", b"/"):
                return None
        if shown in HIDDEN_IN_ROOT:
            return None
        return shown
