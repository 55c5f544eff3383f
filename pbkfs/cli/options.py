"""Options and types that several verbs share, with the names that pg_probackup's users know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


class _Place(click.Path):
    """A path; never the empty one, which would be the working directory."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


# Whether a path can be read is told by what reads it, with its own words and exit code.
PATH = _Place(path_type=Path, readable=False)
FILE = _Place(path_type=Path, readable=False, dir_okay=False)


def mountpoint_option(function: Function) -> Function:
    """Add ``-D/--pgdata/--mnt-path`` as ``mountpoint``."""
    return click.option(
        "-D",
        "--pgdata",
        "--mnt-path",
        "mountpoint",
        type=PATH,
        envvar="PBKFS_PGDATA",
        metavar="DIR",
        help="Mount point: what PostgreSQL gets as its data directory.",
    )(function)


def diff_option(function: Function) -> Function:
    """Add ``-d/--diff-dir`` as ``diff``."""
    return click.option(
        "-d",
        "--diff-dir",
        "diff",
        type=PATH,
        envvar="PBKFS_DIFF_DIR",
        metavar="DIR",
        help="The diff: the directory that holds all changes.",
    )(function)


def store_option(function: Function) -> Function:
    """Add ``-B/--backup-path/--pbk-store`` as ``store``."""
    return click.option(
        "-B",
        "--backup-path",
        "--pbk-store",
        "store",
        type=PATH,
        envvar=["PBKFS_BACKUP_PATH", "PBKFS_PBK_STORE"],
        metavar="DIR",
        help="pg_probackup's store (its -B).",
    )(function)


def instance_option(function: Function) -> Function:
    """Add ``-I/--instance`` as ``instance``."""
    return click.option(
        "-I",
        "--instance",
        "instance",
        envvar="PBKFS_INSTANCE",
        metavar="NAME",
        help="Instance of the store; may be left out where there is just one.",
    )(function)


def debug_option(function: Function) -> Function:
    """Add ``--debug`` as ``debug``."""
    return click.option(
        "--debug",
        is_flag=True,
        envvar="PBKFS_DEBUG",
        help="Log more, and show the traceback of an error.",
    )(function)
