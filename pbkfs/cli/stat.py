"""``pbkfs stat``: one answer of the worker, or one every few seconds."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from pbkfs.cli.options import debug_option, diff_option, mountpoint_option
from pbkfs.cli.output import echo_json, format_fields, format_option, is_terminal
from pbkfs.cli.progress import describe_hydration
from pbkfs.units import format_bytes, format_duration, parse_duration


@click.command()
@mountpoint_option
@diff_option
@format_option
@click.option("--counters-reset", is_flag=True, help="Set the counters to zero after showing them.")
@click.option(
    "--watch",
    "watch_s",
    type=parse_duration,
    is_flag=False,
    flag_value="2",
    metavar="[SEC]",
    help="Show again every SEC seconds (default 2) until interrupted.",
)
@debug_option
def command(
    *,
    mountpoint: Path | None,
    diff: Path | None,
    output: str,
    counters_reset: bool,
    watch_s: float | None,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """Show what a mount holds, costs and does. The numbers come from its worker, now."""
    from pbkfs.mount.target import find_target

    path = find_target(mountpoint, diff).diff
    with suppress(KeyboardInterrupt) if watch_s is not None else nullcontext():
        _show(path, output, is_reset=counters_reset, every_s=watch_s)


def _show(path: Path, output: str, *, is_reset: bool, every_s: float | None) -> None:
    from pbkfs.mount import control

    while True:
        found = control.call(path, "stat", reset=is_reset)["stat"]
        if output == "json" and every_s is not None:
            click.echo(json.dumps(found))  # one line a sample
        elif output == "json":
            echo_json(found)
        else:
            if every_s is not None and is_terminal():
                click.clear()
            click.echo(format_statistics(found))
        if every_s is None:
            return
        time.sleep(every_s)


def format_statistics(found: dict[str, Any]) -> str:
    """Return the answer as text for people."""
    changed, disk, space = found["changed"], found["disk"], found["space"]
    fields = {
        "mount point": found["mountpoint"],
        "base": found["base"],
        "diff": found["diff"],
        "worker": f"pid {found['pid']}, {found['state']}, up {format_duration(found['uptime_s'])}, "
        f"pbkfs {found['version']}",
        "changed": f"{changed['files']} files, {format_bytes(changed['bytes'])}",
        "disk": f"{format_bytes(disk['total_bytes'])}: "
        f"objects {format_bytes(disk['objects_bytes'])}, "
        f"journal {format_bytes(disk['journal_bytes'])}, WAL {format_bytes(disk['wal_bytes'])}",
        "space": f"{format_bytes(space['free_bytes'])} free, "
        f"{format_bytes(space['reserve_bytes'])} in reserve for at most "
        f"{format_bytes(space['dirty_bytes'])} of dirty pages"
        + ("" if space["is_bounded"] else " (the kernel's default)"),
        "hydration": describe_hydration(found["hydration"]),
    }
    if found["verifies"]:
        n_pages, n_errors = (found["overlay"][name] for name in ("pages_verified", "verify_errors"))
        fields["verified"] = f"{n_pages} pages of the base by {found['verifies']}, {n_errors} bad"
    if n_waiting := found["fuse"].get("waiting_for_space"):
        fields["disk is full"] = f"{n_waiting} writes wait until there is space for the diff"
    text = format_fields(fields)
    for part in ("overlay", "fuse"):
        if found[part]:
            width = max(len(name) for name in found[part])
            lines = "\n".join(f"  {name:<{width}}  {n}" for name, n in found[part].items())
            text += f"\n{part}:\n{lines}"
    return text
