"""What ``pbkfs branch`` and ``pbkfs trunk`` share: opening the service, options, how heads look.

Nothing of ``pbkfs.branch`` is imported before a command runs: ``--help`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from pbkfs.cli.output import echo_json, format_fields, format_table
from pbkfs.cli.remote import api_token, api_url
from pbkfs.units import format_bytes, format_duration

if TYPE_CHECKING:
    from pbkfs.branch.service import Service
    from pbkfs.branch.views import Connection, HeadView, Log

Function = TypeVar("Function", bound=Callable[..., Any])

_COLOURS = {"running": "green", "stopped": "yellow", "error": "red", "deleting": "red"}
_PROGRESS_AFTER_S = 1.0


class AliasGroup(click.Group):
    """A group of commands with other names: ``aliases`` is by the other name."""

    aliases: dict[str, str] = {}  # noqa: RUF012 - replaced as a whole, never changed

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, self.aliases.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, [*self.commands, *self.aliases], n=1)
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no such command {name!r}.{advice}", ctx)
        return super().resolve_command(ctx, args)


# --- the service --------------------------------------------------------------------------------


@contextlib.contextmanager
def service(*, settles: bool = True) -> Iterator[Service]:
    """Open the service in this process; before that, settle what a crash left and what expired.

    Where a daemon is named (``--api-url``), it does the work: what is given has the same methods.
    """
    if api_url():
        from pbkfs.client import RemoteService

        yield cast("Service", RemoteService(api_url(), api_token()))
        return
    from pbkfs.branch.service import open_service
    from pbkfs.branch.settings import read_settings

    with open_service(read_settings()) as opened:
        if settles:
            for line in opened.settle():
                click.echo(f"pbkfs: {line}", err=True)
        yield opened


class Progress:
    """Shows what takes longer than a second: on a terminal in one line, elsewhere line by line."""

    def __init__(self) -> None:
        self._began_at = time.monotonic()
        self._last = ""
        self._is_terminal = sys.stderr.isatty()
        self._is_shown = False

    def __call__(self, text: str) -> None:
        """Show ``text``, unless all of it has taken less than a second so far."""
        if time.monotonic() - self._began_at < _PROGRESS_AFTER_S or text == self._last:
            return
        self._last = text
        if self._is_terminal:
            click.echo(f"\r\x1b[K{text}", err=True, nl=False)
            self._is_shown = True
        else:
            click.echo(f"pbkfs: {text}", err=True)

    def end(self) -> None:
        """Leave the line."""
        if self._is_shown:
            click.echo("\r\x1b[K", err=True, nl=False)
            self._is_shown = False


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Show the progress of what happens inside."""
    shown = Progress()
    try:
        yield shown
    finally:
        shown.end()


# --- options ------------------------------------------------------------------------------------


def output_option(function: Function) -> Function:
    """Add ``-o/--output table|json|yaml`` and ``--no-color``."""
    function = click.option(
        "--no-color", is_flag=True, expose_value=False, callback=_set_colour, help="No colours."
    )(function)
    return click.option(
        "-o",
        "--output",
        "--format",
        "output",
        type=click.Choice(("table", "json", "yaml")),
        default="table",
        envvar=["PBKFS_OUTPUT", "PGBRANCH_OUTPUT"],
        show_default=True,
        help="Output format.",
    )(function)


def _set_colour(ctx: click.Context, _parameter: click.Parameter, is_off: bool) -> None:
    if is_off or os.environ.get("NO_COLOR"):
        ctx.color = False


def yes_option(function: Function) -> Function:
    """Add ``-y/--yes``."""
    return click.option("-y", "--yes", is_flag=True, help="Do it without asking.")(function)


