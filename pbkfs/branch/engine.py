"""What an engine of storage does for trunks and branches; the overlay engine is in ``overlay``.

An engine makes and removes the data of heads and shows it as a PGDATA. It knows heads only by
their ids, and nothing of names, servers or the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BaseSource:
    """What a trunk is made from: a backup of a store, a directory, or nothing (``is_empty``)."""

    store: Path | None = None
    instance: str | None = None
    backup_id: str | None = None
    directory: Path | None = None
    is_empty: bool = False
    owner: tuple[int, int] | None = None
    """(uid, gid) of the files; None: as ``pbkfs mount`` chooses."""


@dataclass(frozen=True, slots=True)
class Cloned:
    """How a clone was made. ``point`` is what its data goes back to; empty: its base.

    ``live_uuid`` is the source's writable layer from then on. ``gate_ms`` is how long the source's
    writes had to wait, ``held_ms`` how long its server stood still.
    """

    point: str
    live_uuid: str
    gate_ms: float = 0.0
    held_ms: float = 0.0
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes on the disk: what only this head refers to, and what others do, too."""

    own_bytes: int = 0
    shared_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.own_bytes + self.shared_bytes


TryLock = Callable[[str], AbstractContextManager[bool]]
"""Tries to lock the head of an id, and says whether it is locked inside of ``with``."""


class Engine(Protocol):
    """Storage of heads. Every method blocks; none is called for the same head at the same time."""

    name: str

    def create(self, head_id: str, source: BaseSource) -> None:
        """Make a head of a base, and mount it. Raises PbkfsError; then nothing is left."""
        ...

    def clone(self, source_id: str, child_id: str) -> Cloned:
        """Make a head of the present state of another one, which may be in use."""
        ...

    def clone_point(self, source_id: str, child_id: str, point: str) -> Cloned:
        """Make a head of a branch point of ``source_id``."""
        ...

    def live_uuid(self, head_id: str) -> str:
        """Return the id of the layer that a head writes to."""
        ...

    def mount(self, head_id: str) -> Path:
        """Show a head as a PGDATA, if it is not yet; returns where."""
        ...

    def unmount(self, head_id: str, *, force: bool = False) -> None:
        """Show it no more. A head that is not shown is no error."""
        ...

    def is_mounted(self, head_id: str) -> bool:
        """Return whether the head is shown and alive."""
        ...

    def reset(self, head_id: str, point: str) -> None:
        """Take a head that is not mounted back to the point; empty: to its base.

        Interrupted, it has to be done again before the head is used.
        """
        ...

    def n_layers(self, head_id: str) -> int:
        """Return how much lies one upon the other below a head; 0 where that costs nothing."""
        ...

    def flatten(self, head_id: str, limit: int, lock: TryLock) -> int:
        """Let that be ``limit`` at most, without any other change; returns what it is then.

        The caller has the head's lock, and sees to it that nothing is collected; other heads are
        changed while ``lock`` says that theirs is held. Raises PbkfsError; the head is sound then.
        """
        ...

    def destroy(self, head_id: str) -> None:
        """Delete the data of a head; what others refer to stays. Idempotent."""
        ...

    def collect(
        self,
        points: Collection[str],
        known: Callable[[], Collection[str]],
        made: Collection[str] = (),
    ) -> list[str]:
        """Delete what no head refers to, and the points that are not named; returns their names.

        ``known`` gives the ids that the store has: what belongs to them is being made or used.
        ``made`` are those that are complete: where one of them, or a point, is not there, nobody
        knows what it refers to, and nothing is deleted. Raises PbkfsError.
        """
        ...

    def sizes(self, points: Mapping[str, Collection[str]]) -> dict[str, Size]:
        """Return the sizes of all heads by id; ``points`` says which heads refer to which point."""
        ...

    def shared_bytes(self, points: Mapping[str, Collection[str]]) -> int:
        """Return what all heads together share, each byte once."""
        ...
