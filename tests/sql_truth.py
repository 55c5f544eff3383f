"""What a cluster holds, as SQL sees it, in the form of the manifests of the real catalogs.

``read_truth`` asks a running server; ``differences`` compares two truths.
"""

from __future__ import annotations

from typing import Any

import psycopg

_TABLES = """
select format('%I.%I', n.nspname, c.relname), c.relpersistence = 'u'
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'm') and n.nspname not in ('pg_catalog', 'information_schema')
  and n.nspname !~ '^pg_toast' order by 1
"""
_ROWS = """
select count(*), md5(coalesce(string_agg(md5(t::text), ',' order by md5(t::text)), '')) from {} t
"""
_SEQUENCES = """
select format('%I.%I', n.nspname, c.relname)
from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'S' order by 1
"""


def read_truth(uri: str) -> dict[str, Any]:
    """Read all databases of the server at ``uri`` (its path names the first one to connect to)."""
    truth: dict[str, Any] = {}
    with psycopg.connect(uri, autocommit=True) as connection:
        rows = connection.execute(
            "select datname, oid, datallowconn from pg_database order by oid"
        ).fetchall()
    truth["databases"] = [f"{name}:{oid}:{'true' if ok else 'false'}" for name, oid, ok in rows]
    for name, _, allows_connections in rows:
        if allows_connections:
            with psycopg.connect(uri, dbname=name, autocommit=True) as connection:
                truth[name] = _read_database(connection)
    return truth


def _read_database(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    def one(query: str, *params: object) -> tuple[Any, ...]:
        row = connection.execute(query.encode(), params or None).fetchone()
        assert row is not None
        return tuple(row)

    tables: dict[str, Any] = {}
    for name, is_unlogged in connection.execute(_TABLES).fetchall():
        rows, md5 = one(_ROWS.format(name))
        (size,) = one("select pg_relation_size(%s::regclass)", name)
        tables[name] = {"rows": rows, "md5": md5, "relation_size": size}
        if is_unlogged:
            tables[name]["unlogged"] = True
    sequences = {}
    for (name,) in connection.execute(_SEQUENCES).fetchall():
        value, is_called = one(f"select last_value, is_called from {name}")
        sequences[name] = f"{value},{'true' if is_called else 'false'}"
    (n_classes,) = one("select count(*) from pg_class")
    return {"tables": tables, "sequences": sequences, "pg_class_rows": n_classes}


def differences(got: dict[str, Any], wanted: dict[str, Any], *, sizes: bool = True) -> list[str]:
    """List how ``got`` differs from ``wanted``; the content of unlogged tables does not count."""
    found: list[str] = []
    if got["databases"] != wanted["databases"]:
        found.append(f"databases: {got['databases']} instead of {wanted['databases']}")
        return found
    for database, expected in wanted.items():
        if database == "databases":
            continue
        actual = got[database]
        for key in ("sequences", "pg_class_rows"):
            if actual[key] != expected[key]:
                found.append(f"{database}: {key} {actual[key]} instead of {expected[key]}")
        if actual["tables"].keys() != expected["tables"].keys():
            found.append(
                f"{database}: tables {sorted(actual['tables'].keys() ^ expected['tables'].keys())}"
            )
            continue
        for table, row in expected["tables"].items():
            if row.get("unlogged"):
                continue
            keys = ("rows", "md5", "relation_size") if sizes else ("rows", "md5")
            mine = {key: actual["tables"][table][key] for key in keys}
            theirs = {key: row[key] for key in keys}
            if mine != theirs:
                found.append(f"{database}.{table}: {mine} instead of {theirs}")
    return found
