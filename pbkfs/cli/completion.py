"""``pbkfs completion``: let the shell complete commands, options and names of branches."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pbkfs.errors import HostError, UsageError

SHELLS = ("bash", "zsh", "fish")

# Where each shell looks by itself, below the user's data or configuration directory.
_PLACES = {
    "bash": ("XDG_DATA_HOME", ".local/share", "bash-completion/completions/pbkfs"),
    "zsh": ("XDG_DATA_HOME", ".local/share", "zsh/site-functions/_pbkfs"),
    "fish": ("XDG_CONFIG_HOME", ".config", "fish/completions/pbkfs.fish"),
}
_ADVICE = {
    "bash": "It works in new shells where the package bash-completion is installed.",
    "zsh": "Put this into ~/.zshrc, before compinit: fpath+=({directory})",
    "fish": "It works in new shells.",
}

shell_option = click.option(
    "--shell", type=click.Choice(SHELLS), help="The shell.  [default: that of $SHELL]"
)


@click.group("completion")
def command() -> None:
    """Let the shell complete commands, options and the names of trunks and branches."""


@command.command("install")
@shell_option
def install(shell: str | None) -> None:
    """Write the completion to where the shell looks for it."""
    shell = shell or _detect()
    path = _place(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_script(shell), encoding="utf-8")
    except OSError as error:
        raise HostError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
    click.echo(f"Installed {path}")
    click.echo(_ADVICE[shell].format(directory=path.parent))


@command.command("uninstall")
@shell_option
def uninstall(shell: str | None) -> None:
    """Remove it again."""
    path = _place(shell or _detect())
    try:
        path.unlink()
    except FileNotFoundError:
        click.echo(f"{path} is not there")
        return
    except OSError as error:
        raise HostError(f"cannot remove {path}: {error.strerror}") from error
    click.echo(f"Removed {path}")


@command.command("show")
@shell_option
def show(shell: str | None) -> None:
    """Print it, for a shell that looks elsewhere."""
    click.echo(_script(shell or _detect()))


def _detect() -> str:
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in SHELLS:
        raise UsageError(
            f"the shell {name or 'of this user'} is not known here",
            hint=f"Name one with --shell: {', '.join(SHELLS)}.",
        )
    return name


def _place(shell: str) -> Path:
    variable, default, below = _PLACES[shell]
    base = os.environ.get(variable) or os.path.join(os.path.expanduser("~"), default)
    return Path(base) / below


def _script(shell: str) -> str:
    from click.shell_completion import get_completion_class

    from pbkfs.cli.main import group

    kind = get_completion_class(shell)
    assert kind is not None
    made = kind(group, {}, "pbkfs", "_PBKFS_COMPLETE")
    # Not source(), which asks bash for its version: 4.4 is from 2016.
    return made.source_template % made.source_vars()
