"""``pbkfs stop``: stop the server of a PGDATA and wait until it is gone."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.pgdata_option import cluster_at, pgdata_option
from pbkfs.errors import NotRunningError, PbkfsError
from pbkfs.mount.mounts import resolve
from pbkfs.postgres.running import STOP_SIGNALS, stop


@click.command("stop")
@pgdata_option
@click.option(
    "-m",
    "--mode",
    type=click.Choice(tuple(STOP_SIGNALS)),
    default="fast",
    show_default=True,
    help="smart waits for clients; fast ends them and writes a checkpoint; immediate just ends, "
    "and the next start recovers.",
)
@click.option(
    "--timeout",
    type=float,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until it is gone.",
)
def command(pgdata: Path, mode: str, timeout: float) -> None:
    """Stop the PostgreSQL server of a mount or another PGDATA."""
    owner, problem = None, None
    try:
        owner = cluster_at(pgdata).owner
    except PbkfsError as error:
        # Where the mount's worker is gone, nothing can be read, but its server may still be there.
        problem = error
    try:
        stopped = stop(resolve(pgdata), owner, mode, timeout)
    except NotRunningError as error:
        raise problem or error from None
    click.echo(f"stopped (pid {stopped.pid})", err=True)
