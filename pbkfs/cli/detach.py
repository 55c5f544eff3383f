"""``pbkfs detach``: hydrate the rest, unmount, and turn the diff into a plain PGDATA."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import click

from pbkfs.cli.options import PATH, debug_option, diff_option, mountpoint_option
from pbkfs.cli.output import warn
from pbkfs.cli.progress import Bar, watch
from pbkfs.errors import BusyError, HostError


@click.command(
    epilog="Without --to, the PGDATA takes the mount point's place. A detach that was interrupted "
    "is finished by running it again: pbkfs detach -d DIFF."
)
@mountpoint_option
@diff_option
@click.option(
    "--to",
    "target",
    type=PATH,
    metavar="DIR",
    help="Where the PGDATA is to be, on the diff's file system; must not exist.",
)
@click.option("--no-hydrate", is_flag=True, help="Refuse if not everything is in the diff yet.")
@click.option("--keep-diff", is_flag=True, help="Leave what was the diff; it can't be mounted.")
@debug_option
def command(
    *,
    mountpoint: Path | None,
    diff: Path | None,
    target: Path | None,
    no_hydrate: bool,
    keep_diff: bool,
    debug: bool,  # noqa: ARG001 - read by main
) -> None:
    """End a mount as a plain PGDATA, without a copy; it needs neither pbkfs nor the backup.

    The server has to be stopped. What is not in the diff yet is hydrated first; 'pbkfs hydrate'
    does that while the server is still in use.
    """
    from pbkfs.mount.detaching import Plan, finish_detach, plan_detach
    from pbkfs.mount.ending import unmount
    from pbkfs.mount.hydrating import HydrationStatus

    plan: Plan = plan_detach(mountpoint, diff, target)
    if plan.mounted is not None:
        place = plan.mounted.mountpoint
        if place is not None:
            _check_stopped(place)
        if plan.mounted.has_worker():
            _hydrate(plan.diff, may_hydrate=not no_hydrate)
        unmount(None, plan.diff)
    bar = Bar()

    def show(status: HydrationStatus) -> None:
        bar.show(dataclasses.asdict(status))

    left = finish_detach(plan, may_hydrate=not no_hydrate, is_kept=keep_diff, show=show)
    click.echo(f"detached: {plan.target} is a plain PGDATA now, its own settings apply again")
    if left:
        warn(f"left what is not of pbkfs in {plan.diff}: {', '.join(left)}")


def _check_stopped(pgdata: Path) -> None:
    from pbkfs.postgres.postmaster import find_postmaster

    running = find_postmaster(pgdata)
    if running is not None:
        raise BusyError(
            f"a server runs on {pgdata} (pid {running.pid})",
            hint=f"Stop it first: pbkfs stop -D {pgdata}",
        )


def _hydrate(diff: Path, *, may_hydrate: bool) -> None:
    from pbkfs.mount import control
    from pbkfs.mount.detaching import missing_error
    from pbkfs.mount.hydrating import HydrationStatus

    def ask(op: str = "hydration", **arguments: object) -> dict[str, Any]:
        found: dict[str, Any] = control.call(diff, op, timeout_s=None, **arguments)["hydration"]
        return found

    if not may_hydrate:
        found = ask("hydration", look=True)
        if found["files_done"] < found["files_total"]:
            raise missing_error(diff, HydrationStatus(**found))
        return
    ask("hydrate")
    found = watch(ask)
    if found["state"] != "done":
        message = found["error"] or f"the hydration of diff {diff} was stopped"
        raise HostError(message, hint=found["hint"] or f"Its log: {diff}{os.sep}log")
