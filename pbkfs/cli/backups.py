"""``pbkfs backups``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click

from pbkfs.cli.options import debug_option, instance_option, store_option
from pbkfs.cli.output import echo_json, format_option, format_table
from pbkfs.errors import UsageError


@click.command()
@store_option
@instance_option
@format_option
@debug_option
def command(
    *,
    store: Path | None,
    instance: str | None,
    output: str,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """List a store's backups and whether they can be mounted.

    Reads control files only; a damaged file list shows when the backup is mounted.
    """
    if store is None:
        raise UsageError("no store is given", hint="Name it: -B DIR.")
    from pbkfs.backup.probackup.catalog import list_instances
    from pbkfs.backup.probackup.chain import list_backups

    names = [instance] if instance else list_instances(store)
    found = [backup for name in names for backup in list_backups(store, name)]
    if output == "json":
        echo_json([dataclasses.asdict(backup) for backup in found])
        return
    if not found:
        click.echo(f"no backups in {store}")
        return
    rows = [
        [
            backup.instance,
            backup.backup_id,
            backup.status,
            backup.mode or "-",
            {True: "STREAM", False: "ARCHIVE", None: "-"}[backup.stream],
            backup.pg_version or "-",
            _time(backup.recovery_time or backup.start_time),
            "yes" if backup.is_mountable else f"no: {backup.reason}",
        ]
        for backup in found
    ]
    header = ("instance", "id", "status", "mode", "wal", "pg", "time (utc)", "mountable")
    click.echo(format_table(header, rows))


def _time(seconds: int | None) -> str:
    if seconds is None:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
