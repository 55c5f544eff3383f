"""``pbkfs wal-get``: one WAL file out of an archive; PostgreSQL's restore_command.

PostgreSQL runs it once a segment, so it imports next to nothing: the restore_command runs this
module itself, and click is loaded only for the command line.

Exit codes are the contract of restore_command: 0 is done, 1 is not there, and above 125 recovery
stops. A damaged segment or an archive that cannot be read is the latter: taken for the end of the
archive, it would end recovery early and silently.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from pbkfs.postgres.wal_file import ArchiveError, check_archive, fetch

if TYPE_CHECKING:
    import click

    command: click.Command

NOT_THERE = 1
STOP_RECOVERY = 255


def get(archive: str, name: str, destination: str) -> int:
    """Fetch ``name`` and return the exit code."""
    try:
        return 0 if fetch(archive, name, destination) else NOT_THERE
    except ArchiveError as error:
        print(f"pbkfs: error: {error}", file=sys.stderr)
        return STOP_RECOVERY


def check(archive: str) -> int:
    """Say whether the archive can be read, and return the exit code."""
    try:
        check_archive(archive)
    except ArchiveError as error:
        print(f"pbkfs: error: {error}", file=sys.stderr)
        return STOP_RECOVERY
    return 0


def _main(arguments: list[str]) -> int:
    """Serve restore_command: ``--archive DIR NAME DEST`` or ``--archive DIR --check``."""
    if len(arguments) == 3 and arguments[0] == "--archive" and arguments[2] == "--check":
        return check(arguments[1])
    if len(arguments) == 4 and arguments[0] == "--archive":
        return get(*arguments[1:])
    print("pbkfs: error: usage: --archive DIR NAME DEST", file=sys.stderr)
    return STOP_RECOVERY


def _make_command() -> click.Command:
    import click

    from pbkfs.errors import NotFoundError, UsageError

    @click.command("wal-get")
    @click.option("-B", "--pbk-store", "--backup-path", "store", metavar="DIR", help="The store.")
    @click.option("-I", "--instance", metavar="NAME", help="The instance in the store.")
    @click.option("--archive", metavar="DIR", help="A directory of WAL instead of a store.")
    @click.argument("name")
    @click.argument("destination", type=click.Path())
    def wal_get(
        store: str | None, instance: str | None, archive: str | None, name: str, destination: str
    ) -> int:
        """Fetch the WAL segment or history file NAME into DESTINATION.

        Raw, compressed and partial segments are found. For restore_command: exit code 1 says that
        the archive has no such file, 255 that it is damaged or cannot be read.
        """
        if archive is None:
            if store is None or instance is None:
                raise UsageError(
                    "no archive named", hint="Give -B STORE --instance NAME, or --archive DIR."
                )
            archive = os.path.join(store, "wal", instance)
        elif store is not None or instance is not None:
            raise UsageError("both a store and --archive are given", hint="Give one of them.")
        if not os.path.isdir(archive):
            raise NotFoundError(f"archive {archive} does not exist")
        return get(archive, name, destination)

    return wal_get


def __getattr__(name: str) -> object:
    # The command is made when the command line asks for it, and never for the server.
    if name == "command":
        return _make_command()
    raise AttributeError(name)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
