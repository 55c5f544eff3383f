"""``pbkfs start``: PostgreSQL on a mount or any other copy of a PGDATA, with safe settings."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from pbkfs.cli.options import FILE, PATH
from pbkfs.cli.output import echo_json, format_option
from pbkfs.cli.pgdata_option import archive_of, cluster_at, pgdata_option, user_option
from pbkfs.cli.server_options import recovery_options, settings_options
from pbkfs.errors import UsageError
from pbkfs.postgres.launch import Reporter, Started, StartOptions
from pbkfs.postgres.network import split_addresses
from pbkfs.postgres.recovery import RecoveryTarget
from pbkfs.postgres.running import exec_psql
from pbkfs.postgres.server import start

_PROGRESS_S = 5.0


@click.command("start")
@pgdata_option
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port.  [default: first free from 5432]"
)
@click.option(
    "--listen",
    "listen",
    multiple=True,
    metavar="ADDRESSES",
    help="Addresses to listen on; '' for the local socket only.  [default: 127.0.0.1]",
)
@click.option(
    "--socket-dir",
    type=PATH,
    help="Directory of the Unix socket.  [default: a short one of the server's user, 0700]",
)
@settings_options
@click.option("--pg-options", metavar="ARGS", help="More arguments of postgres, as pg_ctl -o.")
@click.option(
    "--trust-local",
    is_flag=True,
    help="Ask nobody for a password on the local socket, which only the server's user and root "
    "can reach. Else PGDATA's own pg_hba.conf counts.",
)
@click.option(
    "--log",
    "--log-file",
    "log",
    type=FILE,
    help="The server's log.  [default: in the diff, or beside PGDATA]",
)
@recovery_options()
@click.option(
    "--timeout",
    type=float,
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait until it is ready.",
)
@click.option("--connect", is_flag=True, help="Run psql when the server is ready.")
@user_option
@format_option
def command(
    pgdata: Path,
    port: int | None,
    listen: tuple[str, ...],
    socket_dir: Path | None,
    pg_bindir: Path | None,
    shared_buffers: str | None,
    settings: list[tuple[str, str]],
    pg_options: str | None,
    trust_local: bool,
    log: Path | None,
    target: RecoveryTarget | None,
    wal_archive: Path | None,
    timeout: float,
    connect: bool,
    user: str,
    output: str,
) -> None:
    """Start PostgreSQL on a mount or any other copy of a PGDATA.

    The server never archives, never connects to the original or its neighbours, and listens on its
    own port. It runs as the owner of PGDATA. All of that is said on its command line. In PGDATA's
    own configuration only files that are missing are added, and lines that this host can't use
    become comments, which is said. Prints how to connect.

    A backup starts as of its end. With a recovery target it is recovered further, from the
    archive of its store.
    """
    cluster = cluster_at(pgdata)
    archive = wal_archive
    if archive is None and target is not None:
        archive = archive_of(cluster)
    options = StartOptions(
        bindir=pg_bindir,
        port=port,
        listen_addresses=split_addresses(listen) if listen else "127.0.0.1",
        socket_dir=socket_dir.absolute() if socket_dir is not None else None,
        shared_buffers=shared_buffers,
        settings=settings,
        arguments=_split(pg_options),
        trusts_socket=trust_local,
        target=target,
        archive=archive,
        log=log.absolute() if log is not None else None,
        user=user,
        timeout_s=timeout,
    )
    progress = _Progress()
    started = start(cluster, options, Reporter(_notice, progress.show))
    if output == "json":
        echo_json(_to_json(started))
    elif started.place is None:
        click.echo(f"recovered and shut down; log: {started.log}")
    else:
        if started.is_paused:
            _notice("recovery is paused at the target; the server is read-only")
        click.echo(started.uri)
    if connect and started.place is not None:
        exec_psql(started, cluster, user)


def _notice(text: str) -> None:
    click.echo(f"pbkfs: {text}", err=True)


class _Progress:
    """Shows a start that takes long: one line now and then, and only if it says something new."""

    def __init__(self) -> None:
        self._shown_at = time.monotonic()
        self._shown = ""

    def show(self, text: str) -> None:
        """Show ``text`` unless it was shown, or something else a moment ago."""
        now = time.monotonic()
        if text != self._shown and now - self._shown_at >= _PROGRESS_S:
            self._shown_at, self._shown = now, text
            _notice(text)


def _split(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError as error:
        raise UsageError(f"arguments {text!r} are not understood: {error}") from error


def _to_json(started: Started) -> dict[str, object]:
    place = started.place
    return {
        "running": place is not None,
        "pid": started.postmaster.pid if started.postmaster else None,
        "port": place.port if place else None,
        "socket_directory": str(place.socket_dir) if place else None,
        "uri": started.uri,
        "in_recovery": started.is_paused,
        "version": started.binaries.version,
        "log": str(started.log),
    }
