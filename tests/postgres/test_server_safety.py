"""What a server started on a copy must never do, with a configuration that makes it want to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fix_postgres import ArchivedSource, Cluster, Programs, copy_tree, free_port
from machine import MAJORS

LIBRARIES = "pg_cron, pg_stat_statements, no_such_library, $libdir/no_such_other"


def poison(cluster: Cluster, witness: Path) -> None:
    """Configure everything that reaches out of a PGDATA; each command leaves a file behind."""
    elsewhere = witness / "elsewhere"
    elsewhere.mkdir()
    cluster.configure(
        data_directory=str(elsewhere),
        hba_file=str(elsewhere / "pg_hba.conf"),
        ident_file="/etc/no-such/pg_ident.conf",
        external_pid_file=str(witness / "external.pid"),
        port="5999",
        listen_addresses="*",
        unix_socket_directories=str(elsewhere),
        unix_socket_group="no-such-group",
        cluster_name="production",
        archive_mode="always",
        archive_command=f"touch {witness}/archived",
        archive_cleanup_command=f"touch {witness}/cleaned",
        recovery_end_command=f"touch {witness}/ended",
        restore_command=f"touch {witness}/restored",
        primary_conninfo="host=192.0.2.1 connect_timeout=1",
        primary_slot_name="production",
        synchronous_standby_names="FIRST 1 (ghost)",
        synchronous_commit="on",
        shared_preload_libraries=LIBRARIES,
        session_preload_libraries="no_such_session_library",
        local_preload_libraries="no_such_local_library",
        logging_collector="on",
        log_directory=str(elsewhere),
        log_destination="csvlog",
        ssl="on",
        ssl_cert_file="/etc/no-such/server.crt",
        huge_pages="on",
        recovery_target_time="2001-01-01",
        max_logical_replication_workers="7",
    )
    major = cluster.programs.major
    if major < 15:
        cluster.configure(stats_temp_directory=str(elsewhere))
    if major < 16:
        cluster.configure(promote_trigger_file=str(witness / "trigger"))
        cluster.configure(vacuum_defer_cleanup_age="0")
    if major >= 17:
        cluster.configure(sync_replication_slots="on")
    cluster.programs.user.give(witness)


def test_a_poisoned_configuration(
    archived: ArchivedSource, programs: Programs, server_place: Path
) -> None:
    cluster = archived.copy("stream", server_place)
    witness = server_place / "witness"
    witness.mkdir()
    poison(cluster, witness)
    port = str(free_port())
    cluster.start("--port", port)
    # Would wait for ever for production's standby, and open the connection to it.
    assert cluster.sql("set statement_timeout = '20s'", "create table mine as select 1 as n") == ""
    cluster.sql("select pg_switch_wal()", "checkpoint")

    expected = {
        "data_directory": str(cluster.pgdata),
        "hba_file": str(cluster.pgdata / "pg_hba.conf"),
        "ident_file": str(cluster.pgdata / "pg_ident.conf"),
        "port": port,
        "listen_addresses": "127.0.0.1",
        "archive_mode": "off",
        "archive_command": "(disabled)",
        "archive_cleanup_command": "",
        "recovery_end_command": "",
        "restore_command": "",
        "primary_conninfo": "",
        "primary_slot_name": "",
        "synchronous_standby_names": "",
        "shared_preload_libraries": "pg_stat_statements",
        "session_preload_libraries": "",
        "local_preload_libraries": "",
        "logging_collector": "off",
        "log_destination": "stderr",
        "ssl": "off",
        "huge_pages": "try",
        "unix_socket_group": "",
        "max_logical_replication_workers": "0",
        "recovery_init_sync_method": "syncfs",
    }
    if programs.major < 15:
        expected["stats_temp_directory"] = "pg_stat_tmp"
    if programs.major < 16:
        expected["promote_trigger_file"] = ""
    if programs.major >= 15:
        expected["archive_library"] = ""
    if programs.major >= 17:
        expected["sync_replication_slots"] = "off"
    names = ", ".join(f"'{name}'" for name in expected)
    rows = cluster.sql(f"select name || '=' || setting from pg_settings where name in ({names})")
    assert dict(row.split("=", 1) for row in rows.splitlines()) == expected
    assert cluster.setting("cluster_name") != "production"
    cluster.stop()
    assert sorted(path.name for path in witness.iterdir()) == ["elsewhere"]
    assert list((witness / "elsewhere").iterdir()) == []

    for said in (
        "left out pg_cron: it runs the original's jobs",
        "left out no_such_library: it is not installed here",
        "left out no_such_other",
        "left out no_such_session_library",
        "left out no_such_local_library",
        "ssl is off: /etc/no-such/server.crt",
        "unix_socket_group = 'no-such-group'",
    ):
        assert said in cluster.notices, said


def test_the_users_own_settings_win(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.configure(shared_preload_libraries="pg_stat_statements")
    cluster.start("-c", "shared_preload_libraries=auto_explain", "-c", "cluster_name=mine")
    assert cluster.setting("shared_preload_libraries") == "auto_explain"
    assert cluster.setting("cluster_name") == "mine"


def test_all_is_synced_before_a_recovery_without_full_page_images(newest_cluster: Cluster) -> None:
    newest_cluster.configure(full_page_writes="off")
    newest_cluster.start()
    assert newest_cluster.setting("recovery_init_sync_method") == "fsync"
    newest_cluster.stop()


def test_nothing_is_persisted(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    files = ("postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf")
    before = {name: (cluster.pgdata / name).read_bytes() for name in files}
    cluster.start()
    cluster.stop()
    assert {name: (cluster.pgdata / name).read_bytes() for name in files} == before


def test_subscriptions_do_not_connect(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.start()
    cluster.sql(
        "create subscription s connection 'host=127.0.0.1 port=1' publication p "
        "with (connect = false, enabled = false, slot_name = 's')",
        "alter subscription s enable",
    )
    workers = cluster.sql(
        "select count(*) from pg_stat_activity where backend_type like 'logical replication%'"
    )
    assert workers == "0"


def test_sizes_that_hot_standby_needs_come_from_the_control_file(
    newest_archived: ArchivedSource, server_place: Path
) -> None:
    """Without them a paused recovery stops: insufficient parameter settings."""
    cluster = newest_archived.copy("bare", server_place)
    configuration = cluster.pgdata / "postgresql.conf"
    text = configuration.read_text()
    assert "max_connections = 42" in text
    configuration.write_text(text.replace("max_connections = 42", "max_connections = 20"))
    cluster.start(
        "--recovery-target-name", newest_archived.points["name"],
        "--recovery-target-action", "pause", "--wal-archive", newest_archived.archive,
    )  # fmt: skip
    assert cluster.setting("max_connections") == "42"


def test_shared_buffers_of_a_larger_host(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    cluster.configure(shared_buffers="900GB")
    cluster.start()
    assert "shared_buffers = 900GB is more than half of this host's memory" in cluster.notices
    cluster.stop()
    cluster.start("--shared-buffers", "20MB")
    assert cluster.setting("shared_buffers") == "2560"
    assert "shared_buffers" not in cluster.notices


# --- files that are missing or mean something else on a copy ----------------------------------


@pytest.mark.parametrize("programs", [MAJORS[0], MAJORS[-1]], indirect=True)
def test_a_cluster_without_configuration_files(cluster: Cluster) -> None:
    """As Debian has it: its configuration lies in /etc and is in no backup."""
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        (cluster.pgdata / name).unlink()
    cluster.start("--trust-local")
    assert "has no postgresql.conf: wrote one" in cluster.notices
    assert "has no pg_hba.conf: wrote a cautious one" in cluster.notices
    assert cluster.sql("select 1") == "1"
    owner = cluster.programs.user.uid
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        status = (cluster.pgdata / name).stat()
        assert (status.st_uid, status.st_mode & 0o777) == (owner, 0o600)
    rules = cluster.sql("select count(*) from pg_hba_file_rules where auth_method = 'trust'")
    assert rules == "2"
    cluster.stop()
    cluster.start()
    assert "wrote" not in cluster.notices


@pytest.mark.parametrize("name", ["standby.signal", "recovery.signal"])
def test_a_standby_that_is_no_mount_is_left_alone(newest_cluster: Cluster, name: str) -> None:
    cluster = newest_cluster
    (cluster.pgdata / name).touch()
    before = cluster.tree()
    message, hint = cluster.fail_to_start(10)
    assert f"({name}) and not a mount of pbkfs" in message
    assert f"Remove {name}" in hint
    assert cluster.tree() == before


def test_a_tablespace_map_that_is_no_mount(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    (cluster.pgdata / "tablespace_map").write_text("16400 /srv/production/ts\n")
    message, _ = cluster.fail_to_start(10)
    assert "original's tablespaces" in message


def test_a_copy_that_shares_wal_or_a_tablespace_with_a_running_server(
    newest_cluster: Cluster, server_place: Path
) -> None:
    """As cp -a copies it: the links lead to the original's directories."""
    original = newest_cluster
    user = original.programs.user
    copy = Cluster(copy_tree(original.pgdata, server_place / "copy"), original.programs)
    wal, tablespace = server_place / "wal", server_place / "tablespace"
    (original.pgdata / "pg_wal").rename(wal)
    for cluster in (original, copy):
        shutil.rmtree(cluster.pgdata / "pg_wal", ignore_errors=True)
        (cluster.pgdata / "pg_wal").symlink_to(wal)
    original.start()
    message, hint = copy.fail_to_start(10)
    assert f"{copy.pgdata}/pg_wal leads to {wal}" in message
    assert f"the running server of {original.pgdata} uses" in message
    assert "let the link point to the copy" in hint
    (copy.pgdata / "pg_wal").unlink()
    copy_tree(wal, copy.pgdata / "pg_wal")

    tablespace.mkdir()
    user.give(tablespace)
    original.sql(f"create tablespace ts location '{tablespace}'")
    oid = original.sql("select oid from pg_tablespace where spcname = 'ts'")
    (copy.pgdata / "pg_tblspc" / oid).symlink_to(tablespace)
    message, _ = copy.fail_to_start(10)
    assert f"pg_tblspc/{oid} leads to {tablespace}" in message


def test_a_missing_include_that_is_no_mount(newest_cluster: Cluster) -> None:
    cluster = newest_cluster
    with open(cluster.pgdata / "postgresql.conf", "a") as file:
        file.write("include '/etc/no-such/tuning.conf'\n")
    before = cluster.tree()
    message, _ = cluster.fail_to_start(10)
    assert "includes /etc/no-such/tuning.conf, which does not exist" in message
    assert cluster.tree() == before
