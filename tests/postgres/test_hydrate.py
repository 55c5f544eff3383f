"""A real chain, hydrated while pgbench works on it, detached, and started without pbkfs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fix_catalogs import CatalogStore, manifests, truth
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Programs, wait_until
from machine import postgres_bindir, postgres_majors
from servers import MountedServer
from sql_truth import differences, read_truth

CATALOG = "b_full_delta_delta_zlib_stream"
WORK_SECONDS = "8"


def hydration(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = mount.stat()["hydration"]
    return found


def newest_of(catalog: str) -> tuple[dict[str, Any], str]:
    manifest = manifests()[catalog]
    good = [name for name, backup in manifest["backups"].items() if truth(backup)]
    return manifest, good[-1]


@pytest.fixture
def mount(mounts: Mounts, catalog_store: CatalogStore) -> Mount:
    """A mount of the newest backup of a chain of three, not mounted yet."""
    if CATALOG not in manifests() or int(manifests()[CATALOG]["pg_major"]) not in postgres_majors():
        pytest.skip(f"catalog {CATALOG} or its PostgreSQL is not here")
    manifest, backup_id = newest_of(CATALOG)
    store = catalog_store(CATALOG)
    return mounts.prepare("-B", store, "--instance", manifest["instance"], "-i", backup_id)


@pytest.mark.timeout(600)
def test_hydrated_under_load_and_detached(mount: Mount, all_programs: Any) -> None:
    major = int(manifests()[CATALOG]["pg_major"])
    programs: Programs = all_programs(major)
    server = MountedServer(mount, postgres_bindir(major))
    mount.mount("--hydrate=1MB")
    server.start()
    server.run("pgbench", "-i", "-q", "-s", "2")
    pgbench = server.begin("pgbench", "-T", WORK_SECONDS, "-c", "4", "-j", "2")
    wait_until(lambda: hydration(mount)["bytes_done"] > 2 << 20)
    found = hydration(mount)
    assert found["state"] == "running"
    assert found["rate_limit"] == 1 << 20
    assert 0 < found["files_done"] < found["files_total"]
    assert "hydration:" in run_pbkfs("stat", "-D", mount.pgdata).stdout
    assert pgbench.wait(60) == 0, mount.server_log.read_text()[-3000:]

    # An unmount in the middle keeps what is there; the next mount goes on.
    server.stop()
    before = hydration(mount)
    assert before["state"] == "running"
    assert run_pbkfs("hydrate", "-D", mount.pgdata, "--stop").returncode == 0
    wait_until(lambda: hydration(mount)["state"] == "stopped")
    mount.unmount()
    mount.mount()
    assert hydration(mount)["state"] == "off"
    run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", "1MB/s")
    wait_until(lambda: hydration(mount)["state"] == "running")
    assert hydration(mount)["bytes_done"] >= before["bytes_done"] * 3 // 4
    server.start()
    pgbench = server.begin("pgbench", "-T", WORK_SECONDS, "-c", "4", "-j", "2")
    watched = run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", "0", "--watch")
    assert "done" in watched.stdout
    assert "%" in watched.stderr
    found = hydration(mount)
    assert (found["state"], found["error"]) == ("done", None)
    assert found["bytes_done"] == found["bytes_total"]
    assert found["files_done"] == found["files_total"]
    assert pgbench.wait(60) == 0, mount.server_log.read_text()[-3000:]
    server.check_cluster()

    # The server has to be stopped first; then the mount becomes the plain directory.
    done = run_pbkfs("detach", "-D", mount.pgdata, check=False)
    assert done.returncode == 8
    assert "a server runs on" in done.stderr
    worked = read_truth(server.uri)
    server.stop()
    inode = (mount.diff / "pg_wal").stat().st_ino
    done = run_pbkfs("detach", "-D", mount.pgdata)
    mount.is_mounted = False
    assert done.stdout.startswith(f"detached: {mount.pgdata}")
    assert not mount.diff.exists()
    assert not os.path.ismount(mount.pgdata)
    assert not (mount.pgdata / "pg_wal").is_symlink()
    assert (mount.pgdata / "pg_wal").stat().st_ino != inode

    start_plainly(programs, mount.pgdata, worked)


def start_plainly(programs: Programs, pgdata: Path, expected: dict[str, Any]) -> None:
    """Start with pg_ctl and nothing else; what SQL sees is what was there."""
    sockets = Path(pgdata.parent) / "s"
    sockets.mkdir()
    programs.user.give(sockets)
    options = f"-c listen_addresses='' -c unix_socket_directories='{sockets}' -c port=5432"
    programs.run("pg_ctl", "-w", "-D", pgdata, "-l", sockets / "log", "-o", options, "start")
    try:
        uri = f"postgresql://postgres@/postgres?host={sockets}"
        assert differences(read_truth(uri), expected) == []
        programs.run(
            "pg_amcheck",
            "-h",
            sockets,
            "-U",
            "postgres",
            "-a",
            "--install-missing",
            "--heapallindexed",
        )
        programs.sql(uri, "create table after_all as select generate_series(1, 1000) as i")
    finally:
        programs.run("pg_ctl", "-w", "-D", pgdata, "-m", "fast", "stop")


@pytest.mark.timeout(300)
def test_detach_hydrates_what_is_missing(mount: Mount, all_programs: Any) -> None:
    manifest, backup_id = newest_of(CATALOG)
    restore = truth(manifest["backups"][backup_id])
    assert restore is not None
    mount.mount()
    done = run_pbkfs("detach", "-D", mount.pgdata, "--no-hydrate", check=False)
    assert done.returncode == 8
    assert "still needs" in done.stderr
    assert os.path.ismount(mount.pgdata)
    target = mount.pgdata.with_name("standalone")
    run_pbkfs("detach", "-D", mount.pgdata, "--to", target, "--keep-diff")
    mount.is_mounted = False
    assert list(mount.pgdata.iterdir()) == []
    done = run_pbkfs("mount", "-D", mount.pgdata, "-d", mount.diff, check=False)
    assert done.returncode == 7
    assert f"was detached to {target}" in done.stderr
    run_pbkfs("cleanup", "-d", mount.diff)
    start_plainly(all_programs(int(manifest["pg_major"])), target, restore["sql"])
    shutil.rmtree(target)


def test_a_store_that_vanishes_ends_hydration_with_a_message(
    mounts: Mounts, catalog_store: CatalogStore
) -> None:
    """The files that were brought up stay readable, and the command says what is wrong."""
    manifest, backup_id = newest_of(CATALOG)
    store = catalog_store(CATALOG)
    mount = mounts.mount("-B", store, "--instance", manifest["instance"], "-i", backup_id)
    run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", "1MB")
    wait_until(lambda: hydration(mount)["bytes_done"] > 1 << 20)
    for path in (store / "backups" / manifest["instance"]).glob("*/database/base/*/*"):
        path.unlink()
    done = run_pbkfs("hydrate", "-D", mount.pgdata, "--rate", "0", "--watch", check=False)
    assert done.returncode == 9
    assert "can't be read from below" in done.stderr
    found = json.loads(run_pbkfs("stat", "-D", mount.pgdata, "-o", "json").stdout)["hydration"]
    assert found["state"] == "incomplete"
    assert 0 < found["files_done"] < found["files_total"]
    assert (mount.pgdata / "PG_VERSION").read_text().strip() == manifest["pg_major"]
    mount.unmount()
