"""The checks of a drill: the user's SQL, pg_amcheck, pg_checksums.

Each returns a ``Check`` and never raises for what it finds; a drill that runs out of time is
TimedOutError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pbkfs.drill.report import MAX_DETAILS, Check
from pbkfs.drill.request import SqlCheck
from pbkfs.drill.server import NULL, DrillServer, Output
from pbkfs.errors import PostgresError

AMCHECK = "pg_amcheck"
CHECKSUMS = "page checksums"

# Source: src/bin/pg_amcheck/pg_amcheck.c, verify_heap_slot_handler and verify_btree_slot_handler.
_FINDING = re.compile(r'^(?:heap table|btree index) "(.+?)"(?:, block|, checking|:)')
# Source: src/bin/pg_checksums/pg_checksums.c, scan_file.
_FILE = re.compile(r'file "([^"]+)"')
_SCANNED = re.compile(r"^(Files|Blocks) scanned: +(\d+)", re.MULTILINE)
_FORK = re.compile(r"(?:_(?:fsm|vm|init))?(?:\.\d+)?$")
_NAMED = 5


# --- SQL --------------------------------------------------------------------------------------


def check_sql(server: DrillServer, database: str, wanted: SqlCheck) -> Check:
    """Run one check of the user's."""
    done = server.psql(database, f"{wanted.text}\n;\n", shows_tags=wanted.needs_row)
    name = f"sql {wanted.name}"
    rows = done.stdout.splitlines()
    if done.code != 0:
        return Check(name, "failed", done.complaint(), details=_details(done))
    if wanted.needs_row and not rows:
        return Check(name, "failed", "returned no row")
    for word, value in (("false", "f"), ("null", NULL)):
        if value in rows:
            return Check(name, "failed", f"returned {word}")
    return Check(name, "passed", f"returned {_quote(rows)}")


def _quote(rows: list[str]) -> str:
    if not rows:
        return "nothing"
    text = rows[0] if len(rows[0]) <= 60 else f"{rows[0][:59]}…"
    text = {"t": "true", "": "an empty value"}.get(text, text)
    return text if len(rows) == 1 else f"{text} and {len(rows) - 1} more rows"


# --- pg_amcheck -------------------------------------------------------------------------------


def check_relations(
    server: DrillServer, databases: Iterable[str], *, is_writable: bool, n_jobs: int
) -> Check:
    """Have pg_amcheck look at all tables and B-trees of all databases, heapallindexed."""
    program = server.binaries.tool("pg_amcheck")
    if program is None:
        why = f"no pg_amcheck in {server.binaries.bindir}"
        return Check(AMCHECK, "not available", why)
    try:
        wanted, left_out = _prepare_amcheck(server, list(databases), is_writable=is_writable)
    except _NotAvailableError as why:
        return Check(AMCHECK, "not available", str(why))
    except PostgresError as error:
        return Check(AMCHECK, "failed", error.message)
    options = [*server.connection_options(), "--heapallindexed", "--jobs", str(n_jobs)]
    if is_writable:
        options.append("--install-missing")
    done = server.run(program, *options, "--all")
    lines = done.stdout.splitlines()
    found = list(dict.fromkeys(match[1] for line in lines if (match := _FINDING.match(line))))
    details = _details(done)
    if found:
        return Check(AMCHECK, "failed", f"corruption in {_name_some(found)}", details=details)
    if done.code != 0:
        return Check(AMCHECK, "failed", done.complaint(), details=details)
    message = f"no corruption in {len(wanted)} database{'s' * (len(wanted) != 1)}"
    if left_out:
        message += f"; without the extension amcheck, so not looked at: {', '.join(left_out)}"
    return Check(AMCHECK, "passed", message)


class _NotAvailableError(Exception):
    """Why pg_amcheck can't be run here."""


def _prepare_amcheck(
    server: DrillServer, databases: list[str], *, is_writable: bool
) -> tuple[list[str], list[str]]:
    """Return the databases that can be looked at, and those that can't.

    An extension that an older major left in a database is brought up to date. Raises PostgresError,
    _NotAvailableError.
    """
    libraries = server.binaries.library_directory()
    version = server.query(
        databases[0], "select default_version from pg_available_extensions where name = 'amcheck'"
    )
    if not version:
        raise _NotAvailableError(f"PostgreSQL {server.binaries.version} has no extension amcheck")
    if libraries is not None and not (libraries / "amcheck.so").exists():
        raise _NotAvailableError(f"no library amcheck.so in {libraries}")
    has_it = {}
    for database in databases:
        rows = server.query(
            database, "select extversion from pg_extension where extname = 'amcheck'"
        )
        has_it[database] = bool(rows)
        if rows and rows != version and is_writable:
            server.query(database, "alter extension amcheck update")
    if is_writable:
        return databases, []
    wanted = [database for database in databases if has_it[database]]
    if not wanted:
        raise _NotAvailableError(
            "recovery is paused, so the server is read-only, and no database has the extension "
            "amcheck"
        )
    return wanted, [database for database in databases if not has_it[database]]


# --- checksums --------------------------------------------------------------------------------


def check_checksums(server: DrillServer, relations: Mapping[str, str]) -> Check:
    """Have pg_checksums read every page; the server has been stopped cleanly.

    ``relations`` maps the path of a main fork's first file to its relation.
    """
    program = server.binaries.tool("pg_checksums")
    if program is None:
        return Check(CHECKSUMS, "not available", f"no pg_checksums in {server.binaries.bindir}")
    data_dir = str(server.cluster.data_dir)
    done = server.run(program, "--check", "-D", data_dir)
    if done.code == 0:
        counts = {match[1]: match[2] for match in _SCANNED.finditer(done.stdout)}
        blocks, files = counts.get("Blocks", "all"), counts.get("Files", "all")
        return Check(CHECKSUMS, "passed", f"{blocks} pages in {files} files are right")
    lines = [line.replace(f"{data_dir}/", "") for line in done.stderr.splitlines()]
    paths = dict.fromkeys(match[1] for line in lines if (match := _FILE.search(line)))
    named = [_name_of(path, relations) for path in paths]
    if not named:
        return Check(CHECKSUMS, "failed", done.complaint(), details=_details(done))
    return Check(
        CHECKSUMS, "failed", f"bad pages in {_name_some(named)}", details=lines[:MAX_DETAILS]
    )


def _name_of(path: str, relations: Mapping[str, str]) -> str:
    name = relations.get(_FORK.sub("", path))
    return f"{name} ({path})" if name else path


def list_relation_files(server: DrillServer, databases: Iterable[str]) -> dict[str, str]:
    """Return path of the main fork, relative to PGDATA -> ``database.schema.relation``."""
    found: dict[str, str] = {}
    for database in databases:
        try:
            rows = server.query(
                database,
                "select pg_relation_filepath(c.oid), "
                "format('%s.%I.%I', current_database(), n.nspname, c.relname) "
                "from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                "where pg_relation_filepath(c.oid) is not null",
            )
        except PostgresError:
            continue  # a damaged catalog: the checks say so, and files keep their numbers
        found |= {row[0]: row[1] for row in rows if len(row) == 2}
    return found


# --- words ------------------------------------------------------------------------------------


def _details(done: Output) -> list[str]:
    return [*done.stdout.splitlines(), *done.stderr.splitlines()][:MAX_DETAILS]


def _name_some(names: list[str]) -> str:
    text = ", ".join(names[:_NAMED])
    return text if len(names) <= _NAMED else f"{text} and {len(names) - _NAMED} more"
