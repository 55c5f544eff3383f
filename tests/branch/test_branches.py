"""Branches through the real command line, with real servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fix_trunks import Heads

from pbkfs.branch.service import open_service
from pbkfs.branch.settings import read_settings
from pbkfs.branch.store import now

_N_BRANCHES = int(os.environ.get("PBKFS_TEST_BRANCHES", "4"))


@pytest.fixture
def prod(heads: Heads, pgdata_template: Path) -> Heads:
    """A running trunk ``prod`` with a table ``t``."""
    heads.trunk("prod", pgdata_template)
    heads.sql("prod", "create table t (n int)", "insert into t values (1)", kind="trunk")
    return heads


def test_branch_of_a_running_trunk_and_both_go_their_own_way(prod: Heads) -> None:
    made = prod.branch("a", "prod", "--tag", "pr-1")
    assert made["status"] == "running"
    assert made["parent"] == "prod"
    assert made["tags"] == ["pr-1"]
    assert "password" not in made["connection"]
    assert prod.sql("a", "select n from t") == "1"

    prod.sql("a", "insert into t values (2)")
    prod.sql("prod", "insert into t values (3)", kind="trunk")
    assert prod.sql("a", "select string_agg(n::text, ',' order by n) from t") == "1,2"
    assert prod.sql("prod", "select string_agg(n::text, ',' order by n) from t", kind="trunk") == (
        "1,3"
    )
    prod.check_cluster("a")


def test_branch_of_a_branch(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.sql("a", "insert into t values (2)")
    prod.branch("b", "a")
    prod.sql("b", "insert into t values (3)")
    prod.branch("c", "b")
    prod.sql("a", "delete from t")
    assert prod.sql("c", "select count(*) from t") == "3"
    assert prod.sql("b", "select count(*) from t") == "3"
    tree = prod.run("branch", "list", "--tree").stdout
    assert [re.sub(r", .*", "", line) for line in tree.splitlines()] == [
        "prod (running", "└── a (running", "    └── b (running", "        └── c (running",
    ]  # fmt: skip
    assert prod.info("b")["children"] == ["c"]


def test_branch_of_what_is_stopped(prod: Heads) -> None:
    prod.run("trunk", "stop", "prod")
    prod.branch("a", "prod")
    assert prod.sql("a", "select n from t") == "1"
    prod.sql("a", "insert into t values (2)")
    prod.run("branch", "stop", "a")
    prod.branch("b", "a")
    assert prod.sql("b", "select count(*) from t") == "2"
    prod.run("trunk", "start", "prod")
    assert prod.sql("prod", "select count(*) from t", kind="trunk") == "1"


def test_second_branch_of_an_idle_trunk_shares_the_point(prod: Heads) -> None:
    prod.branch("a", "prod")
    n_layers = len(list(prod.layout.layers.iterdir()))
    prod.branch("b", "prod")
    # Only its own live layer: the trunk was not sealed again.
    assert len(list(prod.layout.layers.iterdir())) == n_layers + 1
    prod.sql("prod", "insert into t values (2)", kind="trunk")
    prod.branch("c", "prod")
    assert prod.sql("b", "select count(*) from t") == "1"
    assert prod.sql("c", "select count(*) from t") == "2"


def test_settings_changed_without_wal_reach_the_next_branch(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.sql("prod", "alter system set work_mem = '7MB'", kind="trunk")
    prod.branch("b", "prod")
    assert prod.sql("b", "show work_mem") == "7MB"


def test_password(prod: Heads) -> None:
    prod.branch("a", "prod")
    uri = prod.uri("a")
    bare = re.sub(r":[^:@/]+@", "@", uri)
    assert bare != uri
    refused = prod.programs.run("psql", "-w", "-d", bare, "-c", "select 1", check=False)
    assert refused == ""
    wrong = prod.uri("prod", "trunk").split("@")[0] + "@" + uri.split("@")[1]
    assert prod.programs.run("psql", "-w", "-d", wrong, "-c", "select 1", check=False) == ""
    prod.branch("open", "prod", "--trust")
    assert prod.programs.sql(prod.uri("open"), "select 1") == "1"
    secrets = list((prod.layout.root / "secrets").iterdir())
    assert len(secrets) == 2
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secrets)


def test_stop_gives_the_port_back_and_start_takes_it_again(prod: Heads) -> None:
    port = prod.branch("a", "prod")["port"]
    out = prod.run("branch", "stop", "a").stdout
    assert out == 'Stopping branch "a"... done\n'
    assert prod.info("a")["status"] == "stopped"
    assert prod.branch("b", "prod")["port"] != port
    out = prod.run("branch", "start", "a").stdout
    assert out.startswith('Starting branch "a"... ready\nConnection: postgresql://')
    assert prod.info("a")["port"] == port
    assert prod.sql("a", "select n from t") == "1"
    prod.run("branch", "restart", "a")
    assert prod.info("a")["port"] == port


def test_reset_goes_back_and_keeps_name_port_and_password(prod: Heads) -> None:
    prod.branch("a", "prod")
    uri = prod.uri("a")
    prod.sql("a", "insert into t values (2)", "create table mine ()", "checkpoint")
    prod.branch("child", "a")
    prod.sql("prod", "insert into t values (9)", kind="trunk")
    prod.run("branch", "reset", "a", "--yes")
    assert prod.uri("a") == uri
    assert prod.sql("a", "select string_agg(n::text, ',') from t") == "1"
    assert prod.sql("a", "select to_regclass('mine') is null") == "t"
    assert prod.sql("child", "select count(*) from t") == "2"
    prod.sql("a", "insert into t values (5)")
    prod.run("branch", "reset", "a", "--yes")
    assert prod.sql("a", "select string_agg(n::text, ',') from t") == "1"
    prod.check_cluster("a")


def test_destroy(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.branch("b", "a")
    assert prod.fail(8, "branch", "destroy", "a", "--yes") == "branch 'a' has branches: b"
    assert prod.fail(2, "branch", "destroy", "a").startswith("Destroy branch 'a'?")
    out = prod.run("branch", "destroy", "a", "-r", "-y").stdout
    assert out == "Destroyed branch 'b'\nDestroyed branch 'a'\n"
    assert prod.names() == []
    assert prod.leftovers() == []
    prod.branch("x", "prod")
    assert prod.run("trunk", "destroy", "prod", "--yes").stdout == (
        "Destroyed branch 'x'\nDestroyed trunk 'prod'\n"
    )
    for name in ("heads", "layers", "points", "mounts", "secrets"):
        assert list((prod.layout.root / name).iterdir()) == []


def test_ttl(prod: Heads) -> None:
    prod.branch("short", "prod", "--ttl", "300ms")
    prod.branch("long", "prod", "--ttl", "2h")
    assert prod.info("long")["expires_at"] is not None
    assert prod.names() == ["long"]
    assert prod.leftovers() == []
    assert "Expires: never" in prod.run("branch", "extend", "long", "never").stdout
    assert prod.info("long")["expires_at"] is None
    assert prod.fail(2, "branch", "extend", "long", "soon") == "duration 'soon' is not understood"


def test_branch_that_gets_more_time_when_it_is_over(prod: Heads) -> None:
    made = prod.branch("a", "prod", "--ttl", "1h")
    with open_service(read_settings({**os.environ, **prod.env})) as service:
        with service.life.locks.hold(made["id"], what="another operation on it"):
            service.store.update(made["id"], expires_at=now())
            # Whoever works on it is not waited for, by no command.
            assert prod.names() == ["a"]
            prod.run("branch", "extend", "a", "2h")
        # A reaper that had found it before asks again.
        assert not service.branches.expire(made["id"])
        service.store.update(made["id"], expires_at=now())
    assert prod.names() == []
    assert prod.leftovers() == []


def test_names_tags_and_filters(prod: Heads) -> None:
    prod.branch("a", "prod", "-t", "x", "-t", "y")
    auto = prod.json("branch", "create", "--from", "prod")["name"]
    assert re.fullmatch(r"branch-[0-9a-f]{8}", auto)
    assert prod.run("branch", "tag", "a", "z").stdout == "Tags: x, y, z\n"
    assert prod.run("branch", "tag", "-r", "a", "x").stdout == "Tags: y, z\n"
    table = prod.run("branch", "ls", "--tag", "y").stdout.splitlines()
    assert table[0].split()[:5] == ["NAME", "STATUS", "PARENT", "AGE", "SIZE"]
    assert [line.split()[0] for line in table[1:]] == ["a"]
    assert prod.json("branch", "list", "-s", "stopped")["total"] == 0
    assert prod.json("branch", "list", "-s", "Running")["total"] == 2
    assert "'nonsense' is not one of" in prod.fail(2, "branch", "list", "-s", "nonsense")
    assert "--tree shows all" in prod.fail(2, "branch", "list", "--tree", "-t", "y")
    assert prod.json("branch", "list", "-p", "prod")["total"] == 2
    prod.run("branch", "rename", "a", "b")
    assert prod.sql("b", "select n from t") == "1"
    assert prod.fail(4, "branch", "info", "a") == "branch 'a' does not exist"
    assert prod.fail(8, "branch", "rename", "b", "prod") == "a trunk named 'prod' exists already"


def test_refusals(prod: Heads, place: Path) -> None:
    prod.branch("a", "prod")
    assert prod.fail(8, "branch", "create", "a", "-f", "prod") == (
        "a branch named 'a' exists already"
    )
    assert prod.fail(4, "branch", "create", "b", "-f", "nope") == (
        "trunk or branch 'nope' does not exist"
    )
    assert "is no name" in prod.fail(2, "branch", "create", "No Good", "-f", "prod")
    # That of a trunk that is not there yet.
    for command in (("create", "main", "-f", "prod"), ("rename", "a", "main")):
        assert prod.fail(8, "branch", *command) == "'main' is the default trunk's name"
    assert "duration" in prod.fail(2, "branch", "create", "b", "-f", "prod", "--ttl", "2 moons")
    # What a script's empty variable says is not the default.
    assert "is no name" in prod.fail(2, "branch", "create", "", "-f", "prod")
    for option in ("--ttl", "--idle-stop"):
        assert "duration ''" in prod.fail(2, "branch", "create", "b", "-f", "prod", option, "")
    assert "1 branches" in prod.fail(
        9, "branch", "create", "b", "-f", "prod", PBKFS_MAX_BRANCHES="1"
    )
    assert "levels deep" in prod.fail(9, "branch", "create", "b", "-f", "a", PGBRANCH_MAX_DEPTH="1")
    start = str(prod.info("a")["port"])
    assert "no free port" in prod.fail(
        9, "branch", "create", "b", "-f", "prod",
        PBKFS_PORT_RANGE_START=start, PBKFS_PORT_RANGE_END=start,
    )  # fmt: skip
    assert "is not available here" in prod.fail(11, "branch", "create", "b", "--cpu", "500m")
    assert prod.names() == ["a"]
    assert prod.leftovers() == []
    assert "does not exist" in prod.fail(4, "trunk", "create", "x", "--from-dir", place / "nope")
    assert prod.leftovers() == []


def test_sizes_add_up(prod: Heads) -> None:
    prod.branch("a", "prod")
    prod.branch("b", "a")
    prod.sql("b", "create table big as select generate_series(1, 20000) as n", "checkpoint")
    prod.run("branch", "stop", "b")
    prod.run("branch", "stop", "a")
    sizes = _check_sizes_of_what_has_stopped(prod)
    assert sizes["b"] > sizes["a"] + 700_000


@pytest.mark.timeout(120 + 15 * _N_BRANCHES)
def test_many_of_one_trunk_run_together(prod: Heads) -> None:
    """As many as ``PBKFS_TEST_BRANCHES`` says."""
    names = [f"b{number}" for number in range(_N_BRANCHES)]
    for number, name in enumerate(names):
        prod.branch(name, "prod")
        prod.sql(name, f"insert into t values ({100 + number})")
    for number, name in enumerate(names):
        assert prod.sql(name, "select string_agg(n::text, ',' order by n) from t") == (
            f"1,{100 + number}"
        )
    views = prod.json("branch", "list")["branches"]
    assert {view["name"] for view in views if view["status"] == "running"} == set(names)
    for name in names:
        prod.run("branch", "stop", name)
    assert set(_check_sizes_of_what_has_stopped(prod)) == {*names, "prod"}


def _check_sizes_of_what_has_stopped(prod: Heads) -> dict[str, int]:
    """Stop the trunk; what is said of all heads is what ``du`` finds. Returns own bytes by name."""
    prod.run("trunk", "stop", "prod")
    views = [*prod.json("branch", "list")["branches"], *prod.json("trunk", "list")["trunks"]]
    shared = prod.json("status")["shared_bytes"]
    top = sum((prod.layout.root / n).stat().st_blocks * 512 for n in ("heads", "layers", "points"))
    secrets = sum(p.stat().st_blocks * 512 for p in (prod.layout.root / "secrets").iterdir())
    assert sum(view["own_bytes"] for view in views) + shared + top - secrets == prod.disk_bytes()
    return {view["name"]: view["own_bytes"] for view in views}


def test_status_and_log(prod: Heads) -> None:
    prod.branch("a", "prod")
    lines = prod.run("status").stdout.splitlines()
    assert re.fullmatch(r"Controller: healthy \(v[\d.]+.*, no daemon\)", lines[0])
    assert lines[1:3] == [
        "Trunks: 1 running / 1 total",
        "Branches: 1 running, 0 stopped, 1 total",
    ]
    assert re.fullmatch(r"Storage: [\d.]+ [KMG]iB used", lines[3])
    log = prod.run("branch", "log", "a").stdout
    assert "created: from prod" in log
    assert "database system is ready to accept connections" in log
    out = prod.run("branch", "info", "a").stdout
    for label in ("Name", "ID", "Status", "Parent", "Created", "PG Version", "Size", "Tags",
                  "Connection"):  # fmt: skip
        assert f"{label}:" in out
    assert 'name: "a"' in prod.run("branch", "info", "a", "-o", "yaml").stdout


def test_connect(prod: Heads, tmp_path: Path) -> None:
    prod.branch("a", "prod")
    uri = prod.uri("a")
    # What the environment says of other servers is not for this one.
    env = {"PATH": f"{prod.programs.bindir}:{os.environ['PATH']}", "PGUSER": "nobody"}
    for command in (
        ("branch", "connect", "a"),
        ("branch", "connect", "--psql", "a"),
        ("branch", "create", "--from", "a", "--connect"),
        ("trunk", "connect", "prod", "--psql"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pbkfs", *command],
            env={**os.environ, **prod.env, **env},
            input="select 'as ' || current_user || ' with ' || count(*) from t;\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "as postgres with 1" in done.stdout
    (tmp_path / "bin").mkdir()
    without = {"PATH": str(tmp_path / "bin")}
    assert prod.run("branch", "connect", "a", **without).stdout.strip() == uri
    assert prod.fail(10, "branch", "connect", "a", "--psql", **without) == (
        "there is no psql on PATH"
    )
    prod.run("branch", "stop", "a")
    assert prod.fail(8, "branch", "connect", "a") == "branch 'a' is stopped"


def test_colours_are_for_terminals_that_want_them(prod: Heads) -> None:
    prod.branch("a", "prod")
    green = "\x1b[32mrunning\x1b[0m"
    for command in (("list",), ("list", "--tree"), ("info", "a")):
        assert green in prod.on_terminal("", "branch", *command)[1]
        assert "\x1b" not in prod.on_terminal("", "branch", *command, NO_COLOR="1")[1]
        assert "\x1b" not in prod.on_terminal("", "branch", *command, "--no-color")[1]
        assert "\x1b" not in prod.run("branch", *command).stdout


def test_a_reset_that_failed_comes_first(prod: Heads) -> None:
    """A head half-way in a reset may have one state's WAL and another one's layers."""
    prod.branch("a", "prod")
    prod.sql("a", "insert into t values (2)")
    (point,) = prod.layout.points.iterdir()
    superblock = point / "superblock.json"
    superblock.rename(point / "away")
    prod.run("branch", "reset", "a", "--yes", check=False)
    for command in (
        ("start", "a"),
        ("stop", "a"),
        ("restart", "a"),
        ("create", "b", "--from", "a"),
    ):
        done = prod.run("branch", *command, check=False)
        assert done.returncode != 0
        assert "the reset of branch 'a' did not come to its end" in done.stderr
    (point / "away").rename(superblock)
    prod.run("branch", "start", "a")
    assert prod.sql("a", "select string_agg(n::text, ',') from t") == "1"
    prod.check_cluster("a")


def test_tablespace_is_branched_with_its_files(prod: Heads) -> None:
    """What CREATE TABLESPACE names lies on the host: a branch must not share it with its source."""
    location = prod.root / "location"
    location.mkdir()
    if os.geteuid() == 0:
        os.chown(location, prod.programs.user.uid, prod.programs.user.gid)
    prod.sql(
        "prod",
        f"create tablespace s location '{location}'",
        "create table x tablespace s as select generate_series(1, 1000) as i",
        kind="trunk",
    )
    assert list(location.iterdir()) == []
    prod.branch("a", "prod")
    prod.sql("a", "delete from x where i > 10", "vacuum full x", "checkpoint")
    prod.sql("prod", "insert into x values (0)", "checkpoint", kind="trunk")
    assert prod.sql("a", "select count(*) from x") == "10"
    assert prod.sql("prod", "select count(*) from x", kind="trunk") == "1001"
    # In a branch the same location is free.
    prod.sql(
        "a", f"create tablespace s2 location '{location}'", "create table y (i int) tablespace s2"
    )
    prod.run("branch", "reset", "a", "--yes")
    assert prod.sql("a", "select count(*) from x") == "1000"
    prod.check_cluster("a")


def test_replication_slots_stay_with_their_head(heads: Heads, pgdata_template: Path) -> None:
    heads.trunk("prod", pgdata_template, "--wal-level", "logical")
    slots = (
        "select pg_create_physical_replication_slot('p', true)",
        "select pg_create_logical_replication_slot('l', 'pgoutput')",
    )
    count = "select count(*) from pg_replication_slots"
    heads.sql("prod", *slots, kind="trunk")
    heads.branch("a", "prod")
    # Nobody would ever come for what they hold.
    assert heads.sql("a", count) == "0"
    heads.sql("a", *slots)
    heads.run("branch", "restart", "a")
    assert heads.sql("a", count) == "2"
    heads.branch("b", "a")
    assert heads.sql("b", count) == "0"
    assert heads.sql("b", "show wal_level") == "logical"
    heads.run("branch", "reset", "a", "--yes")
    assert heads.sql("a", count) == "0"
    assert heads.sql("prod", count, kind="trunk") == "2"
    heads.run("trunk", "restart", "prod")
    assert heads.sql("prod", count, kind="trunk") == "2"
    assert "slots removed: l, p" in heads.run("branch", "log", "a", "--events").stdout
