"""The overlay engine: heads are diffs of our own file system, branching is a seal of the source.

No kernel module, no volume manager, no copy. Layers are immutable once they are sealed; who refers
to which is in the superblocks of the heads and points, so what is on the disk decides what may be
deleted, never the store. See ARCHITECTURE.md, "Trunks and branches".
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pbkfs import durable
from pbkfs.branch.engine import BaseSource, Cloned, Size, TryLock
from pbkfs.branch.layout import Inode, Layout, disk_bytes, measure
from pbkfs.branch.serving import free_of_holders
from pbkfs.config import DEFAULT_INDEX_BYTES
from pbkfs.errors import BusyError, DiffError, HostError, NotRunningError, PbkfsError
from pbkfs.mount import ending, flattening, launch, sealing
from pbkfs.mount.binding import read_binding, write_binding
from pbkfs.mount.mounts import find_mountpoint
from pbkfs.mount.opening import open_mount
from pbkfs.mount.request import MountRequest
from pbkfs.mount.target import state_of, target_of
from pbkfs.overlay.folding import Folded, find_data, find_run, read_layers, replace_run
from pbkfs.overlay.layer import Layer, delete_layer
from pbkfs.overlay.superblock import NAME as SUPERBLOCK
from pbkfs.overlay.superblock import LayerRef, Superblock, new_superblock, read_superblock
from pbkfs.overlay.wal_copy import copy_bytes

_WAL = "pg_wal"
# What makes a head's own directory a layer of others: a trunk's first one.
_LAYER_PARTS = ("journal", "objects")
# Source: include/uapi/linux/fs.h.
_FICLONE = 0x40049409


class OverlayEngine:
    """See ``engine.Engine``."""

    name = "overlay"

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    # --- showing --------------------------------------------------------------------------------

    def create(self, head_id: str, source: BaseSource) -> None:
        """Make a head of a base, and mount it."""
        try:
            self._mount(head_id, source)
        except BaseException:
            with contextlib.suppress(OSError):
                self._layout.mount(head_id).rmdir()
            raise

    def mount(self, head_id: str) -> Path:
        """Mount a head, if it is not yet; returns its PGDATA."""
        if not self.is_mounted(head_id):
            self._mount(head_id, BaseSource())
        return self._layout.mount(head_id)

    def _mount(self, head_id: str, source: BaseSource) -> None:
        place = self._layout.mount(head_id)
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o755)
        request = MountRequest(
            mountpoint=place,
            diff=self._layout.head(head_id),
            index_bytes=DEFAULT_INDEX_BYTES,
            store=source.store,
            instance=source.instance,
            backup_id=source.backup_id,
            base_dir=source.directory,
            is_empty=source.is_empty,
            owner=source.owner,
        )
        if threading.active_count() > 1:
            _mount_elsewhere(request)
            return
        foreign = launch.inherited_descriptors()
        opened = open_mount(request)
        launched = launch.start_worker(opened, foreign=foreign, wait=True, timeout_s=None)
        if launched.state == "interrupted":
            raise KeyboardInterrupt

    def unmount(self, head_id: str, *, force: bool = False) -> None:
        """End the mount of a head, dead or alive, if there is one."""
        place, diff = self._layout.mount(head_id), self._layout.head(head_id)
        if not diff.is_dir():
            return
        with contextlib.suppress(NotRunningError):
            free_of_holders(lambda: _ignore(ending.unmount(None, diff, force=force)))
        if find_mountpoint(place) is None:
            with contextlib.suppress(OSError):
                place.rmdir()

    def is_mounted(self, head_id: str) -> bool:
        """Return whether the head's mount is there and served."""
        diff = self._layout.head(head_id)
        entry = find_mountpoint(self._layout.mount(head_id))
        if entry is None or not diff.is_dir():
            return False
        return state_of(target_of(diff, entry)) != "dead"

    # --- branching ------------------------------------------------------------------------------

    def clone(self, source_id: str, child_id: str) -> Cloned:
        """Seal the source and make a head on the sealed layer."""
        source, child = self._layout.head(source_id), self._layout.head(child_id)
        new_live = self._layout.layer(str(uuid.uuid4()))
        child_live = self._layout.layer(str(uuid.uuid4()))
        report = sealing.seal(
            source, new_live=new_live, child=sealing.Child(head=child, live=child_live)
        )
        self._bind(source_id, child_id)
        point = self._make_point(child)
        return Cloned(point, self.live_uuid(source_id), report.gate_ms, report.held_ms, report.note)

    def clone_point(self, source_id: str, child_id: str, point: str) -> Cloned:
        """Make a head of a point of the source; an empty one is the source's base as it was."""
        child = self._layout.head(child_id)
        shown = self._layout.point(point) if point else self._layout.head(source_id)
        origin = read_superblock(shown)
        layers = origin.layers if point else ()
        made = new_superblock(origin.base, origin.system_identifier, layers)
        making = child.with_name(f".{child_id}.new")
        with _host_errors(child):
            _remove(making)
            making.mkdir(mode=0o711)
            making.chmod(0o711)
            if point:
                _copy_wal(shown / _WAL, making / _WAL)
            self._write_superblock(making, made)
            durable.on_step("branch:head:rename")
            os.rename(making, child)
            durable.fsync_dir(child.parent, label="branch:head")
        self._bind(source_id, child_id)
        return Cloned(point, self.live_uuid(source_id))

    def live_uuid(self, head_id: str) -> str:
        """Return the uuid of the layer that a head writes to."""
        found = read_superblock(self._layout.head(head_id))
        return str(found.live_id)

    def _bind(self, source_id: str, child_id: str) -> None:
        """Let the child find the base that the source is mounted over."""
        bound = read_binding(self._layout.head(source_id))
        if bound is None:
            raise HostError(
                f"head {source_id} was never mounted",
                hint=f"Its directory is {self._layout.head(source_id)}.",
            )
        write_binding(
            self._layout.head(child_id),
            dataclasses.replace(
                bound,
                mountpoint=str(self._layout.mount(child_id)),
                pid=None,
                state="released",
                made_directory=True,
            ),
        )

    def _make_point(self, child: Path) -> str:
        """Keep what a new head, not yet mounted, consists of; returns the point's id."""
        name = str(uuid.uuid4())
        making = self._layout.points / f".{name}.new"
        with _host_errors(child):
            making.mkdir(mode=0o700)
            if (child / _WAL).is_dir():
                _copy_wal(child / _WAL, making / _WAL)
            shown = dataclasses.replace(read_superblock(child), live=".", live_uuid=None)
            shown.write(making, label="branch:point")
            durable.on_step("branch:point:rename")
            os.rename(making, self._layout.point(name))
            durable.fsync_dir(self._layout.points, label="branch:point")
        return name

    def _write_superblock(self, head: Path, superblock: Superblock) -> None:
        """Write a head's superblock, with a new empty layer as its live one."""
        live = Layer.make(self._layout.layer(str(uuid.uuid4())))
        live.close()
        changed = dataclasses.replace(superblock, live=str(live.path), live_uuid=live.uuid)
        changed.write(head, label="branch:superblock")

    def reset(self, head_id: str, point: str) -> None:
        """Give a head a new live layer upon the layers and the WAL of the point."""
        head = self._layout.head(head_id)
        mine = read_superblock(head)
        layers: tuple[LayerRef, ...] = ()
        shown = self._layout.point(point)
        with _host_errors(head):
            if point:
                layers = read_superblock(shown).layers
            _remove(head / _WAL)
            _remove(head / f"{_WAL}.new")
            if point and (shown / _WAL).is_dir():
                _copy_wal(shown / _WAL, head / _WAL)
            durable.on_step("branch:reset")
            self._write_superblock(head, dataclasses.replace(mine, layers=layers))

    # --- flattening -----------------------------------------------------------------------------

    def n_layers(self, head_id: str) -> int:
        """Return how many sealed layers lie below a head."""
        return len(read_superblock(self._layout.head(head_id)).layers)

    def flatten(self, head_id: str, limit: int, lock: TryLock) -> int:
        """Fold layers of a head until ``limit`` are left; returns how many there are then.

        What is folded is put into the place of the same layers of other heads and of points, too,
        as far as these have all of them; who has only some keeps them.
        """
        head = self._layout.head(head_id)
        with _host_errors(head):
            while (run := self._choose_run(head, limit)) is not None:
                layers = read_layers(head)[run.start :]
                n_newest = run.stop - run.start
                target = self._layout.layer(str(uuid.uuid4()))
                folded = flattening.make_fold(head, layers, n_newest, target)
                if not flattening.put_fold(head, layers[:n_newest], folded):
                    raise BusyError(
                        f"the layers of {head} were changed meanwhile", hint="Try again."
                    )
                self._put_elsewhere(head_id, layers[:n_newest], folded, lock)
        return self.n_layers(head_id)

    def _choose_run(self, head: Path, limit: int) -> slice | None:
        layers = read_layers(head)
        if len(layers) <= limit:
            return None
        users: dict[Path, set[Path]] = {}
        for path, superblock in {**self._readable_heads(), **self._points()}.items():
            for layer in _layers_of(path, superblock):
                users.setdefault(layer, set()).add(path)
        paths = [Path(ref.path) for ref in layers]
        return choose_run(
            [frozenset(users.get(path, ())) for path in paths],
            [max(disk_bytes(path / "objects"), 1) for path in paths],
            limit,
        )

    def _put_elsewhere(
        self, head_id: str, run: Sequence[LayerRef], folded: Folded, lock: TryLock
    ) -> None:
        for path in self._points():
            replace_run(path, run, folded.layer)
        for path in self._readable_heads():
            if path.name == head_id or find_run(read_layers(path), run) is None:
                continue
            with lock(path.name) as is_ours:
                if is_ours:
                    # One that can't be changed now keeps the layers that it has.
                    with contextlib.suppress(BusyError, FileNotFoundError):
                        flattening.put_fold(path, run, folded)

    # --- deleting -------------------------------------------------------------------------------

    def destroy(self, head_id: str) -> None:
        """Delete a head; its own directory stays as a bare layer where others lie on it."""
        self.unmount(head_id, force=True)
        head = self._layout.head(head_id)
        with _host_errors(head):
            for leftover in (f".{head_id}.new", f".{head_id}.seal"):
                _remove(head.with_name(leftover))
            with contextlib.suppress(FileNotFoundError):
                (head / SUPERBLOCK).unlink()
            if head in self._references(self._heads(), self._points()):
                for name in os.listdir(head):
                    if name not in _LAYER_PARTS:
                        _remove(head / name)
            else:
                _remove(head)
            with contextlib.suppress(FileNotFoundError):
                self._layout.mount(head_id).rmdir()

    def collect(
        self,
        points: Collection[str],
        known: Callable[[], Collection[str]],
        made: Collection[str] = (),
    ) -> list[str]:
        """Delete layers, points and copied bases that nothing refers to any more.

        Of what looks like a head, only what was never used: a child that a seal has made for
        somebody who had died meanwhile has no binding yet. A head of a lost store stays.
        """
        places = [self._layout.points, self._layout.layers, self._layout.heads]
        places.append(self._layout.root / "backups")
        # Looked at first: what is made later, by somebody whose row is there, is not in the list.
        found = {place: sorted(place.iterdir()) for place in places}
        known_ids = known()
        heads = {
            path: superblock
            for path, superblock in self._heads().items()
            if _head_id(path) in known_ids or read_binding(path) is not None
        }
        kept = {path: found for path, found in self._points().items() if path.name in points}
        used = self._references(heads, kept)
        lost = [f"head {path}" for path in map(self._layout.head, made) if path not in heads]
        lost += [f"point {path}" for path in map(self._layout.point, points) if path not in kept]
        lost += [f"layer {path}" for path in used if not path.is_dir()]
        if lost:
            # What is named lies elsewhere, so what lies here may be what is meant; and what a head
            # that is missing refers to is not known.
            raise HostError(
                f"{min(lost)} is missing, so nothing below {self._layout.root} is cleaned up",
                hint="Has the data directory been moved? Move it back, or restore what is missing.",
            )
        bases = {bound.base.path for path in heads if (bound := read_binding(path)) is not None}

        def is_kept(path: Path) -> bool:
            if path.parent == self._layout.points:
                return path in kept
            if path.parent == self._layout.layers:
                return path in used
            is_used = path in heads or path in used or str(path) in bases
            return is_used or _head_id(path) in known_ids

        removed = [path for paths in found.values() for path in paths if not is_kept(path)]
        # What a head was in the beginning, and nobody has as a layer any more.
        removed += [
            head / part
            for head in found[self._layout.heads]
            if head in heads and head not in used
            for part in _LAYER_PARTS
            if (head / part).exists()
        ]
        return [
            str(path.relative_to(self._layout.root))
            for path in removed
            if (delete_layer(path) if path.parent == self._layout.layers else _remove(path))
        ]

    def _heads(self) -> dict[Path, Superblock]:
        return dict(_superblocks(self._layout.heads))

    def _readable_heads(self) -> dict[Path, Superblock]:
        """Return the heads without the damaged ones: for what is only shown."""
        found = {}
        for path in self._layout.heads.iterdir():
            with contextlib.suppress(OSError, DiffError):
                found[path] = read_superblock(path)
        return found

    def _points(self) -> dict[Path, Superblock]:
        return dict(_superblocks(self._layout.points))

    def _references(self, *several: Mapping[Path, Superblock]) -> set[Path]:
        """Return the directories of all layers that these superblocks name."""
        return {path for found in several for head in found.items() for path in _layers_of(*head)}

    # --- sizes ----------------------------------------------------------------------------------

    def sizes(self, points: Mapping[str, Collection[str]]) -> dict[str, Size]:
        """Return own and shared bytes of every head."""
        own, shared = {}, {}
        heads = self._readable_heads()
        layers = self._references(heads)
        for path in heads:
            own[path.name] = _bytes_beside(path, _LAYER_PARTS if path in layers else ())
            own[path.name] += disk_bytes(self._layout.secret(path.name))
            shared[path.name] = 0
        for n_bytes, users in self._parts(heads, points):
            for user in users & own.keys():
                if len(users) == 1:
                    own[user] += n_bytes
                else:
                    shared[user] += n_bytes
        return {name: Size(own[name], shared[name]) for name in own}

    def shared_bytes(self, points: Mapping[str, Collection[str]]) -> int:
        """Return what several heads refer to, each byte once."""
        parts = self._parts(self._readable_heads(), points)
        return sum(n_bytes for n_bytes, users in parts if len(users) > 1)

    def _parts(
        self, heads: Mapping[Path, Superblock], points: Mapping[str, Collection[str]]
    ) -> Iterator[tuple[int, set[str]]]:
        """Yield (bytes, heads that refer to it)."""
        users: dict[Path, set[str]] = {}
        for path, superblock in heads.items():
            for layer in _layers_of(path, superblock):
                users.setdefault(layer, set()).add(path.name)
        # Objects of several layers: each is referred to by all that refer to one of these.
        linked: dict[Inode, tuple[int, set[str]]] = {}
        for layer, names in users.items():
            parts = [layer]
            if layer.parent == self._layout.heads:
                parts = [layer / part for part in _LAYER_PARTS]
            for part in parts:
                n_bytes, more = measure(part)
                yield n_bytes, names
                for inode, n_linked in more.items():
                    linked.setdefault(inode, (n_linked, set()))[1].update(names)
        yield from linked.values()
        for point, owners in points.items():
            yield disk_bytes(self._layout.point(point)), set(owners)


