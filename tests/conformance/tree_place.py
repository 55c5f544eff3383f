"""A Tree with all that belongs to it, which tests open, drop, seal and cut the power of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conformance.drivers import TreeDriver
from conformance.plain_base import PlainBase

from pbkfs.errors import BusyError
from pbkfs.overlay.check import check_diff
from pbkfs.overlay.diff import Diff, live_path, open_layers
from pbkfs.overlay.folding import Folded, fold, read_layers, replace_run
from pbkfs.overlay.journal import HEADER_BYTES
from pbkfs.overlay.layer import JOURNAL, Layer
from pbkfs.overlay.sealing import Child, Sealed
from pbkfs.overlay.superblock import LayerRef, read_superblock
from pbkfs.overlay.tree import Tree

OWNER = (os.geteuid(), os.getegid())


class TreePlace:
    """``lower`` is the base's directory, ``diff_path`` the writable diff, made below ``place``."""

    def __init__(self, place: Path, lower: Path) -> None:
        self.place = place
        self.lower = lower
        self.base = PlainBase(lower)
        self.diff_path = place / "diff1"
        self.layers: list[LayerRef] = []
        self.n_seals = self.n_folds = 0
        self._tree: Tree | None = None
        self.driver: TreeDriver

    @property
    def tree(self) -> Tree:
        """The open tree."""
        assert self._tree is not None
        return self._tree

    @property
    def is_open(self) -> bool:
        return self._tree is not None

    def open(self, session: bytes | None = None) -> Tree:
        """Open the diff (made if there is none) with its layers; ``session`` goes on."""
        assert self._tree is None
        diff = self.open_diff(session)
        self._tree = Tree(self.base, diff, open_layers(diff), owner=OWNER, log_fd=-1)
        self.driver = TreeDriver(self._tree)
        return self._tree

    def open_diff(self, session: bytes | None = None) -> Diff:
        """Open only the diff; the caller closes it."""
        return Diff.open(self.diff_path, self.base, layers=self.layers, session=session)

    def close(self) -> None:
        """End the tree as an unmount does."""
        if self._tree is not None:
            tree, self._tree = self._tree, None
            tree.close()

    def drop(self) -> None:
        """End the tree as SIGKILL does: descriptors are closed and nothing else happens."""
        if self._tree is not None:
            tree, self._tree = self._tree, None
            tree.leave()

    def reopen(self) -> Tree:
        """Close and open again."""
        self.close()
        return self.open()

    def crash(self) -> Tree:
        """Drop and open again, as a worker does that takes over: the session goes on."""
        session = self.tree._stack.live.session
        self.drop()
        return self.open(session)

    def kill(self) -> Tree:
        """Drop and open again, as the next mount does: what was not synced does not count."""
        self.drop()
        return self.open()

    def cut_power(self, *, torn_bytes: int = 0) -> Tree:
        """Drop, forget what the journal has not synced, and open again.

        Of the first lost frame, ``torn_bytes`` are left, if it has as many. Objects keep what they
        have.
        """
        synced = self.tree._stack.live.journal.synced
        self.drop()
        with (self.live_path / JOURNAL).open("r+b") as journal:
            tail = journal.seek(0, os.SEEK_END) - synced
            journal.truncate(synced + min(tail, torn_bytes))
        return self.open()

    def seal(self) -> Tree:
        """Close the diff, make it a sealed layer, and open a new one above it."""
        self.close()
        superblock = read_superblock(self.diff_path)
        self.layers = [
            LayerRef(superblock.live_id, str(self.live_path)),
            *(LayerRef(ref.uuid, str(self.diff_path / ref.path)) for ref in superblock.layers),
        ]
        self.n_seals += 1
        self.diff_path = self.place / f"diff{self.n_seals + 1}"
        return self.open()

    def seal_live(self, child: Path | None = None) -> Sealed:
        """Seal the diff while it is in use; ``child`` is another head to be made."""
        self.n_seals += 1
        live = self.place / f"live{self.n_seals}"
        new = None if child is None else Child(child, self.place / f"live{self.n_seals}of_child")
        return self.tree.seal(live, new)

    @property
    def n_layers(self) -> int:
        """How many sealed layers the diff has."""
        return len(read_layers(self.diff_path))

    def fold(self, heads: Sequence[Path], newest: int, n_layers: int) -> Folded | None:
        """Fold up to ``n_layers`` of the closed diff from ``newest`` on, for all these heads.

        Layers that no head names any more are deleted, and every head has to be sound.
        """
        layers = read_layers(self.diff_path)[newest:]
        run = layers[:n_layers]
        if not run:
            return None
        self.n_folds += 1
        folded = fold(self.base, layers, len(run), self.place / f"folded{self.n_folds}")
        for head in heads:
            replace_run(head, run, folded.layer)
        named = {Path(ref.path) for head in heads for ref in read_layers(head)}
        named |= {live_path(head, read_superblock(head)) for head in heads}
        for ref in run:
            if Path(ref.path) not in named:
                shutil.rmtree(Path(ref.path) / "objects")
                os.unlink(Path(ref.path) / "journal")
        self.layers = read_layers(self.diff_path)
        for head in heads:
            report = check_diff(head, self.base)
            assert report.is_clean, report.findings
        return folded

    def fold_in_use(self, newest: int, n_layers: int, *, counts_descriptors: bool = True) -> bool:
        """Fold layers of the open diff, and let the tree go over to the new one.

        The old ones are deleted, so that whatever still refers to them fails. Returns False where
        a file without a name is in use, and then nothing has changed.
        """
        layers = read_layers(self.diff_path)[newest:]
        run = layers[:n_layers]
        self.n_folds += 1
        folded = fold(self.base, layers, len(run), self.place / f"folded{self.n_folds}")
        new = Layer.sealed(Path(folded.layer.path), folded.layer.uuid)
        n_descriptors = len(os.listdir("/proc/self/fd"))
        try:
            assert self.tree.restack(run, new, folded.origins)
        except BusyError:
            new.close()
            return False
        if counts_descriptors:
            assert len(os.listdir("/proc/self/fd")) <= n_descriptors - 2 * len(run)
        for ref in run:
            shutil.rmtree(Path(ref.path) / "objects")
            os.unlink(Path(ref.path) / "journal")
        self.layers = read_layers(self.diff_path)
        return True

    @property
    def live_path(self) -> Path:
        """The directory that is written to."""
        return live_path(self.diff_path, read_superblock(self.diff_path))

    @contextmanager
    def opened(self, diff_path: Path) -> Iterator[Tree]:
        """The tree of another head upon the same base."""
        diff = Diff.open(diff_path, self.base)
        tree = Tree(self.base, diff, open_layers(diff), owner=OWNER, log_fd=-1)
        try:
            yield tree
        finally:
            tree.close()

    def journal_records(self) -> bytes:
        """Return the journal's bytes behind the header."""
        return (self.live_path / JOURNAL).read_bytes()[HEADER_BYTES:]

    def object_paths(self) -> Sequence[Path]:
        """Return the files of all objects of the writable diff."""
        return sorted(p for p in (self.live_path / "objects").rglob("*") if p.is_file())

    def end(self) -> None:
        """Close all, however far things went."""
        try:
            self.close()
        finally:
            self.base.close()


@contextmanager
def open_place(path: Path) -> Iterator[TreePlace]:
    """Yield a place with an empty base in the empty directory ``path``; closes it."""
    lower = path / "lower"
    lower.mkdir(mode=0o700)
    place = TreePlace(path, lower)
    try:
        yield place
    finally:
        place.end()
