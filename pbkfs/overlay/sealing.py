"""Sealing: the live layer of a diff becomes immutable, and the diff goes on in a new one.

Owns the order of a seal and what is on the disk at each moment. Nothing is copied but WAL. One
rename, that of the superblock, is the switch: before it all is as it was, and a failure takes away
what was made; after it nothing may fail, and if it does, the process has to end (BrokenSealError).

Making a ``Seal``, ``switch`` and ``cancel`` belong to the thread that owns the tree; ``prepare``,
``sync`` and ``finish``, which wait for the disk, may run in any other one. Requests go on between
these.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pbkfs import durable
from pbkfs.errors import DiffError, FormatError, UnsupportedError
from pbkfs.overlay.contents import Contents
from pbkfs.overlay.diff import WAL, Diff
from pbkfs.overlay.inode import File
from pbkfs.overlay.layer import Layer
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.replay import is_wal_out
from pbkfs.overlay.stack import Stack
from pbkfs.overlay.superblock import LayerRef, Superblock, new_superblock, read_superblock
from pbkfs.overlay.wal_copy import WalCopy, WalStart
from pbkfs.pgdata import parse_lsn, read_control_file

_CONTROL = b"global/pg_control"
_LABEL = b"backup_label"
_MAX_SMALL_BYTES = 8192
_START = re.compile(r"^START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) ", re.MULTILINE)


class BrokenSealError(RuntimeError):
    """The disk is switched to the new layer and the process is not: it must not go on."""


@dataclass(frozen=True, slots=True)
class Child:
    """A head to be made on the sealed layer: its directory, and that of its live layer."""

    head: Path
    live: Path


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a seal did. ``layer`` has an absolute path; the gate was closed for ``gate_ns``."""

    layer: LayerRef
    gate_ns: int
    wal_bytes: int


