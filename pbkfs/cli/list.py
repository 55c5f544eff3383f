"""``pbkfs list``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pbkfs.cli.options import debug_option
from pbkfs.cli.output import echo_json, format_option, format_table
from pbkfs.errors import PbkfsError

if TYPE_CHECKING:
    from pbkfs.mount.target import Target

_PING_LIMIT_S = 0.5


@click.command()
@format_option
@debug_option
def command(*, output: str, debug: bool) -> None:  # noqa: ARG001 - read by main
    """List the mounts of this host: where, of what, and whether their worker lives."""
    from pbkfs.errors import DiffError
    from pbkfs.mount import mounts, target
    from pbkfs.mount.binding import Binding, read_binding

    rows: list[dict[str, object]] = []
    for entry in mounts.our_mounts():
        found = target.target_of(Path(entry.source), entry)
        binding: Binding | None = None
        try:
            binding = read_binding(Path(entry.source))
        except (OSError, DiffError):
            binding = None
        rows.append(
            {
                "mountpoint": str(entry.mountpoint),
                "diff": entry.source,
                "state": _describe_state(found),
                "pid": found.owner.pid if found.owner is not None else None,
                "base": dataclasses.asdict(binding.base) if binding is not None else None,
                "description": str(binding.base) if binding is not None else None,
            }
        )
    if output == "json":
        echo_json(rows)
        return
    if not rows:
        click.echo("nothing is mounted")
        return
    header = ("mount point", "state", "pid", "diff", "base")
    keys = ("mountpoint", "state", "pid", "diff", "description")
    click.echo(
        format_table(
            header, [[str("-" if row[k] is None else row[k]) for k in keys] for row in rows]
        )
    )


def _describe_state(found: Target) -> str:
    """Return the state of a mount, ``full`` for one whose writes wait for space."""
    from pbkfs.mount import control, target

    state = target.state_of(found)
    if state != "alive":
        return state
    try:
        answer = control.call(found.diff, "ping", timeout_s=_PING_LIMIT_S)
    except PbkfsError:
        return state  # another user's, or too busy to say
    return "full" if answer.get("waiting_for_space") else state
