"""The little client of PostgreSQL's protocol: its verifiers, its rows, its errors."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from fix_postgres import Cluster

from pbkfs.errors import PostgresError, TimedOutError
from pbkfs.postgres.query import make_scram_secret, quote_identifier, run_query


def test_scram_secret_is_that_of_postgresql() -> None:
    # Source: RFC 7677, section 3: user "user", password "pencil", this salt, 4096 iterations.
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    secret = make_scram_secret("pencil", salt)
    assert secret == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
        "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )


def test_identifiers_are_quoted() -> None:
    assert quote_identifier('a"b') == '"a""b"'


@pytest.fixture
def ask(newest_cluster: Cluster) -> Callable[..., list[list[str | None]]]:
    """Ask a running server that trusts its socket."""
    newest_cluster.start("--trust-local")
    status = newest_cluster.status()
    socket_dir = Path(status["socket_directory"])

    def run(sql: str, **options: object) -> list[list[str | None]]:
        return run_query(
            socket_dir,
            status["port"],
            sql,
            user=str(options.pop("user", "postgres")),
            **options,  # type: ignore[arg-type]
        )

    return run


def test_rows_and_errors(ask: Callable[..., list[list[str | None]]]) -> None:
    assert ask("select 1, null, '', 'ä'") == [["1", None, "", "ä"]]
    assert ask("select generate_series(1, 3)") == [["1"], ["2"], ["3"]]
    assert ask("create table t (n int); insert into t values (1); select n from t") == [["1"]]
    with pytest.raises(PostgresError, match='the server says: relation "nope" does not exist'):
        ask("select * from nope")
    with pytest.raises(PostgresError, match='role "nobody" does not exist'):
        ask("select 1", user="nobody")
    with pytest.raises(TimedOutError):
        ask("select pg_sleep(10)", timeout_s=0.1)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(PostgresError, match="cannot talk to the server on port 1"):
        run_query(tmp_path, 1, "select 1", user="postgres")
