"""The REST interface, with a real daemon and real servers: what each endpoint answers."""

from __future__ import annotations

import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fix_catalogs import CatalogStore
from fix_postgres import Cluster, free_port, wait_until
from fix_web import TOKEN, Answer, Daemon

pytestmark = pytest.mark.xdist_group("rest")


# --- the daemon itself --------------------------------------------------------------------------


def test_health_counts(served: Daemon) -> None:
    served.branch("a")
    served.post("branches/a/stop")
    served.branch("b")
    answer = served.get("health", headers={})
    assert answer.status == 200
    found = answer.json
    assert found["status"] == "healthy"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", found["version"])
    assert found["uptime_seconds"] >= 0
    assert found["storage_used_bytes"] > 1 << 20
    counts = {name: n for name, n in found.items() if name.startswith(("trunks_", "branches_"))}
    assert counts == {
        "trunks_running": 1,
        "trunks_total": 1,
        "branches_running": 1,
        "branches_stopped": 1,
        "branches_total": 2,
    }


def test_token_is_needed_for_all_but_health_and_readyz(served: Daemon) -> None:
    for path in ("/api/v1/health", "/readyz"):
        assert served.get(path, headers={}).status == 200
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
    ]
    for headers in wrong:
        for path in ("branches", "openapi.json", "nothing/here", "/metrics"):
            answer = served.get(path, headers=headers)
            answer.problem(401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
    for unix in (False, True):
        assert served.get("branches", headers={}, unix=unix).status == 401
        assert served.get("branches", unix=unix).status == 200
    assert served.get("branches", headers={"Authorization": f"bearer {TOKEN}"}).status == 200


def test_socket_is_for_its_user_only(served: Daemon) -> None:
    assert stat.S_IMODE(served.socket.stat().st_mode) == 0o600
    assert served.get("health", unix=True).json["status"] == "healthy"


def test_metrics(served: Daemon) -> None:
    served.branch("a")
    served.get("branches/none")
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.body.decode().splitlines()
    assert 'pbkfs_branches{status="running"} 1' in lines
    assert 'pbkfs_branches{status="error"} 0' in lines
    assert 'pbkfs_trunks{status="running"} 1' in lines
    assert any(line.startswith("pbkfs_reaper_runs_total ") for line in lines)
    (used,) = [line for line in lines if line.startswith("pbkfs_storage_bytes ")]
    assert int(used.split()[1]) > 0
    requests = [line for line in lines if line.startswith("pbkfs_http_requests_total{")]
    assert any('route="/api/v1/branches/{name}",status="404"' in line for line in requests)
    assert any(
        line.startswith('pbkfs_operations_total{operation="create_branch"') for line in lines
    )
    for line in lines:
        assert re.fullmatch(r'#.*|[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [0-9.]+', line)


# --- trunks -------------------------------------------------------------------------------------


def test_default_trunk_is_there(served: Daemon) -> None:
    found = served.get("trunks").json
    assert found["total"] == 1
    main = found["trunks"][0]
    assert (main["name"], main["status"], main["database"]) == ("main", "running", "postgres")
    assert main["wal_level"] == "replica"
    served.delete("trunks/main").problem(409, "protected")


def test_life_of_a_trunk(served: Daemon, pgdata_template: Path) -> None:
    port = free_port()
    wish = {
        "name": "prod", "directory": str(pgdata_template), "port": port, "wal_level": "logical",
    }  # fmt: skip
    answer = served.post("trunks", wish)
    assert answer.status == 201, answer.body
    assert answer.headers["location"] == "/api/v1/trunks/prod"
    made = answer.json
    assert (made["name"], made["port"], made["database"]) == ("prod", port, "postgres")
    assert made["status"] == "creating"
    served.wait_for("prod", "running", "trunks")
    assert served.sql("prod", "show wal_level", kind="trunks") == "logical"
    served.sql("prod", "create table t as select 7 as n", kind="trunks")
    served.branch("a", "prod")

    assert served.post("trunks/prod/stop").json["status"] == "stopped"
    served.get("trunks/prod/connection").problem(409, "wrong_state")
    assert served.sql("a", "select n from t") == "7"  # branches go on
    other = free_port()
    assert served.post("trunks/prod/start", {"port": other}).json["port"] == other
    started_at = served.get("trunks/prod").json["started_at"]
    assert served.post("trunks/prod/restart").json["started_at"] > started_at
    connection = served.get("trunks/prod/connection").json
    assert connection["port"] == other
    assert served.sql("prod", "select n from t", kind="trunks") == "7"
    log = served.get("trunks/prod/log?lines=5").json
    assert {"created", "branched", "stopped", "started"} <= {
        event["what"] for event in log["events"]
    }
    assert 0 < len(log["lines"]) <= 5

    served.delete("trunks/prod?recursive=false").problem(409, "has_children")
    answer = served.delete("trunks/prod")
    assert answer.status == 202
    assert answer.json["children_deleted"] == ["a"]
    served.wait_for("prod", "gone", "trunks")
    assert served.names() == []
    assert pgdata_template.is_dir()


def test_trunk_of_a_backup_and_its_refresh(served: Daemon, catalog_store: CatalogStore) -> None:
    store = catalog_store("a_full_none_stream")
    wish = {"name": "prod", "store": str(store), "backup_id": "latest", "port": free_port()}
    answer = served.post("trunks?wait=true", wish)
    assert answer.status == 201, answer.body
    assert answer.json["status"] == "running"
    served.branch("a", "prod")
    assert served.sql("a", "select 1") == "1"
    assert served.post("trunks/prod/refresh").json["status"] == "running"
    served.post("trunks/main/refresh").problem(400, "invalid_request")


def test_trunk_of_a_running_server(served: Daemon, newest_cluster: Cluster) -> None:
    newest_cluster.start()
    newest_cluster.sql("create table t as select 5 as n")
    wish = {"name": "prod", "url": newest_cluster.uri, "port": free_port()}
    answer = served.post("trunks?wait=true", wish)
    assert answer.status == 201, answer.body
    assert served.sql("prod", "select n from t", kind="trunks") == "5"


def test_trunk_that_is_refused(served: Daemon, tmp_path: Path) -> None:
    served.post("trunks", {"name": "Bad Name"}).problem(400, "invalid_name")
    served.post("trunks", {"name": "main"}).problem(409, "name_conflict")
    served.post("trunks", {}).problem(400, "invalid_request")
    served.post("trunks", {"name": "x", "directory": "relative"}).problem(400, "invalid_request")
    served.post("trunks", {"name": "x", "instance": "main"}).problem(400, "invalid_request")
    both = {"name": "x", "directory": "/a", "url": "postgresql:///"}
    assert "exclude" in served.post("trunks", both).problem(400, "invalid_request")
    served.post("trunks", {"name": "x", "port": 70000}).problem(400, "invalid_request")
    missing = {"name": "x", "directory": str(tmp_path / "none"), "port": free_port()}
    served.post("trunks?wait=true", missing).problem(404, "not_found")
    taken = {"name": "x", "port": served.port}
    served.post("trunks", taken).problem(409, "busy")
    assert served.names("trunks") == ["main"]
    assert served.leftovers() == []


def test_failed_creation_says_why(served: Daemon, tmp_path: Path) -> None:
    missing = {"name": "x", "directory": str(tmp_path / "none"), "port": free_port()}
    assert str(tmp_path) in served.post("trunks?wait=30s", missing).problem(404, "not_found")
    answer = served.post("trunks", missing)
    if answer.status != 201:  # it had failed by then
        assert str(tmp_path) in answer.problem(404, "not_found")
    served.wait_for("x", "gone", "trunks")

    def says_why() -> bool:
        detail = served.get("trunks/x").problem(404, "not_found")
        return "its creation failed" in detail and str(tmp_path) in detail

    wait_until(says_why)


def test_replication_is_not_here_yet(served: Daemon) -> None:
    for method, path in (
        ("GET", "replication"),
        ("POST", "replication"),
        ("DELETE", "replication"),
        ("GET", "replication/guide"),
        ("GET", "replication/slots"),
        ("DELETE", "replication/slot"),
    ):
        served.request(method, f"/api/v1/trunks/main/{path}").problem(501, "not_implemented")


# --- branches -----------------------------------------------------------------------------------


def test_branch_is_created_asynchronously(served: Daemon) -> None:
    answer = served.post("branches", {"name": "my-feature", "ttl": "2h", "tags": ["pr-1", "x"]})
    assert answer.status == 201, answer.body
    assert answer.headers["location"] == "/api/v1/branches/my-feature"
    made = answer.json
    assert made["status"] in ("creating", "starting")
    assert (made["name"], made["parent"]) == ("my-feature", "main")
    assert re.fullmatch(r"[0-9a-f-]{36}", made["id"])
    assert made["created_at"].endswith("Z")
    connection = made["connection"]
    assert set(connection) == {"host", "port", "user", "database", "uri"}
    assert made["tags"] == ["pr-1", "x"]
    assert made["expires_at"] > made["created_at"]

    found = served.wait_for("my-feature", "running")
    assert found["connection"] == connection  # the port is known from the begin
    assert found["id"] == made["id"]
    assert served.sql("my-feature", "select 1") == "1"


def test_branch_with_nothing_said(served: Daemon) -> None:
    for body in (None, {}):
        answer = served.post("branches?wait=true", body)
        assert answer.status == 201, answer.body
        assert re.fullmatch("branch-[0-9a-f]{8}", answer.json["name"])
        assert answer.json["status"] == "running"


def test_wait_has_a_limit(served: Daemon) -> None:
    assert served.post("branches?wait=1ms", {"name": "a"}).json["status"] in (
        "creating",
        "starting",
    )
    served.wait_for("a", "running")
    for wait in ("soon", "-1s", "5"):
        served.post(f"branches?wait={wait}", {"name": "b"}).problem(400, "invalid_request")


def test_the_same_request_again_joins_the_creation(served: Daemon) -> None:
    wish = {"name": "a", "tags": ["x"], "ttl": "1h"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: served.post("branches", wish), range(8)))
    made = {answer.json.get("id") for answer in answers if answer.status == 201}
    assert len(made) == 1
    # One that came when it was ready already is told so.
    assert {answer.status for answer in answers} <= {201, 409}
    assert sum(answer.status == 201 for answer in answers) > 1
    served.wait_for("a", "running")
    # And once it is ready it is another branch of the same name that is asked for.
    wait_until(lambda: served.post("branches", wish).status == 409)
    served.post("branches", wish).problem(409, "name_conflict")


