"""One layer directory: a journal and the objects it names.

Owns what lies in it and its recovery. A layer is either the *live* one of a diff, which is written
to and whose lock the caller holds, or a *sealed* one, which is only read and never changed again; a
seal turns the one into the other. Called by ``diff``, ``tree`` and ``check``, all on the thread
that owns the tree, except ``sync``, which any thread may call.

Opening has two steps, because only a replay over the base's names tells which objects still have a
name: ``open`` reads and changes nothing in an existing layer, ``start`` recovers and begins to
write.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pbkfs import _native, durable
from pbkfs.errors import BusyError, DiffError, FormatError, HostError
from pbkfs.overlay import journal as records
from pbkfs.overlay.objects import ObjectStore, object_path

JOURNAL = "journal"
OBJECTS = "objects"

# A journal below this size is not worth a rewrite.
COMPACTION_BYTES = 64 << 10

_NO_SESSION = bytes(16)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_COPY_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)

_log = logging.getLogger(__name__)


def sync_file_system(fd: int) -> None:
    """Call syncfs(2). Raises OSError; of a write error since ``fd`` was opened too, once."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class PageMap(NamedTuple):
    """What a journal says of one object: valid blocks, the limit for what is below, or all."""

    changed: bytes
    limit: int
    is_whole: bool
    hydrated: bytes = b""
    """Valid as well, and as they are below; empty if the object is whole."""

    @property
    def present(self) -> bytes:
        """The blocks that are in the object, changed or hydrated."""
        if not self.hydrated:
            return self.changed
        size = max(len(self.changed), len(self.hydrated))
        merged = int.from_bytes(self.changed, "little") | int.from_bytes(self.hydrated, "little")
        return merged.to_bytes(size, "little")


EMPTY_MAP = PageMap(b"", records.NO_LIMIT, False)


class Named(NamedTuple):
    """An object that a name leads to at the end of a replay."""

    path: bytes
    is_created: bool
    """Made empty by CREATE: its directory entry need not have been durable before the record."""
    is_mapped: bool


def new_session() -> bytes:
    """Return 16 bytes that name a session: all that is written from a mount to its end, or to the
    death of a worker that nobody takes over from."""
    return uuid.uuid4().bytes


