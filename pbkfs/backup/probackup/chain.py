"""A backup and its ancestors down to the FULL, and whether they may be mounted.

Works on control files only. Called by ``probackup.base`` to open a chain and by ``cli`` to list
what can be mounted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbkfs.backup.probackup.catalog import Backup, Instance
from pbkfs.backup.probackup.control import BackupControl, Version
from pbkfs.errors import ChainError, FormatError, PbkfsError, UnsupportedError
from pbkfs.pgdata import BLCKSZ, parse_major

# What each status means for a mount. OK and DONE are the only ones that need no --force.
_STATUS = {
    "CORRUPT": "validation found damage in it",
    "ORPHAN": "an ancestor of it is damaged or missing",
    "RUNNING": "it is being taken, or its process was killed",
    "ERROR": "it failed",
    "MERGING": "a merge is rewriting it, or was killed while doing so",
    "MERGED": "a merge of it is not finished",
    "DELETING": "it is being deleted",
    "DELETED": "it is being deleted",
    "UNKNOWN": "its control file names no known status",
}
_FORCIBLE = frozenset({"CORRUPT", "ORPHAN"})
_HINT = {
    "CORRUPT": "With --force undamaged files can be read and damaged ones give errors.",
    "ORPHAN": "Run pg_probackup validate, or mount with --force.",
    "RUNNING": "Wait until the backup is done, or take another one.",
    "MERGING": "Let pg_probackup merge finish, then mount the merged backup.",
    "MERGED": "Let pg_probackup merge finish, then mount the merged backup.",
}

NEWEST_VERSION: Version = (2, 5, 9999)
OLDEST_VERSION: Version = (2, 0, 0)
# These lost lines of lists longer than 4 MB. Source: pg_probackup issue 132.
LOSSY_VERSIONS = frozenset({(2, 1, 4), (2, 1, 5), (2, 2, 1)})
LOSSY_LIST_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Member:
    """One backup of a chain whose control file is complete."""

    backup: Backup
    control: BackupControl
    version: Version

    @property
    def name(self) -> str:
        return self.backup.name

    @property
    def is_full(self) -> bool:
        return self.control.mode == "FULL"


def resolve_chain(instance: Instance, backup: Backup) -> list[Backup]:
    """Follow parent-backup-id from ``backup`` to its FULL; newest first.

    Raises ChainError for a missing parent, a cycle, or a chain without a FULL, FormatError when a
    control file cannot be read.
    """
    chain: list[Backup] = []
    seen: set[str] = set()
    while True:
        control = backup.control
        if control is None:
            assert backup.problem is not None
            raise _member_error(chain, backup, backup.problem.message) from backup.problem
        chain.append(backup)
        seen.add(backup.backup_id)
        if control.mode is None:
            raise _member_error(chain[:-1], backup, "its control file has no backup-mode")
        if control.mode == "FULL":
            return chain
        if control.parent_id is None:
            raise ChainError(
                f"backup {backup.name} is of mode {control.mode} but names no parent",
                hint="The chain has no FULL backup and cannot be mounted.",
            )
        if control.parent_id in seen:
            raise ChainError(
                f"backup {backup.name} names {control.parent_id} as its parent, which is a cycle: "
                + " -> ".join([*(member.name for member in chain), control.parent_id]),
                hint="The control files of this chain are damaged.",
            )
        parent = instance.find_backup(control.parent_id)
        if parent is None:
            raise ChainError(
                f"parent {control.parent_id} of backup {backup.name} is missing"
                + _of_chain(chain, backup),
                hint="The chain is incomplete and cannot be mounted, not even with --force.",
            )
        if parent.backup_id in seen:
            raise ChainError(f"backup {backup.name} is its own ancestor, which is a cycle")
        backup = parent


def _of_chain(chain: list[Backup], backup: Backup) -> str:
    return f" (in the chain of {chain[0].name})" if chain and chain[0] is not backup else ""


def _member_error(chain: list[Backup], backup: Backup, reason: str) -> FormatError:
    return FormatError(
        f"backup {backup.name} cannot be read{_of_chain(chain, backup)}: {reason}",
        hint="The backup died early or its directory is damaged; take another one.",
    )


def check_statuses(chain: list[Backup], *, force: bool) -> list[str]:
    """Check that every member of a chain (newest first) may be mounted.

    Returns notes about what ``force`` let pass. Raises ChainError naming the first member, newest
    first, that stands in the way, and the oldest ancestor that is the cause of it.
    """
    bad = [backup for backup in chain if backup.status not in ("OK", "DONE")]
    if not bad:
        return []
    fatal = [backup for backup in bad if backup.status not in _FORCIBLE]
    if force and not fatal:
        return [
            f"Backup {backup.name} has status {backup.status}: {_STATUS[backup.status]}."
            for backup in bad
        ]
    first = fatal[0] if force else bad[0]
    message = f"backup {first.name} has status {first.status}: {_STATUS[first.status]}"
    if first is not chain[0]:
        message = f"backup {chain[0].name} cannot be mounted: its ancestor {first.name} has status"
        message += f" {first.status}: {_STATUS[first.status]}"
    cause = bad[-1]
    if first.status == "ORPHAN" and cause is not first:
        message += f" (its ancestor {cause.name} is {cause.status})"
    hint = _HINT.get(first.status, "Mount another backup.")
    if not force and fatal and first.status in _FORCIBLE:
        # --force would not help: name the member that it can't get past.
        hint = f"Not even --force helps, as backup {fatal[0].name} is {fatal[0].status}."
    raise ChainError(message, hint=hint)


def check_member(backup: Backup, *, force: bool) -> Member:
    """Check what a single member says about its format.

    Raises UnsupportedError for a version or block size that is not known, FormatError when a
    needed key is absent.
    """
    control = backup.control
    assert control is not None
    version = control.program_version
    if version is None:
        raise FormatError(f"backup {backup.name} does not name its program-version")
    dotted = ".".join(map(str, version))
    if version < OLDEST_VERSION or (version > NEWEST_VERSION and not force):
        raise UnsupportedError(
            f"backup {backup.name} was made by pg_probackup {dotted}, which is not known",
            hint="Versions 2.0 to 2.5 are supported.",
        )
    for key, size in (
        ("block-size", control.block_size),
        ("xlog-block-size", control.wal_block_size),
    ):
        if size != BLCKSZ:
            raise UnsupportedError(
                f"backup {backup.name} has {key} = {size}",
                hint=f"Only clusters with a block size of {BLCKSZ} are supported.",
            )
    if control.server_version is None:
        raise FormatError(f"backup {backup.name} does not name its server-version")
    try:
        major = parse_major(control.server_version)
    except ValueError as error:
        raise FormatError(
            f"backup {backup.name} has server-version = {control.server_version!r}"
        ) from error
    if major < 10:
        raise UnsupportedError(
            f"backup {backup.name} is of PostgreSQL {control.server_version}",
            hint="PostgreSQL 10 and newer are supported.",
        )
    return Member(backup, control, version)


def open_chain(
    instance: Instance, backup: Backup, *, force: bool = False
) -> tuple[list[Member], list[str]]:
    """Resolve and check a chain: (members newest first, notes for the user).

    Raises ChainError, FormatError or UnsupportedError.
    """
    # A destination that will never do is told first: its chain does not matter then.
    if backup.control is not None and backup.status not in ("OK", "DONE", *_FORCIBLE):
        check_statuses([backup], force=force)
    chain = resolve_chain(instance, backup)
    notes = check_statuses(chain, force=force)
    members = [check_member(member, force=force) for member in chain]
    newest = members[0]
    for member in members[1:]:
        if member.control.server_version != newest.control.server_version:
            raise ChainError(
                f"backup {newest.name} is of PostgreSQL {newest.control.server_version} but its "
                f"ancestor {member.name} of {member.control.server_version}"
            )
    return members, notes


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """One line of a list of backups."""

    instance: str
    backup_id: str
    status: str
    mode: str | None
    parent_id: str | None
    stream: bool | None
    pg_version: str | None
    program_version: str | None
    start_time: int | None
    recovery_time: int | None
    tli: int | None
    start_lsn: int | None
    stop_lsn: int | None
    pgdata_bytes: int | None
    data_bytes: int | None
    is_mountable: bool
    reason: str | None
    """Why it is not mountable."""


def _summarize(instance: Instance, backup: Backup) -> BackupSummary:
    reason = None
    try:
        open_chain(instance, backup)
    except PbkfsError as error:
        reason = error.message
    control = backup.control
    version = None if control is None else control.program_version
    return BackupSummary(
        instance=instance.name,
        backup_id=backup.name,
        status=backup.status,
        mode=control.mode if control else None,
        parent_id=control.parent_id if control else None,
        stream=control.stream if control else None,
        pg_version=control.server_version if control else None,
        program_version=".".join(map(str, version)) if version else None,
        start_time=control.start_time if control else None,
        recovery_time=control.recovery_time if control else None,
        tli=control.tli if control else None,
        start_lsn=control.start_lsn if control else None,
        stop_lsn=control.stop_lsn if control else None,
        pgdata_bytes=control.pgdata_bytes if control else None,
        data_bytes=control.data_bytes if control else None,
        is_mountable=reason is None,
        reason=reason,
    )


def list_backups(store: Path, instance: str) -> list[BackupSummary]:
    """Every backup of an instance, oldest first, with whether and why not it can be mounted.

    File lists are not read, so damage in them shows only when a backup is mounted.
    Raises NotFoundError.
    """
    opened = Instance(store, instance)
    return [_summarize(opened, backup) for backup in opened.backups()]