class Seal:
    """One seal of a tree, whose live layer from then on is ``new_live``, a new directory."""

    def __init__(
        self,
        stack: Stack,
        namespace: Namespace,
        contents: Contents,
        new_live: Path,
        child: Child | None,
    ) -> None:
        """Look at what is there; changes nothing. Raises OSError, FileExistsError for a path."""
        self._stack = stack
        self._namespace = namespace
        self._contents = contents
        self._diff = stack.diff
        self._old = stack.live
        self._new_live = Path(os.path.abspath(new_live))
        self._new: Layer | None = None
        self._child = None if child is None else _NewHead(child)
        self._has_wal = child is not None and is_wal_out(namespace)
        self._wal: WalCopy | None = None
        self._start = self._find_start()
        self._is_switched = False
        for path in (self._new_live, *(self._child.paths if self._child else ())):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    def prepare(self) -> None:
        """Make the new directories, and most of the old layer durable. OSError, HostError."""
        self._new = Layer.make(self._new_live, session=self._old.session)
        self._new.start({}, (os.geteuid(), os.getegid()))
        if self._child is not None:
            self._child.make(self._diff, self._old)
            if self._has_wal:
                self._wal = WalCopy(self._diff.wal_path, self._child.wal_path)
                if self._start is not None:
                    self._wal.advance(self._start)
        self.sync()

    def sync(self) -> None:
        """Make what the old layer has now durable: ``switch`` has to wait for the rest only."""
        self._contents.sync_open()
        self._old.sync()

    def switch(self) -> Sealed:
        """Seal: on return the new layer is in force, on the disk and in the tree.

        Raises OSError, and then all is as before; call ``cancel`` then. Raises BrokenSealError.
        """
        nodes, new = self._contents.nodes, self._new
        assert new is not None
        assert self._stack.live is self._old
        files = self._contents.live_files()
        began_ns = time.monotonic_ns()
        with ExitStack() as undo:
            nodes.gate_close()
            undo.callback(nodes.gate_open)
            nodes.sync()
            self._old.mark_end()
            if self._wal is not None:
                # Before the seal is prepared: it may open a file, which attaches its object.
                self._start = self._find_start()
                if self._start is not None:
                    self._wal.advance(self._start)
            nodes.prepare_seal(self._old.label)
            undo.callback(nodes.cancel_seal)
            maps = self._contents.export_maps(files)
            superblock = self._next_superblock(new)
            try:
                write_switch(superblock, self._diff.path, label="seal:superblock")
            except BrokenSealError:
                undo.pop_all()
                raise
            undo.pop_all()
        try:
            nodes.seal(new.journal, new.objects.fd)
            self._old.page_maps.update(maps)
            self._stack.push(superblock, new)
            self._contents.reseat(files)
            self._is_switched = True
            nodes.gate_open()
        except BaseException as error:
            raise BrokenSealError(f"diff {self._diff.path} was half sealed: {error!r}") from error
        return Sealed(
            layer=LayerRef(self._old.uuid, str(self._old.path)),
            gate_ns=time.monotonic_ns() - began_ns,
            wal_bytes=0 if self._wal is None else self._wal.n_bytes,
        )

    def finish(self) -> None:
        """Make the child durable and put it into its place, if there is one. Raises OSError."""
        if self._child is not None:
            if self._wal is not None:
                self._wal.sync()
            self._child.publish()

    def cancel(self) -> None:
        """Take away what was made and is not in use: all, or after the switch the child.

        Never raises OSError: what can't be deleted means nothing to anybody.
        """
        if self._child is not None:
            self._child.remove()
        if self._is_switched:
            return
        if self._new is not None:
            self._new.close()
            shutil.rmtree(self._new_live, ignore_errors=True)

    def _next_superblock(self, new: Layer) -> Superblock:
        now = self._diff.superblock
        return dataclasses.replace(
            now,
            live=str(new.path),
            live_uuid=new.uuid,
            layers=(LayerRef(self._old.uuid, now.live), *now.layers),
        )

    def _find_start(self) -> WalStart | None:
        """Return where a recovery of the tree would begin; None if it holds no cluster."""
        control = self._read(_CONTROL) if self._has_wal else None
        if control is None:
            return None
        try:
            found = read_control_file(control)
        except (FormatError, UnsupportedError) as error:
            raise OSError(errno.EIO, str(error)) from error
        lsn = found.redo_lsn
        label = self._read(_LABEL)
        match = None if label is None else _START.search(label.decode(errors="replace"))
        if match is not None:
            lsn = min(lsn, parse_lsn(match[1]))
        return WalStart(lsn, found.wal_segment_size, found.wal_block_size)

    def _read(self, path: bytes) -> bytes | None:
        try:
            file = self._namespace.resolve(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not isinstance(file, File):
            return None
        self._contents.open(file)
        return self._contents.nodes.read(file.ino, 0, _MAX_SMALL_BYTES)


def write_switch(superblock: Superblock, diff: Path, *, label: str) -> None:
    """Replace the superblock of a diff in use. Raises OSError where it is the old one still.

    Raises BrokenSealError where nobody knows which one a power cut would find.
    """
    try:
        superblock.write(diff, label=label)
    except BaseException as error:
        # The rename may have been done, and then it may be durable or not.
        if _is_on_disk(superblock, diff):
            raise BrokenSealError(f"the stack of diff {diff} is half changed: {error}") from error
        raise


def _is_on_disk(superblock: Superblock, diff: Path) -> bool:
    try:
        found = read_superblock(diff)
    except (OSError, DiffError):
        return True  # nobody knows
    return (found.live_id, found.layers) == (superblock.live_id, superblock.layers)


class _NewHead:
    """A second diff directory upon the sealed layer, made under a temporary name."""

    def __init__(self, child: Child) -> None:
        self._head = Path(os.path.abspath(child.head))
        self._live = Path(os.path.abspath(child.live))
        self._tmp = self._head.with_name(f".{self._head.name}.seal")
        self._is_made = self._is_published = False

    @property
    def paths(self) -> tuple[Path, Path]:
        """What must not exist yet."""
        return self._head, self._live

    @property
    def wal_path(self) -> Path:
        """Where its WAL is to be copied to, before it is published."""
        return self._tmp / WAL

    def make(self, diff: Diff, sealed: Layer) -> None:
        """Make it, durable but for its name and its WAL. ``sealed`` is to be its newest layer."""
        if os.path.lexists(self._tmp):
            shutil.rmtree(self._tmp)  # of a process that died
        live = Layer.make(self._live)
        live.close()
        self._is_made = True
        below = [LayerRef(ref.uuid, str(diff.layer_path(ref))) for ref in diff.superblock.layers]
        made = new_superblock(
            diff.superblock.base,
            diff.superblock.system_identifier,
            [LayerRef(sealed.uuid, str(sealed.path)), *below],
        )
        made = dataclasses.replace(made, live=str(self._live), live_uuid=live.uuid)
        os.mkdir(self._tmp, 0o711)
        os.chmod(self._tmp, 0o711)
        made.write(self._tmp, label="seal:child:superblock")

    def publish(self) -> None:
        """Give it its name, durably. Raises OSError."""
        durable.fsync_dir(self._tmp, label="seal:child")
        durable.on_step("seal:child:rename")
        if os.path.lexists(self._head):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._head))
        os.rename(self._tmp, self._head)
        self._is_published = True
        durable.fsync_dir(self._head.parent, label="seal:child:rename")

    def remove(self) -> None:
        """Delete what was made, unless it was published."""
        if self._is_made and not self._is_published:
            shutil.rmtree(self._tmp, ignore_errors=True)
            shutil.rmtree(self._live, ignore_errors=True)