class Layer:
    """A layer directory, see the module. ``page_maps`` and ``objects`` are by object id."""

    def __init__(
        self,
        path: Path,
        layer_id: uuid.UUID,
        *,
        journal_fd: int,
        objects_fd: int,
        session: bytes | None,
        is_sealed: bool,
    ) -> None:
        self.path = path
        self.uuid = layer_id
        self.objects = ObjectStore(objects_fd)
        self.is_sealed = is_sealed
        self.page_maps: dict[int, PageMap] = {}
        self._journal: _native.Journal | None = None
        self._journal_fd = journal_fd
        self._goes_on = session is not None
        self.session = session or new_session()
        self._end = 0
        self._marked_end = 0
        self._names: list[bytes] = []

    # --- opening ----------------------------------------------------------------------------

    @classmethod
    def make(cls, path: Path, *, session: bytes | None = None) -> Layer:
        """Make an empty live layer, the new directory ``path``; durable on return. Not started.

        Leaves nothing where it fails. Raises OSError, DiffError, HostError.
        """
        layer_id = uuid.uuid4()
        durable.on_step("layer:mkdir")
        os.mkdir(path, 0o700)
        try:
            fill_layer(path, layer_id)
            durable.fsync_dir(path.parent, label="layer:mkdir")
            return cls.open(path, layer_id, session=session, is_sealed=False)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    @classmethod
    def open(
        cls, path: Path, layer_id: uuid.UUID, *, session: bytes | None = None, is_sealed: bool
    ) -> Layer:
        """Open the layer at ``path``; its journal must be that of ``layer_id``.

        ``session`` is one that is to go on: what was written in it and not synced counts, for who
        knows that the page cache has it still, and that nothing of it failed to be written back.
        Without one nothing counts that was not synced. Raises BusyError if another process writes
        to it, DiffError if it is damaged or another one, HostError if this machine or user can't.
        """
        with host_errors(path):
            return cls._open(path, layer_id, session, is_sealed=is_sealed)

    @classmethod
    def sealed(cls, path: Path, layer_id: uuid.UUID, *, session: bytes | None = None) -> Layer:
        """Open a sealed layer; nothing in it is ever changed. Raises DiffError, HostError."""
        if not path.is_dir():
            raise DiffError(
                f"sealed layer {path} is missing",
                hint="Put the layer back; the diffs above it can't be read without it.",
            )
        return cls.open(path, layer_id, session=session, is_sealed=True)

    @classmethod
    def _open(
        cls, path: Path, layer_id: uuid.UUID, session: bytes | None, *, is_sealed: bool
    ) -> Layer:
        with missing_part(path):
            objects_fd = os.open(
                path / OBJECTS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            try:
                access = os.O_RDONLY if is_sealed else os.O_RDWR
                journal_fd = os.open(path / JOURNAL, access | os.O_NOFOLLOW | os.O_CLOEXEC)
            except BaseException:
                os.close(objects_fd)
                raise
        try:
            # Whoever deletes layers that nothing seems to name leaves those that are open alone: a
            # superblock is perhaps about to name them.
            fcntl.flock(objects_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not is_sealed:
                _lock_journal(journal_fd, path)
        except BaseException:
            os.close(journal_fd)
            os.close(objects_fd)
            raise
        layer = cls(
            path,
            layer_id,
            journal_fd=journal_fd,
            objects_fd=objects_fd,
            session=session,
            is_sealed=is_sealed,
        )
        try:
            layer._read_journal()
        except BaseException:
            layer.close()
            raise
        return layer

    def _read_journal(self) -> None:
        try:
            records.check_header(
                os.pread(self._journal_fd, records.HEADER_BYTES, 0), self.uuid.bytes
            )
        except FormatError as error:
            raise DiffError(
                f"journal of diff {self.path} can't be read: {error}",
                hint="Restore the journal from a copy, or begin with a new diff.",
            ) from error
        try:
            self._end, self._names, maps = _native.scan_journal(self._journal_fd, self.session)
        except OSError as error:
            if error.errno != errno.EIO or error.strerror == os.strerror(errno.EIO):
                raise
            raise DiffError(
                f"journal of diff {self.path} is damaged: {error.strerror}",
                hint="Restore the journal from a copy, or begin with a new diff.",
            ) from error
        self.page_maps = {object_id: PageMap(*found) for object_id, found in maps.items()}

    @property
    def names(self) -> list[bytes]:
        """The payloads of the name records, in order; gone after ``start``."""
        return self._names

    @property
    def label(self) -> str:
        """What log lines call this layer."""
        return f"diff {str(self.uuid)[:8]}"

    # --- recovery ---------------------------------------------------------------------------

    def check_objects(self, named: Mapping[int, Named]) -> None:
        """Raise DiffError if an object of this sealed layer is missing."""
        with host_errors(self.path):
            missing = named.keys() - self.objects.scan()
        if missing:
            raise self._missing(min(missing), named)
        self._forget_records(named)

    def start(self, named: Mapping[int, Named], owner: tuple[int, int]) -> None:
        """Recover what a crash left and begin to write.

        ``named`` are the objects that have a name. An object made by CREATE that a power cut took
        with it is made again, empty and owned by ``owner``. Raises DiffError, HostError; the
        checks come first, so a damaged diff is left as it is.
        """
        with host_errors(self.path):
            self._check_tail()
            leftovers: list[str] = []
            present = self.objects.scan(leftovers=leftovers)
            lost = sorted(named.keys() - present)
            for object_id in lost:
                if not named[object_id].is_created:
                    raise self._missing(object_id, named)
            self.objects.next_id = max(_next_ids((*present, *self.page_maps), self._names))
            self._secure_journal()
            # One of them may have the name under which a lost object is made again.
            for path in leftovers:
                self.objects.remove_leftover(path)
            for object_id in lost:
                _log.warning(
                    "%s: object %s of %r was not durable before a power cut; the file is empty now",
                    self.path,
                    object_path(object_id),
                    os.fsdecode(named[object_id].path),
                )
                self.objects.recreate(object_id, 0o600, *owner)
            # After the death of a worker, what it made may not be durable yet.
            self.objects.fsync_directories(label="recover:objects")
            settled = self._settle(named)
            for object_id in sorted(present - named.keys()):
                self.objects.remove(object_id)
            if not self._compact(named):
                self._journal = _native.Journal(self._journal_fd, self._end)
                self.append(records.encode_session(self.session), label="session")
                for object_id in settled:
                    for payload in records.encode_pages(
                        object_id, self.page_maps[object_id].changed
                    ):
                        self.append(payload, label="recover:pages")
            now = self.now()
            self.sync()
            self.mark(now)
            self._forget_records(named)

    @property
    def end(self) -> int:
        """How many bytes of the journal check, counted from its start."""
        return self._end

    def read_tail(self) -> bytes:
        """Return what follows the last frame of the journal that checks. Raises OSError."""
        size = os.fstat(self._journal_fd).st_size
        return os.pread(self._journal_fd, size - self._end, self._end)

    def _check_tail(self) -> None:
        """Raise DiffError if the tail that is to be cut off was durable once."""
        if records.is_damaged(self.read_tail(), self._end):
            raise DiffError(
                f"journal of diff {self.path} is damaged at byte {self._end}: "
                "what follows was durable once",
                hint="Restore the diff from a copy; pbkfs check tells more.",
            )

    def _secure_journal(self) -> None:
        """Make the journal durable as it was read, before anything is made of what it says.

        Where its last session did not end well, an fdatasync of it may have failed. The kernel
        calls its pages clean since, and would not write them again: so it is copied, but for a
        session that goes on, whose successor has asked for errors.
        """
        size = os.fstat(self._journal_fd).st_size
        if size > self._end:
            _log.info(
                "%s: the last %d bytes of the journal are no record and were never synced; cut off",
                self.path,
                size - self._end,
            )
        if not self._goes_on and not self._has_ended_well(size):
            try:
                self._renew_journal(self._copy_journal, label="recover:journal")
                return
            except _NoRoomError as error:
                # Nobody could make room by removing files if it could not be mounted.
                _log.warning("%s: no room to copy the journal: %s", self.path, error)
        if size > self._end:
            durable.on_step("recover:journal:truncate")
            os.ftruncate(self._journal_fd, self._end)
        durable.fsync_fd(self._journal_fd, label="recover:journal")

    def _has_ended_well(self, size: int) -> bool:
        if size == records.HEADER_BYTES:
            return True
        start = size - records.END_BYTES
        if start < records.HEADER_BYTES or size != self._end:
            return False
        return records.is_end(os.pread(self._journal_fd, records.END_BYTES, start), start)

    def _copy_journal(self, fd: int) -> None:
        at = 0
        while at < self._end:
            data = os.pread(self._journal_fd, min(_COPY_BYTES, self._end - at), at)
            try:
                durable.write_all(fd, data)
            except OSError as error:
                if error.errno in _NO_SPACE:
                    raise _NoRoomError(error.strerror) from error
                raise
            at += len(data)

    def _renew_journal(self, write: Callable[[int], None], *, label: str) -> None:
        """Replace the journal by what ``write`` writes to a descriptor."""
        fd = -1
        try:
            with durable.replacing(self.path / JOURNAL, label=label) as new:
                _lock_journal(new, self.path)
                write(new)
                fd = os.dup(new)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        os.close(self._journal_fd)
        self._journal_fd = fd

    def _settle(self, named: Mapping[int, Named]) -> list[int]:
        """Make pages durable that only a PAGES_LIVE record of this session vouches for.

        From here on all bits count as durable, and an fsync of the file would not look at these
        again. A second scan that believes no session tells which objects that concerns. Returns
        them.
        """
        if not self._goes_on:
            return []
        _, _, synced = _native.scan_journal(self._journal_fd, _NO_SESSION)
        behind = []
        for object_id, found in self.page_maps.items():
            if object_id not in named or found.is_whole:
                continue
            if _strip(found.changed) != _strip(synced.get(object_id, EMPTY_MAP)[0]):
                self.objects.fsync_object(object_id, label="recover:object")
                behind.append(object_id)
        return behind

    def _compact(self, named: Mapping[int, Named]) -> bool:
        """Rewrite the journal if that halves it; returns whether it did."""
        if self._end < COMPACTION_BYTES:
            return False
        names = [each for each in self._names if each[0] != records.Synced.type_code]
        n_removed = sum(payload[0] == records.Remove.type_code for payload in names)
        if n_removed > len(names) // 4:
            names = records.drop_pairs(names)
        payloads = [*names, records.encode_session(self.session)]
        for object_id, found in self.page_maps.items():
            if object_id in named:
                payloads.extend(records.encode_map(object_id, *found))
        size = records.HEADER_BYTES + records.count_frame_bytes(payloads)
        if size > self._end // 2:
            return False
        content = records.encode_header(self.uuid.bytes) + b"".join(
            map(records.encode_frame, payloads)
        )
        self._renew_journal(lambda fd: durable.write_all(fd, content), label="compact:journal")
        _log.info("%s: journal rewritten, %d bytes instead of %d", self.path, size, self._end)
        self._end = size
        self._journal = _native.Journal(self._journal_fd, size)
        return True

    def _forget_records(self, named: Mapping[int, Named]) -> None:
        self._names = []
        self.page_maps = {k: v for k, v in self.page_maps.items() if k in named}

    def _missing(self, object_id: int, named: Mapping[int, Named]) -> DiffError:
        path = os.fsdecode(named[object_id].path)
        return DiffError(
            f"object {object_path(object_id)} of diff {self.path} is missing (file {path!r})",
            hint="Restore the diff's objects directory from a copy, or begin with a new diff.",
        )

    # --- writing ----------------------------------------------------------------------------

    @property
    def journal(self) -> _native.Journal:
        """The journal, open for appending; only after ``start``."""
        assert self._journal is not None
        return self._journal

    def append(self, payload: bytes, *, label: str) -> None:
        """Append one record; not durable before ``sync``. Raises OSError, and then did nothing."""
        assert not self.is_sealed
        durable.on_step(f"journal:{label}:append")
        self.journal.append(payload)

    def sync(self) -> None:
        """Make all records appended so far durable, and the objects they name. Any thread may."""
        self.objects.sync_fresh()
        durable.on_step("journal:sync")
        self.journal.sync()

    def now(self) -> records.Synced:
        """Return what is there now; once it is synced, ``mark`` may say so. On the tree's thread.

        Objects are made and named on that thread, so that none is half made.
        """
        return records.Synced(self.journal.end, self.objects.next_id)

    def mark(self, synced: records.Synced) -> None:
        """Say in the journal that all that was there at a call of ``now`` has been synced since.

        So damage to that is told from a torn end, and an object that is missing from one that was
        never durable. Does nothing where nothing was appended since the last time. Raises OSError.
        """
        if synced.end == self._marked_end:
            return
        self.append(synced.encode(), label="synced")
        self._marked_end = self.journal.end

    def end_session(self) -> None:
        """Mark the end of a journal that is durable, see ``mark_end``.

        Not worth an error: on a full disk it is left out, and the next mount copies the journal.
        """
        try:
            self.mark_end()
        except OSError as error:
            _log.warning("%s: the end of the journal is not marked: %s", self.path, error)

    def mark_end(self) -> None:
        """Say in the journal that all that was written is durable, and make that durable.

        Nothing may be appended meanwhile. Raises OSError, and then it is not said.
        """
        now = self.now()
        self.sync()
        try:
            for payload in records.encode_end(now.end, now.next_id, self.session):
                self.append(payload, label="end")
            self.journal.sync()
        except OSError:
            # What is in the page cache now may not be on the disk.
            with suppress(OSError):
                os.ftruncate(self._journal_fd, now.end)
            raise

    def sync_file_system(self) -> None:
        """Make all of the file system that the diff is on durable. Raises OSError."""
        durable.on_step("close:syncfs")
        sync_file_system(self.objects.fd)

    def retire(self) -> None:
        """Close the descriptors of a sealed layer that no stack has any more.

        The journal stays: an fsync that was begun before the seal may still look whether its
        records are durable. They all are, so that needs no descriptor.
        """
        journal = self._journal
        self.close()
        self._journal = journal

    def close(self) -> None:
        """Close the descriptors; makes nothing durable. Idempotent."""
        self._journal = None
        self.objects.close()
        if self._journal_fd >= 0:
            os.close(self._journal_fd)
            self._journal_fd = -1


def delete_layer(path: Path) -> bool:
    """Delete the layer directory ``path``, unless somebody has it open; returns whether it is gone.

    For who knows that no superblock names it. Raises OSError.
    """
    try:
        fd = os.open(path / OBJECTS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        _remove(path)
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def fill_layer(path: Path, layer_id: uuid.UUID) -> None:
    """Make an empty layer in a directory that exists; durable on return. Raises OSError."""
    with suppress(FileExistsError):
        os.mkdir(path / OBJECTS, 0o700)
    header = records.encode_header(layer_id.bytes)
    durable.replace_file(path / JOURNAL, header, label="layer:journal")


def _next_ids(used: Iterable[int], names: Sequence[bytes]) -> Iterator[int]:
    """Yield ids such that no object with that or a greater one was ever made."""
    yield 1
    yield from (object_id + 1 for object_id in used)
    for payload in names:
        if payload[0] in (records.Create.type_code, records.CopyUp.type_code):
            yield int.from_bytes(payload[1:9], "little") + 1
        elif payload[0] == records.Synced.type_code:
            yield records.Synced.decode(payload).next_id


def _lock_journal(fd: int, path: Path) -> None:
    """Keep others from writing to a layer: two heads may name one, if somebody copied a diff."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"layer {path} is written to by another mount",
            hint="A copied diff names the layers of the one that it was copied of: use that, or a "
            "branch of it.",
        ) from None


class _NoRoomError(Exception):
    """There is no room for a copy of the journal."""


def _strip(bitmap: bytes) -> bytes:
    return bitmap.rstrip(b"\0")


@contextmanager
def missing_part(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        name = os.path.basename(os.fsdecode(error.filename))
        raise DiffError(
            f"diff {path} has no {name}",
            hint="Restore the diff from a copy, or begin with a new one.",
        ) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DiffError(
            f"a part of diff {path} is a symbolic link: {error.filename}",
            hint="This is not a diff made by pbkfs.",
        ) from error


@contextmanager
def host_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "Free some space on the diff's file system, then try again."
        elif error.errno == errno.EROFS:
            hint = "A diff needs a file system that can be written to."
        elif error.errno in (errno.EACCES, errno.EPERM):
            hint = "Run pbkfs as the user who made the diff."
        else:
            hint = "See the kernel's log about the disk under the diff."
        raise HostError(f"cannot use diff {path}: {reason}", hint=hint) from error