def test_another_request_for_a_name_that_is_creating(served: Daemon) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = list(
            pool.map(lambda tag: served.post("branches", {"name": "a", "tags": [tag]}), "xy")
        )
    (made,) = [answer for answer in answers if answer.status == 201]
    (refused,) = [answer for answer in answers if answer is not made]
    refused.problem(409, "name_conflict")
    assert served.wait_for("a", "running")["tags"] == made.json["tags"]


def test_connection(served: Daemon) -> None:
    served.branch("a")
    found = served.get("branches/a/connection").json
    assert set(found) == {"host", "port", "user", "password", "database", "uri", "psql"}
    assert found["password"] in found["uri"]
    assert found["uri"] in found["psql"]
    assert served.heads.programs.sql(found["uri"], "select current_user") == found["user"]
    assert served.heads.uri("a") == found["uri"]

    served.branch("b", auth="trust")
    found = served.get("branches/b/connection").json
    assert found["password"] == "trust"
    assert served.heads.programs.sql(found["uri"], "select 1") == "1"


def test_servers_do_not_inherit_the_token(served: Daemon) -> None:
    served.branch("a")
    served.sql("a", "create table t (line text)", "copy t from program 'env' delimiter e'\\x01'")
    found = served.sql("a", "select string_agg(line, chr(10)) from t")
    assert "PATH=" in found
    assert TOKEN not in found


