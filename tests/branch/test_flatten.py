"""Stacks stay low: trunks and branches whose layers are folded, with real servers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fix_trunks import Heads
from machine import TESTS

from pbkfs.branch.overlay import choose_run
from pbkfs.overlay.superblock import read_superblock

# Not every step: about this many, evenly spread.
_N_TRIES = int(os.environ.get("PBKFS_TEST_KILLS", "5")) // 2 + 1


@pytest.fixture
def prod(heads: Heads, pgdata_template: Path) -> Heads:
    """A running trunk ``prod`` with a table ``t``."""
    heads.trunk("prod", pgdata_template)
    heads.sql(
        "prod",
        "create table t (n int, pad text)",
        "create index on t (n)",
        "insert into t select n, repeat('x', 500) from generate_series(1, 500) n",
        kind="trunk",
    )
    return heads


def _n_layers(heads: Heads, name: str, kind: str = "branch") -> int:
    head = heads.layout.head(heads.info(name, kind)["id"])
    return len(read_superblock(head).layers)


def _change(heads: Heads, number: int) -> None:
    heads.sql(
        "prod",
        f"update t set pad = repeat('{number % 10}', 500) where n % 7 = {number % 7}",
        f"insert into t values ({1000 + number}, 'new')",
        f"drop table if exists made{number % 3}",
        f"create table made{number % 3} as select {number} as n",
        kind="trunk",
    )


def _content(heads: Heads, name: str, kind: str = "branch") -> str:
    return heads.sql(name, "select count(*), sum(hashtext(n || pad)) from t", kind=kind)


def _check_sizes(heads: Heads) -> None:
    views = [*heads.json("branch", "list")["branches"], *heads.json("trunk", "list")["trunks"]]
    shared = heads.json("status")["shared_bytes"]
    root = heads.layout.root
    top = sum((root / n).stat().st_blocks * 512 for n in ("heads", "layers", "points"))
    secrets = sum(p.stat().st_blocks * 512 for p in (root / "secrets").iterdir())
    own = sum(view["own_bytes"] for view in views)
    assert own + shared + top - secrets == heads.disk_bytes()


def test_depth_is_bounded_while_branches_come_and_go(prod: Heads) -> None:
    """Of a trunk that runs and is written to all the time; every branch is what the trunk was."""
    prod.env["PBKFS_MAX_LAYERS"] = "3"
    depths, expected = [], {}
    for number in range(6):
        _change(prod, number)
        name = f"b{number}"
        expected[name] = _content(prod, "prod", "trunk")
        prod.branch(name, "prod")
        depths.append(_n_layers(prod, "prod", "trunk"))
        if number % 3 != 2:
            prod.run("branch", "destroy", f"b{number - number % 3}", "--yes", check=False)
            expected.pop(f"b{number - number % 3}", None)
    assert max(depths) == 3, depths
    assert any(after < before for before, after in itertools.pairwise(depths))
    assert "flattened" in prod.run("trunk", "log", "prod").stdout
    last = _content(prod, "prod", "trunk")
    for name in prod.names():
        assert _content(prod, name) == expected[name], name
    prod.check_cluster(sorted(prod.names())[-1])
    for name in prod.names():
        prod.run("branch", "stop", name)
    prod.run("trunk", "restart", "prod")
    assert _content(prod, "prod", "trunk") == last
    prod.run("trunk", "stop", "prod")
    _check_sizes(prod)
    prod.run("trunk", "start", "prod")
    for name in prod.names():
        prod.run("branch", "destroy", name, "--yes")
    # Nothing is left of what only they needed.
    assert len(list(prod.layout.layers.iterdir())) <= 1 + _n_layers(prod, "prod", "trunk")
    prod.branch("last", "prod")
    prod.check_cluster("last")
    assert _content(prod, "last") == last


def test_flatten_by_hand_running_and_stopped(prod: Heads) -> None:
    for number in range(3):
        _change(prod, number)
        prod.branch(f"b{number}", "prod")
        if number:
            prod.run("branch", "destroy", f"b{number}", "--yes")
    head = prod.layout.head(prod.info("prod", "trunk")["id"])
    expected = _content(prod, "prod", "trunk")
    prod.sql("prod", "begin; declare c cursor for select 1; insert into t values (7); rollback",
             kind="trunk")  # fmt: skip
    assert _n_layers(prod, "prod", "trunk") == 3
    assert prod.run("trunk", "flatten", "prod").stdout == (
        "Flattened trunk 'prod': 3 layers, now 1\n"
    )
    assert _n_layers(prod, "prod", "trunk") == 1
    assert _content(prod, "prod", "trunk") == expected
    log = (head / "log" / "worker.log").read_text()
    assert "3 layers are one now" in log
    assert not any(word in log for word in ("WARNING", "ERROR", "CRITICAL"))
    _change(prod, 9)
    assert _content(prod, "prod", "trunk") != expected
    expected = _content(prod, "prod", "trunk")
    prod.branch("after", "prod")
    prod.run("trunk", "stop", "prod")
    prod.run("branch", "stop", "after")
    prod.run("branch", "stop", "b0")
    assert prod.run("branch", "flatten", "after").stdout.endswith(": 2 layers, now 1\n")
    # The trunk had the same two, and was not in use.
    assert _n_layers(prod, "prod", "trunk") == 1
    _check_sizes(prod)
    assert prod.run("trunk", "flatten", "prod").stdout.endswith(": 1 layers, now 1\n")
    prod.run("trunk", "start", "prod")
    prod.run("branch", "start", "after")
    prod.run("branch", "start", "b0")
    assert _content(prod, "prod", "trunk") == expected
    assert _content(prod, "after") == expected
    prod.check_cluster("after")
    prod.check_cluster("b0")
    found = prod.fail(2, "flatten", "-d", head)
    assert found.endswith("is that of a trunk or branch")


def test_killed_at_any_step_while_it_runs(prod: Heads) -> None:
    def run_dying(at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, TESTS / "dying_command.py", str(at), "trunk", "flatten", "prod"],
            env={**os.environ, **prod.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    _change(prod, 0)
    prod.branch("b", "prod")
    kept = _content(prod, "b")
    _deepen(prod)
    done = run_dying(0)
    assert done.returncode == 0, done.stderr
    n_steps = int(done.stderr.splitlines()[-1])
    assert n_steps > 10
    for at in sorted({1 + round(i * (n_steps - 1) / (_N_TRIES - 1)) for i in range(_N_TRIES)}):
        _deepen(prod)
        expected = _content(prod, "prod", "trunk")
        done = run_dying(at)
        # The merged objects are not always as many.
        assert done.returncode in (-9, 0), (at, done.stdout, done.stderr)
        assert prod.leftovers() == [], at
        assert _content(prod, "prod", "trunk") == expected, at
    prod.run("trunk", "flatten", "prod")
    assert _n_layers(prod, "prod", "trunk") == 1
    prod.run("trunk", "restart", "prod")
    assert _content(prod, "prod", "trunk") == expected
    assert _content(prod, "b") == kept
    prod.branch("c", "prod")
    prod.check_cluster("c")


def _deepen(heads: Heads) -> None:
    _change(heads, 1)
    heads.branch("x", "prod")
    heads.run("branch", "destroy", "x", "--yes")


# --- which layers ---------------------------------------------------------------------------------


def _users(*names: str) -> list[frozenset[Path]]:
    return [frozenset(Path(each) for each in name) for name in names]


@pytest.mark.parametrize(
    ("users", "sizes", "limit", "expected"),
    [
        (["a", "ab", "ab", "abc"], [1, 1, 1, 1], 4, None),
        (["a", "ab", "ab", "abc"], [1, 1, 1, 1], 3, slice(1, 3)),
        (["a", "ab", "abc", "abcd"], [1, 1, 1, 1], 2, slice(0, 3)),
        (["a", "ab", "ab", "abc"], [1, 1, 1, 9], 1, slice(0, 4)),
        (["a", "a", "a", "a", "a"], [1, 1, 1, 1, 900], 2, slice(0, 4)),
        (["a", "a", "a", "a", "a"], [1, 1, 1, 1, 900], 1, slice(0, 5)),
        (["a", "a", "a", "a"], [1, 5, 50, 500], 2, slice(0, 2)),
    ],
)
def test_choice(users: list[str], sizes: list[int], limit: int, expected: slice | None) -> None:
    assert choose_run(_users(*users), sizes, limit) == expected
