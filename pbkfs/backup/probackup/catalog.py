"""The catalog of pg_probackup: which instances and backups a store holds.

Reads directories and backup.control files only, never a file list. Called by ``chain``,
``wal_archive`` and ``cli`` (to list what can be mounted).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pbkfs.backup.probackup.control import (
    BackupControl,
    format_backup_id,
    parse_backup_id,
    parse_control,
    parse_settings,
)
from pbkfs.errors import FormatError, HostError, NotFoundError, PbkfsError

CONTROL_FILE = "backup.control"
CONF_FILE = "pg_probackup.conf"
LIST_FILE = "backup_content.control"
# A real one has less than 2 kB; the limit keeps a hostile store from filling the memory.
CONTROL_FILE_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup directory of an instance."""

    path: Path
    control: BackupControl | None
    """None when backup.control is missing, empty or cannot be parsed."""
    problem: PbkfsError | None
    """Why ``control`` is None."""
    control_stat: tuple[int, int, int] | None
    """(inode, mtime_ns, size) of backup.control when it was read: tells a later change."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def backup_id(self) -> str:
        """Id that parents are resolved by: of start-time, else of the directory's name."""
        if self.control is not None and self.control.backup_id is not None:
            return self.control.backup_id
        try:
            return format_backup_id(parse_backup_id(self.name))
        except ValueError:
            return self.name

    @property
    def status(self) -> str:
        return "UNKNOWN" if self.control is None else self.control.status


def quote(names: Iterable[str], *, limit: int = 12) -> str:
    """Name what exists, for a hint; long lists are cut."""
    listed = sorted(names)
    shown = ", ".join(listed[:limit])
    return shown + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def stat_key(status: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was replaced or rewritten."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_small_file(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a control or configuration file without following a link in its last component.

    Raises OSError, and FormatError when it is not a small regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        data = b""
        while len(data) <= CONTROL_FILE_LIMIT:
            piece = os.read(fd, CONTROL_FILE_LIMIT + 1 - len(data))
            if not piece:
                return data, status
            data += piece
    except IsADirectoryError as error:
        raise FormatError(f"{path} is a directory") from error
    finally:
        os.close(fd)
    raise FormatError(f"{path} is larger than {CONTROL_FILE_LIMIT} bytes")


def list_directories(path: Path) -> list[str]:
    """Names of the directories in ``path`` that do not begin with a dot. Raises OSError."""
    with os.scandir(path) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=True)
        )


def _check_name(name: str, what: str) -> None:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise NotFoundError(f"{name!r} cannot be the name of {what}")


class Instance:
    """One instance of a store: ``STORE/backups/NAME``."""

    def __init__(self, store: Path, name: str) -> None:
        """Check that store and instance exist. Raises NotFoundError naming what does."""
        self.store = store
        self.name = name
        self.path = store / "backups" / name
        self.archive_path = store / "wal" / name
        names = list_instances(store)
        _check_name(name, "an instance")
        if name not in names:
            exist = f"The store has: {quote(names)}." if names else "The store has no instance."
            raise NotFoundError(f"no instance {name!r} in the store {store}", hint=exist)

    def settings(self) -> dict[str, str]:
        """Parsed pg_probackup.conf; empty when there is none."""
        path = self.path / CONF_FILE
        try:
            data, _ = read_small_file(path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}") from error
        return parse_settings(data, str(path))

    def backup_names(self) -> list[str]:
        """Names of the backup directories."""
        try:
            return list_directories(self.path)
        except OSError as error:
            raise HostError(f"cannot list {self.path}: {error.strerror}") from error

    def read_backup(self, name: str) -> Backup:
        """Read one backup's control file; a broken one is told in ``problem``, not raised."""
        path = self.path / name
        origin = path / CONTROL_FILE
        problem: PbkfsError
        try:
            if path.is_symlink():
                raise FormatError(
                    f"{path} is a symbolic link",
                    hint="What a backup holds must lie in the store; move it there.",
                )
            data, status = read_small_file(origin)
            if data.strip():
                control = parse_control(data, str(origin))
                return Backup(path, control, None, stat_key(status))
            problem = FormatError(f"{origin} is empty")
        except FileNotFoundError:
            problem = FormatError(f"{origin} does not exist")
        except OSError as error:
            problem = HostError(f"cannot read {origin}: {error.strerror}")
        except PbkfsError as error:
            problem = error
        return Backup(path, None, problem, None)

    def find_backup(self, backup_id: str) -> Backup | None:
        """Find a backup by id (upper or lower case): of its start-time, or its directory's name.

        The start-time decides, because pg_probackup resolves parents by it; nearly always the
        directory is named by it too, so that one control file is read and not all of them.
        """
        names = self.backup_names()
        wanted = backup_id.upper()
        named = [name for name in names if name.upper() == wanted]
        for name in named:
            backup = self.read_backup(name)
            if backup.backup_id == wanted:
                return backup
        for name in names:
            if name not in named:
                backup = self.read_backup(name)
                if backup.control is not None and backup.control.backup_id == wanted:
                    return backup
        return self.read_backup(named[0]) if named else None

    def backup(self, backup_id: str) -> Backup:
        """Find a backup. Raises NotFoundError naming what exists."""
        _check_name(backup_id, "a backup")
        backup = self.find_backup(backup_id)
        if backup is None:
            names = self.backup_names()
            exist = f"The instance has: {quote(names)}." if names else "The instance has no backup."
            raise NotFoundError(
                f"no backup {backup_id!r} in the instance {self.name!r} of {self.store}", hint=exist
            )
        return backup

    def backups(self) -> list[Backup]:
        """All backups, oldest first."""
        backups = [self.read_backup(name) for name in self.backup_names()]
        return sorted(backups, key=lambda backup: (len(backup.backup_id), backup.backup_id))


def list_instances(store: Path) -> list[str]:
    """Names of the instances of a store. Raises NotFoundError when it is no store."""
    try:
        return list_directories(store / "backups")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not store.is_dir():
            message = f"the store {store} does not exist"
        else:
            message = f"{store} is no pg_probackup store: it has no directory backups"
        raise NotFoundError(
            message, hint="Give the directory that pg_probackup knows as -B/--backup-path."
        ) from error
    except OSError as error:
        raise HostError(
            f"cannot read the store {store}: {error.strerror}",
            hint="Run as the owner of the store.",
        ) from error
