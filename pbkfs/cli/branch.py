"""``pbkfs branch``: full, writable servers of the present state of a trunk or branch."""

from __future__ import annotations

from typing import Any

import click

from pbkfs.cli import heads
from pbkfs.cli.heads import AliasGroup, complete_name, output_option, yes_option
from pbkfs.cli.remote import api_url, remote_options
from pbkfs.errors import UsageError
from pbkfs.units import format_bytes, format_duration


class _Group(AliasGroup):
    aliases = {"ls": "list", "rm": "destroy", "delete": "destroy", "show": "info"}  # noqa: RUF012


name_argument = click.argument("name", shell_complete=complete_name("branch"))


@click.group("branch", cls=_Group)
@remote_options
def command() -> None:
    """Branches: a server of its own in about a second, whatever the size.

    \b
    pbkfs trunk create prod --from-backup /backups --instance main -i latest
    pbkfs branch create my-feature --from prod --ttl 2d
    pbkfs branch connect my-feature
    """


@command.command("create")
@click.argument("name", required=False)
@click.option(
    "-f",
    "--from",
    "parent",
    default="main",
    show_default=True,
    metavar="NAME",
    shell_complete=complete_name(None),
    help="The trunk or branch to branch from; it runs on.",
)
@click.option("--ttl", metavar="TIME", help="How long it lives: 90m, 2h, 7d.  [default: for ever]")
@click.option(
    "--idle-stop",
    metavar="TIME",
    help="Stop it after so long without a client, 30m; the next one starts it again. By the "
    "daemon: see pbkfs server.",
)
@click.option("-t", "--tag", "tags", multiple=True, metavar="TAG", help="A tag; can be repeated.")
@click.option(
    "--trust",
    is_flag=True,
    help="Ask nobody for a password, on no address. Else a random one is made: see connect.",
)
@click.option("--cpu", metavar="CPUS", help="Most processors: 2, 0.5 or 500m.")
@click.option("--memory", metavar="SIZE", help="Most memory: 512Mi.")
@click.option("-w", "--wait/--no-wait", default=True, hidden=True)
@click.option("-c", "--connect", is_flag=True, help="Run psql when it is ready.")
@output_option
def create(
    name: str | None,
    parent: str,
    ttl: str | None,
    idle_stop: str | None,
    tags: tuple[str, ...],
    trust: bool,
    cpu: str | None,
    memory: str | None,
    wait: bool,
    connect: bool,
    output: str,
) -> None:
    """Make a branch of a trunk or branch as it is now, and start it.

    Without NAME it gets one like branch-a1b2c3d4. What it branches from is not stopped.
    """
    # Without a daemon there is nobody who could go on.
    more: dict[str, Any] = {} if wait or connect or not api_url() else {"wait": False}
    with heads.service() as service, heads.progress() as say:
        view = service.branches.create(
            name,
            parent=parent,
            ttl=ttl,
            tags=tags,
            auth="trust" if trust else "password",
            idle_stop=idle_stop,
            cpu=cpu,
            memory=memory,
            say=say,
            **more,
        )
        found = service.branches.connection(view.name) if connect else None
    if output == "table":
        click.echo(f"Created branch {view.name!r} from {parent!r}")
    heads.echo_ready(view, output)
    if found is not None:
        heads.connect(found, as_psql=True, as_uri=False)


@command.command("list")
@click.option(
    "-s",
    "--status",
    type=click.Choice(
        ("creating", "starting", "running", "stopped", "error", "deleting"), case_sensitive=False
    ),
    help="Only those in this state.",
)
@click.option("-p", "--parent", metavar="NAME", help="Only those branched from this.")
@click.option("-t", "--tag", metavar="TAG", help="Only those with this tag.")
@click.option("--tree", is_flag=True, help="Show trunks, and what was branched from what.")
@output_option
def list_(status: str | None, parent: str | None, tag: str | None, tree: bool, output: str) -> None:
    """List branches. SIZE is what a branch has on disk, with what it shares with others."""
    if tree and (status or parent or tag):
        raise UsageError(
            "--tree shows all trunks and branches", hint="Leave out --status, --parent and --tag."
        )
    with heads.service() as service:
        if tree and output == "table":
            views = service.tree()
            heads.echo_tree(views)
            return
        views = service.branches.list_all(status=status, parent=parent, tag=tag)
    if output != "table":
        found = [view.to_json() for view in views]
        heads.echo_value({"branches": found, "total": len(found)}, output)
        return
    rows = [
        [
            view.name,
            heads.describe_status(view),
            view.parent or "",
            format_duration(view.age_s()),
            format_bytes(view.size.total_bytes),
            format_bytes(view.size.own_bytes),
            str(view.head.port or ""),
        ]
        for view in views
    ]
    heads.echo_table(["name", "status", "parent", "age", "size", "own", "port"], rows, 1)


@command.command("info")
@name_argument
@output_option
def info(name: str, output: str) -> None:
    """Show all that is known of a branch."""
    with heads.service() as service:
        heads.echo_head(service.branches.info(name), output)


