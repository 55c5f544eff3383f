"""``pbkfs upgrade``."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import debug_option, diff_option, mountpoint_option


@click.command()
@mountpoint_option
@diff_option
@debug_option
def command(
    *,
    mountpoint: Path | None,
    diff: Path | None,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """Have this program serve a mount in place of the one that does.

    A server on the mount goes on; its file operations wait for a moment. For mounts that were made
    with --supervised.
    """
    from pbkfs.mount.upgrading import upgrade

    done = upgrade(mountpoint, diff)
    click.echo(
        f"{done.mountpoint or done.diff} is served by pbkfs {done.version} (pid {done.pid}), "
        f"{done.old_version} before"
    )
