"""Restore drills of real catalogs through the command line: what they find, what they leave.

Each test drills in a work directory of its own; at its end no mount, no process and no file of the
drill may be left there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from fix_catalogs import CatalogStore, manifests
from fix_mounts import Mounts, run_pbkfs
from fix_postgres import ArchivedSource, Programs, server_pids, wait_until
from machine import ROOT, open_to_everybody, own_mounts, postgres_bindir
from servers import MountedServer

from pbkfs import errors
from pbkfs.mount.lock import read_owner

FULL = "a_full_none_stream"
DELTAS = "b_full_delta_delta_zlib_stream"
ARCHIVE = "c_full_page_page_archive_pglz"
NO_CHECKSUMS = "f_no_checksums"
PAGE_RECORD_BYTES = 8 + 8192

pytestmark = pytest.mark.skipif(FULL not in manifests(), reason="the real catalogs are not here")


class Drills:
    """Runs drills in one work directory."""

    def __init__(self, root: Path, owner: str) -> None:
        self.root = root
        self.work_dir = root / "work"
        self.work_dir.mkdir(mode=0o755)
        self.owner = owner

    def command(self, *args: str | os.PathLike[str]) -> list[str]:
        """The arguments of pbkfs for a drill."""
        here = ["--work-dir", str(self.work_dir), "--owner", self.owner]
        return ["drill", *map(str, args), *here]

    def run(
        self, *args: str | os.PathLike[str], code: int = 0
    ) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
        """Hold a drill that ends with ``code``; returns its report and what it printed."""
        path = self.root / "report.json"
        path.unlink(missing_ok=True)
        done = run_pbkfs(*self.command(*args), "--report", path, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        report: dict[str, Any] = json.loads(path.read_text())
        assert report["exit_code"] == code
        self.assert_nothing_is_left()
        return report, done

    def assert_nothing_is_left(self) -> None:
        """Fail if a mount, a server, a worker or a file of a drill is still there."""
        assert str(self.work_dir) not in Path("/proc/self/mountinfo").read_text()
        assert server_pids(self.work_dir) == []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            # A worker has the command line of the drill that it was forked from.
            assert str(self.work_dir) not in words, process
        assert list(self.work_dir.iterdir()) == []
        assert not (self.root / "run").exists()


@pytest.fixture
def drills(place: Path, server_owner: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drills]:
    """A work directory for drills; what a failed one left there is taken away."""
    monkeypatch.setenv("PBKFS_RUN_DIR", str(place / "run"))
    made = Drills(place, server_owner)
    yield made
    for root in made.work_dir.iterdir():
        run_pbkfs("stop", "-D", root / "pgdata", "-m", "immediate", check=False)
        run_pbkfs("unmount", "-D", root / "pgdata", "--force", check=False)


def results(report: dict[str, Any]) -> dict[str, str]:
    """Name of a check -> its result."""
    return {check["name"]: check["result"] for check in report["checks"]}


def check_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The check of a name."""
    (found,) = (check for check in report["checks"] if check["name"] == name)
    assert isinstance(found, dict)
    return found


def newest(catalog: str) -> str:
    """The id of a catalog's newest backup."""
    return max(manifests()[catalog]["backups"])


@pytest.mark.parametrize("catalog", [FULL, DELTAS])
def test_a_good_backup_passes(drills: Drills, catalog_store: CatalogStore, catalog: str) -> None:
    store = catalog_store(catalog)
    script = drills.root / "two things.sql"
    script.write_text("create table made (n int);\nselect count(*) = 0 from made;\n")
    junit = drills.root / "junit.xml"
    report, done = drills.run(
        "-B", store, "-I", "main", "--latest",
        "--sql", "databases: select count(*) > 1 from pg_database",
        "--sql-file", script, "--junit", junit,
    )  # fmt: skip
    assert report["result"] == "passed"
    assert results(report) == {
        "start": "passed",
        "sql databases": "passed",
        "sql two things.sql": "passed",
        "pg_amcheck": "passed",
        "clean stop": "passed",
        "page checksums": "passed",
        "stored pages": "passed",
    }
    assert report["backup"]["id"] == newest(catalog)
    assert report["recovery"]["lsn"]
    assert report["recovery"]["timeline"] == 1
    assert report["postgres_version"].startswith("15.")
    assert set(report["sizes"]) == {"pgdata", "stored", "databases", "diff"}
    assert all(phase["seconds"] >= 0 for phase in report["phases"])
    assert [phase["name"] for phase in report["phases"]][:2] == ["mount", "start"]
    assert done.stdout.splitlines()[0].endswith(f"in {store}: PASSED")
    assert done.stderr == ""

    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert suite.get("name") == "restore drill"
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == list("7000")
    assert [case.get("name") for case in suite.iter("testcase")] == list(results(report))


