"""What start, stop and status share: which PGDATA, its diff and archive, as whom to connect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pbkfs.cli.options import PATH
from pbkfs.errors import PbkfsError
from pbkfs.mount.binding import read_binding
from pbkfs.mount.mounts import our_mounts, resolve
from pbkfs.postgres.cluster import Cluster, open_cluster

Function = TypeVar("Function", bound=Callable[..., Any])


def pgdata_option(function: Function) -> Function:
    """Add ``-D/--pgdata`` as the parameter ``pgdata``."""
    return click.option(
        "-D",
        "--pgdata",
        "--mnt-path",
        "pgdata",
        required=True,
        envvar="PBKFS_PGDATA",
        metavar="DIR",
        # What is there and may be read is open_cluster's to say, and better.
        type=PATH,
        help="The mount point, or any other PGDATA.",
    )(function)


def user_option(function: Function) -> Function:
    """Add ``-U/--username`` as the parameter ``user``."""
    return click.option(
        "-U",
        "--username",
        "user",
        default="postgres",
        show_default=True,
        help="Role to connect as, in the printed URI and for questions to the server.",
    )(function)


def diff_of(pgdata: Path) -> Path | None:
    """Return the diff of the mount on which ``pgdata`` (resolved) lies, or None."""
    found = None
    for entry in our_mounts():
        if entry.mountpoint == pgdata or entry.mountpoint in pgdata.parents:
            found = Path(entry.source)
    return found


def cluster_at(pgdata: Path) -> Cluster:
    """Return the PGDATA at ``pgdata``; knows the diff where it lies on a mount."""
    data_dir = resolve(pgdata)
    return open_cluster(data_dir, diff_of(data_dir))


def archive_of(cluster: Cluster) -> Path | None:
    """Return the WAL archive of the store from which ``cluster`` is mounted, or None.

    Only a store of backups has one; for other bases the user has to name it. The store's place is
    in the binding of the diff, which only the worker's user may read.
    """
    if cluster.diff is None:
        return None
    try:
        binding = read_binding(cluster.diff)
    except (OSError, PbkfsError):
        return None
    if binding is None or binding.base.store is None or binding.base.instance is None:
        return None
    return Path(binding.base.store) / "wal" / binding.base.instance
