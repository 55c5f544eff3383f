"""One drill from the mount to the end, whatever happens on the way.

``run`` is called by the command line, in a process without threads. It raises nothing that it
expects: errors, the end of the time and signals are in the report that it returns.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pbkfs
from pbkfs.backup.probackup.catalog import Instance
from pbkfs.drill import checks
from pbkfs.drill.place import Mounted, Place
from pbkfs.drill.report import Check, Phase, Problem, Recovery, Report
from pbkfs.drill.request import DrillRequest
from pbkfs.drill.server import NULL, Deadline, DrillServer, find_psql
from pbkfs.drill.signals import Signals, StoppedError
from pbkfs.errors import (
    FormatError,
    HostError,
    NotRunningError,
    PbkfsError,
    PostgresError,
    TimedOutError,
)
from pbkfs.mount import control
from pbkfs.mount.owner import host_name
from pbkfs.mount.statistics import measure_disk
from pbkfs.pgdata import format_lsn, read_control_file
from pbkfs.postgres.account import check_can_serve
from pbkfs.postgres.binaries import Binaries, find_binaries
from pbkfs.postgres.cluster import Cluster, open_cluster
from pbkfs.postgres.launch import Reporter, Started, StartOptions
from pbkfs.postgres.running import stop
from pbkfs.postgres.server import start

START = "start"
STOP = "clean stop"
STORED = "stored pages"

# Source: src/include/catalog/pg_control.h, DBState: DB_SHUTDOWNED, DB_SHUTDOWNED_IN_RECOVERY.
_SHUT_DOWN = (1, 2)

# The diff is thrown away: what a crash of this machine would do to it does not matter, and less is
# changed. What the user gives comes later, and so wins.
_SETTINGS = (("fsync", "off"), ("autovacuum", "off"), ("log_min_messages", "warning"))

_FACTS = """
select coalesce(pg_last_wal_replay_lsn()::text, pg_current_wal_lsn()::text),
  to_char(pg_last_xact_replay_timestamp() at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
  case when pg_is_in_recovery() then (select timeline_id from pg_control_checkpoint())
    else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end,
  pg_is_in_recovery(), current_setting('server_version'), current_setting('data_checksums'),
  (select sum(pg_database_size(oid)) from pg_database)
"""
_DATABASES = "select datname from pg_database where datallowconn order by oid"


def run(request: DrillRequest, say: Callable[[str], None]) -> Report:
    """Hold the drill; ``say`` is told each step as it begins."""
    return _Drill(request, say).run()


class _Drill:
    """The state of one drill; ``run`` once."""

    def __init__(self, request: DrillRequest, say: Callable[[str], None]) -> None:
        self._request = request
        self._say = say
        self._report = Report(host=host_name(), pbkfs_version=pbkfs.__version__)
        self._deadline = Deadline(request.timeout_s)
        self._databases: list[str] = []
        self._is_read_only = False
        self._has_checksums = False

    def run(self) -> Report:
        """Hold the drill, tidy up and return the report."""
        report = self._report
        report.started_at = _now()
        began = time.monotonic()
        place: Place | None = None
        with Signals() as signals:
            try:
                place = Place.make(self._request)
                try:
                    signals.hear()
                    self._rehearse(place, signals)
                finally:
                    signals.hold()
            except StoppedError as stopped:
                message = f"interrupted: {stopped}"
                report.problem = Problem("interrupted", message, None, 128 + stopped.signum)
                report.result = "interrupted"
            except TimedOutError as error:
                report.fail(error, "timed out")
            except PbkfsError as error:
                report.fail(error)
            finally:
                if place is not None:
                    self._end(place)
        report.seconds = time.monotonic() - began
        report.ended_at = _now()
        self._add_what_was_left_out()
        report.conclude()
        return report

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time one step of the drill."""
        self._say(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self._report.phases.append(Phase(name, time.monotonic() - began))

    # --- the way up -----------------------------------------------------------------------------

    def _rehearse(self, place: Place, signals: Signals) -> None:
        """Go through all the steps; what remains to be done after them is tidying up."""
        with self._phase("mount"):
            mounted = place.mount(self._request, signals, self._deadline.left_s())
        self._report.notices += mounted.notices
        self._report.backup = self._describe_backup(mounted)
        cluster = open_cluster(place.pgdata, place.diff)
        check_can_serve(cluster.owner, cluster.data_dir)
        place.server_user = cluster.owner
        binaries = find_binaries(cluster.major, self._request.bindir)
        find_psql(binaries)
        self._report.postgres_version = binaries.version
        server = self._start(cluster, binaries, mounted)
        if server is not None:
            self._check(server)
        self._check_store(place)
        self._report.sizes["diff"] = measure_disk(place.diff).total_bytes

    def _describe_backup(self, mounted: Mounted) -> dict[str, object]:
        found: dict[str, object] = {"name": mounted.name}
        if mounted.store is None or mounted.instance is None or mounted.backup_id is None:
            return found | {"kind": "directory", "path": str(self._request.base_dir)}
        found |= {
            "kind": "probackup",
            "store": mounted.store,
            "instance": mounted.instance,
            "id": mounted.backup_id,
        }
        control = Instance(Path(mounted.store), mounted.instance).backup(mounted.backup_id).control
        if control is None:
            return found
        for name, n_bytes in (("pgdata", control.pgdata_bytes), ("stored", control.data_bytes)):
            if n_bytes is not None:
                self._report.sizes[name] = n_bytes
        return found | {
            "mode": control.mode,
            "stream": control.stream,
            "stop_lsn": format_lsn(control.stop_lsn),
            "recovery_time": _format_time(control.recovery_time),
        }

    def _start(self, cluster: Cluster, binaries: Binaries, mounted: Mounted) -> DrillServer | None:
        """Start the server, and learn what it recovered to; None, and a failed check, if it can't.

        Raises what is not the backup's fault.
        """
        request = self._request
        target = request.target
        archive = request.archive
        if archive is None and target is not None and mounted.store and mounted.instance:
            archive = Path(mounted.store) / "wal" / mounted.instance
        options = StartOptions(
            bindir=binaries.bindir,
            listen_addresses="",
            shared_buffers=request.shared_buffers,
            settings=[*_SETTINGS, *request.settings],
            trusts_socket=True,
            target=target,
            archive=archive,
            user=request.user,
            timeout_s=self._deadline.left_s(),
        )
        wanted = target.describe() if target is not None else "the backup's own WAL"
        self._report.recovery = Recovery(target=wanted)
        with self._phase("start"):
            try:
                started = start(cluster, options, Reporter(notice=self._report.notices.append))
                # Only a server that was told to shut down at its target is nowhere.
                assert started.place is not None
                server = DrillServer(
                    cluster, started.binaries, started.place, request.user, self._deadline
                )
                self._learn(server, started)
            except TimedOutError:
                # Its own words are of a server that goes on.
                raise self._deadline.error() from None
            except (PostgresError, FormatError) as error:
                server = None
                check = _failed(START, error)
            else:
                lsn, timeline = self._report.recovery.lsn, self._report.recovery.timeline
                check = Check(START, "passed", f"consistent at {lsn}, timeline {timeline}")
        check.seconds = self._report.phases[-1].seconds
        self._report.checks.append(check)
        return server

    def _learn(self, server: DrillServer, started: Started) -> None:
        """Ask the server what it is. Raises PostgresError."""
        report = self._report
        database, (facts,) = _ask_any(server, _FACTS)
        lsn, moment, timeline, _, version, has_checksums, n_bytes = facts
        assert report.recovery is not None
        report.recovery.lsn = lsn
        report.recovery.time = None if moment == NULL else moment
        report.recovery.timeline = int(timeline)
        report.postgres_version = version
        report.sizes["databases"] = int(n_bytes)
        self._is_read_only = started.is_paused
        self._has_checksums = has_checksums == "on"
        self._databases = [row[0] for row in server.query(database, _DATABASES)]

    # --- the checks -----------------------------------------------------------------------------

    def _add_what_was_left_out(self) -> None:
        """Say of every check that was wanted and did not come about that it was not made."""
        request = self._request
        names = [START, *(f"sql {wanted.name}" for wanted in request.sql_checks)]
        names += [checks.AMCHECK, STOP, checks.CHECKSUMS, STORED]
        made = {check.name for check in self._report.checks}
        why = "the drill ended before it" if self._report.problem else "the server did not come up"
        self._report.checks += [Check(name, "not run", why) for name in names if name not in made]

    def _check(self, server: DrillServer) -> None:
        """Make all checks, also after one that failed."""
        request = self._request
        for wanted in request.sql_checks:
            name = f"sql {wanted.name}"
            self._timed(name, checks.check_sql, server, request.database, wanted)
        self._timed(checks.AMCHECK, self._check_relations, server)
        relations = {}
        if self._has_checksums and request.runs_checksums:
            relations = checks.list_relation_files(server, self._databases)
        self._timed(STOP, self._stop, server)
        is_stopped = self._report.checks[-1].result == "passed"
        self._timed(checks.CHECKSUMS, self._check_checksums, server, relations, is_stopped)

    def _timed(self, name: str, make: Callable[..., Check], *arguments: object) -> None:
        with self._phase(name):
            check = make(*arguments)
        check.seconds = self._report.phases[-1].seconds
        self._report.checks.append(check)

    def _check_relations(self, server: DrillServer) -> Check:
        if not self._request.runs_amcheck:
            return Check(checks.AMCHECK, "not run", "left out by --no-amcheck")
        return checks.check_relations(
            server,
            self._databases,
            is_writable=not self._is_read_only,
            n_jobs=self._request.n_jobs,
        )

    def _check_checksums(
        self, server: DrillServer, relations: dict[str, str], is_stopped: bool
    ) -> Check:
        if not self._request.runs_checksums:
            return Check(checks.CHECKSUMS, "not run", "left out by --no-checksums")
        if not self._has_checksums:
            return Check(checks.CHECKSUMS, "not enabled", "the cluster has no data checksums")
        if not is_stopped:
            return Check(checks.CHECKSUMS, "not run", "the server did not stop cleanly")
        return checks.check_checksums(server, relations)

    def _stop(self, server: DrillServer) -> Check:
        """Stop the server as an administrator does, so that every page is on the mount."""
        try:
            stop(server.cluster.data_dir, server.cluster.owner, "fast", self._deadline.left_s())
        except TimedOutError:
            raise self._deadline.error() from None
        except PbkfsError as error:
            return _failed(STOP, error)
        try:
            state = read_control_file(server.cluster.read("global/pg_control")).state
        except (FormatError, OSError) as error:
            return Check(STOP, "failed", f"pg_control cannot be read after the stop: {error}")
        if state not in _SHUT_DOWN:
            return Check(STOP, "failed", f"pg_control says state {state} after the stop")
        return Check(STOP, "passed", "the server ended cleanly")

    def _check_store(self, place: Place) -> None:
        """Say whether what was read of the backup could be read, whoever asked for it."""
        try:
            stat = control.call(place.diff, "stat", timeout_s=self._deadline.left_s())["stat"]
        except NotRunningError:
            raise HostError(
                "the mount's worker died during the drill",
                hint="The kernel's log may say why (dmesg): out of memory, or a crash.",
            ) from None
        n_errors = int(stat["overlay"]["read_errors"])
        warnings = place.worker_warnings()
        if n_errors:
            message = f"{n_errors} reads of the backup failed"
            self._report.checks.append(Check(STORED, "failed", message, details=warnings))
        else:
            self._report.checks.append(
                Check(STORED, "passed", "all that was read of the backup could be read")
            )

    # --- the end --------------------------------------------------------------------------------

    def _end(self, place: Place) -> None:
        """Take everything away again, or say what is kept. Signals are held back."""
        report = self._report
        report.mount_log = place.worker_warnings()
        if self._request.is_kept:
            place.end_mounter()
            if place.is_mounted():
                report.kept = {
                    "mount point": str(place.pgdata),
                    "diff": str(place.diff),
                    "look": f"pbkfs start -D {place.pgdata} --trust-local --connect",
                    "clean up": f"pbkfs stop -D {place.pgdata}; pbkfs unmount -D {place.pgdata} && "
                    f"pbkfs cleanup -d {place.diff} && rm -r {place.root}",
                }
                return
        with self._phase("clean up"):
            try:
                place.remove()
            except PbkfsError as error:
                report.notices.append(f"not cleaned up: {error.message}")
                report.fail(error)


def _ask_any(server: DrillServer, question: str) -> tuple[str, list[list[str]]]:
    """Ask a database that every cluster has, if nobody dropped it; returns its name, too."""
    try:
        return "postgres", server.query("postgres", question)
    except PostgresError as error:
        try:
            return "template1", server.query("template1", question)
        except PostgresError:
            raise error from None


def _failed(name: str, error: PbkfsError) -> Check:
    """Return a failed check; the lines below the first, as of a log, are its details."""
    first, *rest = error.message.splitlines()
    return Check(name, "failed", first.rstrip(":"), details=[line.strip() for line in rest])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _format_time(seconds: int | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
