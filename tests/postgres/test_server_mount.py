"""Servers on mounts: where their files go, a standby's copy, recovery to a point."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from fix_catalogs import CatalogStore, manifests
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import ArchivedSource, Programs, is_running, wait_until
from machine import postgres_bindir
from sql_truth import differences, read_truth

ARCHIVE_CATALOG = "c_full_page_page_archive_pglz"


def start(mount: Mount, *options: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """Start a server on a mount; returns the command's JSON and its notices."""
    done = run_pbkfs("start", "-D", mount.pgdata, "--format", "json", *options)
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def base(newest_archived: ArchivedSource, server_place: Path) -> Path:
    """A base for a mount: a backup with its WAL."""
    return newest_archived.copy("stream", server_place, "base").pgdata


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is in a directory, to see that nothing changed."""
    found = {}
    for entry in sorted(path.rglob("*")):
        status = entry.lstat()
        is_file = entry.is_file() and not entry.is_symlink()
        found[str(entry)] = (
            status.st_mode,
            status.st_mtime_ns,
            entry.read_bytes() if is_file else b"",
        )
    return found


def answers(path: Path) -> bool:
    """Whether a mount's worker is still there. What it left unanswered ends with ECONNABORTED."""
    try:
        os.listdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return error.errno != errno.ENOTCONN
    return True


def test_log_and_state_lie_in_the_diff(
    base: Path, mounts: Mounts, newest_programs: Programs
) -> None:
    before = tree(base)
    mount = mounts.mount("--base", base)
    started, _ = start(mount)
    assert started["log"] == str(mount.server_log)
    assert "database system is ready" in mount.server_log.read_text()
    assert newest_programs.sql(started["uri"], "select count(*) from t") == "10"
    status = json.loads(run_pbkfs("status", "-D", mount.pgdata, "--format", "json").stdout)
    assert status["data_directory"] == str(mount.pgdata)
    assert status["log"] == str(mount.server_log)
    visible = set(os.listdir(mount.pgdata))
    assert not [name for name in visible if "pbkfs" in name or name.endswith((".log", ".sock"))]
    run_pbkfs("stop", "-D", mount.pgdata)
    mount.unmount()
    assert tree(base) == before


def test_the_copy_of_a_standby_with_its_configuration_elsewhere(
    base: Path, mounts: Mounts, newest_programs: Programs
) -> None:
    (base / "standby.signal").touch()
    (base / "pg_hba.conf").unlink()
    with open(base / "postgresql.conf", "a") as file:
        file.write("include_dir 'conf.d'\ninclude = '/etc/no-such.conf'\nwork_mem = '6MB'\n")
        file.write("primary_conninfo = 'host=192.0.2.1'\n")
    newest_programs.user.give(base)
    before = tree(base)
    mount = mounts.mount("--base", base)
    started, notices = start(mount, "--trust-local")
    for said in (
        "removed standby.signal",
        "has no pg_hba.conf: wrote a cautious one",
        "/etc/no-such.conf is not in the backup; the include is commented out",
        "conf.d is not in the backup",
    ):
        assert said in notices
    uri = started["uri"]
    assert newest_programs.sql(uri, "select pg_is_in_recovery()") == "f"
    assert newest_programs.sql(uri, "show work_mem") == "6MB"
    assert newest_programs.sql(uri, "insert into t values (11)", "select max(n) from t") == "11"
    run_pbkfs("stop", "-D", mount.pgdata)
    mount.unmount()
    assert tree(base) == before

    mount.mount()
    started, notices = start(mount, "--trust-local")
    assert notices == ""
    assert newest_programs.sql(started["uri"], "select max(n) from t") == "11"


def test_settings_that_this_host_does_not_know(
    base: Path, mounts: Mounts, newest_programs: Programs
) -> None:
    """PostgreSQL checks what its files say even where the command line says something else."""
    (base / "conf.d").mkdir()
    (base / "conf.d" / "more.conf").write_text("lc_time = 'xx_XX.UTF-8'\n")
    with open(base / "postgresql.conf", "a") as file:
        file.write(
            "include_dir 'conf.d'\nlc_messages = 'xx_XX.UTF-8'\nwork_mem = '6MB'\n"
            "TimeZone = 'Mars/Olympus'\nvendors_parameter = on\nTimeZone = 'Mars/Olympus'\n"
        )
    with open(base / "postgresql.auto.conf", "a") as file:
        file.write("lc_monetary = 'xx_XX.UTF-8'\n")
    newest_programs.user.give(base)
    before = tree(base)
    mount = mounts.mount("--base", base)
    started, notices = start(mount)
    for name in ("lc_messages", "lc_time", "lc_monetary", "TimeZone", "vendors_parameter"):
        assert f"{name} = " in notices
    uri = started["uri"]
    assert newest_programs.sql(uri, "show work_mem") == "6MB"
    assert newest_programs.sql(uri, "show timezone") == "GMT"
    run_pbkfs("stop", "-D", mount.pgdata)
    more = (mount.pgdata / "conf.d" / "more.conf").read_text()
    assert more == "# pbkfs: not possible here: lc_time = 'xx_XX.UTF-8'\n"
    assert start(mount)[1] == ""
    run_pbkfs("stop", "-D", mount.pgdata)
    mount.unmount()
    assert tree(base) == before


