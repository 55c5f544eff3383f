"""PostgreSQL servers for tests: programs, an unprivileged user, data directories, an archive.

Servers here never run as root: with root, they run as ``server_owner``; else as the user of the
tests. Whatever still runs on a data directory of a test is killed at its teardown.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from fix_mounts import run_pbkfs
from machine import MAJORS, postgres_bindir, postgres_majors, session_directory

WAL_SEGMENT_BYTES = 1 << 20


@dataclass(frozen=True)
class User:
    """The user of the servers."""

    name: str
    uid: int
    gid: int

    @property
    def identity(self) -> dict[str, Any]:
        """Arguments of subprocess that make a child run as this user."""
        if os.geteuid() != 0:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": [self.gid]}

    def give(self, path: Path) -> Path:
        """Make this user the owner of ``path`` and all below it."""
        if os.geteuid() == 0:
            for found in [path, *path.rglob("*")]:
                os.chown(found, self.uid, self.gid, follow_symlinks=False)
        return path


def _find_user() -> User:
    if os.geteuid() != 0:
        entry = pwd.getpwuid(os.geteuid())
    else:
        names = {entry.pw_name for entry in pwd.getpwall()}
        entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True)
class Programs:
    """The programs of one major, run as the servers' user."""

    major: int
    bindir: Path
    user: User

    def run(self, program: str, *args: str | os.PathLike[str], check: bool = True) -> str:
        """Run one and return what it printed; it must succeed unless ``check`` is false."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        done = subprocess.run(
            [self.bindir / program, *map(str, args)],
            cwd="/",
            env={**environment, "LC_ALL": "C", "PGCONNECT_TIMEOUT": "10"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            **self.user.identity,
        )
        if check:
            assert done.returncode == 0, f"{program} {args}: {done.stdout}{done.stderr}"
        return done.stdout

    def initdb(self, pgdata: Path, *args: str) -> None:
        """Make a cluster that trusts everybody; its superuser is postgres."""
        self.run(
            "initdb", "-D", pgdata, "-U", "postgres", "-A", "trust", "-k", "--no-sync",
            "--locale=C", "-E", "UTF8", f"--wal-segsize={WAL_SEGMENT_BYTES >> 20}", *args,
        )  # fmt: skip

    def sql(self, uri: str, *statements: str) -> str:
        """Run statements, each a transaction of its own; return the last output."""
        out = ""
        for statement in statements:
            out = self.run("psql", "-XAtqw", "-v", "ON_ERROR_STOP=1", "-d", uri, "-c", statement)
        return out.strip()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        pause.wait(0.02)


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a directory with owners and modes; returns ``target``."""
    subprocess.run(["cp", "-a", source, target], check=True)
    return target