def test_quiet_says_nothing_of_a_good_backup(drills: Drills, catalog_store: CatalogStore) -> None:
    store = catalog_store(NO_CHECKSUMS)
    report, done = drills.run("-B", store, "-i", newest(NO_CHECKSUMS), "-q")
    assert (done.stdout, done.stderr) == ("", "")
    assert results(report)["page checksums"] == "not enabled"


def test_recovery_to_a_target(drills: Drills, catalog_store: CatalogStore) -> None:
    store = catalog_store(ARCHIVE)
    name = manifests()[ARCHIVE]["pitr"]["restore_point"]
    report, _ = drills.run("-B", store, "--latest", "--recovery-target-name", name)
    assert report["recovery"]["target"] == f"name {name}"
    assert report["recovery"]["timeline"] == 2
    assert report["recovery"]["time"].startswith("2026-")
    report, _ = drills.run(
        "-B", store, "--latest", "--recovery-target", "immediate",
        "--recovery-target-action", "pause", "--sql", "select pg_is_in_recovery()",
    )  # fmt: skip
    assert results(report)["pg_amcheck"] == "not available"
    assert "recovery is paused" in check_of(report, "pg_amcheck")["message"]
    report, done = drills.run("-B", store, "--latest", "--recovery-target-xid", "99999999", code=1)
    assert results(report)["start"] == "failed"
    assert results(report)["page checksums"] == "not run"
    assert "before configured recovery target was reached" in done.stdout


