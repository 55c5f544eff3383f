"""The store of trunks and branches: rows, rules, versions, several users."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pbkfs.branch.errors import InsufficientResourcesError
from pbkfs.branch.ports import assign_port
from pbkfs.branch.settings import Settings
from pbkfs.branch.store import Head, Point, Store, now
from pbkfs.errors import BusyError, FormatError


def _head(name: str, parent: Head | None = None, **values: object) -> Head:
    made = Head(
        id=f"id-{name}",
        name=name,
        kind="branch" if parent else "trunk",
        parent_id=parent.id if parent else None,
        status="stopped",
        engine="overlay",
        pg_user="postgres",
        pg_database="postgres",
        auth="password",
        created_at=now(),
    )
    return replace(made, **values)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "metadata.db")
    yield made
    made.close()


def _insert(store: Store, *heads: Head) -> None:
    with store.transaction() as tx:
        for head in heads:
            tx.insert(head)


def _open_files() -> set[str]:
    return {os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")}


def test_heads_come_back_as_they_were(store: Store) -> None:
    trunk = _head("main", wal_level="replica", is_wanted=False)
    branch = _head("a", trunk, expires_at=now(), operation="create", status="creating")
    with store.transaction() as tx:
        tx.insert(trunk)
        tx.insert(branch, ["x", "y", "x"])
    assert store.heads() == [trunk, branch]
    assert store.heads("branch") == [branch]
    assert store.find("a") == store.get("id-a") == branch
    assert store.find("b") is None
    with store.transaction() as tx:
        assert tx.tags() == {"id-a": ["x", "y"]}
        assert tx.children("id-main") == [branch]
        assert (tx.depth(trunk), tx.depth(branch)) == (0, 1)


def test_it_is_for_its_owner_only(store: Store) -> None:
    assert store.path.stat().st_mode & 0o777 == 0o600


def test_a_failed_transaction_changes_nothing(store: Store) -> None:
    trunk = _head("main")
    with pytest.raises(sqlite3.IntegrityError):
        _insert(store, trunk, trunk)
    assert store.heads() == []


def test_rules_that_the_schema_keeps(store: Store) -> None:
    trunk = _head("main")
    _insert(store, trunk)
    for bad in (
        _head("main", id="other"),
        _head("a", replace(trunk, id="unknown")),
        _head("a", trunk, status="asleep"),
        _head("a", trunk, auth="none"),
    ):
        with pytest.raises(sqlite3.IntegrityError):
            _insert(store, bad)
    _insert(store, _head("a", trunk))
    with pytest.raises(sqlite3.IntegrityError), store.transaction() as tx:
        tx.delete(trunk.id)


def test_what_belongs_to_a_head_goes_with_it_but_for_its_events(store: Store) -> None:
    trunk = _head("main")
    _insert(store, trunk)
    with store.transaction() as tx:
        tx.add_tags(trunk.id, ["x"])
        tx.take_port(5500, trunk.id)
        tx.set_point(Point(trunk.id, "p", "u", "0/1", 1.5))
        tx.record(trunk, "created", "from nothing")
        assert tx.point(trunk.id) == Point(trunk.id, "p", "u", "0/1", 1.5)
        assert tx.point_ids() == {"p"}
        tx.delete(trunk.id)
        assert tx.tags() == {}
        assert tx.ports() == {}
        assert tx.point_ids() == set()
        assert [(e.what, e.detail) for e in tx.events(trunk.id)] == [("created", "from nothing")]


def test_a_new_id_takes_everything_along(store: Store) -> None:
    trunk = _head("main")
    branch = _head("a", trunk)
    _insert(store, trunk, branch)
    with store.transaction() as tx:
        tx.take_port(5500, trunk.id)
        tx.add_tags(trunk.id, ["x"])
        tx.update(trunk.id, id="new")
        assert tx.children("new") == [replace(branch, parent_id="new")]
        assert tx.ports() == {5500: "new"}
        assert tx.tags() == {"new": ["x"]}


def test_an_older_program_leaves_a_newer_store_alone(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(FormatError, match="version 99") as refused:
        Store(path)
    assert str(path) not in _open_files(), refused


def test_what_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(FormatError, match=r"metadata\.db is damaged") as refused:
        Store(path)
    assert str(path) not in _open_files(), refused


def test_threads_and_connections_share_it(store: Store) -> None:
    other = Store(store.path)

    def insert(into: Store, first: int) -> None:
        for number in range(first, first + 20):
            _insert(into, _head(f"t{number}"))

    threads = [
        threading.Thread(target=insert, args=(into, first))
        for first, into in ((0, store), (100, store), (200, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.heads()) == 60
    other.close()


# --- ports --------------------------------------------------------------------------------------


def _settings(**values: object) -> Settings:
    made = Settings(Path("/d"), Path("/d/metadata.db"), port_range_start=5500, port_range_end=5502)
    return replace(made, **values)  # type: ignore[arg-type]


def _assign(
    store: Store, head: Head, *used: int, may_move: bool = False, **settings: object
) -> int:
    with store.transaction() as tx:
        found = tx.get(head.id)
        assert found is not None
        return assign_port(
            tx, found, _settings(**settings), lambda port: port not in used, may_move=may_move
        )


def test_ports_are_given_in_order_and_kept(store: Store) -> None:
    trunk = _head("main")
    a, b, c, d = (_head(name, trunk) for name in "abcd")
    _insert(store, trunk, a, b, c, d)
    assert _assign(store, trunk) == 5432
    assert [_assign(store, a), _assign(store, b, 5501)] == [5500, 5502]
    assert _assign(store, a) == 5500
    with store.transaction() as tx:
        tx.release_port(a.id)
    # It is a's wish for the next time: c gets another one as long as there is one.
    assert _assign(store, c) == 5501
    assert _assign(store, d) == 5500
    with pytest.raises(InsufficientResourcesError) as caught:
        _assign(store, a)
    assert caught.value.http_status == 503


def test_a_port_that_somebody_else_uses_is_left_to_him(store: Store) -> None:
    trunk = _head("main", port=6000)
    a = _head("a", trunk)
    _insert(store, trunk, a)
    assert _assign(store, a, 5500, 5501) == 5502
    with pytest.raises(BusyError, match="port 6000 of trunk 'main' is in use"):
        _assign(store, trunk, 6000)
    assert _assign(store, trunk, may_move=True) == 6000
    assert _assign(store, trunk, 6000, may_move=True) == 5432
    other = _head("other")
    _insert(store, other)
    assert _assign(store, other, trunk_port=5499) == 5499
    assert _assign(store, _again(store, other), 5499, trunk_port=5499) == 5503


def _again(store: Store, head: Head) -> Head:
    store.update(head.id, port=0)
    return head


def test_a_forked_child_leaves_the_connection_alone(store: Store) -> None:
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert store.heads() == []


def test_store_of_an_older_version(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    _insert(store := Store(path), _head("main"))
    store.close()
    db = sqlite3.connect(path)
    for column in ("idle_stop_s", "is_asleep", "cpu_limit", "memory_limit_bytes"):
        db.execute(f"ALTER TABLE heads DROP COLUMN {column}")
    db.execute("PRAGMA user_version = 1")
    db.close()
    store = Store(path)
    found = store.find("main")
    assert found is not None
    assert found == replace(_head("main"), created_at=found.created_at)
    store.update(found.id, is_asleep=1)
    assert store.heads()[0].is_asleep
    store.close()


def test_changes_by_others_are_seen(store: Store) -> None:
    _insert(store, _head("main"))
    other = Store(store.path)
    before = other.changes()
    assert other.changes() == before
    store.update("id-main", port=1)
    assert other.changes() != before
    other.close()
