"""The settings with which a server on a copy is started, so that it never acts as the original.

A branch must never archive over production, dial home, wait for production's standbys, run the
original's jobs, or open a file of the original that lies outside of PGDATA. All of it is given on
the command line, which beats every configuration file and ALTER SYSTEM. Files of the configuration
that are missing, and lines of it that this host can't use, are part of the plan too (``files``).
Pure: reads PGDATA's surroundings, changes nothing. Any thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pbkfs.errors import PostgresError
from pbkfs.postgres.account import find_obstacle, group_exists
from pbkfs.postgres.binaries import Binaries
from pbkfs.postgres.cluster import Cluster
from pbkfs.postgres.configuration import Configuration, join_list, parse_memory
from pbkfs.postgres.network import Place

# Libraries whose background workers act on their own: they run the original's jobs, or talk to the
# original's neighbours. The rest of an extension works without its worker, except where said.
_ACTING_LIBRARIES = {
    "pg_cron": "it runs the original's jobs",
    "pg_partman_bgw": "it creates and drops partitions",
    "pglogical": "it connects to other nodes",
    "bdr": "it connects to other nodes",
    "spock": "it connects to other nodes",
    "citus": "it connects to the original's workers",
    "pgautofailover": "it connects to the original's monitor",
    "pg_failover_slots": "it connects to the original",
    "repmgr": "it connects to other nodes",
    "pg_net": "it sends the original's requests",
    "bgw_replstatus": "it opens the original's status port",
}

# Placeholders of libraries that stay loaded because data needs them, without their jobs.
_QUIET_LIBRARIES = {
    "timescaledb": [("timescaledb.max_background_workers", "0")],
    "pg_squeeze": [("squeeze.worker_autostart", "")],
}

# A standby must not have less than its primary had. Source: src/backend/access/transam/
# xlogrecovery.c, CheckRequiredParameterValues. (setting, label of pg_controldata, default)
_AT_LEAST = (
    ("max_connections", "max_connections setting", 100),
    ("max_worker_processes", "max_worker_processes setting", 8),
    ("max_wal_senders", "max_wal_senders setting", 10),
    ("max_prepared_transactions", "max_prepared_xacts setting", 0),
    ("max_locks_per_transaction", "max_locks_per_xact setting", 64),
)

_MINIMAL_CONFIGURATION = """\
# Written by pbkfs: the backup has no postgresql.conf, because the original keeps its configuration
# outside of PGDATA. All defaults; settings of this branch may be added here.
"""

_MINIMAL_HBA = """\
# Written by pbkfs: the backup has no pg_hba.conf, because the original keeps its configuration
# outside of PGDATA. The local socket: the user of the same name. TCP: password, this host only.
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     peer
host    all             all             127.0.0.1/32            scram-sha-256
host    all             all             ::1/128                 scram-sha-256
"""


@dataclass(slots=True)
class SafeStart:
    """What to start with, what to write into PGDATA before, and what to tell the user."""

    settings: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    removals: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def set(self, name: str, value: str) -> None:
        """Add a setting; a later one of the same name wins."""
        self.settings.append((name, value))

    def value(self, name: str) -> str | None:
        """Return what a setting was set to, or None."""
        found = [value for key, value in self.settings if key == name]
        return found[-1] if found else None


def plan_safe_start(
    cluster: Cluster,
    binaries: Binaries,
    configuration: Configuration,
    control: dict[str, str],
    place: Place,
    *,
    cluster_name: str,
    shared_buffers: str | None = None,
    recovers: bool = False,
) -> SafeStart:
    """Return how to start a server on ``cluster``. Raises PostgresError, changes nothing.

    ``recovers``: the caller adds a recovery target, and so decides about recovery.signal.
    """
    plan = SafeStart()
    _plan_identity(plan, cluster, place, cluster_name)
    _plan_silence(plan, cluster.major, configuration)
    _plan_log(plan)
    _plan_files(plan, cluster, configuration)
    _plan_includes(plan, cluster, configuration)
    _plan_signals(plan, cluster, recovers)
    _plan_tls(plan, cluster, configuration)
    _plan_libraries(plan, configuration, binaries)
    _plan_sizes(plan, configuration, control, shared_buffers)
    return plan


def _plan_identity(plan: SafeStart, cluster: Cluster, place: Place, cluster_name: str) -> None:
    # A data_directory in the original's configuration would beat -D, and start the original.
    plan.set("data_directory", str(cluster.data_dir))
    plan.set("port", str(place.port))
    plan.set("listen_addresses", place.listen_addresses)
    plan.set("unix_socket_directories", join_list([str(place.socket_dir)]))
    plan.set("cluster_name", cluster_name)
    plan.set("bonjour", "off")


def _plan_silence(plan: SafeStart, major: int, configuration: Configuration) -> None:
    """Everything by which a server acts on others."""
    plan.set("archive_mode", "off")
    plan.set("archive_command", "")
    plan.set("archive_cleanup_command", "")
    plan.set("recovery_end_command", "")
    plan.set("restore_command", "")
    plan.set("primary_conninfo", "")
    plan.set("primary_slot_name", "")
    # Production's standbys are not ours: with them every commit would wait for ever.
    plan.set("synchronous_standby_names", "")
    plan.set("max_logical_replication_workers", "0")
    if major < 16:
        plan.set("promote_trigger_file", "")
    if major >= 14:
        # "fsync" opens every file before recovery, which takes its time. syncfs(2) reaches nothing
        # of a mount, but what was not synced comes back from the full-page images in the WAL.
        is_covered = configuration.is_on("full_page_writes", default=True)
        plan.set("recovery_init_sync_method", "syncfs" if is_covered else "fsync")
    if major >= 15:
        plan.set("archive_library", "")
    if major >= 17:
        plan.set("sync_replication_slots", "off")
        plan.set("synchronized_standby_slots", "")
    # Targets which an earlier restore left in postgresql.auto.conf. They come before the ones that
    # are asked for: PostgreSQL refuses a second target, even an empty one after another.
    for name in ("", "_name", "_time", "_xid", "_lsn"):
        plan.set(f"recovery_target{name}", "")


def _plan_log(plan: SafeStart) -> None:
    plan.set("logging_collector", "off")
    plan.set("log_destination", "stderr")


def _plan_files(plan: SafeStart, cluster: Cluster, configuration: Configuration) -> None:
    if not configuration.has_main_file:
        plan.files["postgresql.conf"] = _MINIMAL_CONFIGURATION
        plan.notices.append("the backup has no postgresql.conf: wrote one with the defaults")
    for setting, name, minimal in (
        ("hba_file", "pg_hba.conf", _MINIMAL_HBA),
        ("ident_file", "pg_ident.conf", "# Written by pbkfs: the backup has none.\n"),
    ):
        configured = configuration.get(setting)
        if configured and _is_inside(cluster, configured):
            path = cluster.data_dir / configured
            if not path.exists():
                raise PostgresError(f"{setting} = {configured!r} does not exist in PGDATA")
            # PostgreSQL takes a relative path from the directory in which it is started.
            plan.set(setting, str(path))
            continue
        # Outside, the path names a file of the original, or of another server of this host.
        plan.set(setting, str(cluster.data_dir / name))
        if not cluster.has(name):
            plan.files[name] = minimal
            plan.notices.append(f"the backup has no {name}: wrote a cautious one")
    if configuration.get("external_pid_file"):
        plan.set("external_pid_file", "")
    if cluster.major < 15 and not _is_inside(cluster, configuration.get("stats_temp_directory")):
        plan.set("stats_temp_directory", "pg_stat_tmp")
    group = configuration.get("unix_socket_group")
    if group and not group_exists(group):
        plan.set("unix_socket_group", "")
        plan.notices.append(f"unix_socket_group = {group!r}: no such group here, not set")


def _plan_includes(plan: SafeStart, cluster: Cluster, configuration: Configuration) -> None:
    """Comment out the include of a file that was not in the backup: it stops every start."""
    for missing in configuration.missing:
        if not can_edit(cluster, missing.file):
            raise PostgresError(
                f"{missing.file} line {missing.line_number} includes {missing.target}, "
                "which does not exist",
                hint="Remove the line, or bring the file.",
            )
        comment_out(plan, cluster, missing.file, missing.line_number, "not in the backup")
        plan.notices.append(
            f"{missing.file.name} line {missing.line_number}: {missing.target} is not in the "
            "backup; the include is commented out"
        )


def can_edit(cluster: Cluster, file: Path) -> bool:
    """Return whether a configuration file is the copy's own: on a mount, and inside of PGDATA."""
    return cluster.is_mount and _is_inside(cluster, str(file))


