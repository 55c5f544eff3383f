"""Trunks of every source through the real command line, with real servers."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fix_catalogs import CatalogStore
from fix_postgres import Cluster, Programs, free_port, wait_until
from fix_trunks import Heads, kill
from machine import postgres_majors


def test_default_trunk_is_made_when_it_is_needed(heads: Heads) -> None:
    made = heads.json("branch", "create", "a")
    assert made["parent"] == "main"
    heads.sql("a", "create table t ()")
    info = heads.run("trunk", "info").stdout
    for label in ("Status", "Port", "Database", "PG Version", "WAL Level", "Started", "Connection"):
        assert f"{label}:" in info
    table = heads.run("trunk", "list").stdout.splitlines()
    assert " ".join(table[0].split()) == "NAME STATUS PORT DATABASE WAL LEVEL"
    assert table[1].split()[:2] == ["main", "running"]
    assert "can't be destroyed" in heads.fail(8, "trunk", "destroy", "main", "--yes")


def test_role_and_database_of_the_settings(heads: Heads) -> None:
    heads.env |= {"PGBRANCH_DEFAULT_PG_USER": "boss", "PBKFS_DEFAULT_PG_DB": "my Shop"}
    made = heads.json("trunk", "create", "shop", "--empty", "--no-start")
    assert made["database"] == "my Shop"
    heads.branch("a", "shop")
    assert heads.sql("a", "select current_user, current_database()") == "boss|my Shop"
    heads.run("trunk", "start", "shop")
    assert heads.sql("shop", "select current_database()", kind="trunk") == "my Shop"


def test_empty_trunk_of_a_major_that_is_named(
    heads: Heads, all_programs: Callable[[int], Programs]
) -> None:
    oldest = min(postgres_majors())
    heads.env["PBKFS_PG_BIN_DIR"] = str(all_programs(oldest).bindir)
    port = str(free_port())
    made = heads.json(
        "trunk", "create", "old", "--empty", "--pg-version", str(oldest), "--port", port
    )
    assert (made["port"], made["pg_version"].split(".")[0]) == (int(port), str(oldest))
    heads.branch("a", "old")
    assert heads.sql("a", "show server_version_num").startswith(str(oldest))
    assert "exclude each other" in heads.fail(
        2, "trunk", "create", "x", "--pg-version", "18", "--from-dir", "/tmp"
    )


def _programs_whose_initdb_waits(heads: Heads, place: Path) -> Path:
    """Return a bindir; its initdb makes the file ``place/begun`` and waits for ``place/go``."""
    bindir = place / "bin"
    bindir.mkdir(parents=True)
    place.chmod(0o777)
    for program in heads.programs.bindir.iterdir():
        if program.name != "initdb":
            (bindir / program.name).symlink_to(program)
    (bindir / "initdb").write_text(
        f"#!/bin/sh\n: > {place}/begun\nwhile [ ! -e {place}/go ]; do sleep 0.05; done\n"
        f'exec {heads.programs.bindir}/initdb "$@"\n'
    )
    (bindir / "initdb").chmod(0o755)
    return bindir


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_port_that_is_taken_while_a_trunk_is_made(
    heads: Heads, place: Path, *, is_asked_for: bool
) -> None:
    port = int(heads.env["PBKFS_DEFAULT_TRUNK_PORT"])
    bindir = _programs_whose_initdb_waits(heads, place / "slow")
    options = ["--port", str(port)] if is_asked_for else []
    creation = heads.spawn(
        "trunk", "create", "t", "--empty", *options, PBKFS_PG_BIN_DIR=str(bindir)
    )
    try:
        wait_until((place / "slow" / "begun").exists)
        assert heads.info("t", "trunk")["port"] == port
        with socket.create_server(("127.0.0.1", port)):
            (place / "slow" / "go").touch()
            _, said = creation.communicate(timeout=60)
            if is_asked_for:
                assert creation.returncode == 8
                assert f"port {port} of trunk 't' is in use" in said
                assert heads.json("trunk", "list")["trunks"] == []
            else:
                assert creation.returncode == 0, said
                assert heads.info("t", "trunk")["port"] > port
                assert heads.sql("t", "select 1", kind="trunk") == "1"
    finally:
        if creation.poll() is None:
            kill(creation)


def test_trunk_of_a_backup(heads: Heads, catalog_store: CatalogStore) -> None:
    made = heads.json(
        "trunk",
        "create",
        "prod",
        "--from-backup",
        catalog_store("a_full_none_stream"),
        "-i",
        "latest",
    )
    assert made["status"] == "running"
    heads.branch("a", "prod")
    assert heads.sql("a", "select 1") == "1"


def test_a_name_is_given_once(heads: Heads, basebackup: Path) -> None:
    heads.trunk("prod", basebackup, "--no-start")
    said = "a trunk named 'prod' exists already"
    assert heads.fail(8, "trunk", "create", "prod", "--from-dir", str(basebackup)) == said
    assert heads.fail(8, "trunk", "create", "prod", "--empty") == said


def test_trunk_that_was_never_started_is_branched_as_it_is(heads: Heads, basebackup: Path) -> None:
    made = heads.trunk("prod", basebackup, "--no-start")
    assert made["status"] == "stopped"
    heads.branch("a", "prod")
    heads.branch("b", "prod")
    heads.sql("a", "delete from unhinted")
    assert heads.sql("b", "select count(*) from unhinted") == "10000"
    heads.run("branch", "reset", "a", "--yes")
    assert heads.sql("a", "select count(*) from unhinted") == "10000"
    # Started later, it is sealed like every other.
    heads.run("trunk", "start", "prod")
    heads.sql("prod", "delete from unhinted where n > 10", kind="trunk")
    heads.branch("c", "prod")
    assert heads.sql("c", "select count(*) from unhinted") == "10"
    heads.check_cluster("c")


def test_trunk_of_a_running_server(heads: Heads, newest_cluster: Cluster) -> None:
    newest_cluster.start()
    newest_cluster.sql("create table t as select generate_series(1, 5) as n")
    heads.json("trunk", "create", "copy", "--from-url", newest_cluster.uri)
    heads.branch("a", "copy")
    assert heads.sql("a", "select count(*) from t") == "5"
    newest_cluster.stop()
    url = "postgresql://postgres:secret@127.0.0.1:1/postgres"
    said = heads.fail(10, "trunk", "create", "x", "--from-url", url)
    assert "secret" not in said
    heads.run("trunk", "destroy", "copy", "--yes")
    assert list((heads.layout.root / "backups").iterdir()) == []


def test_trunk_stop_leaves_branches_alone(heads: Heads, pgdata_template: Path) -> None:
    heads.trunk("prod", pgdata_template)
    heads.branch("a", "prod")
    heads.run("trunk", "stop", "prod")
    assert heads.sql("a", "select 1") == "1"
    assert heads.info("prod", "trunk")["status"] == "stopped"
    assert "is stopped" in heads.fail(8, "trunk", "connect", "prod", "--uri")


def test_destroy_asks_and_takes_yes_for_all_that_it_named(
    heads: Heads, pgdata_template: Path
) -> None:
    heads.trunk("prod", pgdata_template)
    heads.branch("a", "prod")
    assert heads.on_terminal("n", "trunk", "destroy", "prod")[0] == 130
    assert heads.names() == ["a"]
    code, said = heads.on_terminal("y", "trunk", "destroy", "prod")
    assert "Destroy trunk 'prod' and all that was branched from it (a)? [y/N]:" in said
    assert code == 0, said
    assert heads.json("trunk", "list")["trunks"] == []
    assert heads.leftovers() == []


def test_refresh(heads: Heads, pgdata_template: Path, stopped_cluster: Path) -> None:
    heads.trunk("prod", pgdata_template)
    heads.sql("prod", "create table old ()", kind="trunk")
    heads.branch("a", "prod")
    uri = heads.uri("prod", "trunk")
    heads.run("trunk", "refresh", "prod", "--from-dir", stopped_cluster, "--yes")
    assert heads.uri("prod", "trunk") == uri
    heads.branch("b", "prod")
    assert heads.sql("a", "select to_regclass('old') is not null") == "t"
    assert heads.sql("b", "select count(*) from unhinted") == "10000"
    heads.run("branch", "restart", "a")
    assert heads.sql("a", "select to_regclass('old') is not null") == "t"
    heads.run("branch", "destroy", "a", "--yes")
    assert heads.leftovers() == []


def test_refresh_to_a_backup_that_is_named(heads: Heads, catalog_store: CatalogStore) -> None:
    store = catalog_store("a_full_none_stream")
    found = json.loads(heads.run("backups", "-B", store, "--format", "json").stdout)
    backups = [backup["backup_id"] for backup in found if backup["is_mountable"]]
    made = heads.json("trunk", "create", "prod", "--from-backup", store, "-i", backups[0])
    assert backups[0] in made["source"]
    heads.branch("a", "prod")
    heads.sql("prod", "create table mine ()", kind="trunk")
    heads.run("trunk", "refresh", "prod", "--backup-id", backups[-1], "--yes")
    assert backups[-1] in heads.info("prod", "trunk")["source"]
    assert heads.sql("prod", "select to_regclass('mine') is null", kind="trunk") == "t"
    heads.run("branch", "restart", "a")
    assert heads.sql("a", "select 1") == "1"
    # What can't be mounted leaves it as it is.
    assert heads.fail(4, "trunk", "refresh", "prod", "-i", "NOPE00", "--yes")
    assert backups[-1] in heads.info("prod", "trunk")["source"]
    assert heads.sql("prod", "select 1", kind="trunk") == "1"


@pytest.mark.parametrize("source", ["--empty"])
def test_sources_exclude_each_other(heads: Heads, source: str) -> None:
    assert "exclude each other" in heads.fail(
        2, "trunk", "create", "x", source, "--from-dir", "/tmp"
    )
    assert "need a store" in heads.fail(2, "trunk", "create", "x", "-i", "ABC")


def test_trunk_of_a_directory_that_is_set_up_for_replication(
    heads: Heads, newest_cluster: Cluster
) -> None:
    newest_cluster.start()
    newest_cluster.sql("alter system set wal_level = logical")
    newest_cluster.stop()
    newest_cluster.start()
    newest_cluster.sql(
        "select pg_create_physical_replication_slot('p', true)",
        "select pg_create_logical_replication_slot('l', 'pgoutput')",
    )
    newest_cluster.stop()
    made = heads.trunk("prod", newest_cluster.pgdata)
    assert made["wal_level"] == "logical"
    assert heads.sql("prod", "show wal_level", kind="trunk") == "logical"
    assert heads.sql("prod", "select count(*) from pg_replication_slots", kind="trunk") == "0"
    assert sorted(path.name for path in (newest_cluster.pgdata / "pg_replslot").iterdir()) == [
        "l",
        "p",
    ]
    # What is asked for counts.
    heads.trunk("low", newest_cluster.pgdata, "--wal-level", "replica")
    assert heads.sql("low", "show wal_level", kind="trunk") == "replica"
    heads.branch("a", "low")
    assert heads.sql("a", "show wal_level") == "replica"


def test_trunk_that_does_not_start(heads: Heads, newest_cluster: Cluster) -> None:
    for wal_segment in (newest_cluster.pgdata / "pg_wal").glob("0*"):
        wal_segment.unlink()
    done = heads.run("trunk", "create", "x", "--from-dir", newest_cluster.pgdata, check=False)
    assert done.returncode == 10
    # All that there is to be known is in the message, as the log goes with the trunk.
    assert "could not locate a valid checkpoint record" in done.stderr
    assert "gone again" in done.stderr
    assert "postgres.log" not in done.stderr
    assert heads.leftovers() == []
    assert heads.json("trunk", "list")["trunks"] == []
