"""Start a server on a PGDATA: check, plan, write what has to be written, launch, wait.

Nothing in PGDATA changes before every check has passed that can be made without a change. Called
by the command line, in one thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from pbkfs.errors import BusyError, HostError, PostgresError, UsageError
from pbkfs.postgres.account import check_can_serve, check_reachable, find_obstacle, write_for
from pbkfs.postgres.binaries import Binaries, find_binaries
from pbkfs.postgres.cluster import Cluster, check_permissions, read_control
from pbkfs.postgres.configuration import Configuration, read_configuration
from pbkfs.postgres.launch import (
    Launch,
    PortTakenError,
    Reporter,
    Started,
    StartOptions,
    open_log,
)
from pbkfs.postgres.network import (
    TRUSTING_HBA,
    Place,
    check_port,
    check_socket_directory,
    find_free_port,
    make_run_directory,
    remove_dead_sockets,
    remove_run_directory,
)
from pbkfs.postgres.postmaster import (
    find_postmaster,
    find_survivors,
    pid_is_used,
    read_pid_file,
    running_data_dirs,
)
from pbkfs.postgres.recovery import SIGNAL, Recovery, make_restore_command, plan_recovery
from pbkfs.postgres.safe_start import SafeStart, can_edit, comment_out, plan_safe_start
from pbkfs.postgres.wal_feeder import SOCKET_NAME, WalFeeder

_PORT_TRIES = 5
# Source: src/backend/utils/misc/guc.c, in the C locale.
_REFUSED = re.compile(
    r"""(?:invalid value for parameter|unrecognized configuration parameter|parameter)
        [ ]"([\w.]+)"(?::|[ ]in[ ]file|[ ]requires|[ ]must)""",
    re.VERBOSE,
)


def start(cluster: Cluster, options: StartOptions, reporter: Reporter) -> Started:
    """Start a server on ``cluster`` and wait until it accepts connections.

    Raises BusyError if one runs or the port is taken, PostgresError with the end of the log if the
    server does not come up, TimedOutError if it is still recovering after the time limit.
    """
    check_can_serve(cluster.owner, cluster.data_dir)
    binaries = find_binaries(cluster.major, options.bindir)
    _check_not_running(cluster)
    _check_places(cluster, binaries)
    _check_nothing_is_shared(cluster)
    control = read_control(cluster, binaries)
    recovery = plan_recovery(cluster, options.target, options.archive)
    configuration = read_configuration(cluster.data_dir)
    port = _choose_port(options)
    run_dir = make_run_directory(cluster.data_dir, cluster.owner)
    remove_dead_sockets(run_dir)  # no server runs here, as we have seen
    with contextlib.ExitStack() as stack:
        stack.callback(_tidy, cluster)
        place = Place(port, options.listen_addresses, _choose_socket_dir(cluster, options, run_dir))
        plan = plan_safe_start(
            cluster,
            binaries,
            configuration,
            control,
            place,
            cluster_name=_cluster_name(cluster),
            shared_buffers=options.shared_buffers,
            recovers=recovery is not None,
        )
        if options.hba is not None:
            _plan_hba(cluster, plan, run_dir, options.hba)
        elif options.trusts_socket:
            _plan_trusting_hba(cluster, plan, run_dir)
        feeder = None
        if recovery is not None:
            feeder = _plan_recovery(cluster, plan, recovery, configuration, run_dir)
            if feeder is not None:
                stack.callback(feeder.close)
            if options.target is None:
                plan.notices.append(f"going on to recover to {recovery.target.describe()}")
        log = open_log(cluster, options.log, run_dir)
        stack.callback(log.close)
        _prepare(cluster, binaries, plan, configuration, options)
        for text in plan.notices:
            reporter.notice(text)
        launch = Launch(cluster, binaries, log, recovery, feeder, options)
        return _launch(launch, plan, place, options, reporter)


def _launch(
    launch: Launch, plan: SafeStart, place: Place, options: StartOptions, reporter: Reporter
) -> Started:
    """Launch on the chosen port, or on the next one if somebody was faster."""
    for _ in range(_PORT_TRIES):
        launch.begin(_arguments(plan, options), place)
        try:
            return launch.wait(reporter)
        except PortTakenError:
            if options.port is not None:
                break
            next_port = find_free_port(place.listen_addresses, place.port + 1)
            place = Place(next_port, place.listen_addresses, place.socket_dir)
            plan.set("port", str(next_port))
    raise BusyError(
        f"port {place.port} was taken while the server started",
        hint="Try again, or choose another one with --port.",
    )


def _tidy(cluster: Cluster) -> None:
    """Remove the run directory of a server that did not come up."""
    if find_postmaster(cluster.data_dir) is None:
        remove_run_directory(cluster.data_dir, cluster.owner)


def _choose_port(options: StartOptions) -> int:
    if options.port is None:
        return find_free_port(options.listen_addresses)
    check_port(options.listen_addresses, options.port)
    return options.port


def _choose_socket_dir(cluster: Cluster, options: StartOptions, run_dir: Path) -> Path:
    named = options.socket_dir
    if named is None:
        return run_dir
    if not named.is_dir():
        raise UsageError(f"socket directory {named} does not exist")
    check_socket_directory(named)
    check_reachable(cluster.owner, named, "the socket directory", os.W_OK | os.X_OK)
    return named


def _check_not_running(cluster: Cluster) -> None:
    running = find_postmaster(cluster.data_dir)
    if running is not None:
        pid_file = read_pid_file(cluster.data_dir)
        port = f", port {pid_file.port}" if pid_file and pid_file.port else ""
        raise BusyError(
            f"a server already runs on {cluster.data_dir} (pid {running.pid}{port})",
            hint="Stop it with pbkfs stop, or see pbkfs status for how to connect.",
        )
    survivors = find_survivors(cluster.data_dir)
    if survivors:
        raise BusyError(
            f"processes of a dead server still work in {cluster.data_dir}: "
            + ", ".join(f"pid {pid}" for pid in survivors),
            hint="They end by themselves when what they do is done; end them if they hang.",
        )


def _check_places(cluster: Cluster, binaries: Binaries) -> None:
    owner = cluster.owner
    check_permissions(cluster)
    check_reachable(owner, cluster.data_dir, "PGDATA", os.R_OK | os.W_OK | os.X_OK)
    wal = cluster.data_dir / "pg_wal"
    real_wal = Path(os.path.realpath(wal))
    if not real_wal.is_dir():
        where = f" (a link to {real_wal})" if wal.is_symlink() else ""
        raise PostgresError(
            f"{wal}{where} does not exist",
            hint="Mount the diff from its own place: pg_wal is a directory of the diff.",
        )
    check_reachable(owner, real_wal, "pg_wal", os.R_OK | os.W_OK | os.X_OK)
    obstacle = find_obstacle(owner, binaries.postgres, os.R_OK | os.X_OK)
    if obstacle is not None:
        raise HostError(
            f"{owner.name} cannot run {binaries.postgres}: {obstacle}",
            hint="Install PostgreSQL where every user can reach it, or name another --pg-bindir.",
        )


def _check_nothing_is_shared(cluster: Cluster) -> None:
    """Refuse a copy whose links lead into the directories of another server that runs here.

    ``cp -a`` copies the links of pg_wal and of tablespaces, and with them the original's WAL.
    """
    if cluster.is_mount:
        return  # its links stay inside of the mount and the diff
    mine = _linked_places(cluster.data_dir)
    for other in running_data_dirs():
        shared = mine.keys() & _linked_places(other).keys()
        if shared:
            where = min(shared)
            raise PostgresError(
                f"{mine[where]} leads to {where}, which the running server of {other} uses",
                hint="Copy that directory too and let the link point to the copy.",
            )


def _linked_places(data_dir: Path) -> dict[str, Path]:
    """Return the real directories of pg_wal and of the tablespaces, with what leads there."""
    found = {}
    try:
        tablespaces = os.listdir(data_dir / "pg_tblspc")
    except OSError:
        tablespaces = []
    for name in ("pg_wal", *(f"pg_tblspc/{oid}" for oid in tablespaces)):
        if (data_dir / name).exists():
            found[os.path.realpath(data_dir / name)] = data_dir / name
    return found


def _cluster_name(cluster: Cluster) -> str:
    # Shown in the process list. Source: guc_tables.c allows NAMEDATALEN - 1 bytes of ASCII.
    name = f"pbkfs {cluster.data_dir}"
    ascii_name = name.encode("ascii", "replace").decode()
    return ascii_name if len(ascii_name) < 64 else f"{ascii_name[:20]}...{ascii_name[-40:]}"


def _plan_trusting_hba(cluster: Cluster, plan: SafeStart, run_dir: Path) -> None:
    """Write an hba file which trusts the local socket and else says what PGDATA's says.

    It lies beside the socket and not in the diff, whose top only the worker's user can write.
    """
    text = "local all all trust\nlocal replication all trust\n"
    named = plan.value("hba_file") or "pg_hba.conf"
    try:
        kept = cluster.read(named).decode("utf-8", "surrogateescape")
    except OSError:
        kept = plan.files.get(Path(named).name, "")
    # Included files are looked for beside the file that includes them, so they cannot come along.
    if re.search(r"(?m)^\s*include|[\s,]@|^@", kept):
        plan.notices.append("only the local socket is open: pg_hba.conf includes other files")
    else:
        text += kept
    _plan_hba(cluster, plan, run_dir, text)


def _plan_hba(cluster: Cluster, plan: SafeStart, run_dir: Path, text: str) -> None:
    path = run_dir / TRUSTING_HBA
    write_for(cluster.owner, path, text.encode("utf-8", "surrogateescape"))
    plan.set("hba_file", str(path))


def _plan_recovery(
    cluster: Cluster,
    plan: SafeStart,
    recovery: Recovery,
    configuration: Configuration,
    run_dir: Path,
) -> WalFeeder | None:
    """Add the target and how WAL is fetched; returns the feeder that this needs, or None."""
    socket_path = run_dir / SOCKET_NAME
    command = make_restore_command(cluster, recovery.archive, run_dir, socket_path)
    plan.files[SIGNAL] = recovery.signal_text()
    for name, value in recovery.settings(command.text):
        plan.set(name, value)
    if recovery.target.action == "pause":
        # Only its log tells when a server pauses, so it has to speak English and to speak.
        plan.set("lc_messages", "C")
        if configuration.get("log_min_messages").lower() in ("fatal", "panic"):
            plan.set("log_min_messages", "log")
    if not command.needs_feeder or recovery.archive is None:
        return None
    return WalFeeder(recovery.archive, run_dir, cluster.owner, cluster.data_dir)


def _arguments(plan: SafeStart, options: StartOptions) -> list[str]:
    settings = [*plan.settings, *options.settings]
    found = [word for name, value in settings for word in ("-c", f"{name}={value}")]
    return [*found, *options.arguments]


def _prepare(
    cluster: Cluster,
    binaries: Binaries,
    plan: SafeStart,
    configuration: Configuration,
    options: StartOptions,
) -> None:
    """Write what PostgreSQL needs before it can even read its settings, then let it check them."""
    for name, text in plan.files.items():
        if name != SIGNAL:
            cluster.write(name, text)
    _check_settings(cluster, binaries, plan, configuration, options)
    for name in plan.removals:
        cluster.remove(name)
    if SIGNAL in plan.files:
        cluster.write(SIGNAL, plan.files[SIGNAL])
    pid_file = read_pid_file(cluster.data_dir)
    if pid_file is not None and pid_is_used(pid_file.pid):
        # The pid now belongs to a process which is no server of this PGDATA, but PostgreSQL would
        # take it for one. That nobody else works here was checked before.
        cluster.remove("postmaster.pid")


def _check_settings(
    cluster: Cluster,
    binaries: Binaries,
    plan: SafeStart,
    configuration: Configuration,
    options: StartOptions,
) -> None:
    """Have PostgreSQL read its settings; comment out those that this build or host lacks.

    A better value on the command line would not help: PostgreSQL checks what its files say all the
    same. Examples are locales, time zones, compression methods, parameters of a vendor's server.
    """
    seen: set[str] = set()
    while True:
        said = _read_settings(cluster, binaries, _arguments(plan, options))
        if said is None:
            return
        # PostgreSQL complains of unknown names first, and of impossible values when there are none.
        refused = {name for name in _REFUSED.findall(said) if name not in seen}
        if not _comment_out_settings(cluster, plan, configuration, refused):
            break
        seen |= refused
    if 'parameter "recovery_target' in said:
        raise UsageError(
            said, hint="Write a time like '2026-03-01 11:59:00+00' and an LSN like 0/16B3740."
        )
    raise PostgresError(
        f"PostgreSQL {binaries.version} does not accept the settings of {cluster.data_dir}: {said}",
        hint="Correct the configuration files in PGDATA, or what was given with -c.",
    )


def _comment_out_settings(
    cluster: Cluster, plan: SafeStart, configuration: Configuration, names: Iterable[str]
) -> bool:
    """Make comments of all lines which set ``names``; returns whether there were any."""
    edited: set[str] = set()
    for name in sorted(names):
        lines = configuration.lines.get(name.lower(), [])
        if not lines or not all(can_edit(cluster, file) for file, _ in lines):
            continue
        for file, line_number in lines:
            comment_out(plan, cluster, file, line_number, "not possible here")
            edited.add(str(file.relative_to(cluster.data_dir)))
        value = configuration.get(name.lower())
        plan.notices.append(f"{name} = {value!r} is not possible here and is commented out")
    for file_name in sorted(edited):
        cluster.write(file_name, plan.files[file_name])
    return bool(edited)


def _read_settings(cluster: Cluster, binaries: Binaries, arguments: Sequence[str]) -> str | None:
    """Return what PostgreSQL complains about, or None if all its settings are right."""
    # lc_messages: the file's own would translate the complaints about what follows it.
    command: list[str | Path] = [binaries.postgres, "-D", cluster.data_dir, *arguments]
    command += ["-c", "lc_messages=C", "-C", "data_directory"]
    done = subprocess.run(
        command,
        cwd="/",
        env={**cluster.owner.environment(), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        **cluster.owner.popen_identity(),
    )
    if done.returncode == 0:
        return None
    lines = os.fsdecode(done.stderr).strip().splitlines()
    marker = re.compile(r"^.*?\b(LOG|ERROR|FATAL|PANIC|HINT|DETAIL): +")
    cleaned = [marker.sub("", line).strip() for line in lines]
    return "; ".join(line for line in cleaned if line) or f"exit {done.returncode}"
