"""Where PostgreSQL's programs of one major version are on this host.

Looks at places in a fixed order and believes only what ``postgres --version`` says. Called by the
command line; runs short child processes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import PostgresError

BINDIR_VARIABLE = "PBKFS_PG_BINDIR"

# Debian, PGDG's RPMs, SUSE, Gentoo, Alpine, from source, EnterpriseDB, Homebrew, Postgres.app.
_PLACES = (
    "/usr/lib/postgresql/{major}/bin",
    "/usr/pgsql-{major}/bin",
    "/usr/lib/postgresql{major}/bin",
    "/usr/lib64/postgresql-{major}/bin",
    "/usr/libexec/postgresql{major}",
    "/usr/local/pgsql/bin",
    "/usr/local/pgsql-{major}/bin",
    "/usr/local/postgresql-{major}/bin",
    "/opt/postgresql/{major}/bin",
    "/opt/PostgreSQL/{major}/bin",
    "/opt/homebrew/opt/postgresql@{major}/bin",
    "/usr/local/opt/postgresql@{major}/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@{major}/bin",
    "/Applications/Postgres.app/Contents/Versions/{major}/bin",
)
_VERSION = re.compile(r"\(PostgreSQL\)\s+((\d+)\S*)")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one installation. ``version`` is as ``postgres --version`` says it."""

    bindir: Path
    major: int
    version: str

    @property
    def postgres(self) -> Path:
        """The server."""
        return self.bindir / "postgres"

    def tool(self, name: str) -> Path | None:
        """Return another program of the same installation, or None if it was not installed."""
        path = self.bindir / name
        return path if os.access(path, os.X_OK) else None

    def library_directory(self) -> Path | None:
        """Return ``$libdir``, or None if it is at an unusual place.

        Source: PostgreSQL finds it relative to the real place of its own executable
        (src/port/path.c, make_relative_path); libpqwalreceiver is in every installation.
        """
        for base in (self.bindir, self.postgres.resolve().parent):
            for relative in ("../lib", "../lib/postgresql", "../lib/pgsql", "../lib64"):
                candidate = Path(os.path.normpath(base / relative))
                if (candidate / "libpqwalreceiver.so").exists():
                    return candidate
        return self._configured_library_directory()

    def _configured_library_directory(self) -> Path | None:
        pg_config = self.tool("pg_config")
        if pg_config is None:
            return None
        candidate = Path(_output(pg_config, "--pkglibdir"))
        return candidate if (candidate / "libpqwalreceiver.so").exists() else None


def find_binaries(major: int, bindir: Path | None = None) -> Binaries:
    """Return the installation of ``major``; ``bindir`` is the only place looked at if given.

    Raises PostgresError naming the major and where it looked.
    """
    if bindir is not None:
        return _named_binaries(major, bindir)
    looked: list[str] = []
    for place in _candidates(major):
        found = read_binaries(place)
        if found is not None and found.major == major:
            return found
        note = f"{place} ({found.major})" if found is not None else str(place)
        if note not in looked:
            looked.append(note)
    raise PostgresError(
        f"no PostgreSQL {major} on this host; looked in {', '.join(looked)}",
        hint=f"Install the server of PostgreSQL {major}, or name its bin directory with "
        f"--pg-bindir or {BINDIR_VARIABLE}.",
    )


def _named_binaries(major: int, bindir: Path) -> Binaries:
    found = read_binaries(bindir)
    if found is None:
        raise PostgresError(
            f"no PostgreSQL server in {bindir}; PostgreSQL {major} is needed",
            hint="Name the directory that holds postgres and pg_controldata.",
        )
    if found.major != major:
        raise PostgresError(
            f"{bindir} holds PostgreSQL {found.version}, and PostgreSQL {major} is needed",
            hint=f"Name the bin directory of PostgreSQL {major}, or none, to have it looked for.",
        )
    return found


def read_binaries(bindir: Path) -> Binaries | None:
    """Return what is installed in ``bindir``, or None if no server that runs is there."""
    postgres = bindir / "postgres"
    if not os.access(postgres, os.X_OK) or not postgres.is_file():
        return None
    match = _VERSION.search(_output(postgres, "--version"))
    return Binaries(bindir.absolute(), int(match[2]), match[1]) if match else None


def _candidates(major: int) -> Iterator[Path]:
    for named in os.environ.get(BINDIR_VARIABLE, "").split(os.pathsep):
        if named:
            yield Path(named)
    for name in ("postgres", "pg_config"):
        for directory in os.get_exec_path():
            program = shutil.which(name, path=directory)
            if program and name == "postgres":
                yield Path(program).parent
            elif program:
                where = _output(Path(program), "--bindir")
                if where:
                    yield Path(where)
    for place in _PLACES:
        yield Path(place.format(major=major))


def _output(program: Path, argument: str) -> str:
    """Return what a program prints about itself; nothing if it does not run."""
    try:
        done = subprocess.run(
            [program, argument],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return os.fsdecode(done.stdout).strip() if done.returncode == 0 else ""
