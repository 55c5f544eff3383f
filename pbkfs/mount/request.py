"""What a user asks of ``mount``, checked against the host before anything is changed.

Owns the checks of places (mount point, diff, their relation), of the owner shown and of
``allow_other``. Called by ``launch`` before the fork; reads only, nothing here changes the disk.
"""

from __future__ import annotations

import errno
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from pbkfs import log, plain_file
from pbkfs.errors import BusyError, DiffError, HostError, NotFoundError, UsageError
from pbkfs.mount import mounts
from pbkfs.mount.binding import BaseAddress
from pbkfs.mount.mounts import MountEntry
from pbkfs.mount.target import state_of, target_of

SUPERBLOCK = "superblock.json"
FUSE_CONF = Path("/etc/fuse.conf")


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Where the worker logs to. ``path`` None is ``DIFF/log/worker.log``."""

    sink: log.Sink = "file"
    path: Path | None = None
    style: log.Format = "text"
    debug: bool = False


@dataclass(frozen=True, slots=True)
class MountRequest:
    """The arguments of a mount. Of the base, what is None is taken from the diff's binding."""

    mountpoint: Path
    diff: Path
    index_bytes: int
    store: Path | None = None
    instance: str | None = None
    backup_id: str | None = None
    base_dir: Path | None = None
    is_empty: bool = False
    owner: tuple[int, int] | None = None
    allow_other: bool | None = None
    force: bool = False
    log: LogOptions = LogOptions()
    pid_file: Path | None = None
    hydrate: int | None = None
    """Bytes a second of hydration in the background, 0 for no limit; None: no hydration."""
    full_wait_s: int = -1
    """How long written pages wait for space on a full disk; -1: for ever, 0: not at all."""

    verifies_pages: bool = False
    """Whether pages of the base are looked at when they are first read."""

    is_supervised: bool = False
    """Whether another worker takes over when one dies."""

    def names_base(self) -> bool:
        """Return whether the command line says anything about the base."""
        return bool(self.store or self.instance or self.backup_id or self.base_dir or self.is_empty)


@dataclass(frozen=True, slots=True)
class MountPlace:
    """A checked mount point: its real path, and the dead mount that has to go first."""

    path: Path
    dead: MountEntry | None


def check_base_options(request: MountRequest) -> None:
    """Raise UsageError where the options that name a base contradict each other."""
    kinds = [
        name
        for name, given in (
            ("--backup-path", request.store or request.instance or request.backup_id),
            ("--base", request.base_dir),
            ("--empty", request.is_empty),
        )
        if given
    ]
    if len(kinds) > 1:
        raise UsageError(
            f"{kinds[0]} and {kinds[1]} exclude each other", hint="Name one base for the mount."
        )