def test_a_directory_base_recovers_from_a_named_archive(
    newest_archived: ArchivedSource, mounts: Mounts, newest_programs: Programs, server_place: Path
) -> None:
    base = newest_archived.copy("bare", server_place, "base").pgdata
    mount = mounts.mount("--base", base)
    done = run_pbkfs("start", "-D", mount.pgdata, "--recovery-target", "latest", check=False)
    assert done.returncode == 2
    assert "no WAL archive is known" in done.stderr
    archive = newest_archived.archive
    started, _ = start(mount, "--recovery-target", "latest", "--wal-archive", archive)
    assert newest_programs.sql(started["uri"], "select max(n) from t") == "30"
    assert not (mount.pgdata / "recovery.signal").exists()


def test_a_server_whose_mount_died_can_be_stopped(base: Path, mounts: Mounts) -> None:
    mount = mounts.mount("--base", base)
    started, _ = start(mount)
    worker = json.loads((mount.diff / "binding.json").read_text())["pid"]
    os.kill(worker, signal.SIGKILL)
    # Its threads end one after the other, and with the last one the mount dies.
    wait_until(lambda: not answers(mount.pgdata))
    for verb in ("start", "status"):
        done = run_pbkfs(verb, "-D", mount.pgdata, check=False)
        assert done.returncode == 3, done.stderr
        assert "a mount whose worker is gone" in done.stderr
    run_pbkfs("stop", "-D", mount.pgdata, "-m", "immediate")
    assert not is_running(started["pid"])
    done = run_pbkfs("stop", "-D", mount.pgdata, check=False)
    assert done.returncode == 3
    mount.unmount("--force")
    mount.mount()
    start(mount)


def test_a_mount_that_dies_while_its_server_starts(
    base: Path, mounts: Mounts, newest_programs: Programs, server_place: Path
) -> None:
    """The server may hang without its files; who starts it must not."""
    bindir = server_place / "bin"
    bindir.mkdir()
    for program in newest_programs.bindir.iterdir():
        (bindir / program.name).symlink_to(program)
    (bindir / "postgres").unlink()
    real = newest_programs.bindir / "postgres"
    script = f'case " $* " in *" -C "*) ;; *" -c port="*) exec sleep 600;; esac\nexec {real} "$@"\n'
    (bindir / "postgres").write_text(f"#!/bin/sh\n{script}")
    (bindir / "postgres").chmod(0o755)
    mount = mounts.mount("--base", base)
    starting = subprocess.Popen(
        [sys.executable, "-m", "pbkfs", "start", "-D", mount.pgdata, "--pg-bindir", bindir],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        this = psutil.Process(starting.pid)
        wait_until(lambda: any("sleep" in child.name() for child in this.children()))
        [server] = [child for child in this.children() if "sleep" in child.name()]
        os.kill(json.loads((mount.diff / "binding.json").read_text())["pid"], signal.SIGKILL)
        _, said = starting.communicate(timeout=30)
    finally:
        starting.kill()
        starting.communicate()
    assert starting.returncode == 3, said
    assert "a mount whose worker is gone" in said
    assert not server.is_running()
    mount.unmount("--force")
    mount.mount()
    start(mount)


# --- a real catalog ---------------------------------------------------------------------------


def _restores() -> list[Any]:
    """Every restore of the catalog with an archive: backup, our options, its SQL truth."""
    found = []
    manifest = manifests().get(ARCHIVE_CATALOG)
    for backup_id, backup in manifest["backups"].items() if manifest else ():
        for restore in backup["restores"]:
            options = [arg for arg in restore["args"] if arg.startswith("--recovery-target")]
            options = options or ["--recovery-target=latest"]
            found.append(pytest.param(backup_id, options, restore, id=f"{backup_id} {options[0]}"))
    return found


@pytest.mark.parametrize(("backup_id", "options", "restore"), _restores())
def test_recovery_from_a_stores_archive(
    catalog_store: CatalogStore,
    mounts: Mounts,
    backup_id: str,
    options: list[str],
    restore: dict[str, Any],
) -> None:
    """The state is the same as after the real tool's restore to that point."""
    if not (postgres_bindir(15) / "postgres").exists():
        pytest.skip("PostgreSQL 15 is not here")
    store = catalog_store(ARCHIVE_CATALOG)
    before = tree(store)
    mount = mounts.mount("-B", store, "-I", "main", "-i", backup_id)
    started, _ = start(mount, *options)
    assert differences(read_truth(started["uri"]), restore["sql"], sizes=False) == []
    run_pbkfs("stop", "-D", mount.pgdata)
    # It is over: another point needs another diff.
    done = run_pbkfs("start", "-D", mount.pgdata, "--recovery-target", "latest", check=False)
    assert done.returncode == 10
    assert "has been recovered already" in done.stderr
    started, _ = start(mount)
    assert differences(read_truth(started["uri"]), restore["sql"], sizes=False) == []
    run_pbkfs("stop", "-D", mount.pgdata)
    mount.unmount()
    assert tree(store) == before


def test_wal_get_from_a_stores_archive(catalog_store: CatalogStore, tmp_path: Path) -> None:
    if ARCHIVE_CATALOG not in manifests():
        pytest.skip("the catalog with an archive is not here")
    store = catalog_store(ARCHIVE_CATALOG)
    packed = max((store / "wal" / "main").glob("*.gz"))
    target = tmp_path / "got"
    run_pbkfs("wal-get", "-B", store, "--instance", "main", packed.stem, target)
    assert target.read_bytes() == gzip.decompress(packed.read_bytes())