@command.command("connect")
@name_argument
@click.option("--psql", "as_psql", is_flag=True, help="Run psql, or fail.")
@click.option("--uri", "as_uri", is_flag=True, help="Print the connection URI, with the password.")
def connect(name: str, as_psql: bool, as_uri: bool) -> None:
    """Run psql on a branch, or print its URI where there is no psql."""
    with heads.service() as service:
        found = service.branches.connection(name)
    heads.connect(found, as_psql=as_psql, as_uri=as_uri)


@command.command("destroy")
@name_argument
@click.option("-r", "--recursive", is_flag=True, help="Also what was branched from it.")
@yes_option
def destroy(name: str, recursive: bool, yes: bool) -> None:
    """Delete a branch, running or not, with all that was changed on it."""
    with heads.service() as service:
        view = service.branches.info(name)
        what = f"branch {name!r}"
        if recursive and view.children:
            what += f" and what was branched from it ({', '.join(view.children)})"
        heads.confirm(f"Destroy {what}?", is_sure=yes)
        with heads.progress() as say:
            gone = service.branches.destroy(name, recursive=recursive, say=say)
    for each in gone:
        click.echo(f"Destroyed branch {each!r}")


@command.command("start")
@name_argument
@output_option
def start(name: str, output: str) -> None:
    """Start a branch that is stopped or in error."""
    with heads.service() as service, heads.announced("Starting", "branch", name, "ready", output):
        view = service.branches.start(name)
    heads.echo_ready(view, output)


@command.command("stop")
@name_argument
def stop(name: str) -> None:
    """Stop a branch; it keeps its data and gives its port back."""
    with heads.service() as service, heads.announced("Stopping", "branch", name, "done"):
        service.branches.stop(name)


@command.command("restart")
@name_argument
@output_option
def restart(name: str, output: str) -> None:
    """Stop a branch and start it again."""
    with heads.service() as service, heads.announced("Restarting", "branch", name, "ready", output):
        view = service.branches.restart(name)
    heads.echo_ready(view, output)


@command.command("reset")
@name_argument
@yes_option
@output_option
def reset(name: str, yes: bool, output: str) -> None:
    """Take a branch back to where it began; name, port, password and URL stay."""
    with heads.service() as service:
        service.branches.info(name)
        heads.confirm(f"Drop all changes made on branch {name!r}?", is_sure=yes)
        with heads.announced("Resetting", "branch", name, "done", output):
            view = service.branches.reset(name)
    heads.echo_ready(view, output)


@command.command("flatten")
@name_argument
def flatten(name: str) -> None:
    """Fold the sealed layers below a branch into one; it shows what it did.

    This happens by itself from PBKFS_MAX_LAYERS layers on (32).
    """
    with heads.service() as service, heads.progress() as say:
        view = service.branches.flatten(name, say=say)
    click.echo(f"Flattened branch {name!r}" + "".join(f": {note}" for note in view.notes))


@command.command("rename")
@name_argument
@click.argument("new_name")
def rename(name: str, new_name: str) -> None:
    """Give a branch another name; its server runs on."""
    with heads.service() as service:
        service.branches.rename(name, new_name)
    click.echo(f"Renamed branch {name!r} to {new_name!r}")


@command.command("tag")
@name_argument
@click.argument("tags", nargs=-1, required=True)
@click.option("-r", "--remove", is_flag=True, help="Remove the tags.")
def tag(name: str, tags: tuple[str, ...], remove: bool) -> None:
    """Add tags to a branch, or remove them."""
    with heads.service() as service:
        view = service.branches.tag(name, tags, remove=remove)
    click.echo(f"Tags: {', '.join(view.tags) or 'none'}")


@command.command("extend")
@name_argument
@click.argument("ttl")
def extend(name: str, ttl: str) -> None:
    """Let a branch live for TTL (2h, 7d) from now, or for ever: never."""
    with heads.service() as service:
        view = service.branches.extend(name, ttl)
    click.echo(f"Expires: {view.head.expires_at or 'never'}")


@command.command("idle-stop")
@name_argument
@click.argument("time")
def idle_stop(name: str, time: str) -> None:
    """Let the daemon stop a branch after TIME (30m) without a client, or never.

    The branch is asleep then: its port takes clients, and the first one starts it, which takes
    less than a second. Where no daemon runs, it is one that is stopped.
    """
    with heads.service() as service:
        view = service.branches.set_idle_stop(name, time)
    click.echo(f"Idle stop: {heads.describe_idle_stop(view)}")


@command.command("log")
@name_argument
@click.option("-n", "--lines", default=50, show_default=True, help="Lines of the server's log.")
@click.option("--events", is_flag=True, help="Only what pbkfs did with it.")
def log(name: str, lines: int, events: bool) -> None:
    """Show what happened to a branch, and the end of its server's log."""
    with heads.service(settles=False) as service:
        heads.echo_log(service.branches.log(name, n_lines=0 if events else lines))
