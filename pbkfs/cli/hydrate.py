"""``pbkfs hydrate``: start, watch or stop the hydration of a mount."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import debug_option, diff_option, mountpoint_option
from pbkfs.cli.progress import describe_hydration, watch
from pbkfs.errors import HostError, UsageError
from pbkfs.units import parse_rate


@click.command(
    epilog="It goes on where it was after an unmount or a crash, once it is started again; "
    "'pbkfs mount --hydrate' starts it with the mount. 'pbkfs stat' shows how far it is.",
)
@mountpoint_option
@diff_option
@click.option(
    "--rate",
    type=parse_rate,
    metavar="RATE",
    help="At most RATE bytes a second (50MB; 0: no limit). A running hydration is changed.",
)
@click.option("--watch", "is_watched", is_flag=True, help="Show a progress bar until it ends.")
@click.option("--stop", "is_stopped", is_flag=True, help="Stop it; what was brought up stays.")
@debug_option
def command(
    *,
    mountpoint: Path | None,
    diff: Path | None,
    rate: int | None,
    is_watched: bool,
    is_stopped: bool,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """Bring the whole backup into the diff, while the mount is in use.

    Files in use come first. When all is in the diff, nothing is read from the store any more, and
    'pbkfs detach' can make a plain PGDATA of it without a copy.
    """
    if is_stopped and (is_watched or rate is not None):
        raise UsageError("--stop excludes --watch and --rate", hint="Leave one of them out.")
    from pbkfs.mount import control
    from pbkfs.mount.target import find_target

    path = find_target(mountpoint, diff).diff
    found = control.call(path, "hydrate", rate=rate, stop=is_stopped)["hydration"]
    if is_watched:
        try:
            found = watch(lambda: control.call(path, "hydration")["hydration"])
        except KeyboardInterrupt:
            click.echo("no longer watching; hydration goes on", err=True)
            return
        if found["error"]:
            raise HostError(found["error"], hint=found["hint"])
    if is_stopped:
        click.echo("hydration stops; what was brought up stays")
    else:
        click.echo(f"hydration: {describe_hydration(found)}")
