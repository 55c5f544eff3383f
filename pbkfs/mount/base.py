"""From the options that name a base, or a binding, to an open base.

The one place of ``mount`` that knows which kinds of base there are.
"""

from __future__ import annotations

import os
from pathlib import Path

from pbkfs.backup.base import Base
from pbkfs.errors import DiffError, NotFoundError, UsageError
from pbkfs.mount.binding import BaseAddress, Binding
from pbkfs.mount.mounts import resolve
from pbkfs.mount.request import MountRequest


def choose_address(
    request: MountRequest, diff: Path, bound: Binding | None, *, is_reused: bool
) -> BaseAddress:
    """Return the base to mount: from the options, or from the binding, with which they must agree.

    Raises UsageError where neither says enough, DiffError where they differ (``--force`` accepts
    another path of a store or directory; the superblock's identity still has to match).
    """
    if bound is None:
        if not request.names_base():
            raise UsageError(
                f"no base is given for {'diff' if is_reused else 'the new diff'} {diff}",
                hint="Name one: -B STORE -I INSTANCE -i BACKUP, --base DIRECTORY, or --empty.",
            )
        return resolve_address(request)
    was = bound.base
    if not request.names_base():
        return was
    asked = resolve_address(request, was)
    same = asked.kind == was.kind and asked.instance == was.instance
    same = same and (asked.backup_id or "").upper() == (was.backup_id or "").upper()
    has_moved = (asked.store, asked.path) != (was.store, was.path)
    if same and has_moved and not request.force:
        raise DiffError(
            f"diff {diff} belongs to {was}, not to {asked}",
            hint="If it is the same base at another place, say so with --force.",
        )
    if not same:
        raise DiffError(
            f"diff {diff} belongs to {was}, not to {asked}",
            hint="Use another diff for another base; leave the base's options out to use this one.",
        )
    return asked


def resolve_address(request: MountRequest, bound: BaseAddress | None = None) -> BaseAddress:
    """Return the base that the options name; what they leave out is ``bound``'s, or the only one.

    Raises UsageError, NotFoundError.
    """
    if request.is_empty:
        return BaseAddress("empty")
    if request.base_dir is not None:
        return BaseAddress("directory", path=str(resolve(request.base_dir)))
    was = bound if bound is not None and bound.kind == "probackup" else BaseAddress("probackup")
    store = str(resolve(request.store)) if request.store else was.store
    if store is None:
        raise UsageError(
            "the store of the backup is not given", hint="Name it: -B STORE (--backup-path)."
        )
    instance = request.instance or was.instance or only_instance(Path(store))
    backup_id = request.backup_id or was.backup_id
    if backup_id is None:
        raise UsageError(
            f"the backup of instance {instance} is not given",
            hint=f"Name it: -i ID, or -i latest; pbkfs backups -B {store} lists them.",
        )
    if backup_id.lower() == "latest":
        backup_id = latest_backup(Path(store), instance)
    return BaseAddress("probackup", store=store, instance=instance, backup_id=backup_id)


def only_instance(store: Path) -> str:
    """Return the store's instance if it has just one. Raises UsageError, NotFoundError."""
    from pbkfs.backup.probackup.catalog import list_instances, quote

    names = list_instances(store)
    if len(names) == 1:
        return names[0]
    if not names:
        raise NotFoundError(
            f"the store {store} has no instance",
            hint="Give the directory that pg_probackup knows as -B/--backup-path.",
        )
    raise UsageError(
        f"the store {store} has {len(names)} instances, and none is given",
        hint=f"Name one with -I: {quote(names)}.",
    )


def latest_backup(store: Path, instance: str) -> str:
    """Return the id of the instance's newest backup that can be mounted. Raises NotFoundError."""
    from pbkfs.backup.probackup.chain import list_backups

    for summary in reversed(list_backups(store, instance)):
        if summary.is_mountable:
            return summary.backup_id
    raise NotFoundError(
        f"instance {instance} in the store {store} has no backup that can be mounted",
        hint=f"pbkfs backups -B {store} -I {instance} says why.",
    )


def open_base(address: BaseAddress, *, force: bool, owner: tuple[int, int] | None) -> Base:
    """Open the base at ``address``: control files and lists only. Raises PbkfsError."""
    if address.kind == "probackup":
        from pbkfs.backup.probackup.base import open_probackup

        assert address.store
        assert address.instance
        assert address.backup_id
        return open_probackup(Path(address.store), address.instance, address.backup_id, force=force)
    if address.kind == "directory":
        from pbkfs.backup.directory import open_directory

        assert address.path
        return open_directory(Path(address.path))
    from pbkfs.backup.empty import EmptyBase

    return EmptyBase(owner or (os.geteuid(), os.getegid()))
