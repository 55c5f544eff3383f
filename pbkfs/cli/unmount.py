"""``pbkfs unmount``."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import debug_option, diff_option, mountpoint_option
from pbkfs.config import STOP_LIMIT_S
from pbkfs.units import parse_duration


@click.command()
@mountpoint_option
@diff_option
@click.option(
    "--force",
    is_flag=True,
    help="Take the mount from whoever uses it: detach it, and kill a worker that does not end.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=parse_duration,
    metavar="SEC",
    help="Stop waiting after this long; with --force: kill the worker then "
    f"(default {STOP_LIMIT_S:g}).",
)
@debug_option
def command(
    *,
    mountpoint: Path | None,
    diff: Path | None,
    force: bool,
    timeout_s: float | None,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """Unmount; the diff keeps all changes.

    Works on the mount of a dead worker too. A mount in use is refused, with the processes that use
    it.
    """
    from pbkfs.mount.ending import unmount

    kill_after_s = STOP_LIMIT_S if timeout_s is None else timeout_s
    target = unmount(mountpoint, diff, force=force, timeout_s=timeout_s, kill_after_s=kill_after_s)
    where = target.mountpoint or (target.owner.mountpoint if target.owner else target.diff)
    click.echo(f"unmounted {where}")
