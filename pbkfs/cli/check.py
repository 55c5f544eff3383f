"""``pbkfs check``: is a diff sound? Like fsck: offline, and it changes nothing but on request."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pbkfs.cli.options import debug_option, diff_option
from pbkfs.cli.output import echo_json, format_option, warn
from pbkfs.errors import DiffError, NotFoundError, PbkfsError, UsageError

if TYPE_CHECKING:
    from pbkfs.backup.base import Base
    from pbkfs.overlay.check import Report


@click.command()
@diff_option
@format_option
@click.option(
    "--repair",
    "is_repaired",
    is_flag=True,
    help="Settle what a crash left: a torn tail, unfinished truncations, objects without a name, "
    "temporary files. A damaged diff is left as it is.",
)
@debug_option
def command(
    *,
    diff: Path | None,
    output: str,
    is_repaired: bool,
    debug: bool,  # noqa: ARG001 - read by main
) -> int:
    """Check a diff that is not mounted: superblock, journal, names, objects, page maps, pg_wal.

    Changes nothing without --repair. Exit code 0: sound, perhaps with notes of what the next mount
    settles; 7: damaged.
    """
    if diff is None:
        raise UsageError("no diff is given", hint="Name it: -d DIR.")
    from pbkfs.mount import lock
    from pbkfs.mount.mounts import resolve
    from pbkfs.overlay.check import check_diff

    path = resolve(diff)
    if not path.is_dir():
        raise NotFoundError(f"diff {path} does not exist", hint="Name the directory of a diff.")
    if is_repaired:
        return _repair(path, output)
    with lock.hold_off(path):
        base = _open_base(path)
        if base is None:
            report = check_diff(path, None)
        else:
            with closing(base):
                report = check_diff(path, base)
    if output == "json":
        echo_json(_to_json(report))
    else:
        click.echo(_format(report))
    return 0 if report.is_clean else DiffError.exit_code


def _repair(path: Path, output: str) -> int:
    from pbkfs.mount.repairing import repair

    found = repair(path)
    report = found.report
    if output == "json":
        echo_json({**_to_json(report), "repaired": [each.message for each in found.done]})
    else:
        for each in found.done:
            click.echo(f"repaired: {each.message}")
        click.echo(_format(report))
    if found.was_refused:
        warn(
            f"nothing was repaired in diff {path}: it is damaged",
            "What looks left over may be somebody's data whose record is damaged. Restore the "
            "damaged part, or branch or mount anew.",
        )
    return 0 if report.is_clean else DiffError.exit_code


def _open_base(path: Path) -> Base | None:
    """Return the base that the diff's binding names; None, and a warning, if it can't be opened."""
    from pbkfs.mount.base import open_base
    from pbkfs.mount.binding import read_binding

    problem = "binding.json is missing"
    try:
        bound = read_binding(path)
        if bound is not None:
            return open_base(bound.base, force=True, owner=bound.owner)
    except PbkfsError as error:
        problem = error.message
    except OSError as error:
        problem = (error.strerror or str(error)).lower()
    warn(
        f"the base of diff {path} can't be opened: {problem}",
        "Names, objects and page maps are not checked without the base.",
    )
    return None


def _to_json(report: Report) -> dict[str, object]:
    return {
        "diff": str(report.diff),
        "clean": report.is_clean,
        "counts": report.counts,
        "findings": [
            {"severity": each.severity, "kind": each.kind, "message": each.message}
            for each in report.findings
        ],
    }


def _format(report: Report) -> str:
    n_errors = sum(each.severity == "error" for each in report.findings)
    verdict = "sound" if report.is_clean else f"damaged, {n_errors} error{'s' * (n_errors != 1)}"
    counts = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report.counts.items())
    lines = [f"{each.severity}: {each.message}" for each in report.findings]
    return "\n".join([*lines, f"diff {report.diff} is {verdict} ({counts})"])
