"""``pbkfs mount``: options to a request, a worker's report to a line."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pbkfs.cli.options import (
    PATH,
    debug_option,
    diff_option,
    instance_option,
    mountpoint_option,
    store_option,
)
from pbkfs.cli.output import warn
from pbkfs.config import DEFAULT_INDEX_BYTES
from pbkfs.errors import UnsupportedError, UsageError
from pbkfs.units import parse_duration, parse_rate, parse_size


def parse_on_full(text: str) -> int:
    """Return seconds for ``wait:SECONDS``, -1 for ``wait``, 0 for ``error``."""
    kind, colon, limit = text.strip().lower().partition(":")
    if kind == "wait" and not colon:
        return -1
    if kind == "error" and not colon:
        return 0
    if kind == "wait":
        seconds = int(parse_duration(limit))
        if 0 < seconds < 1 << 31:
            return seconds
    raise UsageError(f"--on-full {text!r} is not understood", hint="Write wait, wait:60 or error.")


@click.command(
    epilog="Without -B, --base or --empty the base of an existing diff is mounted again. "
    "The command returns when the mount point answers; the worker goes on in the background.",
)
@store_option
@instance_option
@click.option(
    "-i",
    "--backup-id",
    "backup_id",
    envvar="PBKFS_BACKUP_ID",
    metavar="ID",
    help="Backup to mount: its id, or 'latest'.",
)
@click.option(
    "--base",
    "base_dir",
    type=PATH,
    envvar="PBKFS_BASE",
    metavar="DIR",
    help="Mount a plain copy of a PGDATA (pg_basebackup, a snapshot) instead of a store's backup.",
)
@click.option("--empty", "is_empty", is_flag=True, help="Mount an empty directory, for initdb.")
@mountpoint_option
@diff_option
@click.option(
    "--owner",
    envvar="PBKFS_OWNER",
    metavar="USER[:GROUP]",
    help="Owner of the files shown: who will run the server. Default: the mounting user; for root "
    "the backup's owner, or postgres.",
)
@click.option(
    "--allow-other/--no-allow-other",
    "allow_other",
    default=None,
    help="Let other users enter the mount. Default: as the owner needs it.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Mount a chain whose status is not OK, take a diff that another host did not give back, "
    "or accept the diff's own base at another path.",
)
@click.option("--wait", is_flag=True, help="Return once this command itself has had an answer.")
@click.option(
    "--timeout",
    "timeout_s",
    type=parse_duration,
    metavar="SEC",
    help="Stop waiting after this long; the mount goes on in the background.",
)
@click.option("--console", is_flag=True, help="Stay in front and log to stderr.")
@click.option(
    "--index-memory",
    "index_bytes",
    type=parse_size,
    default=str(DEFAULT_INDEX_BYTES),
    envvar="PBKFS_INDEX_MEMORY",
    metavar="SIZE",
    help="Memory for the page indexes of compressed files.  [default: 64MB]",
)
@click.option(
    "--log-file",
    type=PATH,
    envvar="PBKFS_LOG_FILE",
    metavar="FILE",
    help="Log file of the worker.  [default: DIFF/log/worker.log]",
)
@click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    envvar="PBKFS_LOG_FORMAT",
    show_default=True,
    help="Form of the log's lines.",
)
@click.option(
    "--log-sink",
    type=click.Choice(("file", "journald")),
    default="file",
    envvar="PBKFS_LOG_SINK",
    show_default=True,
    help="Where the worker logs to.",
)
@click.option(
    "--pid-file",
    type=PATH,
    envvar="PBKFS_PID_FILE",
    metavar="FILE",
    help="Write the pid of the mount's owner there while it lives: of its worker, or of the keeper "
    "of a supervised one.",
)
@click.option(
    "--hydrate",
    "hydrate_rate",
    type=parse_rate,
    is_flag=False,
    flag_value="0",
    envvar="PBKFS_HYDRATE",
    metavar="[RATE]",
    help="Bring the whole backup into the diff in the background, hottest files first, at most "
    "RATE bytes a second (50MB; default: no limit).",
)
@click.option(
    "--on-full",
    "full_wait_s",
    type=parse_on_full,
    default="wait",
    envvar="PBKFS_ON_FULL",
    show_default=True,
    metavar="wait[:SEC]|error",
    help="When the diff's disk is full: let written pages wait for space, or fail the fsync, upon "
    "which PostgreSQL panics.",
)
@click.option(
    "--verify-pages",
    "verifies_pages",
    is_flag=True,
    envvar="PBKFS_VERIFY_PAGES",
    help="Check each page of the backup when it is first read: its checksum, or its header where "
    "the cluster has no checksums. A bad one is an I/O error.",
)
@click.option(
    "--supervised",
    "is_supervised",
    is_flag=True,
    envvar="PBKFS_SUPERVISED",
    help="Have another worker take over when one dies, or by 'pbkfs upgrade': who uses the mount "
    "only waits. Needs Linux 6.9, and a diff on ext4, XFS, Btrfs, F2FS or tmpfs (not on an "
    "overlayfs, as a container's own files are). Not with --console.",
)
@click.option("--perf-unsafe", is_flag=True, hidden=True)
@click.option("--no-wal", is_flag=True, hidden=True)
@debug_option
def command(
    *,
    store: Path | None,
    instance: str | None,
    backup_id: str | None,
    base_dir: Path | None,
    is_empty: bool,
    mountpoint: Path | None,
    diff: Path | None,
    owner: str | None,
    allow_other: bool | None,
    force: bool,
    wait: bool,
    timeout_s: float | None,
    console: bool,
    index_bytes: int,
    log_file: Path | None,
    log_format: str,
    log_sink: str,
    pid_file: Path | None,
    hydrate_rate: int | None,
    full_wait_s: int,
    verifies_pages: bool,
    is_supervised: bool,
    perf_unsafe: bool,
    no_wal: bool,
    debug: bool,
) -> int:
    """Mount a backup as a writable PGDATA; the backup itself is never changed.

    \b
    pbkfs mount -B /backups -I main -i latest -D /mnt/pg -d /var/lib/pbkfs/diff
    pbkfs mount --base /backups/pgdata -D /mnt/pg -d /var/lib/pbkfs/diff
    """
    for flag, given in (("--perf-unsafe", perf_unsafe), ("--no-wal", no_wal)):
        if given:
            raise UnsupportedError(
                f"{flag} is not supported: pbkfs never trades safety for speed",
                hint="Leave it out; WAL is kept in a plain directory of the diff, at full speed.",
            )
    if mountpoint is None:
        raise UsageError("no mount point is given", hint="Name an empty directory: -D DIR.")
    if diff is None:
        raise UsageError(
            "no diff is given", hint="Name the directory that takes the changes: -d DIR."
        )
    if log_file is not None and log_sink == "journald":
        raise UsageError(
            "--log-file and --log-sink journald exclude each other", hint="Leave one of them out."
        )
    if console and is_supervised:
        raise UsageError(
            "--console and --supervised exclude each other", hint="Leave one of them out."
        )
    from pbkfs.mount import launch
    from pbkfs.mount.opening import open_mount
    from pbkfs.mount.request import LogOptions, MountRequest, parse_owner_option

    foreign = launch.inherited_descriptors()
    request = MountRequest(
        mountpoint=mountpoint,
        diff=diff,
        index_bytes=index_bytes,
        store=store,
        instance=instance,
        backup_id=backup_id,
        base_dir=base_dir,
        is_empty=is_empty,
        owner=parse_owner_option(owner) if owner else None,
        allow_other=allow_other,
        force=force,
        log=LogOptions(
            sink="journald" if log_sink == "journald" else "file",
            path=_absolute(log_file),
            style="json" if log_format == "json" else "text",
            debug=debug,
        ),
        pid_file=_absolute(pid_file),
        hydrate=hydrate_rate,
        full_wait_s=full_wait_s,
        verifies_pages=verifies_pages,
        is_supervised=is_supervised,
    )
    opened = open_mount(request)
    for message, hint in opened.warnings:
        warn(message, hint)
    for note in opened.base.notes:
        click.echo(f"pbkfs: note: {note}", err=True)
    if console:
        return launch.serve_here(opened)
    launched = launch.start_worker(opened, foreign=foreign, wait=wait, timeout_s=timeout_s)
    place = opened.place.path
    if launched.state == "ready":
        click.echo(f"mounted {opened.name} on {place} (pid {launched.pid})")
    elif launched.state == "in progress":
        click.echo(f"mounting {opened.name} on {place} is still in progress (pid {launched.pid})")
    else:
        who = f" (pid {launched.pid})" if launched.pid is not None else ""
        click.echo(f"no longer waiting; the worker goes on{who}", err=True)
    return 0


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else Path(os.path.abspath(path))