def test_a_copy_of_a_data_directory(
    drills: Drills, newest_archived: ArchivedSource, server_place: Path
) -> None:
    base = newest_archived.copy("stream", server_place, "base").pgdata
    report, _ = drills.run("--base", base, "--sql", "select count(*) = 10 from t")
    assert report["backup"] == {
        "name": f"directory {base}",
        "kind": "directory",
        "path": str(base),
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as root only can")
def test_an_ordinary_user(
    drills: Drills, catalog_store: CatalogStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PBKFS_RUN_DIR")
    uid = 65534
    os.chown(drills.work_dir, uid, uid)
    report = drills.work_dir / "report.json"
    command = [
        "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
        sys.executable, "-m", "pbkfs", "drill", "-B", catalog_store(FULL), "--latest",
        "--work-dir", drills.work_dir, "--report", report,
    ]  # fmt: skip
    words = shlex.join(map(str, command))
    done = subprocess.run(
        [*own_mounts(), "sh", "-ec", f"{open_to_everybody(drills.root)}; exec {words}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results(json.loads(report.read_text())).values()) == {"passed"}
    report.unlink()
    drills.assert_nothing_is_left()


# --- what it finds ----------------------------------------------------------------------------


def find_relation(mounts: Mounts, store: Path) -> tuple[str, str]:
    """A table of a catalog that has some pages: its path and its name as pg_amcheck says it."""
    mount = mounts.mount("-B", store, "-i", "latest")
    server = MountedServer(mount, postgres_bindir(15))
    server.start("--trust-local")
    try:
        found = server.sql(
            "select pg_relation_filepath(c.oid), format('postgres.%I.%I', nspname, relname) "
            "from pg_class c join pg_namespace n on n.oid = relnamespace where relkind = 'r' "
            "and nspname = 'public' and relpersistence = 'p' and pg_relation_size(c.oid) > 65536 "
            "order by pg_relation_size(c.oid) limit 1"
        )
    finally:
        server.stop()
        mounts.discard(mount)
    path, name = found.split("|")
    return path, name


def test_a_damaged_page_fails(drills: Drills, mounts: Mounts, catalog_store: CatalogStore) -> None:
    store = catalog_store(FULL)
    path, name = find_relation(mounts, store)
    stored = store / "backups" / "main" / newest(FULL) / "database" / path
    with open(stored, "r+b") as file:
        file.seek(2 * PAGE_RECORD_BYTES + 8 + 4000)
        file.write(b"\xff" * 200)
    junit = drills.root / "junit.xml"
    report, done = drills.run("-B", store, "--latest", "--junit", junit, code=1)
    assert report["result"] == "failed"
    for check in ("pg_amcheck", "page checksums"):
        found = check_of(report, check)
        assert found["result"] == "failed"
        assert name in found["message"]
    assert path in check_of(report, "page checksums")["message"]
    assert name in done.stdout
    failures = list(ElementTree.parse(junit).getroot().iter("failure"))
    assert len(failures) == 2
    assert all(name in (failure.get("message") or "") for failure in failures)


def test_a_stored_page_that_cannot_be_read_fails(
    drills: Drills, mounts: Mounts, catalog_store: CatalogStore
) -> None:
    store = catalog_store(FULL)
    path, name = find_relation(mounts, store)
    stored = store / "backups" / "main" / newest(FULL) / "database" / path
    with open(stored, "r+b") as file:
        # The header of a record that says which block it is.
        file.seek(2 * PAGE_RECORD_BYTES)
        file.write(b"\xff" * 8)
    report, done = drills.run("-B", store, "--latest", code=1)
    assert name in check_of(report, "pg_amcheck")["message"]
    assert results(report)["stored pages"] == "failed"
    assert any(path in line for line in report["mount_log"])
    assert "the mount's log" in done.stdout


def test_sql_checks_that_fail(drills: Drills, catalog_store: CatalogStore) -> None:
    junit = drills.root / "junit.xml"
    script = drills.root / "wrong.sql"
    script.write_text("select 1;\nselect 1 > 2;\n")
    report, _ = drills.run(
        "-B", catalog_store(FULL), "--latest", "--no-amcheck", "--no-checksums",
        "--sql", "false: select 1 = 2",
        "--sql", "null: select null",
        "--sql", "none: select true where false",
        "--sql", "error: select 1 / 0",
        "--sql", "select 'f' || 'ine'",
        "--sql", "two values: select false, 1",
        "--sql-file", script, "--junit", junit, code=1,
    )  # fmt: skip
    messages = {
        check["name"]: check["message"] for check in report["checks"] if check["result"] == "failed"
    }
    assert messages == {
        "sql false": "returned false",
        "sql null": "returned null",
        "sql none": "returned no row",
        "sql error": "ERROR: division by zero",
        "sql wrong.sql": "returned false",
    }
    assert results(report)["pg_amcheck"] == "not run"
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("skipped")) == ("5", "2")


def test_missing_programs_are_said(drills: Drills, catalog_store: CatalogStore) -> None:
    bindir = drills.root / "bin"
    bindir.mkdir(mode=0o755)
    for program in postgres_bindir(15).iterdir():
        if program.name not in ("pg_amcheck", "pg_checksums"):
            (bindir / program.name).symlink_to(program.resolve())
    report, done = drills.run("-B", catalog_store(FULL), "--latest", "--pg-bindir", bindir)
    for name in ("pg_amcheck", "page checksums"):
        assert results(report)[name] == "not available"
        assert f"not available  {name}: no pg_" in done.stdout


def test_a_missing_extension_is_said(drills: Drills, catalog_store: CatalogStore) -> None:
    # Links won't do: PostgreSQL looks for its files beside its real program.
    copy = drills.root / "pg"
    subprocess.run(["cp", "-a", postgres_bindir(15).parent, copy], check=True)
    (library,) = copy.rglob("amcheck.so")
    library.unlink()
    report, _ = drills.run(
        "-B", catalog_store(FULL), "--latest", "--pg-bindir", copy / "bin", "--no-checksums"
    )
    assert results(report)["pg_amcheck"] == "not available"
    assert "amcheck.so" in check_of(report, "pg_amcheck")["message"]


# --- bad input and early ends -----------------------------------------------------------------


def test_bad_input_has_its_class(drills: Drills, catalog_store: CatalogStore) -> None:
    store = catalog_store(FULL)
    for code, args in (
        (2, []),
        (2, ["-B", store, "--latest", "-i", newest(FULL)]),
        (2, ["-B", store, "--base", store]),
        (2, ["-B", store, "--latest", "--sql", "  "]),
        (2, ["-B", store, "--latest", "--recovery-target-action", "shutdown"]),
        (4, ["-B", store, "--latest", "--sql-file", store / "none.sql"]),
        (4, ["-B", store, "--latest", "--report", store / "none" / "x.json"]),
        (4, ["-B", store, "-i", "NOSUCH"]),
        (10, ["-B", store, "--latest", "--pg-bindir", "/nowhere"]),
    ):
        done = run_pbkfs(*drills.command(*args), check=False)
        assert done.returncode == code, (args, done.stdout, done.stderr)
        assert "pbkfs: error: " in done.stderr
        drills.assert_nothing_is_left()
    inside = run_pbkfs("drill", "-B", store, "--latest", "--work-dir", store, check=False)
    assert inside.returncode == 2
    assert "lies inside of the backup's" in inside.stderr


def test_the_report_of_a_backup_that_is_not_there(
    drills: Drills, catalog_store: CatalogStore
) -> None:
    junit = drills.root / "junit.xml"
    report, _ = drills.run("-B", catalog_store(FULL), "-i", "NOSUCH", "--junit", junit, code=4)
    assert report["result"] == "error"
    assert report["problem"]["slug"] == "not_found"
    (error,) = ElementTree.parse(junit).getroot().iter("error")
    assert "NOSUCH" in (error.get("message") or "")


def test_the_end_of_the_time(drills: Drills, catalog_store: CatalogStore) -> None:
    report, done = drills.run(
        "-B", catalog_store(FULL), "--latest", "--timeout", "4s",
        "--sql", "forever: select pg_sleep(600)", code=12,
    )  # fmt: skip
    assert report["result"] == "timed out"
    assert results(report)["sql forever"] == "not run"
    assert "did not end within 4 s" in done.stderr


def titles(below: Path) -> list[str]:
    """What the servers' processes below a directory are doing."""
    found = []
    for pid in server_pids(below):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(psutil.Process(pid).cmdline()))
    return found


@contextlib.contextmanager
def begun(
    drills: Drills, *args: str | os.PathLike[str], until: str
) -> Iterator[subprocess.Popen[str]]:
    """A drill that has come to the moment ``until`` and, if nobody ends it, stays at an SQL check
    for ever."""
    command = drills.command(*args, "--sql", "forever: select pg_sleep(600)")
    with subprocess.Popen(
        [sys.executable, "-m", "pbkfs", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as drill:

        def has_come() -> bool:
            assert drill.poll() is None, drill.communicate()
            if until == "sql":
                return any("SELECT" in title for title in titles(drills.work_dir))
            if until == "start":
                return bool(server_pids(drills.work_dir))
            return any(root.joinpath("diff").exists() for root in drills.work_dir.iterdir())

        try:
            wait_until(has_come)
            yield drill
        finally:
            drill.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["mount", "start", "sql"])
def test_a_signal_ends_it_and_leaves_nothing(
    drills: Drills, catalog_store: CatalogStore, moment: str, signum: signal.Signals
) -> None:
    path = drills.root / "report.json"
    args = ["-B", catalog_store(DELTAS), "--latest", "--report", path]
    with begun(drills, *args, until=moment) as drill:
        drill.send_signal(signum)
        out, err = drill.communicate(timeout=60)
    assert drill.returncode == 128 + signum, (out, err)
    assert f"interrupted: stopped by {signum.name}" in err
    drills.assert_nothing_is_left()
    report = json.loads(path.read_text())
    assert report["result"] == "interrupted"
    assert results(report)["sql forever"] == "not run"


def test_the_death_of_the_worker_leaves_nothing(
    drills: Drills, catalog_store: CatalogStore
) -> None:
    args = ["-B", catalog_store(FULL), "--latest"]
    with begun(drills, *args, until="sql") as drill:
        (root,) = drills.work_dir.iterdir()
        worker = read_owner(root / "diff")
        assert worker is not None
        os.kill(worker.pid, signal.SIGKILL)
        for pid in server_pids(drills.work_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        out, err = drill.communicate(timeout=60)
    assert drill.returncode == errors.HostError.exit_code, (out, err)
    assert "the mount's worker died" in err
    assert "failed" in out
    drills.assert_nothing_is_left()


def test_keep_leaves_it_for_inspection(
    drills: Drills, catalog_store: CatalogStore, newest_programs: Programs
) -> None:
    path = drills.root / "report.json"
    args = drills.command("-B", catalog_store(FULL), "--latest", "--keep", "--report", path)
    out = run_pbkfs(*args).stdout
    kept = json.loads(path.read_text())["kept"]
    pgdata, diff = kept["mount point"], kept["diff"]
    assert pgdata in out
    assert os.path.ismount(pgdata)
    started = run_pbkfs("start", "-D", pgdata, "--trust-local", "--format", "json")
    assert newest_programs.sql(json.loads(started.stdout)["uri"], "select 1") == "1"
    run_pbkfs("stop", "-D", pgdata)
    run_pbkfs("unmount", "-D", pgdata)
    run_pbkfs("cleanup", "-d", diff)
    shutil.rmtree(Path(diff).parent)
    drills.assert_nothing_is_left()
