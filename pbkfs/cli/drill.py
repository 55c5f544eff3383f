"""``pbkfs drill``: prove that a backup can be restored, and leave nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pbkfs.cli.options import PATH, debug_option, instance_option, store_option
from pbkfs.cli.output import echo_json, format_option, is_terminal
from pbkfs.cli.server_options import recovery_options, settings_options
from pbkfs.errors import UsageError
from pbkfs.units import parse_duration

if TYPE_CHECKING:
    from pbkfs.drill.report import Report
    from pbkfs.postgres.recovery import RecoveryTarget


@click.command(
    "drill",
    epilog="Exit code 0: all checks passed; 1: a check failed; 12: the time was over; "
    "others as for mount and start.",
)
@store_option
@instance_option
@click.option(
    "-i",
    "--backup-id",
    "backup_id",
    envvar="PBKFS_BACKUP_ID",
    metavar="ID",
    help="Backup to try: its id, or 'latest'.",
)
@click.option("--latest", "is_latest", is_flag=True, help="Same as -i latest.")
@click.option(
    "--base",
    "base_dir",
    type=PATH,
    envvar="PBKFS_BASE",
    metavar="DIR",
    help="Try a plain copy of a PGDATA instead of a store's backup.",
)
@click.option(
    "--owner",
    envvar="PBKFS_OWNER",
    metavar="USER[:GROUP]",
    help="User of the server. Default: the calling user; for root the backup's owner, or postgres.",
)
@click.option(
    "--work-dir",
    type=PATH,
    envvar="PBKFS_WORK_DIR",
    metavar="DIR",
    help="Where the drill's own directory is made, for mount and diff.  "
    "[default: $TMPDIR or /var/tmp]",
)
@recovery_options("promote", "pause")
@settings_options
@click.option(
    "--sql",
    "sql",
    multiple=True,
    metavar="[NAME: ]SQL",
    help="A check: SQL that has to run without an error and to return at least one row, none of "
    "them just false or null. May be given several times.",
)
@click.option(
    "--sql-file",
    "sql_files",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="A check: a file for psql that has to run without an error, and no row of it may be just "
    "false or null. May be given several times.",
)
@click.option("--dbname", default="postgres", show_default=True, help="Database of the SQL checks.")
@click.option(
    "-U",
    "--username",
    "user",
    default="postgres",
    show_default=True,
    help="Superuser to connect as.",
)
@click.option("--no-amcheck", is_flag=True, help="Leave pg_amcheck out.")
@click.option("--no-checksums", is_flag=True, help="Leave the page checksums out.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Connections of pg_amcheck.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=parse_duration,
    default="1d",
    show_default=True,
    metavar="TIME",
    help="End the drill after this long: 30min, 8h.",
)
@click.option(
    "--report", "json_file", type=PATH, metavar="FILE", help="Write the report as JSON, too."
)
@click.option(
    "--junit", "junit_file", type=PATH, metavar="FILE", help="Write the report as JUnit's XML, too."
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing if all checks pass.")
@click.option(
    "--keep", is_flag=True, help="Leave mount and diff for inspection; the report says where."
)
@format_option
@debug_option
def command(
    *,
    store: Path | None,
    instance: str | None,
    backup_id: str | None,
    is_latest: bool,
    base_dir: Path | None,
    owner: str | None,
    work_dir: Path | None,
    target: RecoveryTarget | None,
    wal_archive: Path | None,
    pg_bindir: Path | None,
    shared_buffers: str | None,
    settings: list[tuple[str, str]],
    sql: tuple[str, ...],
    sql_files: tuple[Path, ...],
    dbname: str,
    user: str,
    no_amcheck: bool,
    no_checksums: bool,
    jobs: int,
    timeout_s: float,
    json_file: Path | None,
    junit_file: Path | None,
    quiet: bool,
    keep: bool,
    output: str,
    debug: bool,  # noqa: ARG001 - read by main
) -> int:
    """Run a restore drill: mount a backup, start it, check it, report, throw all of it away.

    \b
    pbkfs drill -B /backups -I main --latest --sql 'orders: select count(*) > 0 from orders'
    pbkfs drill --base /backups/pgdata --report drill.json --junit drill.xml

    PostgreSQL is started as by pbkfs start, on a diff of its own in a temporary directory. Then
    come the SQL checks, pg_amcheck of all databases and, after a clean stop, the checksums of all
    pages. What can't be checked here is said in the report. Server, mount and diff are gone at the
    end, also after a failure, Ctrl-C or SIGTERM.
    """
    if is_latest:
        if backup_id is not None:
            raise UsageError("--latest and --backup-id exclude each other", hint="Name one backup.")
        backup_id = "latest"
    if base_dir is not None and (store or instance or backup_id):
        raise UsageError("--backup-path and --base exclude each other", hint="Name one base.")
    if base_dir is None and store is None:
        raise UsageError(
            "no backup is given", hint="Name one: -B STORE -I INSTANCE -i ID, or --base DIR."
        )
    from pbkfs.drill.report import check_files, format_text
    from pbkfs.drill.request import DrillRequest, parse_sql_check, read_sql_file
    from pbkfs.drill.run import run
    from pbkfs.mount.request import parse_owner_option

    check_files([path.absolute() for path in (json_file, junit_file) if path is not None])
    request = DrillRequest(
        store=store,
        instance=instance,
        backup_id=backup_id,
        base_dir=base_dir,
        owner=parse_owner_option(owner) if owner else None,
        work_dir=work_dir,
        target=target,
        archive=wal_archive,
        bindir=pg_bindir,
        shared_buffers=shared_buffers,
        settings=settings,
        user=user,
        database=dbname,
        sql_checks=[*map(parse_sql_check, sql), *map(read_sql_file, sql_files)],
        runs_amcheck=not no_amcheck,
        runs_checksums=not no_checksums,
        n_jobs=jobs,
        timeout_s=timeout_s,
        is_kept=keep,
    )
    report = run(request, _show_step)
    _write_files(report, json_file, junit_file)
    if output == "json":
        echo_json(report.to_json())
    elif report.backup and not (quiet and report.result == "passed"):
        click.echo(format_text(report))
    if report.problem is not None:
        click.echo(f"pbkfs: error: {report.problem.message}", err=True)
        if report.problem.hint:
            click.echo(f"hint: {report.problem.hint}", err=True)
    return report.exit_code


def _show_step(name: str) -> None:
    """Show on a terminal what is being done; cron has no use for it."""
    if sys.stderr.isatty() and is_terminal():
        click.echo(f"pbkfs: {name}", err=True)


def _write_files(report: Report, json_file: Path | None, junit_file: Path | None) -> None:
    import json

    from pbkfs.drill.report import format_junit, write_file

    if json_file is not None:
        text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
        write_file(json_file.absolute(), text.encode("utf-8", "replace") + b"\n")
    if junit_file is not None:
        write_file(junit_file.absolute(), format_junit(report))
