"""Branches of a trunk that is written to all the while, against a ledger outside of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import psycopg
import pytest
from fix_trunks import Heads
from ledger import Ledger

_N_BRANCHES = int(os.environ.get("PBKFS_TEST_BRANCHES", "4"))


@pytest.mark.timeout(180 + 30 * _N_BRANCHES)
def test_branches_at_random_moments(heads: Heads, stopped_cluster: Path) -> None:
    heads.trunk("prod", stopped_cluster)
    uri = heads.uri("prod", "trunk")
    password, address = uri.removeprefix("postgresql://postgres:").split("@")
    port = address.split(":")[1].split("/")[0]
    ledger = Ledger()
    ledger.create(uri)
    arguments = ["-h", "127.0.0.1", "-p", port, "-U", "postgres", "-n", "-c", "3", "-j", "2"]
    # At a rate: otherwise the trunk grows as fast as it can, and each check takes longer.
    rate = ["-R", "200", "-T", "36000"]
    load = heads.spawn_program("pgbench", *arguments, *rate, "postgres", PGPASSWORD=password)
    ledger.begin(uri)
    try:
        for number in range(_N_BRANCHES):
            ledger.wait_for(random.randrange(5, 60))
            before = ledger.acknowledged
            heads.branch(f"b{number}", "prod")
            after = ledger.acknowledged
            with psycopg.connect(heads.uri(f"b{number}"), autocommit=True) as connection:
                row = connection.execute("select count(*), max(id) from ledger").fetchone()
            assert row is not None
            count, newest = row
            assert count == newest, "a gap"
            assert before <= newest <= after + 1, (before, newest, after)
            heads.check_cluster(f"b{number}")
            if number:
                heads.run("branch", "destroy", f"b{number}", "--yes")
        assert load.poll() is None, load.communicate()
    finally:
        ledger.end()
        load.terminate()
        load.communicate()
    assert ledger.ended_by is None
    ledger.check(uri)
    # The first one is as it was, whatever the trunk has become.
    heads.run("branch", "reset", "b0", "--yes")
    heads.check_cluster("b0")
    # PostgreSQL's own sums: what the clients of pgbench moved around adds up.
    total = heads.sql(
        "b0",
        "select (select sum(abalance) from pgbench_accounts) = "
        "(select sum(tbalance) from pgbench_tellers) and (select sum(bbalance) from "
        "pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history)",
    )
    assert total == "t"