def is_running(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def server_pids(below: Path) -> list[int]:
    """The PostgreSQL processes that work in or below a directory."""
    found = []
    for process in psutil.process_iter():
        try:
            where = process.cwd()
            is_server = os.path.basename(process.exe()) == "postgres"
        except (psutil.Error, OSError):
            continue
        if is_server and (where == str(below) or where.startswith(f"{below}/")):
            found.append(process.pid)
    return found


def kill_servers(below: Path, *, patience_s: float = 15) -> None:
    """End every server that works in or below a directory, and wait until all are gone.

    By an immediate shutdown where it obeys within ``patience_s``: one that is killed leaves its
    shared memory, and its pid file.
    """
    patience = time.monotonic() + patience_s

    def kill() -> bool:
        pids = server_pids(below)
        number = signal.SIGQUIT if time.monotonic() < patience else signal.SIGKILL
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return not pids

    wait_until(kill)


# Below those that the kernel gives to outgoing connections, which come and go all the time.
_TEST_PORTS = range(20000, 32000)
_given_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago, and that is given only once."""
    chosen_by = random.SystemRandom()
    while True:
        port = chosen_by.choice(_TEST_PORTS)
        if port in _given_ports:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given_ports.add(port)
            return port


@dataclass
class Cluster:
    """A plain PGDATA of a test, driven through the command line."""

    pgdata: Path
    programs: Programs
    uri: str = ""
    pid: int = 0
    port: int = 0
    notices: str = ""

    def start(self, *options: str | os.PathLike[str]) -> dict[str, Any]:
        """Start it; returns the command's JSON."""
        done = run_pbkfs("start", "-D", self.pgdata, "--format", "json", *options)
        found: dict[str, Any] = json.loads(done.stdout)
        self.notices = done.stderr
        self.uri, self.port = found["uri"] or "", found["port"] or 0
        self.pid = found["pid"] or 0
        return found

    def fail_to_start(
        self, exit_code: int, *options: str | os.PathLike[str], **env: str
    ) -> tuple[str, str]:
        """Try to start it; returns the error's message and hint after checking the exit code."""
        done = run_pbkfs("start", "-D", self.pgdata, *options, check=False, **env)
        assert done.returncode == exit_code, (done.returncode, done.stdout, done.stderr)
        assert done.stdout == ""
        message, _, hint = done.stderr.partition("\nhint: ")
        assert "pbkfs: error: " in message, done.stderr
        return message.partition("pbkfs: error: ")[2], hint.strip()

    def stop(self, *options: str) -> None:
        """Stop it."""
        run_pbkfs("stop", "-D", self.pgdata, *options)

    def status(self, *, code: int = 0) -> dict[str, Any]:
        """What ``pbkfs status`` says as JSON."""
        done = run_pbkfs("status", "-D", self.pgdata, "--format", "json", check=False)
        assert done.returncode == code, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def sql(self, *statements: str) -> str:
        """Run statements on it; return the last output."""
        return self.programs.sql(self.uri, *statements)

    def setting(self, name: str) -> str:
        """A setting of the running server."""
        return self.sql(f"select setting from pg_settings where name = '{name}'")

    @property
    def log(self) -> Path:
        """The server's log: beside a plain PGDATA."""
        return self.pgdata.parent / f"{self.pgdata.name}.postgres.log"

    def configure(self, **values: str) -> None:
        """Append settings to postgresql.conf."""
        with open(self.pgdata / "postgresql.conf", "a") as file:
            for name, value in values.items():
                quoted = value.replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")

    def tree(self) -> dict[str, tuple[int, int, int]]:
        """Relative path -> mode, size, mtime, to see that nothing changed."""
        found = {}
        for path in sorted(self.pgdata.rglob("*")):
            status = path.lstat()
            found[str(path.relative_to(self.pgdata))] = (
                status.st_mode,
                status.st_size,
                status.st_mtime_ns,
            )
        return found


@dataclass
class ArchivedSource:
    """Backups of a server that archives, with what it wrote after them.

    Table ``t`` has rows 1 … 10 at the backups; then 11 … 20, with the points in ``points`` after
    them; then 21 … 30 up to the end of the archive.
    """

    programs: Programs
    root: Path
    points: dict[str, str] = field(default_factory=dict)

    @property
    def archive(self) -> Path:
        """The archived WAL: some raw, some compressed."""
        return self.root / "archive"

    def copy(self, backup: str, place: Path, name: str = "data") -> Cluster:
        """Give a test its own copy of the backup ``stream`` (with WAL) or ``bare`` (without)."""
        return Cluster(copy_tree(self.root / backup, place / name), self.programs)


def _build_archived_source(programs: Programs, root: Path) -> ArchivedSource:
    user, data = programs.user, root / "source"
    made = ArchivedSource(programs, root)
    made.archive.mkdir()
    user.give(made.archive)
    programs.initdb(data)
    with open(data / "postgresql.conf", "a") as file:
        file.write(
            f"listen_addresses = ''\nunix_socket_directories = '{root}'\nport = 5432\n"
            f"archive_mode = on\narchive_command = 'cp %p {made.archive}/%f'\n"
            "fsync = off\nautovacuum = off\nmax_connections = 42\ncluster_name = 'original'\n"
        )
    programs.run("pg_ctl", "-w", "-D", data, "-l", root / "source.log", "start")
    try:
        uri = f"postgresql://postgres@/postgres?host={root}&port=5432"
        programs.sql(uri, "create table t (n int)", "insert into t select generate_series(1, 10)")
        for name, wal in (("stream", "stream"), ("bare", "none")):
            programs.run(
                "pg_basebackup", "-d", uri, "-D", root / name, "-c", "fast", "-X", wal, "--no-sync"
            )
        made.points["xid"] = programs.sql(
            uri,
            "with i as (insert into t select generate_series(11, 20) returning n) "
            "select txid_current() from i limit 1",
        )
        made.points["lsn"] = programs.sql(uri, "select pg_current_wal_insert_lsn()")
        programs.sql(uri, "select pg_create_restore_point('twenty rows')")
        made.points["name"] = "twenty rows"
        made.points["time"] = programs.sql(uri, "select clock_timestamp()")
        programs.sql(
            uri,
            "insert into t select generate_series(21, 30)",
            "select pg_switch_wal()",
            "create table after_all ()",
        )
    finally:
        programs.run("pg_ctl", "-w", "-m", "fast", "-D", data, "stop")
    for number, segment in enumerate(sorted(made.archive.iterdir())):
        if number % 2 and re.fullmatch("[0-9A-F]{24}", segment.name):
            packed = segment.with_name(segment.name + ".gz")
            packed.write_bytes(gzip.compress(segment.read_bytes(), 1))
            segment.unlink()
    made.archive.chmod(0o755)
    user.give(made.archive)
    return made


# --- fixtures ---------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _environment() -> Iterator[None]:
    """``pbkfs start`` finds the tests' servers and keeps sockets in the session's directory."""
    run_dir = session_directory() / "run"
    run_dir.mkdir(mode=0o755, exist_ok=True)
    bindirs = os.pathsep.join(str(postgres_bindir(major)) for major in postgres_majors())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PBKFS_PG_BINDIR", bindirs)
        patch.setenv("PBKFS_RUN_DIR", str(run_dir))
        yield


@pytest.fixture(scope="session")
def server_user() -> User:
    """Who runs the servers."""
    return _find_user()


@pytest.fixture(scope="session")
def server_owner(server_user: User) -> str:
    """The same as ``UID:GID``, for ``mount --owner``."""
    return f"{server_user.uid}:{server_user.gid}"


@pytest.fixture(scope="session")
def all_programs(server_user: User) -> Callable[[int], Programs]:
    """The programs of a major; the test is skipped where they are missing."""

    def find(major: int) -> Programs:
        bindir = postgres_bindir(major)
        if not (bindir / "postgres").exists():
            pytest.skip(f"PostgreSQL {major} is not here")
        return Programs(major, bindir, server_user)

    return find


@pytest.fixture(params=MAJORS)
def programs(request: pytest.FixtureRequest, all_programs: Callable[[int], Programs]) -> Programs:
    """The programs of every major in turn."""
    return all_programs(request.param)


@pytest.fixture
def newest_programs(all_programs: Callable[[int], Programs]) -> Programs:
    """The programs of the newest major, for what does not depend on it."""
    majors = postgres_majors()
    return all_programs(majors[-1] if majors else MAJORS[-1])


@pytest.fixture(scope="session")
def session_place() -> Iterator[Path]:
    """A directory like ``place`` for what is made once a session."""
    path = Path(tempfile.mkdtemp(prefix="s-", dir=session_directory()))
    path.chmod(0o755)
    yield path
    kill_servers(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def templates(session_place: Path) -> Callable[[Programs], Path]:
    """A freshly made cluster of a major, to be copied."""
    made: dict[int, Path] = {}

    def make(programs: Programs) -> Path:
        if programs.major not in made:
            directory = session_place / f"template-{programs.major}"
            directory.mkdir()
            programs.user.give(directory)
            programs.initdb(directory / "data")
            with open(directory / "data" / "postgresql.conf", "a") as file:
                # What a power cut leaves is not tested on plain directories.
                file.write("fsync = off\n")
            made[programs.major] = directory / "data"
        return made[programs.major]

    return make


@pytest.fixture(scope="session")
def archived_sources(session_place: Path) -> Callable[[Programs], ArchivedSource]:
    """Backups and an archive of a server of a major; made once, to be copied."""
    made: dict[int, ArchivedSource] = {}

    def make(programs: Programs) -> ArchivedSource:
        if programs.major not in made:
            root = session_place / f"a{programs.major}"
            root.mkdir()
            programs.user.give(root)
            made[programs.major] = _build_archived_source(programs, root)
        return made[programs.major]

    return make


@pytest.fixture
def server_place(place: Path) -> Iterator[Path]:
    """``place``, and an end to all servers below it."""
    yield place
    kill_servers(place)


def _copy_template(template: Path, place: Path, programs: Programs) -> Cluster:
    return Cluster(copy_tree(template, place / "data"), programs)


@pytest.fixture
def cluster(
    programs: Programs, templates: Callable[[Programs], Path], server_place: Path
) -> Cluster:
    """A fresh PGDATA of every major in turn."""
    return _copy_template(templates(programs), server_place, programs)


@pytest.fixture
def newest_cluster(
    newest_programs: Programs, templates: Callable[[Programs], Path], server_place: Path
) -> Cluster:
    """A fresh PGDATA of the newest major."""
    return _copy_template(templates(newest_programs), server_place, newest_programs)


@pytest.fixture
def archived(
    programs: Programs, archived_sources: Callable[[Programs], ArchivedSource]
) -> ArchivedSource:
    """Backups and an archive of every major in turn."""
    return archived_sources(programs)


@pytest.fixture
def newest_archived(
    newest_programs: Programs, archived_sources: Callable[[Programs], ArchivedSource]
) -> ArchivedSource:
    """Backups and an archive of the newest major."""
    return archived_sources(newest_programs)


@pytest.fixture
def pgdata_template(newest_programs: Programs, templates: Callable[[Programs], Path]) -> Path:
    """A fresh PGDATA of the newest major, not to be changed."""
    return templates(newest_programs)


@pytest.fixture
def basebackup(newest_programs: Programs, session_place: Path) -> Path:
    """A pg_basebackup -Fp of a server of the newest major that pgbench has filled.

    Nobody has read the rows 1 … 10000 of its table ``unhinted``: who does sets hint bits.
    """
    made = session_place / f"basebackup-{newest_programs.major}"
    if not made.exists():
        _take_basebackup(newest_programs, session_place / "basebackup-source", made)
    return made


@pytest.fixture
def stopped_cluster(basebackup: Path) -> Path:
    """The cluster that ``basebackup`` was taken of, shut down cleanly; not to be changed.

    A crash in the first recovery of a base backup leaves PostgreSQL with a cluster that it can't
    start any more (its backup_label is gone), on any file system: not for tests of crashes.
    """
    return basebackup.with_name("basebackup-source")


def _take_basebackup(programs: Programs, data: Path, target: Path) -> None:
    data.mkdir()
    programs.user.give(data)
    target.mkdir()
    programs.user.give(target)
    programs.initdb(data)
    with open(data / "postgresql.conf", "a") as file:
        file.write(f"listen_addresses = ''\nunix_socket_directories = '{data}'\nfsync = off\n")
    programs.run("pg_ctl", "-w", "-D", data, "-l", data / "log", "start")
    try:
        programs.run("pgbench", "-h", data, "-U", "postgres", "-i", "-q", "-s", "5", "postgres")
        programs.sql(
            f"postgresql://postgres@/postgres?host={data}",
            "create table unhinted (n bigint) with (autovacuum_enabled = off)",
            "insert into unhinted select generate_series(1, 10000)",
        )
        programs.run(
            "pg_basebackup", "-h", data, "-U", "postgres", "-D", target, "-c", "fast", "--no-sync"
        )
    finally:
        programs.run("pg_ctl", "-w", "-m", "fast", "-D", data, "stop")