def test_list_and_its_filters(served: Daemon) -> None:
    served.branch("a", tags=["x"])
    served.branch("b", "a", tags=["x", "y"])
    served.branch("c")
    served.post("branches/c/stop")

    def names(query: str) -> list[str]:
        found = served.get(f"branches{query}").json
        assert found["total"] == len(found["branches"])
        return [branch["name"] for branch in found["branches"]]

    assert names("") == ["a", "b", "c"]
    assert names("?status=stopped") == ["c"]
    assert names("?status=running") == ["a", "b"]
    assert names("?parent=a") == ["b"]
    assert names("?parent=main") == ["a", "c"]
    assert names("?tag=x") == ["a", "b"]
    assert names("?tag=y&parent=a&status=running") == ["b"]
    assert names("?tag=none") == []
    served.get("branches?status=great").problem(400, "invalid_request")

    found = served.get("branches/a").json
    assert found["children"] == ["b"]
    assert found["size_bytes"] == found["own_bytes"] + found["shared_bytes"] > 0


def test_stop_and_start(served: Daemon) -> None:
    served.branch("a")
    served.sql("a", "create table t as select 3 as n")
    port = served.get("branches/a").json["port"]
    stopped = served.post("branches/a/stop")
    assert (stopped.status, stopped.json["status"]) == (200, "stopped")
    served.get("branches/a/connection").problem(409, "wrong_state")
    assert served.post("branches/a/stop").status == 200
    started = served.post("branches/a/start")
    assert (started.status, started.json["status"]) == (200, "running")
    assert started.json["port"] == port
    assert served.post("branches/a/start").status == 200
    assert served.sql("a", "select n from t") == "3"
    assert served.post("branches/a/stop?wait=false").status == 202
    served.wait_for("a", "stopped")
    assert served.post("branches/a/restart").json["status"] == "running"


def test_reset(served: Daemon) -> None:
    served.branch("a")
    before = served.get("branches/a/connection").json
    served.sql("a", "create table t ()")
    assert served.post("branches/a/reset").json["status"] == "running"
    assert served.get("branches/a/connection").json == before
    assert served.sql("a", "select to_regclass('t') is null") == "t"


