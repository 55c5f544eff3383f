"""The drill's server as its checks see it: psql and other programs, run as the server's user.

Each program gets what is left of the drill's time and ends with the drill.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import PostgresError, TimedOutError
from pbkfs.postgres.binaries import Binaries
from pbkfs.postgres.cluster import Cluster
from pbkfs.postgres.network import Place as Address

# What a program says beyond this is not kept.
_MAX_OUTPUT_BYTES = 4 << 20
_ERROR = re.compile(r"\b(ERROR|FATAL|PANIC|error|fatal):")
_PROGRAM = re.compile(r"^(psql(:<stdin>:\d+)?|pg_\w+): (error: )?")
NULL = "\\N"
SEPARATOR = "\t"


def find_psql(binaries: Binaries) -> Path:
    """Return psql, of the installation or else any. Raises PostgresError."""
    program = binaries.tool("psql") or shutil.which("psql")
    if program is None:
        raise PostgresError(
            f"no psql in {binaries.bindir}, nor on PATH",
            hint="Install PostgreSQL's client programs.",
        )
    return Path(program)


class Deadline:
    """The moment at which a drill has to end."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds that are left. Raises TimedOutError if there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TimedOutError:
        """Return the error of a drill that took too long."""
        return TimedOutError(
            f"the drill did not end within {self.timeout_s:g} s",
            hint="The report says how far it got; --timeout allows more.",
        )


@dataclass(frozen=True, slots=True)
class Output:
    """What a program left: exit status and the beginnings of what it wrote."""

    code: int
    stdout: str
    stderr: str

    def complaint(self) -> str:
        """Return the line with which it tells its failure."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.search(line)]
        said = next(iter(errors or lines), f"exit status {self.code}")
        return " ".join(_PROGRAM.sub("", said).split())


@dataclass(frozen=True, slots=True)
class DrillServer:
    """The programs of ``binaries`` for ``cluster``; ``address`` is where its server listens."""

    cluster: Cluster
    binaries: Binaries
    address: Address
    user: str
    deadline: Deadline

    def connection_options(self) -> list[str]:
        """Return the options by which every client program finds the server."""
        return ["-h", str(self.address.socket_dir), "-p", str(self.address.port), "-U", self.user]

    def psql(self, database: str, sql: str, *, shows_tags: bool = False) -> Output:
        """Run SQL (or psql's own commands) up to its first error.

        Rows are lines with ``SEPARATOR`` between values and ``NULL`` for null. ``shows_tags``:
        a statement without rows gives its tag.
        """
        program = find_psql(self.binaries)
        format_options = ["-F", SEPARATOR, "-P", f"null={NULL}"]
        options = ["-X", "-A", "-t", "-w", *format_options, "-v", "ON_ERROR_STOP=1"]
        if not shows_tags:
            options.append("-q")
        # A name of a database may look like a connection string; this way it is none.
        name = database.replace("\\", "\\\\").replace("'", "\\'")
        options += [*self.connection_options(), "-d", f"dbname='{name}'", "-f", "-"]
        return self.run(program, *options, stdin=sql)

    def query(self, database: str, sql: str) -> list[list[str]]:
        """Return the rows of a query of ours. Raises PostgresError."""
        done = self.psql(database, f"{sql};")
        if done.code != 0:
            raise PostgresError(f"database {database} does not answer: {done.complaint()}")
        return [line.split(SEPARATOR) for line in done.stdout.splitlines()]

    def run(self, program: Path, *arguments: str, stdin: str = "") -> Output:
        """Run a program to its end. Raises TimedOutError when the drill's time is over."""
        environment = self.cluster.owner.environment()
        environment |= {"LC_ALL": "C", "PGCLIENTENCODING": "UTF8", "PGCONNECT_TIMEOUT": "30"}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with tempfile.TemporaryFile() as source:
                source.write(stdin.encode())
                source.seek(0)
                try:
                    done = subprocess.run(
                        [program, *arguments],
                        cwd="/",
                        env=environment,
                        stdin=source,
                        stdout=out,
                        stderr=err,
                        timeout=self.deadline.left_s(),
                        check=False,
                        **self.cluster.owner.popen_identity(),
                    )
                except subprocess.TimeoutExpired:
                    raise self.deadline.error() from None
            return Output(done.returncode, _head(out.fileno()), _head(err.fileno()))


def _head(fd: int) -> str:
    return os.pread(fd, _MAX_OUTPUT_BYTES, 0).decode(errors="replace")