def comment_out(plan: SafeStart, cluster: Cluster, file: Path, line_number: int, why: str) -> None:
    """Plan to make a comment of a line of a configuration file. Raises PostgresError."""
    name = str(file.relative_to(cluster.data_dir))
    try:
        text = plan.files.get(name) or file.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise PostgresError(f"cannot read {file}: {error.strerror}") from error
    lines = text.split("\n")
    lines[line_number - 1] = f"# pbkfs: {why}: {lines[line_number - 1]}"
    plan.files[name] = "\n".join(lines)


def _plan_signals(plan: SafeStart, cluster: Cluster, recovers: bool) -> None:
    """The copy of a standby starts as a server of its own."""
    for name in ("standby.signal", "recovery.signal"):
        if not cluster.has(name) or (recovers and name == "recovery.signal"):
            continue
        if not cluster.is_mount:
            what = "a standby" if name == "standby.signal" else "about to recover"
            raise PostgresError(
                f"{cluster.data_dir} is {what} ({name}) and not a mount of pbkfs",
                hint=f"Remove {name} if this is a copy which may become a server of its own.",
            )
        plan.removals.append(name)
        plan.notices.append(f"removed {name}: the copy is a server of its own")
    if not cluster.is_mount and cluster.has("tablespace_map"):
        raise PostgresError(
            f"{cluster.data_dir}/tablespace_map sends the server to the original's tablespaces",
            hint="Make the links in pg_tblspc point to the copies and remove tablespace_map.",
        )