def _bytes_beside(head: Path, parts: Collection[str]) -> int:
    """Return what a head's directory takes without these parts of it."""
    if not parts:
        return disk_bytes(head)
    below = sum(disk_bytes(path) for path in head.iterdir() if path.name not in parts)
    return below + os.lstat(head).st_blocks * 512


def choose_run(users: Sequence[frozenset[Path]], sizes: Sequence[int], limit: int) -> slice | None:
    """Return which layers of a stack, newest first, to fold next; None: there are ``limit``.

    All where one is to be left. Those that the same superblocks name come first, because then all
    these have fewer, and the old ones go. Else as many of the newest as are too many. Layers that
    outweigh all that is newer are spared where that is possible: the few files that most changes
    are in would be copied whole each time.
    """
    if len(users) <= limit:
        return None
    if limit == 1:
        return slice(0, len(users))
    best = slice(0, 0)
    start = 0
    for index in range(1, len(users) + 1):
        if index == len(users) or users[index] != users[start]:
            if index - start > best.stop - best.start:
                best = slice(start, index)
            start = index
    if best.stop - best.start < 2:
        best = slice(0, len(users) - limit + 1)
    stop = best.stop
    while (
        limit > 1 and stop - best.start > 2 and sizes[stop - 1] > sum(sizes[best.start : stop - 1])
    ):
        stop -= 1
    return slice(best.start, stop)


