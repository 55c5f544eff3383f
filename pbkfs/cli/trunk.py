"""``pbkfs trunk``: what branches are made of: an empty cluster, a backup, a copy, a server."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli import heads
from pbkfs.cli.heads import AliasGroup, complete_name, output_option, yes_option
from pbkfs.cli.options import PATH
from pbkfs.cli.remote import remote_options
from pbkfs.errors import UsageError


class _Group(AliasGroup):
    aliases = {"ls": "list", "rm": "destroy", "delete": "destroy", "show": "info"}  # noqa: RUF012


name_argument = click.argument("name", shell_complete=complete_name("trunk"))


@click.group("trunk", cls=_Group)
@remote_options
def command() -> None:
    """Trunks: what branches are made of, without a copy.

    \b
    pbkfs trunk create prod --from-backup /backups --instance main -i latest
    pbkfs trunk create copy --from-dir /backups/2026-03-01
    pbkfs trunk create new --empty
    """


@command.command("create")
@click.argument("name")
@click.option(
    "--from-backup",
    "store",
    type=PATH,
    metavar="STORE",
    help="A backup in a store of pg_probackup; it is mounted, not restored.",
)
@click.option("-I", "--instance", metavar="NAME", help="Instance of the store.")
@click.option("-i", "--backup-id", metavar="ID", help="Backup: its id, or latest.")
@click.option(
    "--from-dir",
    "directory",
    type=PATH,
    metavar="DIR",
    help="A copy of a data directory: pg_basebackup, a snapshot. It is never changed.",
)
@click.option("--from-url", "url", metavar="URL", help="A running server: pg_basebackup of it.")
@click.option("--empty", is_flag=True, help="A new cluster (initdb).")
@click.option("--pg-version", type=click.IntRange(14), metavar="MAJOR", help="Of a new cluster.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Port.  [default: the first free from 5432]"
)
@click.option(
    "--wal-level", type=click.Choice(("minimal", "replica", "logical")), help="wal_level."
)
@click.option("--owner", metavar="USER[:GROUP]", help="Who runs the server, if root asks.")
@click.option("--trust", is_flag=True, help="Ask nobody for a password.")
@click.option(
    "--start/--no-start",
    default=None,
    help="Start its server. Not started, every branch begins as of the end of the backup.",
)
@output_option
def create(
    name: str,
    store: Path | None,
    instance: str | None,
    backup_id: str | None,
    directory: Path | None,
    url: str | None,
    empty: bool,
    pg_version: int | None,
    port: int | None,
    wal_level: str | None,
    owner: str | None,
    trust: bool,
    start: bool | None,
    output: str,
) -> None:
    """Make a trunk. Without a source it is an empty cluster."""
    from pbkfs.branch.trunks import TrunkSource
    from pbkfs.mount.request import parse_owner_option

    _check_sources(store, instance, backup_id, directory, url, empty, pg_version)
    source = TrunkSource(
        store=store.absolute() if store else None,
        instance=instance,
        backup_id=(backup_id or "latest") if store else None,
        directory=directory.absolute() if directory else None,
        url=url,
        pg_major=pg_version,
    )
    with heads.service() as service, heads.progress() as say:
        view = service.trunks.create(
            name,
            source,
            port=port,
            wal_level=wal_level,
            auth="trust" if trust else "password",
            owner=parse_owner_option(owner) if owner else None,
            start=start,
            say=say,
        )
    if output == "table":
        click.echo(f"Created trunk {name!r} from {view.head.source}")
    heads.echo_ready(view, output)


def _check_sources(
    store: Path | None,
    instance: str | None,
    backup_id: str | None,
    directory: Path | None,
    url: str | None,
    empty: bool,
    pg_version: int | None,
) -> None:
    given = [
        option
        for option, value in (
            ("--from-backup", store),
            ("--from-dir", directory),
            ("--from-url", url),
            ("--empty", empty),
        )
        if value
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} exclude each other", hint="Name one source.")
    if (instance or backup_id) and store is None:
        raise UsageError(
            "--instance and --backup-id need a store", hint="Name it with --from-backup STORE."
        )
    if pg_version is not None and given not in ([], ["--empty"]):
        raise UsageError(
            f"--pg-version and {given[0]} exclude each other",
            hint="The version is that of the source.",
        )


@command.command("list")
@output_option
def list_(output: str) -> None:
    """List trunks."""
    with heads.service() as service:
        views = service.trunks.list_all()
    if output != "table":
        found = [view.to_json() for view in views]
        heads.echo_value({"trunks": found, "total": len(found)}, output)
        return
    rows = [
        [v.name, v.status, str(v.head.port or ""), v.head.pg_database, v.head.wal_level]
        for v in views
    ]
    heads.echo_table(["name", "status", "port", "database", "wal level"], rows, 1)


@command.command("info")
@click.argument("name", default="main", shell_complete=complete_name("trunk"))
@output_option
def info(name: str, output: str) -> None:
    """Show all that is known of a trunk."""
    with heads.service() as service:
        heads.echo_head(service.trunks.info(name), output)


@command.command("connect")
@name_argument
@click.option("--psql", "as_psql", is_flag=True, help="Run psql, or fail.")
@click.option("--uri", "as_uri", is_flag=True, help="Print the connection URI, with the password.")
def connect(name: str, as_psql: bool, as_uri: bool) -> None:
    """Run psql on a trunk, or print its URI where there is no psql."""
    with heads.service() as service:
        found = service.branches.connection(name, "trunk")
    heads.connect(found, as_psql=as_psql, as_uri=as_uri)


@command.command("start")
@name_argument
@click.option("--port", type=click.IntRange(1, 65535), help="Another port, from now on.")
@output_option
def start(name: str, port: int | None, output: str) -> None:
    """Start a trunk that is stopped or in error."""
    with heads.service() as service, heads.announced("Starting", "trunk", name, "ready", output):
        view = service.trunks.start(name, port=port)
    heads.echo_ready(view, output)


@command.command("stop")
@name_argument
def stop(name: str) -> None:
    """Stop a trunk; its branches go on."""
    with heads.service() as service, heads.announced("Stopping", "trunk", name, "done"):
        service.trunks.stop(name)


@command.command("restart")
@name_argument
@output_option
def restart(name: str, output: str) -> None:
    """Stop a trunk and start it again."""
    with heads.service() as service, heads.announced("Restarting", "trunk", name, "ready", output):
        view = service.trunks.restart(name)
    heads.echo_ready(view, output)


@command.command("flatten")
@name_argument
def flatten(name: str) -> None:
    """Fold the sealed layers below a trunk into one; it shows what it did.

    This happens by itself from PBKFS_MAX_LAYERS layers on (32).
    """
    with heads.service() as service, heads.progress() as say:
        view = service.trunks.flatten(name, say=say)
    click.echo(f"Flattened trunk {name!r}" + "".join(f": {note}" for note in view.notes))


@command.command("destroy")
@name_argument
@click.option("-r", "--recursive", is_flag=True, help="Also without a question about branches.")
@yes_option
def destroy(name: str, recursive: bool, yes: bool) -> None:
    """Delete a trunk and all branches made of it. What it was made from stays."""
    with heads.service() as service:
        view = service.trunks.info(name)
        what = f"trunk {name!r}"
        if view.children:
            what += f" and all that was branched from it ({', '.join(view.children)})"
        heads.confirm(f"Destroy {what}?", is_sure=yes)
        with heads.progress() as say:
            # The question has named them.
            is_recursive = recursive or yes or bool(view.children)
            gone = service.trunks.destroy(name, recursive=is_recursive, say=say)
    for each in gone:
        click.echo(f"Destroyed {'trunk' if each == name else 'branch'} {each!r}")


@command.command("refresh")
@name_argument
@click.option("-i", "--backup-id", metavar="ID", help="The newer backup.  [default: latest]")
@click.option("--from-dir", "directory", type=PATH, metavar="DIR", help="A newer copy.")
@yes_option
@output_option
def refresh(
    name: str, backup_id: str | None, directory: Path | None, yes: bool, output: str
) -> None:
    """Put a trunk on a newer backup; its branches stay on what they were made from."""
    with heads.service() as service:
        service.trunks.info(name)
        heads.confirm(f"Drop all changes made on trunk {name!r} itself?", is_sure=yes)
        with heads.progress() as say:
            view = service.trunks.refresh(
                name,
                backup_id=backup_id,
                directory=directory.absolute() if directory else None,
                say=say,
            )
    if output == "table":
        click.echo(f"Refreshed trunk {name!r}: {view.head.source}")
    heads.echo_ready(view, output)


@command.command("log")
@name_argument
@click.option("-n", "--lines", default=50, show_default=True, help="Lines of the server's log.")
@click.option("--events", is_flag=True, help="Only what pbkfs did with it.")
def log(name: str, lines: int, events: bool) -> None:
    """Show what happened to a trunk, and the end of its server's log."""
    with heads.service(settles=False) as service:
        heads.echo_log(service.branches.log(name, "trunk", n_lines=0 if events else lines))
