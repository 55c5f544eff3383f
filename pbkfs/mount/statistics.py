"""What a worker knows about its mount: what changed, what that costs, what was asked of it.

Collected by the worker for the control socket's ``stat``; the counters are the native half's and
the tree's own. Frozen, so that it can be compared and sent.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pbkfs
from pbkfs.pgdata import BLCKSZ

if TYPE_CHECKING:
    from pbkfs.mount.worker import Worker


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Allocated bytes of a diff's parts, as ``du`` counts them."""

    objects_bytes: int
    journal_bytes: int
    wal_bytes: int
    other_bytes: int
    n_objects: int

    @property
    def total_bytes(self) -> int:
        """All of the diff."""
        return self.objects_bytes + self.journal_bytes + self.wal_bytes + self.other_bytes


@dataclass(frozen=True, slots=True)
class Statistics:
    """One answer to ``stat``."""

    pid: int
    version: str
    state: str
    mountpoint: str
    diff: str
    base: str
    owner: tuple[int, int]
    started_at: float
    uptime_s: float
    changed: dict[str, int]
    """What the diff's objects hold: ``files``, allocated ``bytes``, and those in ``pages``."""
    disk: dict[str, int]
    verifies: str | None
    """What of a page of the base is looked at when it is first read: ``checksum``, or ``header``
    where the base has no checksums; None: nothing."""
    space: dict[str, int | bool]
    """``free_bytes`` as the mount's statfs says, ``reserve_bytes`` that it leaves out, and
    ``dirty_bytes`` that the kernel may hold back at most: set by us if ``is_bounded``, else its
    default."""
    overlay: dict[str, int]
    """Counters of tree and nodes; ``blocks_copied`` were merged with their version below."""
    hydration: dict[str, int | str | None]
    """How far it is: the fields of ``hydrating.HydrationStatus``."""
    fuse: dict[str, int]
    """Requests of the kernel: ``NAME.native`` were answered in C, ``NAME.forwarded`` in Python."""


async def collect(worker: Worker) -> Statistics:
    """Return the worker's statistics; the disk is walked in a thread."""
    import trio

    opened = worker.opened
    disk = await trio.to_thread.run_sync(measure_disk, opened.diff_path, opened.diff.live.path)
    return Statistics(
        pid=os.getpid(),
        version=pbkfs.__version__,
        state=worker.state,
        mountpoint=str(opened.place.path),
        diff=str(opened.diff_path),
        base=opened.base.describe(),
        owner=opened.owner,
        started_at=worker.started_at,
        uptime_s=round(time.time() - worker.started_at, 3),
        changed={
            "files": disk.n_objects,
            "bytes": disk.objects_bytes,
            "pages": disk.objects_bytes // BLCKSZ,
        },
        disk={
            "objects_bytes": disk.objects_bytes,
            "journal_bytes": disk.journal_bytes,
            "wal_bytes": disk.wal_bytes,
            "other_bytes": disk.other_bytes,
            "total_bytes": disk.total_bytes,
        },
        verifies=_verified(worker),
        space=_measure_space(worker),
        overlay={**opened.tree.counters(), **opened.tree.nodes.counters()},
        hydration=worker.hydrator.fields(),
        fuse=_summarize(worker.session_counters()),
    )


def _verified(worker: Worker) -> str | None:
    control = worker.opened.base.control
    if not worker.opened.request.verifies_pages or control is None:
        return None
    return "checksum" if control.data_checksum_version == 1 else "header"


def _measure_space(worker: Worker) -> dict[str, int | bool]:
    found, writeback = worker.opened.tree.statfs(), worker.writeback()
    return {
        "free_bytes": max(found.f_bavail * found.f_frsize - writeback.reserve_bytes, 0),
        "reserve_bytes": writeback.reserve_bytes,
        "dirty_bytes": writeback.dirty_bytes,
        "is_bounded": writeback.is_set,
    }


def _summarize(counters: dict[str, int]) -> dict[str, int]:
    """Put the totals that people look for first before the counters of the dispatcher."""
    kinds = [name for name in counters if name.endswith((".native", ".forwarded"))]
    queues = ("outstanding", "fsync_queue", "retry_queue")
    return {
        "tasks_total": sum(counters[name] for name in kinds) + counters.get("other_requests", 0),
        "queue_depth": sum(counters.get(name, 0) for name in queues),
        **counters,
    }


def measure_disk(diff: Path, live: Path | None = None) -> DiskUse:
    """Return what the diff and its live layer occupy. Files that vanish meanwhile do not count.

    A sealed layer in the diff's own directory is among "other".
    """
    own = _measure(diff)
    if live is None or live == diff:
        return own
    layer = _measure(live)
    return DiskUse(
        objects_bytes=layer.objects_bytes,
        journal_bytes=layer.journal_bytes,
        wal_bytes=own.wal_bytes,
        other_bytes=own.other_bytes + own.objects_bytes + own.journal_bytes + layer.other_bytes,
        n_objects=layer.n_objects,
    )


def _measure(root: Path) -> DiskUse:
    sizes = {"objects": 0, "journal": 0, "pg_wal": 0, "": 0}
    n_objects = 0
    for directory, names, files in os.walk(root):
        parts = Path(directory).relative_to(root).parts
        part = parts[0] if parts and parts[0] in sizes else ""
        for name in (*names, *files):
            try:
                found = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            is_object = part == "objects" and stat.S_ISREG(found.st_mode)
            n_objects += is_object
            if not parts and name == "journal":
                sizes["journal"] += found.st_blocks * 512
            else:
                sizes["" if part == "objects" and not is_object else part] += found.st_blocks * 512
    return DiskUse(sizes["objects"], sizes["journal"], sizes["pg_wal"], sizes[""], n_objects)