def _head_id(path: Path) -> str:
    """Return the id of the head that a directory, perhaps with a temporary name, is for."""
    return path.name.removeprefix(".").partition(".")[0]


def _superblocks(directory: Path) -> Iterator[tuple[Path, Superblock]]:
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield path, read_superblock(path)


def _layers_of(head: Path, superblock: Superblock) -> Iterator[Path]:
    """Yield the directories of all layers of a head or point, the live one first."""
    yield Path(os.path.normpath(head / superblock.live))
    for layer in superblock.layers:
        yield Path(os.path.normpath(head / layer.path))


def _ignore(value: object) -> None:
    """Drop ``value``."""
    del value


def _mount_elsewhere(request: MountRequest) -> None:
    """Mount from a process of its own: one with threads can't fork a worker."""
    arguments = ["-D", str(request.mountpoint), "-d", str(request.diff), "--wait"]
    if request.store:
        arguments += ["-B", str(request.store)]
    if request.instance:
        arguments += ["-I", request.instance]
    if request.backup_id:
        arguments += ["-i", request.backup_id]
    if request.base_dir:
        arguments += ["--base", str(request.base_dir)]
    if request.is_empty:
        arguments.append("--empty")
    if request.owner:
        arguments += ["--owner", f"{request.owner[0]}:{request.owner[1]}"]
    done = subprocess.run(
        [sys.executable, "-m", "pbkfs", "mount", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise _to_error(done.returncode, done.stderr)


def _to_error(code: int, said: str) -> PbkfsError:
    """Return the error that a command printed."""
    message, hint = f"the mount failed with exit code {code}", None
    for line in said.splitlines():
        message = line.removeprefix("pbkfs: error: ") if "error: " in line else message
        hint = line.removeprefix("hint: ") if line.startswith("hint: ") else hint
    for cls in PbkfsError.__subclasses__():
        if cls.exit_code == code:
            return cls(message, hint=hint)
    return HostError(message, hint=hint)


@contextlib.contextmanager
def _host_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        hint = "Check that this user may write there."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space there, then try again."
        raise HostError(f"cannot change {path}: {why}{where}", hint=hint) from error


def _remove(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return True


# --- copies of pg_wal ---------------------------------------------------------------------------


def _copy_wal(source: Path, target: Path) -> None:
    """Copy a directory of WAL with owners and modes; holes stay holes, blocks are shared where the
    file system can. Durable. Raises OSError."""
    target.mkdir(mode=0o700)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = target / entry.name
        if entry.is_dir(follow_symlinks=False):
            _copy_wal(Path(entry.path), path)
        elif entry.is_file(follow_symlinks=False):
            _copy_file(Path(entry.path), path)
    shutil.copystat(source, target)
    _give(target, source)
    durable.fsync_dir(target, label="branch:wal")


def _copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            os.ftruncate(writer.fileno(), size)
            for begin, end in find_data(reader.fileno(), 0, size):
                copy_bytes(reader.fileno(), writer.fileno(), begin, end)
        shutil.copystat(source, target)
        _give(target, source)
        durable.fsync_fd(writer.fileno(), label="branch:wal")


def _give(target: Path, source: Path) -> None:
    if os.geteuid() == 0:
        found = os.stat(source)
        os.chown(target, found.st_uid, found.st_gid)
