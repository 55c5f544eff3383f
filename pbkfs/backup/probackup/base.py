"""A pg_probackup chain as a base: FULL and its increments, composed without reading a page.

Opening costs one pass over the file lists. Called by ``mount`` and ``overlay`` through the
interface of ``backup.base``; belongs to one thread.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from pbkfs.backup.base import TABLESPACE_ROOT, Base, BaseEntry, Kind, Source, WalSeed
from pbkfs.backup.probackup import guard
from pbkfs.backup.probackup.catalog import Instance
from pbkfs.backup.probackup.chain import Member, open_chain
from pbkfs.backup.probackup.composition import Composition
from pbkfs.backup.probackup.content import DIRECTORY, LINK, MISSING
from pbkfs.backup.probackup.layer import DATABASE, Layer
from pbkfs.backup.probackup.tree import NameTree
from pbkfs.backup.probackup.wal_archive import WalArchive
from pbkfs.errors import FormatError, HostError, NotFoundError
from pbkfs.pgdata import (
    BLCKSZ,
    HIDDEN_IN_ROOT,
    PG_CONTROL,
    PG_TBLSPC,
    ControlFile,
    parse_major,
    read_control_file,
)

logger = logging.getLogger(__name__)

# Errors that are of the backup; others are of the machine, and may pass.
_DAMAGE = (errno.EBADMSG, errno.ENOENT)
_DAMAGED_HINT = "The backup is damaged; take another one, or use --force."


class ProbackupBase(Base):
    """A chain of backups, shown as what the newest of them holds."""

    kind = "probackup"

    def __init__(
        self, instance: Instance, members: list[Member], notes: list[str], *, force: bool
    ) -> None:
        """Open the lists of ``members`` (newest first). Raises PbkfsError."""
        from pbkfs._native import crc32c

        self.notes = notes
        self._store = instance.store
        self._instance = instance
        self._force = force
        self._is_closed = False
        self._guarded: list[tuple[Layer, int]] = []
        self._newest = members[0]
        with ExitStack() as stack:
            self._layers = []
            for member in members:
                layer = Layer(member, force=force)
                stack.callback(layer.close)
                self._layers.append(layer)
            self._tree = _read_lists(self._layers, crc32c)
            self._composition = Composition(self._layers)
            self._check_metadata()
            self.control = self._read_control_file(crc32c)
            stack.pop_all()
        control = self._newest.control
        assert control.server_version is not None
        self.pg_major = parse_major(control.server_version)
        self.system_identifier = self.control.system_identifier
        owner = os.fstat(self._layers[0].root_fd)
        self.owner = owner.st_uid, owner.st_gid
        self._mtime_ns = (control.end_time or control.start_time or 0) * 1_000_000_000
        self.identity = {
            "kind": self.kind,
            "instance": instance.name,
            "backup_id": self._newest.name,
            "system_identifier": str(self.system_identifier),
            # A merge leaves id and meaning of a backup but may change its content; the CRC of each
            # member's list tells.
            "chain": " ".join(f"{layer.name}:{layer.content_crc:08x}" for layer in self._layers),
        }
        for layer in self._layers:
            self.notes.extend(layer.notes)
        self._note_external_directories()

    # -- checks at open -----------------------------------------------------------------------

    def _check_metadata(self) -> None:
        for path in (b"PG_VERSION", PG_CONTROL):
            if self._tree.find(path) < 0:
                raise FormatError(
                    f"{self._layers[0].list_origin} does not list {path.decode()}",
                    hint="The list is incomplete; take another backup.",
                )
        damage = self._composition.find_damage(self._tree.paths)
        if damage is not None:
            if not self._force:
                raise damage
            self.notes.append(f"The metadata is damaged: {damage.message}.")

    def _read_control_file(self, crc32c: Callable[[bytes], int]) -> ControlFile:
        from pbkfs._native import open_beneath

        layer = self._layers[0]
        origin = f"{PG_CONTROL.decode()} of backup {layer.name}"
        try:
            fd = open_beneath(layer.root_fd, DATABASE + PG_CONTROL)
        except OSError as error:
            raise FormatError(
                f"cannot open {origin}: {error.strerror}", hint=_DAMAGED_HINT
            ) from error
        try:
            data = os.read(fd, BLCKSZ)
        finally:
            os.close(fd)
        return read_control_file(data, crc32c, origin=origin)

    # -- names --------------------------------------------------------------------------------

    def scandir(self, path: bytes) -> Iterable[BaseEntry]:
        if path == TABLESPACE_ROOT and self._tree.tablespaces:
            return [self._directory(oid, 0o700) for oid in self._tree.tablespaces]
        listed = self._tree.resolve(path)
        if listed is None or listed not in self._tree.children:
            raise NotFoundError(f"no directory {os.fsdecode(path)!r} in {self.describe()}")
        return self._scan(path, listed)

    def _scan(self, path: bytes, listed: bytes) -> Iterator[BaseEntry]:
        skip = len(listed) + 1 if listed else 0
        # Of a directory of tablespaces everything is a link, with line or without.
        oids = set(self._tree.tablespaces) if path == PG_TBLSPC else set()
        for name in self._tree.implied.get(listed, ()):
            if name not in oids:
                yield self._directory(name, 0o700)
        for number in self._tree.children[listed]:
            name = self._tree.paths[number][skip:]
            if name in oids or (not path and name in HIDDEN_IN_ROOT):
                continue
            yield self._entry(number, name)
        for oid in sorted(oids):
            target = b"../" + TABLESPACE_ROOT + b"/" + oid
            yield BaseEntry(oid, Kind.LINK, 0o777, len(target), self._mtime_ns, target)
        if not path and self._tree.tablespaces:
            yield self._directory(TABLESPACE_ROOT, 0o700)

    def _directory(self, name: bytes, mode: int) -> BaseEntry:
        return BaseEntry(name, Kind.DIR, mode, 0, self._mtime_ns)

    def _entry(self, number: int, name: bytes) -> BaseEntry:
        path = self._tree.paths[number]
        layer = self._layers[0]
        entry = layer.entry(number, path)
        mode = stat.S_IMODE(entry.mode)
        if layer.states[number] in (DIRECTORY, LINK):
            return self._directory(name, mode)
        try:
            size = self._composition.size(number, path, entry)
        except (FormatError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _DAMAGE:
                raise  # a listing is kept, and the store may come back
            # One damaged file must not take the directory with it. Its length is unknown; any but
            # zero makes a reader meet the error, where an empty file would be silently wrong.
            logger.error("size of %r in backup %s is unknown: %s", path, layer.name, error)
            size = entry.full_size or BLCKSZ
        return BaseEntry(name, Kind.FILE, mode, size, self._mtime_ns)

    def sources(self, path: bytes) -> tuple[Source, ...]:
        listed = self._tree.resolve(path)
        number = -1 if listed is None else self._tree.find(listed)
        if number < 0 or self._layers[0].states[number] in (MISSING, DIRECTORY, LINK):
            raise NotFoundError(f"no file {os.fsdecode(path)!r} in {self.describe()}")
        assert listed is not None
        return self._composition.sources(number, listed)

    # -- WAL ----------------------------------------------------------------------------------

    def wal_seed(self) -> Iterable[WalSeed]:
        control = self._newest.control
        if control.stream:
            return ()
        return self.wal_archive().range(control.tli, control.start_lsn, control.stop_lsn)

    def wal_archive(self) -> WalArchive:
        """The WAL archive that belongs to this backup."""
        assert self.control is not None
        return WalArchive(self._instance.archive_path, self.control.wal_segment_size)

    # -- what a user wants to know ------------------------------------------------------------

    def external_directories(self) -> list[tuple[int, str, int]]:
        """External directories of the backup, which are not shown: (number, path, n_files)."""
        layer = self._layers[0]
        paths = sorted(self._newest.control.external_dirs, key=os.fsencode)
        return [
            (number, path, layer.n_external.get(number, 0)) for number, path in enumerate(paths, 1)
        ]

    def _note_external_directories(self) -> None:
        external = self.external_directories()
        if external:
            listed = ", ".join(f"{path} ({n_files} files)" for _, path, n_files in external)
            self.notes.append(
                f"The backup holds external directories, which are not part of PGDATA and are not "
                f"shown: {listed}. Restore them with pg_probackup restore --external-mapping."
            )

    def describe(self) -> str:
        control = self._newest.control
        chain = " on ".join(f"{layer.name} ({layer.member.control.mode})" for layer in self._layers)
        return (
            f"backup {chain} of instance {self._instance.name} in {self._store}, PostgreSQL "
            f"{control.server_version}, {'STREAM' if control.stream else 'ARCHIVE'}"
        )

    # -- guard --------------------------------------------------------------------------------

    def acquire(self, pid: int) -> None:
        for layer in self._layers:
            try:
                problem = guard.add_reader(layer.root_fd, layer.name, pid)
                if problem is None:
                    self._guarded.append((layer, pid))
                else:
                    self._note_unguarded(problem)
                layer.check_unchanged()
            except OSError as error:
                self.release(pid)
                raise HostError(f"cannot lock backup {layer.name}: {error.strerror}") from error
            except BaseException:
                self.release(pid)
                raise

    def _note_unguarded(self, problem: OSError) -> None:
        note = (
            f"The store cannot be written ({problem.strerror}), so pg_probackup does not see this "
            "mount: do not merge or delete the chain while it is mounted."
        )
        if note not in self.notes:
            self.notes.append(note)

    def release(self, pid: int) -> None:
        kept = []
        for layer, guarded_pid in self._guarded:
            if guarded_pid == pid:
                guard.remove_reader(layer.root_fd, layer.name, pid)
            else:
                kept.append((layer, guarded_pid))
        self._guarded = kept

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            # While the layers' directories are still open, or the store would keep our lock file.
            for layer, pid in self._guarded:
                guard.remove_reader(layer.root_fd, layer.name, pid)
            self._guarded = []
            for layer in self._layers:
                layer.close()


def _read_lists(layers: list[Layer], crc32c: Callable[[bytes, int], int]) -> NameTree:
    tree = NameTree(layers[0].list_origin)
    try:
        layers[0].read_list(crc32c, tree.add, tree.__len__)
        tree.build()
        for layer in layers[1:]:
            layer.read_list(crc32c, lambda name: tree.find(name[1]), tree.__len__)
    except OSError as error:
        raise HostError(f"cannot read a file list: {error.strerror}") from error
    return tree


def open_probackup(
    store: Path, instance: str, backup_id: str, *, force: bool = False
) -> ProbackupBase:
    """Open a backup of a pg_probackup catalog with its chain.

    ``force`` lets CORRUPT and ORPHAN members and damaged metadata pass; what is damaged then gives
    errors when it is read. Raises NotFoundError, ChainError, FormatError, UnsupportedError,
    HostError.
    """
    opened = Instance(store, instance)
    members, notes = open_chain(opened, opened.backup(backup_id), force=force)
    return ProbackupBase(opened, members, notes, force=force)
