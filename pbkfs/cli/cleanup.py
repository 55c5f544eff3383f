"""``pbkfs cleanup``."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import debug_option, diff_option
from pbkfs.cli.output import warn
from pbkfs.errors import UsageError


@click.command()
@diff_option
@click.option(
    "--force",
    is_flag=True,
    help="Also delete a diff that another host did not give back, one that is damaged, or one "
    "that holds a sealed layer, which other diffs may lie upon.",
)
@debug_option
def command(*, diff: Path | None, force: bool, debug: bool) -> None:  # noqa: ARG001 - read by main
    """Delete a diff, and with it all changes made on its mount.

    Refuses a diff in use, and a directory that is no diff. The backup is not touched.
    """
    if diff is None:
        raise UsageError("no diff is given", hint="Name it: -d DIR.")
    from pbkfs.mount.ending import cleanup

    left = cleanup(diff, force=force)
    click.echo(f"deleted the diff in {diff}")
    if left:
        warn(f"left what is not of pbkfs in {diff}: {', '.join(left)}")