def test_change(served: Daemon) -> None:
    served.branch("a", tags=["x", "y"])
    change = {"name": "b", "add_tags": ["z"], "remove_tags": ["x"], "ttl": "7d"}
    changed = served.patch("branches/a", change)
    assert changed.status == 200, changed.body
    assert changed.json["name"] == "b"
    assert changed.json["tags"] == ["y", "z"]
    assert changed.json["expires_at"] is not None
    assert served.patch("branches/b", {"ttl": "never"}).json["expires_at"] is None
    served.get("branches/a").problem(404, "not_found")
    # All of it or nothing.
    served.branch("c")
    refused = {"name": "c", "add_tags": ["w"], "ttl": "1h"}
    served.patch("branches/b", refused).problem(409, "name_conflict")
    found = served.get("branches/b").json
    assert (found["tags"], found["expires_at"]) == (["y", "z"], None)
    served.patch("branches/b", {"name": "main"}).problem(409, "name_conflict")
    served.patch("branches/b", {"ttl": "soon"}).problem(400, "invalid_request")
    served.patch("branches/b", {"add_tags": ["a b"]}).problem(400, "invalid_request")


def test_destroy(served: Daemon) -> None:
    served.branch("a")
    served.branch("b", "a")
    served.branch("c", "b")
    assert "b" in served.delete("branches/a").problem(409, "has_children")
    served.post("branches/a/stop")
    answer = served.delete("branches/a?recursive=true")
    assert answer.status == 202
    assert answer.json["name"] == "a"
    assert answer.json["status"] == "deleting"
    assert answer.json["children_deleted"] == ["b", "c"]
    served.wait_for("a", "gone")
    assert served.names() == []
    served.delete("branches/a").problem(404, "not_found")
    assert served.leftovers() == []


# --- errors -------------------------------------------------------------------------------------


def test_names_that_are_refused(served: Daemon) -> None:
    for name in ("", "A", "-a", "a b", "a/b", "ü", "a" * 64):
        served.post("branches", {"name": name}).problem(400, "invalid_name")
    served.post("branches", {"name": "main"}).problem(409, "name_conflict")
    served.branch("a")
    served.post("branches", {"name": "a"}).problem(409, "name_conflict")
    served.post("trunks", {"name": "a"}).problem(409, "name_conflict")


def test_requests_that_are_refused(served: Daemon) -> None:
    for ttl in ("soon", "5", "", "-1h", "0s", "300000w"):
        served.post("branches", {"name": "a", "ttl": ttl}).problem(400, "invalid_request")
    bodies: list[object] = [
        {"tags": "x"}, {"tags": ["a b"]}, {"nmae": "a"}, {"name": 5}, {"auth": "none"}, [], "a",
        b"{", b"\xff", b'{"name": "\\ud800"}', {"parent": "a\0"}, b'{"parent": "\\udfff"}',
    ]  # fmt: skip
    for body in bodies:
        served.post("branches", body).problem(400, "invalid_request")
    plain = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "text/plain"}
    served.post("branches", b'{"name": "a"}', headers=plain).problem(400, "invalid_request")
    served.post("branches", {"cpu": "500m"}).problem(422, "unsupported")
    served.post("branches", {"name": "a" * (2 << 20)}).problem(413, "too_large")
    assert served.names() == []


def test_what_is_not_there(served: Daemon) -> None:
    served.post("branches", {"name": "a", "parent": "none"}).problem(404, "parent_not_found")
    answers: list[Answer] = [
        served.get("branches/none"),
        served.get("branches/main"),
        served.get("trunks/none"),
        served.get("branches/none/connection"),
        served.get("branches/none/log"),
        served.post("branches/none/start"),
        served.post("branches/none/stop"),
        served.post("branches/none/reset"),
        served.patch("branches/none", {}),
        served.delete("branches/none"),
        served.delete("trunks/none"),
        served.post("trunks/none/start"),
        served.get("branches/%00"),
        served.get("nothing"),
        served.get("/"),
    ]
    for answer in answers:
        answer.problem(404, "not_found")
    answer = served.request("PUT", "/api/v1/branches/a")
    answer.problem(405, "method_not_allowed")
    assert answer.headers["allow"] == "DELETE, GET, PATCH"


def test_parent_that_is_not_ready(served: Daemon) -> None:
    assert served.post("branches", {"name": "a"}).json["status"] == "creating"
    served.post("branches", {"name": "b", "parent": "a"}).problem(422, "parent_not_ready")
    served.wait_for("a", "running")
    served.branch("b", "a")
