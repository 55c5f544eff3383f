"""``pbkfs wal-get``: one WAL file out of an archive, as restore_command has it."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import PATH, instance_option, store_option
from pbkfs.errors import NotFoundError, UsageError
from pbkfs.postgres.wal_file import run


@click.command("wal-get")
@store_option
@instance_option
@click.option(
    "--archive", type=PATH, metavar="DIR", help="A directory of WAL files instead of a store."
)
@click.argument("name")
@click.argument("destination", type=click.Path())
def command(
    store: Path | None, instance: str | None, archive: Path | None, name: str, destination: str
) -> int:
    """Fetch the WAL segment or history file NAME into DESTINATION.

    Raw, compressed and partial segments are found. For restore_command: exit code 1 says that the
    archive has no such file, 255 that it is damaged or cannot be read.
    """
    if archive is None:
        if store is None or instance is None:
            raise UsageError(
                "no archive named", hint="Give -B STORE --instance NAME, or --archive DIR."
            )
        archive = store / "wal" / instance
    if not archive.is_dir():
        raise NotFoundError(f"the WAL archive {archive} does not exist")
    return run(str(archive), name, destination)
