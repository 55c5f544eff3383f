"""The group ``pbkfs``: finds the verb, runs it, and turns every failure into one line and a code.

A verb's module is imported only when the verb runs, so that ``--help``, ``stat`` and ``list`` do
not pay for what ``mount`` needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

import pbkfs
from pbkfs.config import ENV_PREFIX
from pbkfs.errors import PbkfsError

# verb -> (module, help). The help stands here so that listing the verbs imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "mount": ("pbkfs.cli.mount", "Mount a backup as a writable PGDATA."),
    "upgrade": (
        "pbkfs.cli.upgrade",
        "Have this program serve a mount in place of another version.",
    ),
    "unmount": ("pbkfs.cli.unmount", "Unmount; the diff keeps all changes."),
    "list": ("pbkfs.cli.list", "List the mounts of this host."),
    "stat": ("pbkfs.cli.stat", "Show what a mount holds, costs and does."),
    "hydrate": ("pbkfs.cli.hydrate", "Bring the whole backup into the diff, in the background."),
    "detach": ("pbkfs.cli.detach", "End a mount as a plain PGDATA that needs pbkfs no more."),
    "flatten": ("pbkfs.cli.flatten", "Fold the sealed layers below a diff into one."),
    "cleanup": ("pbkfs.cli.cleanup", "Delete a diff, and with it all changes made on its mount."),
    "check": ("pbkfs.cli.check", "Check a diff that is not mounted, and repair what a crash left."),
    "backups": ("pbkfs.cli.backups", "List a store's backups and whether they can be mounted."),
    "start": ("pbkfs.cli.start", "Start PostgreSQL on a mount, with safe settings."),
    "stop": ("pbkfs.cli.stop", "Stop the PostgreSQL of a mount."),
    "status": ("pbkfs.cli.status", "Show the PostgreSQL of a mount, or all trunks and branches."),
    "drill": ("pbkfs.cli.drill", "Run a restore drill: try a backup out, report, clean up."),
    "trunk": ("pbkfs.cli.trunk", "Trunks: what branches are made of, without a copy."),
    "branch": ("pbkfs.cli.branch", "Branches: a server of its own in about a second."),
    "server": ("pbkfs.cli.server", "The daemon: trunks and branches over REST."),
    "completion": ("pbkfs.cli.completion", "Let the shell complete commands and names."),
    "wal-get": ("pbkfs.cli.wal_get", "Fetch a WAL file from a store's archive (restore_command)."),
}
ALIASES = {"umount": "unmount", "ls": "list"}


class LazyGroup(click.Group):
    """A group whose verbs are modules named in ``COMMANDS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        entry = COMMANDS.get(ALIASES.get(cmd_name, cmd_name))
        if entry is None:
            return None
        command = importlib.import_module(entry[0]).command
        assert isinstance(command, click.Command)
        _name_in_environment(command, f"{ENV_PREFIX}_{_as_variable(entry[0].rpartition('.')[2])}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and name not in ALIASES and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            advice = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"no such command {name!r}.{advice}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[1]) for name, entry in COMMANDS.items()])


def _as_variable(name: str) -> str:
    return name.upper().replace("-", "_")


def _name_in_environment(command: click.Command, prefix: str) -> None:
    """Let each option be set as PREFIX_LONG_NAME, too; click itself takes a parameter's name."""
    for option in command.params:
        if isinstance(option, click.Option):
            given = option.envvar or []
            names = [given] if isinstance(given, str) else list(given)
            names += [
                f"{prefix}_{_as_variable(name[2:])}" for name in option.opts if name[:2] == "--"
            ]
            option.envvar = list(dict.fromkeys(names))
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            _name_in_environment(each, f"{prefix}_{_as_variable(name)}")


@click.command(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
    epilog="pbkfs COMMAND --help shows a command's options; each long one can also be set in the "
    "environment: --port of 'trunk create' as PBKFS_TRUNK_CREATE_PORT.",
)
@click.version_option(pbkfs.__version__, "-V", "--version", message="pbkfs %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Any PostgreSQL backup is a PGDATA, at once: mounted, writable, the backup untouched."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; the console script ``pbkfs``."""
    _open_standard_descriptors()
    arguments = list(sys.argv[1:] if args is None else args)
    sys.exit(run(arguments))


def pgbranchd() -> NoReturn:
    """Run the daemon; the console script of its older name, configured by ``PGBRANCH_*``."""
    main(["server", *sys.argv[1:]])


def _open_standard_descriptors() -> None:
    """Put /dev/null in the place of a closed stdin, stdout or stderr.

    Otherwise the next file that is opened, perhaps a diff's lock, would get that number, and what
    is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    # Python has None in the place of a stream whose descriptor was closed.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def run(arguments: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        result = group.main(arguments, prog_name="pbkfs", standalone_mode=False)
        sys.stdout.flush()
    except PbkfsError as error:
        _report(error.message, error.hint)
        if "--debug" in arguments:
            import traceback

            traceback.print_exc()
        return error.exit_code
    except click.exceptions.Abort:
        _report("interrupted", None)
        return 130
    except KeyboardInterrupt:
        _report("interrupted", None)
        return 130
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        hint = f"'{ctx.command_path} --help' shows what is possible." if ctx else None
        _report(_plain(error.format_message()), hint)
        return 2
    except (BrokenPipeError, SystemExit):
        if os.environ.get("_PBKFS_COMPLETE"):
            return 0  # click has answered a shell that completes a line
        # The reader of our output is gone (``pbkfs list | head -1``); only then does click exit by
        # itself here. The interpreter must not flush what is left. 141 is a shell's 128 + 13.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        _report_bug(error, arguments)
        return 1
    return result if isinstance(result, int) else 0


def _plain(message: str) -> str:
    """Return click's sentence in the form of our messages: lower case, no full stop."""
    message = " ".join(message.split())
    return (message[:1].lower() + message[1:]).removesuffix(".")


def _report(message: str, hint: str | None) -> None:
    click.echo(f"pbkfs: error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _report_bug(error: Exception, arguments: list[str]) -> None:
    """Put the traceback of an unexpected exception where it can be found, and say where."""
    import time
    import traceback

    from pbkfs.config import state_log_path

    text = "".join(traceback.format_exception(error))
    path = state_log_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as log:
            moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            verb = next((word for word in arguments if not word.startswith("-")), "")
            log.write(f"{moment} pbkfs {pbkfs.__version__} {verb}: {text}")
        where = f"The traceback is in {path}; please report it."
    except OSError:
        click.echo(text, err=True, nl=False)
        where = "The traceback is above; please report it."
    else:
        if "--debug" in arguments:
            click.echo(text, err=True, nl=False)
    summary = " ".join(str(error).split())
    _report(f"unexpected {type(error).__name__}: {summary} (this is a bug)", where)
