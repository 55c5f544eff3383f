"""Hydration: bring everything that is still below up into the diff, a step at a time.

Owns the order (files in use first, then by size), the amounts, and what is left. ``mount`` drives
it: ``survey``, ``next_step`` and ``finish`` on the thread that owns the tree, ``Step.run``, which
moves the bytes, in any thread. Between these calls requests may change everything: a file that was
written, removed or given other attributes meanwhile is left as it is and looked at again.

A small file comes up at once: its object is filled and durable before COPY_UP and WHOLE are
appended. A larger one gets an empty mapped object, which the native half fills page range by page
range (HYDRATED records) beside its readers and writers, until it is whole.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from pbkfs.overlay.contents import Contents
from pbkfs.overlay.inode import Directory, File, Inode
from pbkfs.overlay.journal import BLOCK_BYTES
from pbkfs.overlay.layer import EMPTY_MAP
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.objects import ObjectStore
from pbkfs.overlay.stack import Stack

# Up to this size a file is copied in one piece.
MAX_SMALL_BYTES = 1 << 20
# So many small ones at a time, as each costs an fsync.
_MAX_BATCH = 32
# What a crash may cost of a large file's progress.
_SYNC_BYTES = 64 << 20
_HEAT_EVERY_S = 1.0

_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = logging.getLogger(__name__)


class Step(Protocol):
    """A piece of work. ``n_bytes`` is what ``run`` has copied."""

    n_bytes: int

    def run(self) -> None:
        """Move bytes. Any thread. Raises OSError only where hydration has to stop."""


@dataclass(slots=True)
class NewObject:
    """One file that gets an object, and its attributes when that was decided."""

    file: File
    object_id: int
    attributes: tuple[int, int, int]
    times_ns: tuple[int, int]
    is_made: bool = False
    is_forgotten: bool = False
    """The kernel has forgotten the file meanwhile, and so the native half: try again."""


@dataclass(slots=True)
class MakeObjects:
    """Make objects: filled ones for small files, an empty one of its size for a large file."""

    contents: Contents
    objects: ObjectStore
    items: list[NewObject]
    is_filled: bool
    n_bytes: int = 0
    error: OSError | None = None

    def run(self) -> None:
        for item in self.items:
            try:
                self.objects.fill(
                    item.object_id,
                    partial(self._fill, item),
                    attributes=item.attributes,
                    times_ns=item.times_ns,
                )
            except OSError as error:
                if item.is_forgotten:
                    continue
                self.error = error
                if error.errno in _FULL:
                    return
                continue
            item.is_made = True
            if self.is_filled:
                self.n_bytes += item.file.size

    def _fill(self, item: NewObject, fd: int) -> None:
        if not self.is_filled:
            os.ftruncate(fd, item.file.size)
            return
        try:
            self.contents.nodes.copy_to(item.file.ino, fd)
        except FileNotFoundError:
            item.is_forgotten = True
            raise


@dataclass(slots=True)
class FillObject:
    """Bring up some page ranges of one mapped object."""

    contents: Contents
    ino: int
    offset: int
    max_bytes: int
    is_synced: bool = False
    """Whether to record what was brought up so far, for the case of a crash."""
    n_bytes: int = 0
    next_offset: int | None = field(default=None)
    is_whole: bool = False
    error: OSError | None = None

    def run(self) -> None:
        nodes = self.contents.nodes
        try:
            self.n_bytes, self.next_offset = nodes.hydrate(self.ino, self.offset, self.max_bytes)
            if self.next_offset is None or self.is_synced:
                self.is_whole = nodes.hydrate_sync(self.ino)
        except OSError as error:
            self.error = error


class Hydration:
    """See the module. ``n_bytes`` and ``n_files`` count what comes from below."""

    def __init__(self, stack: Stack, namespace: Namespace, contents: Contents) -> None:
        self._stack = stack
        self._namespace = namespace
        self._contents = contents
        self._left: dict[int, int] = {}
        self._cold: deque[int] = deque()
        self._hot: deque[int] = deque()
        self._hot_at = 0.0
        self._current: tuple[int, int] | None = None
        self._n_unsynced = 0
        self._n_bytes_left = 0
        self.n_files = self.n_bytes = 0
        self.failed: dict[int, bytes] = {}
        """Files that can't be read from below: inode and path."""

    @property
    def n_files_done(self) -> int:
        """Files that need nothing from below any more."""
        return self.n_files - len(self._left) - len(self.failed)

    @property
    def n_bytes_done(self) -> int:
        """Bytes that are in the diff."""
        return self.n_bytes - self._n_bytes_left

    # --- what there is to do ------------------------------------------------------------------

    def forget(self) -> None:
        """Know nothing any more; the next survey tells what is missing then."""
        self._left.clear()
        self.failed.clear()
        self._hot.clear()
        self._cold.clear()
        self._current = None
        self.n_files = self.n_bytes = self._n_bytes_left = 0

    def survey(self) -> Iterator[None]:
        """Look at all files; between two items others may use the tree. Raises OSError."""
        self.forget()
        seen: set[int] = set()
        directories: list[Directory] = [self._namespace.root]
        sizes: dict[int, int] = {}
        while directories:
            directory = directories.pop()
            if directory.parent is None:
                continue  # removed meanwhile
            for inode in list(self._namespace.children(directory).values()):
                if isinstance(inode, Directory):
                    directories.append(inode)
                elif isinstance(inode, File) and inode.ino not in seen:
                    seen.add(inode.ino)
                    self._survey_file(inode, sizes)
            yield
        self._cold = deque(sorted(sizes, key=sizes.__getitem__))

    def _survey_file(self, file: File, sizes: dict[int, int]) -> None:
        piece = self._stack.live_piece(file)
        if piece is not None and not piece.is_mapped:
            if file.origin is not None or len(file.pieces) > 1:
                self._stack.load(file)
                self.n_files += 1
                self.n_bytes += file.size
            return
        self._stack.load(file)
        self.n_files += 1
        self.n_bytes += file.size
        n_missing = self._count_missing(file)
        if n_missing is None:
            return
        self._left[file.ino] = n_missing
        self._n_bytes_left += n_missing
        sizes[file.ino] = file.size

    def _count_missing(self, file: File) -> int | None:
        """Return how many bytes the file still needs from below; None if it is whole."""
        piece = self._stack.live_piece(file)
        if piece is None:
            return file.size
        if not piece.is_mapped:
            return None
        nodes = self._contents.nodes
        if nodes.has(file.ino) and nodes.has_object(file.ino):
            n_blocks, n_present, _, is_whole = nodes.count_blocks(file.ino)
        else:
            live = self._stack.live
            found = live.page_maps.get(piece.object_id, EMPTY_MAP)
            size = live.objects.stat(piece.object_id).st_size
            n_blocks = self._stack.live_limit(file, piece, size)
            present = int.from_bytes(found.present, "little") & (1 << n_blocks) - 1
            n_present, is_whole = present.bit_count(), found.is_whole
        return None if is_whole else min(file.size, (n_blocks - n_present) * BLOCK_BYTES)

    def _pick(self) -> int | None:
        """Return the inode to go on with: the one most in use, else the smallest."""
        now = time.monotonic()
        if now >= self._hot_at:
            self._hot_at = now + _HEAT_EVERY_S
            heat = self._contents.nodes.heat()
            hot = [ino for ino in heat if ino in self._left]
            self._hot = deque(sorted(hot, key=heat.__getitem__, reverse=True))
        for queue in (self._hot, self._cold):
            while queue:
                ino = queue.popleft()
                if ino in self._left:
                    return ino
        return next(iter(self._left), None)

    # --- steps --------------------------------------------------------------------------------

    def next_step(self, max_bytes: int) -> Step | None:
        """Return the next step, of about ``max_bytes``; None if there is nothing left to do.

        Raises OSError where hydration has to stop.
        """
        while True:
            if self._current is not None:
                ino, offset = self._current
                is_synced = self._n_unsynced >= _SYNC_BYTES
                return FillObject(self._contents, ino, offset, max_bytes, is_synced)
            ino_or_none = self._pick()
            if ino_or_none is None:
                return None
            file = self._file(ino_or_none)
            if file is None:
                continue
            try:
                if self._stack.live_piece(file) is None:
                    return self._make_objects(file, max_bytes)
                if self._count_missing(file) is None:
                    self._done(file.ino)
                    continue
                self._contents.copy_up(file)
            except OSError as error:
                self._fail(file, error)
                continue
            self._current = (file.ino, 0)
            self._n_unsynced = 0

    def _file(self, ino: int) -> File | None:
        inode: Inode | None = self._namespace.inodes.get(ino)
        if isinstance(inode, File) and inode.parent is not None:
            return inode
        self._done(ino)
        return None

    def _make_objects(self, first: File, max_bytes: int) -> Step:
        is_small = first.size <= MAX_SMALL_BYTES
        files = [first]
        if is_small:
            n_bytes = first.size
            while self._cold and len(files) < _MAX_BATCH:
                ino = self._cold[0]
                file = self._file(ino) if ino in self._left else None
                if file is not None and (
                    n_bytes + file.size > max_bytes or file.size > MAX_SMALL_BYTES
                ):
                    break
                self._cold.popleft()
                if file is None or file in files or self._stack.live_piece(file) is not None:
                    if file is not None and file not in files:
                        self._hot.append(ino)
                    continue
                files.append(file)
                n_bytes += file.size
        step = MakeObjects(self._contents, self._stack.live.objects, [], is_small)
        for file in files:
            try:
                self._contents.open(file)
                item = NewObject(file, self._stack.live.objects.reserve(), *_attributes(file))
            except OSError as error:
                self._fail(file, error)
                continue
            step.items.append(item)
        return step

    def finish(self, step: Step) -> None:
        """Take the result of a step that has run. Raises OSError where hydration has to stop."""
        if isinstance(step, FillObject):
            self._finish_fill(step)
        elif isinstance(step, MakeObjects):
            self._finish_objects(step)

    def _finish_fill(self, step: FillObject) -> None:
        self._progress(step.ino, step.n_bytes)
        self._n_unsynced = 0 if step.is_synced else self._n_unsynced + step.n_bytes
        if step.error is not None:
            self._current = None
            file = self._file(step.ino)
            if file is not None:
                self._fail(file, step.error)
        elif step.next_offset is None:
            self._current = None
            if step.is_whole:
                self._done(step.ino)
            else:
                self._cold.append(step.ino)
        else:
            self._current = (step.ino, step.next_offset)

    def _finish_objects(self, step: MakeObjects) -> None:
        items = deque(item for item in step.items if item.is_made)
        try:
            while items:
                self._take_object(items.popleft(), is_filled=step.is_filled)
        finally:
            for item in items:
                self._stack.live.objects.remove(item.object_id)
        for item in step.items:
            if item.is_forgotten:
                self._cold.append(item.file.ino)
            elif step.error is not None and not item.is_made:
                file = self._file(item.file.ino)
                if file is not None:
                    self._fail(file, step.error)

    def _take_object(self, item: NewObject, *, is_filled: bool) -> None:
        file = item.file
        is_wanted = (
            file.ino in self._left
            and self._file(file.ino) is file
            and self._stack.live_piece(file) is None
            and _attributes(file) == (item.attributes, item.times_ns)
        )
        if not is_wanted:
            self._stack.live.objects.remove(item.object_id)
            self._cold.append(file.ino)
            return
        self._contents.adopt(file, item.object_id, is_whole=is_filled)
        if is_filled:
            self._progress(file.ino, file.size)
            self._done(file.ino)
        else:
            self._hot.appendleft(file.ino)

    def sync(self) -> None:
        """Record what was brought up of the file in work. Raises OSError."""
        if self._current is not None:
            with suppress(FileNotFoundError):
                self._contents.nodes.hydrate_sync(self._current[0])

    # --- the books ----------------------------------------------------------------------------

    def _progress(self, ino: int, n_bytes: int) -> None:
        n_bytes = min(n_bytes, self._left.get(ino, 0))
        if n_bytes:
            self._left[ino] -= n_bytes
            self._n_bytes_left -= n_bytes

    def _done(self, ino: int) -> None:
        self._n_bytes_left -= self._left.pop(ino, 0)

    def _fail(self, file: File, error: OSError) -> None:
        """Note that a file can't be brought up; raises if that is so for all of them."""
        if error.errno in _FULL:
            self._cold.appendleft(file.ino)
            raise error
        path = self._namespace.path_of(file) or b""
        _log.error(
            "%s: %r can't be hydrated: %s",
            self._stack.live.path,
            os.fsdecode(path),
            (error.strerror or str(error)).lower(),
        )
        if file.ino in self._left:
            self.failed[file.ino] = path
            del self._left[file.ino]


def _attributes(file: File) -> tuple[tuple[int, int, int], tuple[int, int]]:
    return (stat.S_IMODE(file.mode), file.uid, file.gid), (file.atime_ns, file.mtime_ns)