def check_mountpoint(path: Path, diff: Path) -> MountPlace:
    """Return the checked mount point. ``diff`` is resolved already.

    A dead mount of the same diff is no obstacle: it is named in the answer. Raises NotFoundError,
    UsageError, BusyError, HostError.
    """
    path = mounts.resolve(path)
    if "\n" in str(path):
        # postmaster.pid has a line for each value, and one of them is this path.
        raise UsageError(
            f"mount point {str(path)!r} has a line break in its name",
            hint="PostgreSQL can't say where it runs then; name another directory.",
        )
    entry = mounts.find_mountpoint(path)
    if entry is not None and entry.fstype == mounts.FSTYPE:
        if state_of(target_of(Path(entry.source), entry)) != "dead":
            raise BusyError(
                f"mount point {path} is already mounted, with diff {entry.source}",
                hint=f"Unmount it first: pbkfs unmount -D {path}",
            )
        if entry.source != str(diff):
            raise BusyError(
                f"mount point {path} holds the dead mount of another diff, {entry.source}",
                hint=f"Clear it first: pbkfs unmount -D {path}",
            )
        return MountPlace(path, dead=entry)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        raise NotFoundError(
            f"mount point {path} does not exist", hint=f"Make it first: mkdir -p {path}"
        ) from None
    except NotADirectoryError:
        raise UsageError(
            f"mount point {path} is not a directory", hint="Name an existing empty directory."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise BusyError(
                f"mount point {path} holds a dead mount of another program",
                hint=f"Clear it first: umount -l {path}",
            ) from None
        raise HostError(
            f"cannot read mount point {path}: {reason(error)}",
            hint="Run pbkfs as a user who may read and write that directory.",
        ) from error
    if names:
        raise UsageError(
            f"mount point {path} is not empty ({len(names)} entries)",
            hint="Name an existing empty directory; a mount would hide what is there.",
        )
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        # Source: fusermount3(1): a user may only mount where he may write.
        raise HostError(
            f"mount point {path} is not writable for this user",
            hint="Without root, a mount point has to be a directory that you can write to.",
        )
    return MountPlace(path, dead=None)


def check_diff(path: Path) -> tuple[Path, bool]:
    """Return the diff's real path and whether a diff is there already. Raises DiffError, HostError.

    An empty directory, or one in which the making of a diff was cut short, is the place of a new
    one.
    """
    from pbkfs.overlay.diff import is_free_place

    path = mounts.resolve(path)
    try:
        names = set(os.listdir(path))
    except FileNotFoundError:
        _check_can_make(path)
        return path, False
    except NotADirectoryError:
        raise DiffError(
            f"diff {path} is not a directory",
            hint="Name the directory of a diff, or one that does not exist yet.",
        ) from None
    except OSError as error:
        raise HostError(
            f"cannot read diff {path}: {reason(error)}",
            hint="Run pbkfs as the user who made the diff.",
        ) from error
    if SUPERBLOCK in names:
        is_reused = True
    elif is_free_place(path):
        is_reused = False
    else:
        raise DiffError(
            f"directory {path} is not empty and is no diff (no {SUPERBLOCK})",
            hint="Name the directory of a diff, an empty one, or one that does not exist yet.",
        )
    _check_writable(path)
    return path, is_reused


def _check_can_make(path: Path) -> None:
    parent = path.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise DiffError(
            f"diff {path} cannot be made: {parent} is not a directory",
            hint="Name the directory of a diff, or one that can be made.",
        )
    _check_writable(parent)


def _check_writable(path: Path) -> None:
    if os.access(path, os.W_OK | os.X_OK):
        return
    is_read_only = bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    why = "the file system is read-only" if is_read_only else "permission denied"
    raise HostError(
        f"cannot write to {path}: {why}",
        hint="A diff needs a directory that this user can write to.",
    )


def check_places(mountpoint: Path, diff: Path, base: BaseAddress) -> None:
    """Raise UsageError where one of mount point, diff and base lies inside another.

    The paths are resolved. A diff inside of its base would change the base, and a mount point
    inside of its diff or base would hide a part of them from ourselves.
    """
    places = [("mount point", mountpoint), ("diff", diff), *_places_of(base)]
    for i, (name, path) in enumerate(places):
        for other_name, other in places[i + 1 :]:
            if path == other:
                raise UsageError(
                    f"{name} and {other_name} are the same directory, {path}",
                    hint="Name separate directories.",
                )
            inner, outer = (path, other) if other in path.parents else (other, path)
            if outer in inner.parents:
                inside, around = (name, other_name) if inner == path else (other_name, name)
                raise UsageError(
                    f"{inside} {inner} lies inside of {around} {outer}",
                    hint="Name directories that do not contain each other.",
                )


def check_own_files(request: MountRequest, mountpoint: Path, base: BaseAddress) -> None:
    """Raise UsageError for a log or pid file of the worker inside of the mount or of the base.

    ``mountpoint`` and the base's path are resolved. Inside of its mount the worker would wait for
    its own answer, for ever. Raises HostError for what is there and no regular file: the pid file
    is written when the mount is up.
    """
    for name, named in (("log file", request.log.path), ("pid file", request.pid_file)):
        if named is None:
            continue
        path = mounts.resolve(named)
        for around, directory in (("mount point", mountpoint), *_places_of(base)):
            if directory in path.parents:
                raise UsageError(
                    f"{name} {path} lies inside of {around} {directory}",
                    hint="Name a file in another directory.",
                )
        try:
            plain_file.check(named)
        except OSError as error:
            raise own_file_error(name, named, error) from error


def own_file_error(name: str, path: Path, error: OSError) -> HostError:
    """Return what is said where a log file or pid file can't be written."""
    return HostError(
        f"cannot write {name} {path}: {reason(error)}",
        hint=f"Name a regular file where this user can write: --{name.replace(' ', '-')} FILE.",
    )


def _places_of(base: BaseAddress) -> list[tuple[str, Path]]:
    """Return where the base lies, and what a user calls it; nothing for an empty base."""
    path = base.store or base.path
    return [("store" if base.kind == "probackup" else "base", Path(path))] if path else []


def parse_owner_option(text: str) -> tuple[int, int]:
    """Return (uid, gid) for ``USER``, ``USER:GROUP``, ``UID`` or ``UID:GID``."""
    import grp

    user, _, group = text.partition(":")
    try:
        number = _parse_id(user)
        if number is None:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        else:
            uid, gid = number, _primary_group(number)
    except KeyError:
        raise UsageError(
            f"user {user!r} does not exist", hint="Name a user of this host, or a number."
        ) from None
    if group:
        try:
            number = _parse_id(group)
            gid = grp.getgrnam(group).gr_gid if number is None else number
        except KeyError:
            raise UsageError(
                f"group {group!r} does not exist", hint="Name a group of this host, or a number."
            ) from None
    return uid, gid


def _parse_id(text: str) -> int | None:
    """Return a uid or gid that is given as a number; None for what must be a name."""
    if not (text.isascii() and text.isdigit()):
        return None
    # Source: chown(2): the last one means "leave it as it is".
    if int(text) >= 2**32 - 1:
        raise UsageError(
            f"{text} is no number of a user or group", hint="They go from 0 to 4294967294."
        )
    return int(text)


def _primary_group(uid: int) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid


def choose_owner(
    asked: tuple[int, int] | None, bound: tuple[int, int] | None, base: tuple[int, int] | None
) -> tuple[int, int]:
    """Return (uid, gid) that the mount shows as the owner of PGDATA.

    ``asked`` is the option, ``bound`` what the diff was mounted with before, ``base`` who owns the
    backup. The default is the mounting user; for root, who may not run a server, the owner of the
    backup or else the user ``postgres``. Raises HostError.
    """
    here = (os.geteuid(), os.getegid())
    if here[0] != 0:
        owner = asked or here
        if owner[0] != here[0] or owner[1] not in {here[1], *os.getgroups()}:
            raise HostError(
                f"files of owner {owner[0]}:{owner[1]} cannot be made by user {here[0]}",
                hint="Run pbkfs as that user, or as root.",
            )
        return owner
    if asked or bound:
        return asked or bound or here
    if base is not None and base[0] != 0:
        return base
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        return here
    return entry.pw_uid, entry.pw_gid


def choose_allow_other(asked: bool | None, owner: tuple[int, int]) -> bool:
    """Return whether users other than the mounting one may enter the mount.

    Needed for root (who is not the user of the server) and where the owner is somebody else.
    Raises HostError where the host does not permit it.
    """
    is_root = os.geteuid() == 0
    wanted = asked if asked is not None else is_root or owner[0] != os.geteuid()
    if wanted and not is_root and not _user_allow_other():
        raise HostError(
            f"allow_other is not permitted for user {os.geteuid()}",
            hint=f"Put the line user_allow_other into {FUSE_CONF}, or mount as root.",
        )
    return wanted


def _user_allow_other() -> bool:
    # Source: libfuse util/fusermount.c, read_conf(): a line by itself, comments begin with #.
    try:
        text = FUSE_CONF.read_text(errors="replace")
    except OSError:
        return False
    return any(line.partition("#")[0].strip() == "user_allow_other" for line in text.splitlines())


def reason(error: OSError) -> str:
    """Return the system's words for an error, in the form of our messages."""
    return (error.strerror or str(error)).lower()
