"""Everything that can be done with trunks and branches, as plain blocking calls.

One ``Service`` a process: the command line has it in-process, the daemon behind its REST interface.
Both may work on one DATA directory at the same time (``locks``). Prints nothing; progress goes to
the ``say`` of a call. Any thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pbkfs
from pbkfs.branch.branches import Branches
from pbkfs.branch.engine import Engine
from pbkfs.branch.layout import Inode, Layout, disk_bytes
from pbkfs.branch.lifecycle import Lifecycle
from pbkfs.branch.locks import Locks
from pbkfs.branch.overlay import OverlayEngine
from pbkfs.branch.reaper import reap
from pbkfs.branch.reconcile import Reconciler
from pbkfs.branch.serving import Serving
from pbkfs.branch.settings import Settings
from pbkfs.branch.store import Store
from pbkfs.branch.trunks import Trunks
from pbkfs.branch.views import HeadView, Overview
from pbkfs.errors import UnsupportedError


class Service:
    """Trunks and branches of one DATA directory."""

    def __init__(self, settings: Settings, *, measures: bool = True) -> None:
        self.settings = settings
        self.layout = Layout(settings.data_dir)
        self.layout.prepare()
        engine = _choose_engine(settings, self.layout)
        self.store = Store(settings.metadata_path)
        self.life = Lifecycle(
            layout=self.layout,
            settings=settings,
            store=self.store,
            locks=Locks(self.layout.lock),
            engine=engine,
            serving=Serving(self.layout, settings),
            measures=measures,
        )
        self.branches = Branches(self.life)
        self.trunks = Trunks(self.life, self.branches)
        self._reconciler = Reconciler(self.life, self.branches, self.trunks)

    def close(self) -> None:
        """Let go of the store."""
        self.store.close()

    def settle(self) -> list[str]:
        """Finish or undo what a crash left, and remove what has expired; returns what was done."""
        done = self._reconciler.run()
        return done + [f"branch {name}: expired" for name in reap(self.store, self.branches)]

    def tree(self) -> list[HeadView]:
        """Return trunks and branches, oldest first."""
        return self.life.view()

    def overview(self) -> Overview:
        """Return the counts and sums that ``pbkfs status`` shows."""
        views = self.life.view(with_sizes=False)
        trunks = [view for view in views if view.head.kind == "trunk"]
        branches = [view for view in views if view.head.kind == "branch"]
        seen: set[Inode] = set()
        used = sum(
            disk_bytes(path, seen)
            for path in self.layout.root.iterdir()
            if path != self.layout.mounts
        )
        points = self.life.point_users([view.head for view in views])
        return Overview(
            version=pbkfs.__version__,
            trunks_running=_count(trunks, "running"),
            trunks_total=len(trunks),
            branches_running=_count(branches, "running"),
            branches_stopped=_count(branches, "stopped"),
            branches_total=len(branches),
            storage_used_bytes=used if views else 0,
            shared_bytes=self.life.engine.shared_bytes(points),
        )


@contextlib.contextmanager
def open_service(settings: Settings, *, measures: bool = True) -> Iterator[Service]:
    """Open the service and close it again; without ``measures`` all sizes are 0."""
    service = Service(settings, measures=measures)
    try:
        yield service
    finally:
        service.close()


def _choose_engine(settings: Settings, layout: Layout) -> Engine:
    if settings.storage_backend in ("overlay", "auto"):
        return OverlayEngine(layout)
    raise UnsupportedError(
        f"storage backend {settings.storage_backend!r} is not part of this version",
        hint="Set PBKFS_STORAGE_BACKEND to overlay, or leave it out.",
    )


def _count(views: list[HeadView], status: str) -> int:
    return sum(view.status == status for view in views)
