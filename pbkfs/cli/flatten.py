"""``pbkfs flatten``: the sealed layers below a diff become one."""

from __future__ import annotations

from pathlib import Path

import click

from pbkfs.cli.options import debug_option, diff_option
from pbkfs.cli.output import warn
from pbkfs.errors import UsageError
from pbkfs.units import format_bytes


@click.command()
@diff_option
@click.option(
    "--delete",
    "deletes",
    is_flag=True,
    help="Also delete the old layers that lie inside of the diff's directory; it must not be "
    "mounted. Only where no other diff lies upon them: nothing records that.",
)
@debug_option
def command(*, diff: Path | None, deletes: bool, debug: bool) -> None:  # noqa: ARG001 - by main
    """Fold the sealed layers below a diff, mounted or not, into one.

    It shows what it did before, and open files stay open. Objects that are in one layer only are
    shared with it by hard links, so this costs little more than what was changed several times.
    For trunks and branches there is pbkfs trunk flatten and pbkfs branch flatten.
    """
    if diff is None:
        raise UsageError("no diff is given", hint="Name it: -d DIR.")
    from pbkfs.mount.flattening import flatten

    path = diff.absolute()
    if path.parent.name == "heads" and (path.parent.parent / "layers").is_dir():
        raise UsageError(
            f"diff {diff} is that of a trunk or branch",
            hint="Name it: pbkfs trunk flatten NAME, or pbkfs branch flatten NAME.",
        )
    done = flatten(diff, deletes=deletes)
    if done.folded is None:
        click.echo(f"nothing to fold in {diff}: sealed layers {done.n_before}")
    else:
        click.echo(
            f"folded {done.n_before} layers of {diff} into one: {done.folded.n_linked} objects "
            f"shared, {done.folded.n_copied} merged ({format_bytes(done.folded.copied_bytes)})"
        )
    for path in done.deleted:
        click.echo(f"deleted the layer in {path}")
    if done.unused:
        names = ", ".join(map(str, done.unused))
        warn(
            f"this diff does not need these layers any more: {names}",
            "Delete them if no other diff lies upon them; --delete does so inside of the diff.",
        )
