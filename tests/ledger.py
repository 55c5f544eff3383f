"""An external ledger: one client that commits numbered rows and writes down what was acknowledged.

After a crash every acknowledged row must be there; of the rows that were not, at most the one in
flight may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg


class Ledger:
    """Commits 1, 2, 3 … into table ``ledger`` on a thread until the server goes away."""

    def __init__(self, on_commit: Callable[[int], None] | None = None) -> None:
        """``on_commit`` is called with each number before the next one is sent."""
        self.acknowledged = 0
        self._on_commit = on_commit
        self._wanted = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.ended_by: psycopg.Error | None = None

    def create(self, uri: str) -> None:
        """Make the table."""
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("create table if not exists ledger (id bigint primary key)")

    def begin(self, uri: str) -> None:
        """Start committing through ``uri``, after the last number that was acknowledged."""
        self._stopping = False
        self._thread = threading.Thread(target=self._commit, args=(uri,), daemon=True)
        self._thread.start()

    def _commit(self, uri: str) -> None:
        try:
            with psycopg.connect(uri, autocommit=True) as connection:
                row = connection.execute("select coalesce(max(id), 0) from ledger").fetchone()
                assert row is not None
                number = int(row[0])
                while not self._stopping:
                    number += 1
                    connection.execute("insert into ledger values (%s)", (number,))
                    if self._on_commit is not None:
                        self._on_commit(number)
                    with self._wanted:
                        self.acknowledged = number
                        self._wanted.notify_all()
        except psycopg.Error as problem:
            self.ended_by = problem  # as a rule the crash that the test wanted

    def wait_for(self, n_more: int, *, timeout_s: float = 60) -> None:
        """Return when ``n_more`` further commits were acknowledged."""
        with self._wanted:
            goal = self.acknowledged + n_more
            assert self._wanted.wait_for(lambda: self.acknowledged >= goal, timeout_s), (
                f"{self.acknowledged} of {goal} commits within {timeout_s} s: {self.ended_by}"
            )

    def end(self) -> None:
        """Stop committing and wait for the thread."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(60)
            assert not self._thread.is_alive(), "the ledger's client hangs"

    def check(self, uri: str, *, n_more: int = 1) -> None:
        """Every acknowledged commit is there, without a gap, and at most so many more."""
        with psycopg.connect(uri, autocommit=True) as connection:
            row = connection.execute("select count(*), coalesce(max(id), 0) from ledger").fetchone()
        assert row is not None
        count, newest = row
        assert count == newest, f"{count} rows up to {newest}"
        assert self.acknowledged <= newest <= self.acknowledged + n_more