def complete_name(kind: str | None) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a completion of names of trunks, branches or (None) both."""

    def complete(_ctx: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
        if api_url():
            return []
        from pbkfs.branch.settings import read_settings
        from pbkfs.branch.store import Store

        try:
            path = read_settings().metadata_path
            if not path.exists():
                return []
            with contextlib.closing(Store(path)) as store:
                heads = store.heads()
        except Exception:
            return []  # a completion must never disturb the line that is typed
        return [h.name for h in heads if h.name.startswith(begun) and kind in (None, h.kind)]

    return complete


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask before something is lost. Raises UsageError where nobody can be asked."""
    from pbkfs.errors import UsageError

    if is_sure:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} nobody is there to be asked", hint="Say it with --yes.")
    click.confirm(question, abort=True, err=True)


# --- printing -----------------------------------------------------------------------------------


def echo_value(value: object, output: str) -> None:
    """Print a value as JSON or YAML."""
    if output == "json":
        echo_json(value)
    else:
        click.echo(format_yaml(value))


def format_yaml(value: object, indent: int = 0) -> str:
    """Return objects, lists and scalars as YAML; strings are quoted as JSON where they need it."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                lines.append(f"{pad}{key}:\n{format_yaml(item, indent + 1)}")
            else:
                lines.append(f"{pad}{key}: {_scalar(item)}")
        return "\n".join(lines)
    if isinstance(value, list) and value:
        lines = []
        for item in value:
            if isinstance(item, dict | list) and item:
                nested = format_yaml(item, indent + 1)
                lines.append(f"{pad}- {nested[len(pad) + 2 :]}")
            else:
                lines.append(f"{pad}- {_scalar(item)}")
        return "\n".join(lines)
    return pad + _scalar(value)


def _scalar(value: object) -> str:
    import json

    # JSON's scalars, and its empty containers, are YAML's too.
    return json.dumps(value, ensure_ascii=False)


def colour_status(status: str) -> str:
    """Return a state in its colour; click leaves it out where the output is no terminal."""
    colour = _COLOURS.get(status.partition(",")[0])
    return click.style(status, fg=colour) if colour else status


def describe_status(view: HeadView) -> str:
    """Return a state in words."""
    return f"{view.status}, asleep" if view.head.is_asleep else view.status


def describe_idle_stop(view: HeadView) -> str:
    """Return after which time without a client a branch is stopped, in words."""
    limit = view.head.idle_stop_s
    return "never" if limit is None else f"after {format_duration(limit)} without a client"


def echo_table(header: list[str], rows: list[list[str]], status_column: int) -> None:
    """Print a table in which the states have colours."""
    for number, line in enumerate(format_table(header, rows).splitlines()):
        if number:
            word = rows[number - 1][status_column]
            line = line.replace(f" {word}", f" {colour_status(word)}", 1)
        click.echo(line)


def _describe_limits(view: HeadView) -> dict[str, str]:
    head, found = view.head, {}
    if head.cpu_limit is not None:
        found["CPU Limit"] = f"{head.cpu_limit:g}"
    if head.memory_limit_bytes is not None:
        found["Memory Limit"] = format_bytes(head.memory_limit_bytes)
    return found


def echo_tree(views: list[HeadView]) -> None:
    """Print trunks and what was branched from them, each line ``name (status, size)``."""
    by_parent: dict[str | None, list[HeadView]] = {}
    for view in views:
        by_parent.setdefault(view.parent, []).append(view)

    def show(view: HeadView, lead: str, below: str) -> None:
        size = format_bytes(view.size.total_bytes)
        tags = f"  [{', '.join(view.tags)}]" if view.tags else ""
        status = colour_status(describe_status(view))
        click.echo(f"{lead}{view.name} ({status}, {size}){tags}")
        children = by_parent.get(view.name, [])
        for number, child in enumerate(children):
            is_last = number + 1 == len(children)
            show(
                child,
                below + ("└── " if is_last else "├── "),
                below + ("    " if is_last else "│   "),
            )

    for root in by_parent.get(None, []):
        show(root, "", "")


def echo_head(view: HeadView, output: str) -> None:
    """Print all that is known of one head."""
    if output != "table":
        echo_value(view.to_json(), output)
        return
    head = view.head
    fields = {"Name": view.name, "ID": head.id, "Status": colour_status(describe_status(view))}
    if head.error:
        fields["Error"] = head.error
    if head.kind == "trunk":
        fields |= {
            "Port": str(head.port or "none"),
            "Database": head.pg_database,
            "PG Version": head.pg_version or "unknown",
            "WAL Level": head.wal_level,
            "Source": head.source,
            "Started": _format_since(head.started_at),
        }
    else:
        ttl = view.ttl_s()
        fields |= {
            "Parent": view.parent or "none",
            "Created": _format_since(head.created_at),
            "Expires": "never" if ttl is None else f"in {format_duration(ttl)}",
            "Idle Stop": describe_idle_stop(view),
            **_describe_limits(view),
            "PG Version": head.pg_version or "unknown",
            "Tags": ", ".join(view.tags) or "none",
        }
    fields["Size"] = (
        f"{format_bytes(view.size.own_bytes)} own, {format_bytes(view.size.shared_bytes)} shared"
    )
    if view.children:
        fields["Children"] = ", ".join(view.children)
    fields["Connection"] = view.connection.uri if view.connection else "none"
    click.echo(format_fields(fields))


def echo_ready(view: HeadView, output: str) -> None:
    """Print what a command that made or started a head says at its end."""
    from pbkfs.cli.output import warn

    for note in view.notes:
        warn(note)
    if output != "table":
        echo_value(view.to_json(), output)
    elif view.connection is not None and view.status == "running":
        click.echo(f"Connection: {view.connection.uri}")


def connect(found: Connection, *, as_psql: bool, as_uri: bool) -> None:
    """Become psql, or print the URI where that is wished or there is no psql."""
    import shutil

    from pbkfs.errors import PostgresError

    program = None if as_uri else shutil.which("psql")
    if program is None:
        if as_psql:
            raise PostgresError("there is no psql on PATH", hint="Connect with the URI: --uri.")
        click.echo(found.uri)
        return
    sys.stdout.flush()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    if found.password is not None:
        environment["PGPASSWORD"] = found.password
    arguments = ["-h", found.host, "-p", str(found.port), "-U", found.user, "-d", found.database]
    os.execve(program, ["psql", *arguments], environment)


def _format_since(moment: str | None) -> str:
    if moment is None:
        return "never"
    from datetime import UTC, datetime

    ago = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    return f"{moment[:19]}Z ({format_duration(ago)} ago)"


@contextlib.contextmanager
def announced(doing: str, kind: str, name: str, done: str, output: str = "table") -> Iterator[None]:
    """Print ``Starting branch "x"...`` before what happens inside, and ``ready`` after it."""
    if output != "table":
        yield
        return
    click.echo(f'{doing} {kind} "{name}"...', nl=False)
    sys.stdout.flush()
    try:
        yield
    except BaseException:
        click.echo(" failed")
        raise
    click.echo(f" {done}")


def echo_log(found: Log) -> None:
    """Print events, and the lines of a server's log."""
    for event in found.events:
        detail = f": {event.detail}" if event.detail else ""
        click.echo(f"{event.at} {event.what}{detail}")
    if found.lines:
        click.echo(f"--- {found.path}")
        click.echo("\n".join(found.lines))


def echo_overview(output: str) -> None:
    """Print how many trunks and branches there are and what they take."""
    from pbkfs.branch.settings import read_settings

    if not api_url() and not read_settings().metadata_path.exists():
        # Looking must not make anything.
        from pbkfs import __version__
        from pbkfs.branch.views import Overview

        found = Overview(__version__, 0, 0, 0, 0, 0, 0, 0)
    else:
        with service() as opened:
            found = opened.overview()
    if output in ("json", "yaml"):
        echo_value(found.to_json(), output)
        return
    uptime = "no daemon" if found.uptime_s is None else f"uptime {format_duration(found.uptime_s)}"
    click.echo(f"Controller: {found.status} (v{found.version}, {uptime})")
    click.echo(f"Trunks: {found.trunks_running} running / {found.trunks_total} total")
    click.echo(
        f"Branches: {found.branches_running} running, {found.branches_stopped} stopped, "
        f"{found.branches_total} total"
    )
    click.echo(f"Storage: {format_bytes(found.storage_used_bytes)} used")
