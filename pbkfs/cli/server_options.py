"""What start and drill let one choose about a server: programs, settings, a recovery target."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pbkfs.cli.options import PATH
from pbkfs.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])

# As postgres.recovery.ACTIONS, which a mere --help need not import.
_ACTIONS = {
    "promote": "promote to a writable server on a new timeline",
    "pause": "pause as a read-only one",
    "shutdown": "shut down",
}


def settings_options(function: Function) -> Function:
    """Add ``--pg-bindir``, ``--shared-buffers`` and ``-c`` (``settings``: pairs of strings)."""
    for option in (
        click.option(
            "-c",
            "settings",
            multiple=True,
            callback=_parse_settings,
            metavar="NAME=VALUE",
            help="A setting of the server, for this start only; beats all others.",
        ),
        click.option("--shared-buffers", metavar="SIZE", help="Size of shared_buffers."),
        click.option(
            "--pg-bindir",
            type=PATH,
            help="Where the server's programs are.  [default: found by PGDATA's version]",
        ),
    ):
        function = option(function)
    return function


def _parse_settings(
    _context: click.Context, _parameter: click.Parameter, texts: Sequence[str]
) -> list[tuple[str, str]]:
    return [_parse_setting(text) for text in texts]


def _parse_setting(text: str) -> tuple[str, str]:
    # Source: src/backend/utils/misc/guc.c, ParseLongOption: a dash in the name is an underscore.
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w$.]*", name):
        raise UsageError(f"setting {text!r} is not understood", hint="Write it like work_mem=64MB.")
    return name, value


def recovery_options(*actions: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds the options; the command gets ``target`` and ``wal_archive``.

    ``target`` is a RecoveryTarget or None. ``actions`` are those that make sense; default: all.
    """
    options = (
        click.option("--recovery-target-time", metavar="TIME", help="Recover up to this time."),
        click.option(
            "--recovery-target-lsn", metavar="LSN", help="Recover up to this WAL position."
        ),
        click.option(
            "--recovery-target-xid", metavar="XID", help="Recover up to this transaction."
        ),
        click.option(
            "--recovery-target-name", metavar="NAME", help="Recover up to this restore point."
        ),
        click.option(
            "--recovery-target",
            type=click.Choice(("immediate", "latest")),
            help="immediate: as soon as the backup is consistent; latest: all archived WAL.",
        ),
        click.option(
            "--recovery-target-action",
            type=click.Choice(actions or tuple(_ACTIONS)),
            help="At the target: "
            + ", or ".join(_ACTIONS[action] for action in actions or _ACTIONS)
            + ".  [default: promote]",
        ),
        click.option(
            "--recovery-target-timeline",
            metavar="TLI",
            help="current, latest or a number.  [default: current]",
        ),
        click.option(
            "--recovery-target-inclusive",
            type=click.BOOL,
            help="Whether to stop just after the target or just before it.  [default: true]",
        ),
        click.option(
            "--wal-archive",
            type=PATH,
            help="Directory of archived WAL.  [default: the archive of the mount's store]",
        ),
    )

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            from pbkfs.postgres.recovery import parse_target

            kinds = ("time", "lsn", "xid", "name")
            target = parse_target(
                {kind: values.pop(f"recovery_target_{kind}") for kind in kinds},
                point=values.pop("recovery_target"),
                action=values.pop("recovery_target_action"),
                timeline=values.pop("recovery_target_timeline"),
                is_inclusive=values.pop("recovery_target_inclusive"),
            )
            archive = values.pop("wal_archive")
            if archive is not None and target is None:
                raise UsageError(
                    "--wal-archive without a recovery target", hint="Add --recovery-target latest."
                )
            archive = archive.absolute() if archive is not None else None
            return function(target=target, wal_archive=archive, **values)

        for option in reversed(options):
            command = option(command)
        return command

    return add
