"""A plain data directory as a base: pg_basebackup -Fp, Barman, a mounted snapshot, any copy.

Lists lazily through directory descriptors, one component at a time and without following links;
tablespaces, and a pg_wal that is a link, are opened at open time by the directory their link leads
to. Nothing is written. Called by ``mount`` and ``overlay`` through the interface of
``backup.base``; belongs to one thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from pbkfs.backup.base import TABLESPACE_ROOT, Base, BaseEntry, Kind, RawSource, Source
from pbkfs.errors import BusyError, FormatError, HostError, NotFoundError, UnsupportedError
from pbkfs.pgdata import (
    BACKUP_LABEL,
    BLCKSZ,
    HIDDEN_IN_ROOT,
    PG_CONTROL,
    PG_TBLSPC,
    PG_VERSION,
    PG_WAL,
    POSTMASTER_PID,
    TABLESPACE_MAP,
    ControlFile,
    parse_major,
    parse_tablespace_map,
    read_control_file,
)

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_PGDATA_HINT = "Give the directory that holds PG_VERSION, base and global."
_SMALL_FILE_LIMIT = 1 << 20
_INCREMENTAL = re.compile(rb"^INCREMENTAL FROM LSN:", re.MULTILINE)

# Directories whose content belongs to the server that was copied. Source:
# src/backend/backup/basebackup.c (excludeDirContents) for the first.
_EMPTY_DIRECTORIES = frozenset({b"pg_replslot"})
_TEMPORARY = b"pgsql_tmp"


def _open_beneath(root_fd: int, path: bytes, flags: int) -> int:
    """Open ``path`` below a directory descriptor; no component may be a link. Raises OSError."""
    if not path:
        return os.open(b".", flags, dir_fd=root_fd)
    fd = root_fd
    components = path.split(b"/")
    try:
        for position, component in enumerate(components):
            if component in (b"", b".", b".."):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            is_last = position == len(components) - 1
            new_fd = os.open(
                component, (flags if is_last else _OPEN_DIRECTORY) | os.O_NOFOLLOW, dir_fd=fd
            )
            if fd != root_fd:
                os.close(fd)
            fd = new_fd
    except BaseException:
        if fd != root_fd:
            os.close(fd)
        raise
    return fd


def _read_small(root_fd: int, path: bytes) -> bytes | None:
    """Content of a small regular file, None when there is none. Raises OSError."""
    try:
        fd = _open_beneath(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = b""
        while len(data) < _SMALL_FILE_LIMIT:
            piece = os.read(fd, _SMALL_FILE_LIMIT - len(data))
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(fd)


class DirectoryBase(Base):
    """A data directory that nobody changes."""

    kind = "directory"

    def __init__(self, path: Path) -> None:
        """Check and open the directory. Raises NotFoundError, FormatError, BusyError, HostError."""
        from pbkfs._native import crc32c

        self.notes = []
        self._path = path.resolve()
        self._fds: list[int] = []
        # Shown directory -> descriptor of where it is. The longest prefix wins.
        self._roots: dict[bytes, int] = {}
        self._tablespaces: list[bytes] = []
        try:
            self._root_fd = self._open_root(path)
            self._roots[b""] = self._root_fd
            self._check_server()
            self._check_store()
            self.pg_major = self._read_major()
            label = _read_small(self._root_fd, BACKUP_LABEL)
            if label is not None and _INCREMENTAL.search(label):
                raise UnsupportedError(
                    f"{self._path} is an incremental backup of pg_basebackup",
                    hint="Combine it with its ancestors by pg_combinebackup first.",
                )
            data = _read_small(self._root_fd, PG_CONTROL)
            if data is None:
                raise FormatError(
                    f"{self._path} has no {PG_CONTROL.decode()}", hint=_NO_PGDATA_HINT
                )
            control = read_control_file(
                data[:BLCKSZ], crc32c, origin=f"{PG_CONTROL.decode()} of {self._path}"
            )
            self._check_blocks(control)
            self._open_tablespaces()
            self._open_wal()
        except OSError as error:
            self.close()
            raise HostError(
                f"cannot read the base {path}: {error.strerror}",
                hint="Run as the owner of the directory.",
            ) from error
        except BaseException:
            self.close()
            raise
        status = os.fstat(self._root_fd)
        self.owner = status.st_uid, status.st_gid
        self.system_identifier = control.system_identifier
        self.control = control
        state = hashlib.sha256(data + (label or b"")).hexdigest()
        self.identity = {
            "kind": self.kind,
            "path": str(self._path),
            "system_identifier": str(self.system_identifier),
            # A server that ran on the base changed pg_control, another copy has another label.
            "state": state,
        }

    # -- checks at open -----------------------------------------------------------------------

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _open_root(self, path: Path) -> int:
        try:
            return self._keep(os.open(self._path, _OPEN_DIRECTORY))
        except FileNotFoundError as error:
            raise NotFoundError(f"the base {path} does not exist", hint=_NO_PGDATA_HINT) from error
        except NotADirectoryError as error:
            raise NotFoundError(f"the base {path} is not a directory") from error

    def _check_store(self) -> None:
        """Refuse the files of a pg_probackup backup: they look like a PGDATA, but hold records."""
        control = self._path.parent / "backup.control"
        if self._path.name == "database" and control.is_file():
            raise UnsupportedError(
                f"{self._path} is what pg_probackup stores of a backup, not a data directory",
                hint=f"Mount it from its store: -B STORE -I INSTANCE -i {self._path.parent.name}.",
            )

    def _read_major(self) -> int:
        data = _read_small(self._root_fd, PG_VERSION)
        if data is None:
            raise FormatError(
                f"{self._path} is not a data directory: it has no PG_VERSION", hint=_NO_PGDATA_HINT
            )
        try:
            major = parse_major(data[:64].decode("ascii"))
        except ValueError as error:
            raise FormatError(
                f"PG_VERSION of {self._path} is {data[:64]!r}", hint=_NO_PGDATA_HINT
            ) from error
        if major < 10:
            raise UnsupportedError(
                f"{self._path} is of PostgreSQL {data.decode().strip()}",
                hint="PostgreSQL 10 and newer are supported.",
            )
        return major

    def _check_blocks(self, control: ControlFile) -> None:
        for name, size in (("block", control.block_size), ("WAL block", control.wal_block_size)):
            if size != BLCKSZ:
                raise UnsupportedError(
                    f"the cluster in {self._path} has a {name} size of {size}",
                    hint=f"Only {BLCKSZ} is supported.",
                )

    def _check_server(self) -> None:
        """Refuse a directory that a server runs on: its files change under the mount.

        A pid file alone proves nothing, its pid may belong to another process by now. A postmaster
        has its data directory as working directory. Source: src/backend/utils/init/miscinit.c
        (ChangeToDataDir, CreateLockFile).
        """
        data = _read_small(self._root_fd, POSTMASTER_PID)
        if data is None:
            return
        lines = data.decode("utf-8", "surrogateescape").splitlines()
        pid = lines[0].strip() if lines else ""
        if not pid.isdigit() or not self._is_postmaster(int(pid), lines[1] if lines[1:] else ""):
            return
        raise BusyError(
            f"a server with pid {pid} runs on {self._path}",
            hint="Stop it, or give a copy or a snapshot of the directory.",
        )

    def _is_postmaster(self, pid: int, data_directory: str) -> bool:
        try:
            cwd = os.stat(f"/proc/{pid}/cwd")
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            # Another user's process does not show its directory, but its name.
            try:
                name = Path(f"/proc/{pid}/comm").read_text()
            except OSError:
                return False
            return name.startswith(("postgres", "postmaster")) and (
                os.path.realpath(data_directory) == str(self._path)
            )
        return os.path.samestat(cwd, os.fstat(self._root_fd))

    def _open_tablespaces(self) -> None:
        linked = {}
        try:
            fd = _open_beneath(self._root_fd, PG_TBLSPC, _OPEN_DIRECTORY)
        except FileNotFoundError:
            fd = -1
        if fd >= 0:
            try:
                for name in os.listdir(fd):
                    oid = os.fsencode(name)
                    status = os.stat(oid, dir_fd=fd, follow_symlinks=False)
                    if oid.isdigit() and stat.S_ISLNK(status.st_mode):
                        linked[oid] = os.readlink(oid, dir_fd=fd)
                    elif oid.isdigit():
                        linked[oid] = b""
            finally:
                os.close(fd)
        for oid, target in sorted(linked.items()):
            if target:
                where = os.path.join(os.fsencode(self._path), PG_TBLSPC, target)
                self._add_tablespace(oid, where, os.fsdecode(target))
        mapped = _read_small(self._root_fd, TABLESPACE_MAP) or b""
        for oid, target in sorted(parse_tablespace_map(mapped).items()):
            if oid not in linked:
                # Barman keeps tablespaces beside the data directory, by oid. The original place,
                # which the map names, may be the production's: it is never looked at.
                where = os.path.join(os.fsencode(self._path.parent), oid)
                self._add_tablespace(oid, where, os.fsdecode(target))

    def _add_tablespace(self, oid: bytes, where: bytes, name: str) -> None:
        try:
            fd = self._keep(os.open(where, _OPEN_DIRECTORY))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"tablespace {oid.decode()} ({name}) of {self._path} is not at "
                f"{os.fsdecode(where)}",
                hint="Copy its files there, or make pg_tblspc/OID a link to them.",
            ) from error
        shown = TABLESPACE_ROOT + b"/" + oid
        self._roots[shown] = fd
        self._tablespaces.append(oid)
        self.notes.append(
            f"Tablespace {oid.decode()} is read from {os.path.realpath(os.fsdecode(where))}."
        )

    def _open_wal(self) -> None:
        try:
            target = os.readlink(PG_WAL, dir_fd=self._root_fd)
        except OSError:
            return
        where = os.path.join(os.fsencode(self._path), target)
        try:
            self._roots[PG_WAL] = self._keep(os.open(where, _OPEN_DIRECTORY))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"pg_wal of {self._path} is a link to {os.fsdecode(target)}, which does not exist",
                hint="Copy the WAL directory too, or make the link lead to it.",
            ) from error

    # -- names --------------------------------------------------------------------------------

    def _locate(self, path: bytes) -> tuple[int, bytes]:
        """Descriptor and path below it of a shown path."""
        first, _, rest = path.partition(b"/")
        if first == PG_WAL and PG_WAL in self._roots:
            return self._roots[PG_WAL], rest
        if self._tablespaces:
            if first == TABLESPACE_ROOT:
                oid, _, below = rest.partition(b"/")
                fd = self._roots.get(TABLESPACE_ROOT + b"/" + oid)
                if fd is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                return fd, below
            if first == PG_TBLSPC and rest.partition(b"/")[0] in self._tablespaces:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if path in HIDDEN_IN_ROOT:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self._root_fd, path

    def scandir(self, path: bytes) -> Iterable[BaseEntry]:
        if path == TABLESPACE_ROOT and self._tablespaces:
            return [self._tablespace_directory(oid) for oid in self._tablespaces]
        try:
            root_fd, below = self._locate(path)
            fd = _open_beneath(root_fd, below, _OPEN_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no directory {os.fsdecode(path)!r} in {self._path}") from error
        try:
            return list(self._scan(fd, path))
        finally:
            os.close(fd)

    def _scan(self, fd: int, path: bytes) -> Iterator[BaseEntry]:
        if path in _EMPTY_DIRECTORIES or path.rpartition(b"/")[2] == _TEMPORARY:
            return
        if path == PG_TBLSPC:
            for oid in self._tablespaces:
                target = b"../" + TABLESPACE_ROOT + b"/" + oid
                mtime_ns = os.fstat(fd).st_mtime_ns
                yield BaseEntry(oid, Kind.LINK, 0o777, len(target), mtime_ns, target)
        elif not path and self._tablespaces:
            yield BaseEntry(TABLESPACE_ROOT, Kind.DIR, 0o700, 0, os.fstat(fd).st_mtime_ns)
        for text in os.listdir(fd):
            name = os.fsencode(text)
            if self._is_hidden(path, name):
                continue
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                entry = self._entry(fd, path, name, status)
            except FileNotFoundError:
                continue
            if entry is not None:
                yield entry

    def _is_hidden(self, path: bytes, name: bytes) -> bool:
        if not path:
            return name in HIDDEN_IN_ROOT or (name == TABLESPACE_ROOT and bool(self._tablespaces))
        return path == PG_TBLSPC and name in self._tablespaces

    def _entry(self, fd: int, path: bytes, name: bytes, status: os.stat_result) -> BaseEntry | None:
        mode = stat.S_IMODE(status.st_mode)
        mtime_ns = status.st_mtime_ns
        if stat.S_ISREG(status.st_mode):
            return BaseEntry(name, Kind.FILE, mode, status.st_size, mtime_ns)
        if stat.S_ISDIR(status.st_mode):
            return BaseEntry(name, Kind.DIR, mode, 0, mtime_ns)
        if stat.S_ISLNK(status.st_mode):
            if not path and name in self._roots:
                real = os.fstat(self._roots[name])
                return BaseEntry(name, Kind.DIR, stat.S_IMODE(real.st_mode), 0, real.st_mtime_ns)
            target = os.readlink(name, dir_fd=fd)
            return BaseEntry(name, Kind.LINK, 0o777, len(target), mtime_ns, target)
        # Sockets, pipes and devices mean nothing in a copy.
        return None

    def _tablespace_directory(self, oid: bytes) -> BaseEntry:
        real = os.fstat(self._roots[TABLESPACE_ROOT + b"/" + oid])
        return BaseEntry(oid, Kind.DIR, 0o700, 0, real.st_mtime_ns)

    def sources(self, path: bytes) -> tuple[Source, ...]:
        try:
            root_fd, below = self._locate(path)
            directory, _, name = below.rpartition(b"/")
            fd = _open_beneath(root_fd, directory, _OPEN_DIRECTORY)
            try:
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"no file {os.fsdecode(path)!r} in {self._path}") from error
        if not stat.S_ISREG(status.st_mode):
            raise NotFoundError(f"{os.fsdecode(path)!r} in {self._path} is not a file")
        return (RawSource(root_fd, below, status.st_size, "base"),)

    def describe(self) -> str:
        return f"the data directory {self._path}, PostgreSQL {self.pg_major}"

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def open_directory(path: Path) -> DirectoryBase:
    """Open a data directory. Raises NotFoundError, FormatError, BusyError, HostError."""
    return DirectoryBase(path)
