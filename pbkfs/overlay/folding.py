"""Folding: adjacent sealed layers become one new sealed layer that means the same.

Owns how names, objects and page maps of several layers are merged. The layers that are folded are
not touched, so whoever names them may take the new one instead, at any time or never; replacing
them in superblocks and deleting them is the caller's. Called by ``mount.flattening`` and
``branch.overlay``; a thread may, as long as no other one uses the same base.

An object that is the only one of its file is shared by a hard link, because nothing ever changes a
sealed object. Only files that were changed in several of the layers are copied.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pbkfs import durable
from pbkfs.backup.base import Base
from pbkfs.overlay import journal as records
from pbkfs.overlay.inode import File, Inode, Piece
from pbkfs.overlay.journal import BLOCK_BYTES, NO_LIMIT
from pbkfs.overlay.layer import (
    EMPTY_MAP,
    JOURNAL,
    OBJECTS,
    Layer,
    PageMap,
    host_errors,
    new_session,
)
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.objects import object_path
from pbkfs.overlay.replay import Replay
from pbkfs.overlay.stack import LayerStack, count_blocks
from pbkfs.overlay.superblock import LayerRef, Superblock, read_superblock
from pbkfs.overlay.wal_copy import copy_bytes

# A directory of objects has up to this many before the next one is made: each costs 4 KiB and an
# fsync, and a fold knows beforehand that nothing will be added.
_OBJECTS_PER_DIRECTORY = 64

# What keeps an object from being linked where it could be copied: another file system, too many
# links (65000 on ext4), an object of another user under fs.protected_hardlinks.
_NO_LINK = (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP)


Origins = Mapping[tuple[uuid.UUID, int], tuple[int, bool]]


@dataclass(frozen=True, slots=True)
class Folded:
    """A layer made by a fold. ``layer`` has an absolute path.

    ``origins`` has all its objects: of each the newest of those that it was made of, and from that
    its id, and whether it is mapped.
    """

    layer: LayerRef
    origins: Origins
    n_linked: int
    n_copied: int
    copied_bytes: int


def fold(base: Base, layers: Sequence[LayerRef], n_newest: int, target: Path) -> Folded:
    """Fold the first ``n_newest`` of ``layers`` into the new layer directory ``target``.

    ``layers`` are newest first, with absolute paths, and reach down to the base. On return the new
    layer is complete and durable; a crash before leaves at most ``.NAME.fold`` beside it. Raises
    DiffError, HostError; then nothing is left.
    """
    target = Path(os.path.abspath(target))
    with host_errors(target), ExitStack() as opened:
        stack = LayerStack(base, [])
        for ref in reversed(layers):
            stack.layers.append(Layer.sealed(Path(ref.path), ref.uuid))
            opened.callback(stack.layers[-1].close)
        made = _Fold(stack, len(layers) - n_newest, target)
        try:
            return made.run()
        except BaseException:
            shutil.rmtree(made.making, ignore_errors=True)
            raise


def read_layers(diff: Path) -> list[LayerRef]:
    """Return the sealed layers of a diff, newest first, with absolute paths. OSError, DiffError."""
    return [
        LayerRef(ref.uuid, os.path.normpath(diff / ref.path))
        for ref in read_superblock(diff).layers
    ]


def find_run(layers: Sequence[LayerRef], run: Sequence[LayerRef]) -> int | None:
    """Return where in ``layers`` those of ``run`` lie, all of them and side by side; else None."""
    wanted = [ref.uuid for ref in run]
    for index in range(len(layers) - len(run) + 1):
        if [ref.uuid for ref in layers[index : index + len(run)]] == wanted:
            return index
    return None


def replace_run(diff: Path, run: Sequence[LayerRef], by: LayerRef) -> bool:
    """Let a diff that nobody uses name ``by`` instead of the layers of ``run``; durable on return.

    Returns False, and changes nothing, if it does not name them side by side. The one rename that
    this is leaves the old stack or the new one, both complete. Raises OSError, DiffError.
    """
    changed = put_into(read_superblock(diff), diff, run, by)
    if changed is not None:
        changed.write(diff, label="fold:superblock")
    return changed is not None


def put_into(
    superblock: Superblock, diff: Path, run: Sequence[LayerRef], by: LayerRef
) -> Superblock | None:
    """Return the superblock of ``diff`` with ``by`` instead of ``run``; None if it has no such."""
    index = find_run(superblock.layers, run)
    if index is None:
        return None
    path = Path(by.path)
    # What lies inside of a diff can be moved with it.
    named = str(path.relative_to(diff)) if path.is_relative_to(diff) else by.path
    above, below = superblock.layers[:index], superblock.layers[index + len(run) :]
    return dataclasses.replace(superblock, layers=(*above, LayerRef(by.uuid, named), *below))


class _Records:
    """The name records of all folded layers, without those that the merged layer has no use for."""

    def __init__(self) -> None:
        self._kept: list[records.Record | None] = []
        # By inode: the record that brings its object in, and those of attributes after that.
        self._objects: dict[int, tuple[int, File]] = {}
        self._attributes: dict[int, tuple[list[int], Inode]] = {}

    def add(self, record: records.Record) -> None:
        self._kept.append(record)

    def has_object(self, file: File) -> None:
        """Note that the newest record gives ``file`` an object, and with it new attributes."""
        if file.ino in self._objects:
            self._kept[-1] = None
        else:
            self._objects[file.ino] = (len(self._kept) - 1, file)
        self._drop_attributes(file)

    def has_attributes(self, inode: Inode) -> None:
        """Note that the newest record changes attributes of ``inode``."""
        self._attributes.setdefault(inode.ino, ([], inode))[0].append(len(self._kept) - 1)

    def _drop_attributes(self, inode: Inode) -> None:
        for index in self._attributes.pop(inode.ino, ([], inode))[0]:
            self._kept[index] = None

    def drop_nameless(self) -> None:
        """Drop what is about files that have no name any more: nobody asks for them.

        But for their names' own records: others may be relative to them.
        """
        for _, inode in list(self._attributes.values()):
            if inode.parent is None:
                self._drop_attributes(inode)
        for ino, (index, file) in list(self._objects.items()):
            if file.parent is None and isinstance(self._kept[index], records.CopyUp):
                self._kept[index] = None
                del self._objects[ino]

    def objects(self) -> Iterator[tuple[records.Create | records.CopyUp, File]]:
        """Yield the records that bring an object in, each with its file."""
        for index, file in self._objects.values():
            record = self._kept[index]
            assert isinstance(record, records.Create | records.CopyUp)
            yield record, file

    def encode(self) -> list[bytes]:
        return records.drop_pairs([each.encode() for each in self._kept if each is not None])


class _Recording(Replay):
    """A replay that keeps what it applies."""

    def __init__(self, namespace: Namespace, stack: LayerStack, layer: int, kept: _Records) -> None:
        super().__init__(namespace, stack, layer)
        self._kept = kept

    def _apply(self, record: records.Record) -> None:
        if not isinstance(record, records.Synced):  # of bytes and numbers of another journal
            self._kept.add(record)
        super()._apply(record)

    def _put_piece(self, file: File, piece: Piece) -> None:
        super()._put_piece(file, piece)
        self._kept.has_object(file)

    def _set_attributes(self, inode: Inode, record: records.SetAttr) -> None:
        super()._set_attributes(inode, record)
        self._kept.has_attributes(inode)


class _Fold:
    """One fold of the layers from number ``first`` on."""

    def __init__(self, stack: LayerStack, first: int, target: Path) -> None:
        self._stack = stack
        self._first = first
        self._target = target
        self.making = target.with_name(f".{target.name}.fold")
        self._directories: set[int] = set()
        self._maps: dict[int, PageMap] = {}
        self._origins: dict[tuple[uuid.UUID, int], tuple[int, bool]] = {}
        self._n_linked = self._n_copied = self._copied_bytes = 0

    def run(self) -> Folded:
        kept = self._replay()
        durable.on_step("fold:mkdir")
        os.mkdir(self.making, 0o700)
        os.mkdir(self.making / OBJECTS, 0o700)
        number = 0
        for record, file in kept.objects():
            record.object_id = _object_id(number)
            number += 1
            if file.parent is None:
                continue  # only its name came and went; there is no object behind it
            pieces = [piece for piece in file.pieces if piece.layer >= self._first]
            if isinstance(record, records.CopyUp):
                record.is_mapped = pieces[-1].is_mapped
            newest = self._stack.layers[pieces[0].layer].uuid, pieces[0].object_id
            self._origins[newest] = record.object_id, pieces[-1].is_mapped
            self._make_directory(record.object_id & 255)
            if len(pieces) == 1:
                self._share(record.object_id, pieces[0])
            else:
                self._merge(record.object_id, file, pieces)
        for each in sorted(self._directories):
            durable.fsync_dir(self.making / OBJECTS / f"{each:02x}", label="fold:objects")
        durable.fsync_dir(self.making / OBJECTS, label="fold:objects")
        layer_id = uuid.uuid4()
        content = self._encode(layer_id, kept.encode())
        durable.replace_file(self.making / JOURNAL, content, label="fold:journal")
        durable.on_step("fold:rename")
        if os.path.lexists(self._target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self._target))
        os.rename(self.making, self._target)
        try:
            durable.fsync_dir(self._target.parent, label="fold:rename")
        except BaseException:
            shutil.rmtree(self._target, ignore_errors=True)
            raise
        return Folded(
            LayerRef(layer_id, str(self._target)),
            self._origins,
            self._n_linked,
            self._n_copied,
            self._copied_bytes,
        )

    def _replay(self) -> _Records:
        """Bring all names to where they are at the top of what is folded."""
        # Whom files of the base belong to plays no part.
        namespace = Namespace(self._stack.base, (0, 0), 0)
        kept = _Records()
        for number, layer in enumerate(self._stack.layers):
            if number < self._first:
                replay = Replay(namespace, self._stack, number)
            else:
                replay = _Recording(namespace, self._stack, number, kept)
            replay.run(layer, layer.names)
        kept.drop_nameless()
        return kept

    def _encode(self, layer_id: uuid.UUID, names: Sequence[bytes]) -> bytes:
        session = new_session()
        payloads = [*names, records.encode_session(session)]
        for object_id, found in self._maps.items():
            payloads.extend(records.encode_map(object_id, *found))
        end = records.HEADER_BYTES + records.count_frame_bytes(payloads)
        payloads.extend(records.encode_end(end, 1 + max(self._maps, default=0), session))
        header = records.encode_header(layer_id.bytes)
        return header + b"".join(map(records.encode_frame, payloads))

    # --- objects ----------------------------------------------------------------------------

    def _make_directory(self, number: int) -> None:
        if number not in self._directories:
            os.mkdir(self.making / OBJECTS / f"{number:02x}", 0o700)
            self._directories.add(number)

    def _path(self, object_id: int) -> Path:
        return self.making / OBJECTS / object_path(object_id)

    def _share(self, object_id: int, piece: Piece) -> None:
        """Take over an object that stands alone, by a link if that is possible."""
        layer = self._stack.layers[piece.layer]
        layer.objects.stat(piece.object_id)  # that it is there, and a file
        durable.on_step("fold:link")
        try:
            os.link(
                object_path(piece.object_id),
                self._path(object_id),
                src_dir_fd=layer.objects.fd,
                follow_symlinks=False,
            )
            self._n_linked += 1
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with _NewObject(self._path(object_id)) as made:
                size = layer.objects.stat(piece.object_id).st_size
                self._copy(piece, made, 0, size)
                made.finish(layer.objects.stat(piece.object_id))
        if piece.is_mapped:
            self._maps[object_id] = layer.page_maps.get(piece.object_id, EMPTY_MAP)

    def _merge(self, object_id: int, file: File, pieces: Sequence[Piece]) -> None:
        """Make one object of several ones of a file, of which the first is the newest."""
        newest = self._stack.layers[pieces[0].layer].objects.stat(pieces[0].object_id)
        n_blocks = count_blocks(newest.st_size)
        missing = (1 << n_blocks) - 1
        changed, limit, is_full = 0, NO_LIMIT, False
        with _NewObject(self._path(object_id)) as made:
            for index, piece in enumerate(pieces):
                layer = self._stack.layers[piece.layer]
                found = layer.page_maps.get(piece.object_id, EMPTY_MAP)
                if piece.is_mapped:
                    # Of what lies below the end of one that is full only this still counts: it
                    # says which blocks are not as they are below.
                    changed |= int.from_bytes(found.changed, "little")
                    limit = min(limit, self._limit(file, index, found))
                if is_full:
                    continue
                if not piece.is_mapped or found.is_whole:
                    here, is_full = missing, True
                else:
                    present = int.from_bytes(found.present, "little")
                    above = -1 << self._limit(file, index, found)
                    here = missing & (present | above)
                missing &= ~here
                for first, count in records.find_runs(_to_bitmap(here)):
                    begin = first * BLOCK_BYTES
                    end = min(newest.st_size, begin + count * BLOCK_BYTES)
                    self._copy(piece, made, begin, end)
            made.finish(newest)
        if not pieces[-1].is_mapped:
            return
        below = (1 << min(limit, n_blocks)) - 1
        present = below & ~missing
        self._maps[object_id] = PageMap(
            _to_bitmap(changed & below),
            limit if limit < count_blocks(self._size_below(file, len(pieces) - 1)) else NO_LIMIT,
            is_full,
            b"" if is_full else _to_bitmap(present & ~changed),
        )

    def _limit(self, file: File, index: int, found: PageMap) -> int:
        """Return from which block on nothing comes from below the object number ``index``."""
        piece = file.pieces[index]
        size = self._stack.layers[piece.layer].objects.stat(piece.object_id).st_size
        below = count_blocks(self._size_below(file, index))
        return min(found.limit, below, count_blocks(size))

    def _size_below(self, file: File, index: int) -> int:
        if index + 1 == len(file.pieces):
            return file.base_size
        piece = file.pieces[index + 1]
        return self._stack.layers[piece.layer].objects.stat(piece.object_id).st_size

    def _copy(self, piece: Piece, made: _NewObject, begin: int, end: int) -> None:
        """Copy what an object has from ``begin`` up to ``end``; holes, and what is behind its end,
        are zeros."""
        objects = self._stack.layers[piece.layer].objects
        source = os.open(
            object_path(piece.object_id),
            os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC,
            dir_fd=objects.fd,
        )
        try:
            durable.on_step("fold:copy")
            for first, last in find_data(source, begin, end):
                copy_bytes(source, made.fd, first, last)
                self._copied_bytes += last - first
        finally:
            os.close(source)
        if not made.is_counted:
            made.is_counted = True
            self._n_copied += 1


class _NewObject:
    """An object in the making. Complete and durable, but for its name, after ``finish``."""

    def __init__(self, path: Path) -> None:
        self.is_counted = False
        durable.on_step("fold:create")
        self.fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )

    def __enter__(self) -> _NewObject:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def finish(self, like: os.stat_result) -> None:
        """Give it size, owner, mode and times of another one, and make it durable."""
        os.ftruncate(self.fd, like.st_size)
        now = os.fstat(self.fd)
        if (now.st_uid, now.st_gid) != (like.st_uid, like.st_gid):
            os.fchown(self.fd, like.st_uid, like.st_gid)
        os.fchmod(self.fd, stat.S_IMODE(like.st_mode))
        os.utime(self.fd, ns=(like.st_atime_ns, like.st_mtime_ns))
        durable.fsync_fd(self.fd, label="fold:object")


def find_data(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of what is no hole of a file, from ``begin`` up to ``end``."""
    while begin < end:
        try:
            first = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        begin = os.lseek(fd, first, os.SEEK_HOLE)
        if first < end:
            yield first, min(begin, end)


def _object_id(number: int) -> int:
    """Return the id of the object ``number`` (from 0 on): few directories, filled one by one."""
    directory, index = divmod(number, _OBJECTS_PER_DIRECTORY)
    turn, directory = divmod(directory, 256)
    return (1 + turn * _OBJECTS_PER_DIRECTORY + index) << 8 | directory


def _to_bitmap(bits: int) -> bytes:
    return bits.to_bytes(-(-bits.bit_length() // 8), "little")
