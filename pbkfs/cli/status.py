"""``pbkfs status``: the server of a PGDATA, or without ``-D`` all trunks and branches."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from pbkfs.cli.options import PATH
from pbkfs.cli.output import echo_json, format_fields
from pbkfs.cli.pgdata_option import cluster_at, user_option
from pbkfs.cli.remote import remote_options
from pbkfs.errors import NotRunningError
from pbkfs.postgres.running import Status, read_status


@click.command("status")
@click.option(
    "-D",
    "--pgdata",
    "--mnt-path",
    "pgdata",
    envvar="PBKFS_PGDATA",
    metavar="DIR",
    type=PATH,
    help="The mount point, or any other PGDATA; without it, trunks and branches.",
)
@user_option
@remote_options
@click.option(
    "-o",
    "--output",
    "--format",
    "output",
    type=click.Choice(("text", "table", "json", "yaml")),
    default="text",
    show_default=True,
    help="Output format; table is another name of text.",
)
def command(pgdata: Path | None, user: str, output: str) -> int:
    """Show whether PostgreSQL runs on a mount or another PGDATA; exit code 3 if not.

    Without -D, count the trunks and branches of this host and what they take on its disk.
    """
    if pgdata is None:
        from pbkfs.cli.heads import echo_overview

        echo_overview(output)
        return 0
    cluster = cluster_at(pgdata)
    status = read_status(cluster, user)
    fields: dict[str, object] = {"data_directory": str(cluster.data_dir)}
    fields |= _to_json(status) if status else {"running": False}
    if output == "json":
        echo_json(fields)
    elif output == "yaml":
        from pbkfs.cli.heads import echo_value

        echo_value(fields, output)
    elif status is None:
        click.echo("not running")
    else:
        click.echo(format_fields(_to_text(status)))
    return 0 if status else NotRunningError.exit_code


def _to_json(status: Status) -> dict[str, object]:
    place = status.place
    return {
        "running": True,
        "state": status.state,
        "pid": status.postmaster.pid,
        "started_at": _format_time(status.started_at),
        "port": place.port if place else None,
        "listen_address": place.listen_addresses if place else None,
        "socket_directory": str(place.socket_dir) if place else None,
        "uri": status.uri,
        "in_recovery": status.is_in_recovery,
        "paused": status.is_paused,
        "lsn": status.lsn,
        "version": status.version,
        "log": str(status.log) if status.log else None,
    }


def _to_text(status: Status) -> dict[str, str]:
    def say(value: bool | None) -> str:
        return "unknown" if value is None else "yes" if value else "no"

    return {
        "running": f"yes ({status.state})",
        "pid": str(status.postmaster.pid),
        "started": _format_time(status.started_at),
        "version": status.version,
        "port": str(status.place.port) if status.place else "unknown",
        "uri": status.uri or "unknown",
        "in recovery": say(status.is_in_recovery) + (", paused" if status.is_paused else ""),
        "lsn": status.lsn or "unknown",
        "log": str(status.log) if status.log else "unknown",
    }


def _format_time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
