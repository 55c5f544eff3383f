"""Random operations on a Tree without a mount: restarts, crashes, power cuts and sealed layers too.

A worker that takes over from another one loses nothing that was in the page cache. A power cut is
played by cutting the journal back to what was synced, and opening it without that session; objects
keep what they have, so a file may show any mix of the versions since its last fsync, page by page,
and nothing else. Names have to be exactly those of the last sync.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conformance.drivers import OsDriver, TreeDriver
from conformance.file_machine import (
    PAGE,
    FileMachine,
    Snapshot,
    describe_difference,
    take_snapshot,
)
from conformance.tree_place import TreePlace
from fix_memory import memory_root
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from pbkfs.overlay import contents, hydration
from pbkfs.overlay.hydration import Step
from pbkfs.overlay.inode import Directory

MAX_LAYERS = 2
MAX_SEALS = 8


class TreeMachine(FileMachine):
    driver: TreeDriver
    root = memory_root()

    def start(self) -> None:
        self.trees = TreePlace(self.place, self.lower)
        # Of each file that ever was in the oracle: a descriptor, which keeps its inode number
        # from being used again, and its contents since the last fsync, oldest first.
        self.held: dict[int, int] = {}
        self.versions: dict[int, list[bytes]] = {}
        # Heads that were made by seals, and what they have to show for good.
        self.children: list[tuple[Path, Snapshot]] = []
        self.trees.open()
        self.reopened()
        self.took_all()

    def stop(self) -> None:
        self.trees.close()
        for path, expected in self.children:
            with self.trees.opened(path) as tree:
                found = take_snapshot(TreeDriver(tree))
            assert found == expected, f"{path.name}: {describe_difference(expected, found)}"
        self.trees.end()
        for fd in self.held.values():
            os.close(fd)

    def reopened(self) -> None:
        self.driver = self.trees.driver
        self.is_hydrating = False
        self.step: Step | None = None

    def compare(self) -> None:
        if self.trees.is_open:  # else a restart has failed, which is reported already
            super().compare()

    # --- what may be lost ---------------------------------------------------------------------

    def hold(self) -> None:
        """Look for files of the oracle that are new."""
        for path in self.paths():
            if self.oracle.stat(path).kind == "file":
                number = self.oracle.stat(path).ino
                if number not in self.held:
                    fd = self.oracle.open(path, os.O_RDONLY)
                    self.held[number] = fd
                    self.versions[number] = [b""]
                    self.note(number)

    def note(self, number: int) -> None:
        fd = self.held[number]
        content = os.pread(fd, os.fstat(fd).st_size, 0)
        if self.versions[number][-1] != content:
            self.versions[number].append(content)

    def changed(self, oracle_handle: int | None, path: bytes | None = None) -> None:
        self.hold()
        if oracle_handle is not None:
            self.note(os.fstat(oracle_handle).st_ino)
        else:
            assert path is not None
            self.note(self.oracle.stat(path).ino)

    def synced(self, oracle_handle: int | None) -> None:
        if oracle_handle is not None:
            number = os.fstat(oracle_handle).st_ino
            self.versions[number] = self.versions[number][-1:]
        self.names_synced()

    def names_synced(self) -> None:
        self.synced_end = self.trees.tree._stack.live.journal.synced
        self.hold()
        self.durable = take_snapshot(self.oracle)
        self.durable_inos = {path: self.oracle.stat(path).ino for path in self.durable}

    def took_all(self) -> None:
        self.names_synced()
        for number, versions in self.versions.items():
            self.versions[number] = versions[-1:]

    @invariant()
    def note_syncs(self) -> None:
        """A write that follows a truncation syncs the journal by itself."""
        trees = self.trees
        if trees.is_open and trees.tree._stack.live.journal.synced != self.synced_end:
            self.names_synced()

    @invariant()
    def native_half_knows_the_names(self) -> None:
        """It answers for missing names, so it must never take one that is there for missing."""
        trees = self.trees
        if not trees.is_open:
            return
        nodes = trees.tree.nodes
        for inode in trees.tree._namespace.inodes.values():
            if isinstance(inode, Directory) and inode.children is not None:
                assert not any(nodes.is_absent(inode.ino, name) for name in inode.children)
                assert nodes.is_absent(inode.ino, b"no such name")

    # --- rules --------------------------------------------------------------------------------

    @rule()
    def compare_all(self) -> None:
        self.compare()

    @rule()
    def forget(self) -> None:
        self.driver.forget_all()

    @rule()
    def reap(self) -> None:
        self.trees.tree.reap()

    @rule()
    def sync(self) -> None:
        self.trees.tree.sync()
        self.names_synced()

    @rule()
    def drop_indexes(self) -> None:
        self.trees.tree.nodes.drop_indexes()

    @rule()
    def hydrate(self) -> None:
        """Look (again) at what there is to hydrate."""
        for _ in self.trees.tree.hydration.survey():
            pass
        self.is_hydrating = True

    @precondition(lambda self: self.is_hydrating and self.step is None)
    @rule(max_bytes=st.sampled_from([1, 3 * PAGE, 1 << 20]))
    def hydrate_more(self, max_bytes: int) -> None:
        """Move bytes, as a thread would beside the changes that come before the step's end."""
        self.step = self.trees.tree.hydration.next_step(max_bytes)
        if self.step is not None:
            self.step.run()

    @precondition(lambda self: self.step is not None)
    @rule()
    def hydrated_more(self) -> None:
        assert self.step is not None
        self.trees.tree.hydration.finish(self.step)
        self.step = None
        assert not self.trees.tree.hydration.failed

    @precondition(lambda self: self.step is None)
    @rule()
    def detach(self) -> None:
        """Hydrate all; linked out, the files are what the tree shows."""
        self.hydrate()
        hydration = self.trees.tree.hydration
        while (step := hydration.next_step(1 << 20)) is not None:
            step.run()
            hydration.finish(step)
        assert not hydration.failed
        self.hydrate()
        assert (hydration.n_files_done, hydration.n_bytes_done) == (
            hydration.n_files,
            hydration.n_bytes,
        )
        target = self.place / "detached"
        target.mkdir()
        self.trees.tree.link_out(target)
        expected = take_snapshot(self.oracle)
        # One name more: the object's.
        found = {
            path: replace(entry, nlink=entry.nlink - (entry.kind == "file"))
            for path, entry in take_snapshot(OsDriver(target)).items()
        }
        assert found == expected, describe_difference(expected, found)
        shutil.rmtree(target)

    @rule()
    def remount(self) -> None:
        self.close_handles()
        self.trees.reopen()
        self.reopened()
        self.took_all()
        self.compare()

    @rule()
    def crash(self) -> None:
        self.close_handles()
        self.trees.crash()
        self.reopened()
        self.names_synced()
        self.compare()

    @precondition(lambda self: len(self.trees.layers) < MAX_LAYERS)
    @rule()
    def seal(self) -> None:
        self.close_handles()
        self.trees.seal()
        self.reopened()
        self.took_all()
        self.compare()

    @precondition(lambda self: self.step is None and self.trees.n_seals < MAX_SEALS)
    @rule(has_child=st.booleans())
    def seal_in_use(self, *, has_child: bool) -> None:
        """What is open stays open; a child shows for good what was sealed."""
        child = self.place / f"child{len(self.children)}" if has_child else None
        self.trees.seal_live(child)
        if child is not None:
            self.children.append((child, take_snapshot(self.oracle)))
        self.is_hydrating = False
        self.took_all()
        self.compare()

    @precondition(lambda self: self.step is None and self.trees.n_layers > 1)
    @rule(newest=st.integers(0, 2), n_layers=st.integers(2, 5))
    def fold(self, newest: int, n_layers: int) -> None:
        """Put one layer in the place of some, for all heads that have them; the old ones go."""
        self.close_handles()
        self.trees.close()
        heads = [self.trees.diff_path, *(path for path, _ in self.children)]
        self.trees.fold(heads, newest, n_layers)
        self.trees.open()
        self.reopened()
        self.took_all()
        self.compare()

    @precondition(lambda self: self.step is None and self.trees.n_layers > 1 and not self.children)
    @rule(newest=st.integers(0, 2), n_layers=st.integers(2, 5))
    def fold_in_use(self, newest: int, n_layers: int) -> None:
        """What is open stays open, and nothing refers to the old layers any more."""
        if newest < self.trees.n_layers:
            self.trees.fold_in_use(newest, n_layers)
            self.is_hydrating = False
            self.compare()

    @rule(torn_bytes=st.sampled_from([0, 3, 11]))  # no frame is as short
    def power_cut(self, torn_bytes: int) -> None:
        self.close_handles()
        self.trees.cut_power(torn_bytes=torn_bytes)
        self.reopened()
        found = take_snapshot(self.driver)
        self.check_names(found)
        self.adopt(found)
        self.compare()

    def check_names(self, found: Snapshot) -> None:
        def names_only(snapshot: Snapshot) -> Snapshot:
            # Mode, size and content of a file are its object's; a directory's are in the journal.
            return {
                path: entry
                if entry.kind != "file"
                else replace(entry, mode=0, size=0, content=b"", set_mtime_ns=None)
                for path, entry in snapshot.items()
            }

        expected = names_only(self.durable)
        assert names_only(found) == expected, describe_difference(expected, names_only(found))
        for path, entry in found.items():
            if entry.kind == "file":
                self.check_content(path, entry.content, self.versions[self.durable_inos[path]])

    def check_content(self, path: bytes, content: bytes, versions: list[bytes]) -> None:
        assert len(content) in {len(version) for version in versions}, f"size of {path!r}"
        for start in range(0, len(content), PAGE):
            page = content[start : start + PAGE]
            allowed = {
                version[start : start + PAGE][: len(page)].ljust(len(page), b"\0")
                for version in versions
            }
            assert page in allowed, f"page {start // PAGE} of {path!r} is of no version"

    def adopt(self, found: Snapshot) -> None:
        """Make the oracle what the power cut left."""
        root = self.oracle.root
        shutil.rmtree(root)
        root.mkdir()
        first: dict[int, Path] = {}
        late: list[tuple[Path, int]] = []
        for path, entry in sorted(found.items()):
            place = root / os.fsdecode(path)
            if entry.group in first:
                os.link(first[entry.group], place, follow_symlinks=False)
                continue
            if entry.kind == "dir":
                place.mkdir(exist_ok=True)
                late.append((place, entry.mode))
                continue
            if entry.kind == "link":
                place.symlink_to(os.fsdecode(entry.target))
            else:
                place.write_bytes(entry.content)
                place.chmod(entry.mode)
            if entry.set_mtime_ns is not None:
                os.utime(place, ns=(0, entry.set_mtime_ns), follow_symlinks=False)
            first[entry.group] = place
        for place, mode in late:
            place.chmod(mode)
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()
        self.versions.clear()
        self.names_synced()
        # The contents need not be durable yet, but a second cut can lose no more.
        for number, versions in self.versions.items():
            self.versions[number] = versions[-1:]


class TestTree(TreeMachine.TestCase):  # type: ignore[misc]
    settings = settings(
        max_examples=100,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @pytest.fixture(autouse=True)
    def _small_files_are_mapped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contents, "MAX_WHOLE_BYTES", 4 * PAGE)
        monkeypatch.setattr(hydration, "MAX_SMALL_BYTES", PAGE)


def test_oracle_counts_directories() -> None:
    """The oracle's file system counts directories in nlink as ours does; else it is no oracle."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        os.mkdir(f"{name}/below")
        assert OsDriver(Path(name)).stat(b"").nlink == 3
