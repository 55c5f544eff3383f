"""The empty base: nothing below the diff, for a cluster that initdb makes on the mount.

Used by ``mount`` for ``--empty`` and by tests.
"""

from __future__ import annotations

from collections.abc import Iterable

from pbkfs.backup.base import Base, BaseEntry, Source
from pbkfs.errors import NotFoundError


class EmptyBase(Base):
    """A tree that has only its root."""

    kind = "empty"

    def __init__(self, owner: tuple[int, int]) -> None:
        self.identity = {"kind": self.kind}
        self.system_identifier = None
        self.control = None
        self.pg_major = None
        self.owner = owner
        self.notes = []

    def scandir(self, path: bytes) -> Iterable[BaseEntry]:
        if path:
            raise NotFoundError(f"no directory {path!r} in an empty base")
        return ()

    def sources(self, path: bytes) -> tuple[Source, ...]:
        raise NotFoundError(f"no file {path!r} in an empty base")

    def describe(self) -> str:
        return "an empty base"