def _plan_tls(plan: SafeStart, cluster: Cluster, configuration: Configuration) -> None:
    if not configuration.is_on("ssl"):
        return
    wanted = [
        configuration.get("ssl_cert_file", "server.crt"),
        configuration.get("ssl_key_file", "server.key"),
        configuration.get("ssl_ca_file"),
        configuration.get("ssl_crl_file"),
        configuration.get("ssl_crl_dir"),
        configuration.get("ssl_dh_params_file"),
    ]
    for name in filter(None, wanted):
        path = Path(os.path.realpath(cluster.data_dir / name))
        if find_obstacle(cluster.owner, path, os.R_OK) is not None:
            plan.set("ssl", "off")
            plan.notices.append(f"ssl is off: {path} is missing or closed to {cluster.owner.name}")
            return


def _plan_libraries(plan: SafeStart, configuration: Configuration, binaries: Binaries) -> None:
    directory = binaries.library_directory()
    search_path = configuration.get("dynamic_library_path", "$libdir")
    for setting in (
        "shared_preload_libraries",
        "session_preload_libraries",
        "local_preload_libraries",
    ):
        wanted = configuration.libraries(setting)
        kept = []
        for library in wanted:
            name = os.path.basename(library).removesuffix(".so")
            if name in _ACTING_LIBRARIES and setting == "shared_preload_libraries":
                plan.notices.append(f"{setting}: left out {name}: {_ACTING_LIBRARIES[name]}")
                continue
            local = setting == "local_preload_libraries"
            if directory and not _library_exists(library, directory, search_path, local=local):
                plan.notices.append(f"{setting}: left out {name}: it is not installed here")
                continue
            kept.append(library)
            for quiet in _QUIET_LIBRARIES.get(name, []):
                plan.set(*quiet)
        if kept != wanted:
            plan.set(setting, join_list(kept))


def _library_exists(library: str, directory: Path, search_path: str, *, local: bool) -> bool:
    # Source: src/backend/utils/fmgr/dfmgr.c, expand_dynamic_library_name.
    if local and "/" not in library:
        library = f"$libdir/plugins/{library}"
    candidates: Iterable[str]
    if "/" in library:
        candidates = [library]
    else:
        candidates = [f"{part.strip()}/{library}" for part in search_path.split(":") if part]
    for candidate in candidates:
        path = candidate.replace("$libdir", str(directory), 1)
        if os.path.isfile(path) or os.path.isfile(f"{path}.so"):
            return True
    return False


def _plan_sizes(
    plan: SafeStart,
    configuration: Configuration,
    control: dict[str, str],
    shared_buffers: str | None,
) -> None:
    for setting, label, default in _AT_LEAST:
        needed = control.get(label, "")
        configured = configuration.get(setting, str(default))
        if needed.isdigit() and not (configured.isdigit() and int(configured) >= int(needed)):
            plan.set(setting, needed)
    if configuration.get("huge_pages").lower() in ("on", "true", "yes", "1"):
        plan.set("huge_pages", "try")
    if shared_buffers is not None:
        plan.set("shared_buffers", shared_buffers)
        return
    # A production server's share of memory is often more than a host of branches has at all.
    configured_bytes = parse_memory(configuration.get("shared_buffers"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if configured_bytes is not None and configured_bytes > memory // 2:
        reduced = max(128, (memory // 8) >> 20)
        plan.set("shared_buffers", f"{reduced}MB")
        plan.notices.append(
            f"shared_buffers = {configuration.get('shared_buffers')} is more than half of this "
            f"host's memory: taking {reduced}MB (--shared-buffers sets another value)"
        )


def _is_inside(cluster: Cluster, configured: str) -> bool:
    """Whether a configured path lies in PGDATA; relative ones do unless they climb out."""
    path = os.path.normpath(cluster.data_dir / configured)
    return path == str(cluster.data_dir) or path.startswith(f"{cluster.data_dir}/")
