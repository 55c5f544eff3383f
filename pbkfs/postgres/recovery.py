"""Point in time: where recovery ends, and how the server gets archived WAL.

A recovery that was begun is recorded in ``recovery.signal`` itself, of which PostgreSQL reads only
the name: so it travels with PGDATA, and is gone exactly when PostgreSQL has finished. Called by the
command line; ``make_restore_command`` runs short child processes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pbkfs.errors import HostError, PostgresError, UsageError
from pbkfs.postgres import wal_file
from pbkfs.postgres.account import find_obstacle, write_for
from pbkfs.postgres.cluster import Cluster

SIGNAL = "recovery.signal"
_MARK = "# pbkfs "
_KINDS = ("time", "lsn", "xid", "name", "immediate", "latest")
ACTIONS = ("promote", "pause", "shutdown")


@dataclass(frozen=True, slots=True)
class RecoveryTarget:
    """Where recovery ends and what happens then.

    ``kind`` is one of time, lsn, xid, name (with ``value``), immediate, latest (without).
    """

    kind: str
    value: str | None
    action: str = "promote"
    timeline: str = "current"
    is_inclusive: bool = True

    def settings(self) -> list[tuple[str, str]]:
        """Return PostgreSQL's settings for it."""
        found: list[tuple[str, str]] = []
        if self.kind == "immediate":
            found.append(("recovery_target", "immediate"))
        elif self.kind != "latest":
            found.append((f"recovery_target_{self.kind}", self.value or ""))
        return [
            *found,
            ("recovery_target_action", self.action),
            ("recovery_target_timeline", self.timeline),
            ("recovery_target_inclusive", "on" if self.is_inclusive else "off"),
            # Delays of a delayed standby, and a closed door while paused, are the original's.
            ("recovery_min_apply_delay", "0"),
            ("hot_standby", "on"),
        ]

    def describe(self) -> str:
        """Return ``time '2026-01-01 12:00'``, ``the end of the archive``."""
        if self.kind == "immediate":
            return "the end of the backup"
        if self.kind == "latest":
            return "the end of the archive"
        return f"{self.kind} {self.value}"


def parse_target(
    values: Mapping[str, str | None],
    *,
    point: str | None,
    action: str | None,
    timeline: str | None,
    is_inclusive: bool | None,
) -> RecoveryTarget | None:
    """Return the target that the command line names, or None if it names none.

    ``values`` maps time, lsn, xid and name to what was given; ``point`` is immediate or latest.
    Raises UsageError for two targets, or for options that mean nothing without one.
    """
    given: list[tuple[str, str | None]] = [
        (kind, value) for kind, value in values.items() if value is not None
    ]
    if point is not None:
        given.append((point, None))
    if len(given) > 1:
        raise UsageError(
            "more than one recovery target: " + ", ".join(kind for kind, _ in given),
            hint="Name one of them.",
        )
    if not given:
        if timeline is not None:
            given = [("latest", None)]
        elif action is not None or is_inclusive is not None:
            raise UsageError(
                "recovery options without a recovery target",
                hint="Add --recovery-target latest, or a time, an LSN, an xid or a name.",
            )
        else:
            return None
    kind, value = given[0]
    _check_value(kind, value)
    if kind == "time" and value is not None:
        # ISO 8601, as our own output has it. PostgreSQL knows no abbreviations of zones this early.
        value = re.sub(r"(?<=\d)[Zz]$", "+00", value.strip())
    if timeline is not None and not re.fullmatch(r"current|latest|\d+|0[xX][0-9a-fA-F]+", timeline):
        raise UsageError(
            f"timeline {timeline!r} is not understood", hint="Write current, latest or a number."
        )
    if kind == "latest" and action not in (None, "promote"):
        # Source: PostgreSQL's documentation of recovery_target_action: no effect without a target.
        raise UsageError(
            f"recovery to the latest cannot {action}: at the end of the archive a server promotes",
            hint="Name a time, an LSN, an xid or a name to stop there.",
        )
    return RecoveryTarget(
        kind,
        value,
        action or "promote",
        timeline or "current",
        True if is_inclusive is None else is_inclusive,
    )


def _check_value(kind: str, value: str | None) -> None:
    patterns = {"lsn": (r"[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}", "0/16B3740"), "xid": (r"\d+", "1234")}
    if kind in patterns and not re.fullmatch(patterns[kind][0], value or ""):
        raise UsageError(
            f"recovery target {kind} {value!r} is not understood",
            hint=f"Write it like {patterns[kind][1]}.",
        )
    # Source: src/backend/access/transam/xlogrecovery.c: a name is shorter than MAXFNAMELEN.
    if kind in ("name", "time") and not value:
        raise UsageError(f"recovery target {kind} is empty")
    if kind == "name" and len((value or "").encode()) >= 64:
        raise UsageError(f"recovery target name {value!r} is too long", hint="63 bytes at most.")


@dataclass(frozen=True, slots=True)
class Recovery:
    """A target and the archive that feeds it; without an archive only pg_wal does."""

    target: RecoveryTarget
    archive: Path | None

    def settings(self, restore_command: str) -> list[tuple[str, str]]:
        """Return all settings of a server that recovers to the target."""
        return [*self.target.settings(), ("restore_command", restore_command)]

    def signal_text(self) -> str:
        """Return the content of recovery.signal."""
        record = asdict(self.target) | {"archive": str(self.archive) if self.archive else None}
        return f"{_MARK}{json.dumps(record)}\n"


def begun_recovery(cluster: Cluster) -> Recovery | None:
    """Return the recovery that was begun by us on this PGDATA and is not finished, or None."""
    try:
        text = cluster.read(SIGNAL).decode(errors="replace")
    except OSError:
        return None
    if not text.startswith(_MARK):
        return None
    try:
        record = json.loads(text.removeprefix(_MARK))
        archive = record.pop("archive")
        target = RecoveryTarget(**record)
    except (ValueError, KeyError, TypeError):
        return None
    if target.kind not in _KINDS or target.action not in ACTIONS:
        return None
    return Recovery(target, Path(archive) if archive else None)


def plan_recovery(
    cluster: Cluster, target: RecoveryTarget | None, archive: Path | None
) -> Recovery | None:
    """Return the recovery to start with: the one asked for, or the one that was begun, or None.

    Raises PostgresError if this PGDATA cannot be recovered to a target any more, UsageError if a
    target needs WAL and no archive is known.
    """
    begun = begun_recovery(cluster)
    if target is None:
        return begun
    if begun is None and not cluster.has("backup_label"):
        raise PostgresError(
            f"{cluster.data_dir} has been recovered already: it has no backup_label",
            hint="A server has run on it, and its WAL is no longer the archive's. "
            "Mount the backup on a new diff to recover to another point.",
        )
    if archive is None and begun is not None:
        archive = begun.archive
    if archive is None and target.kind != "immediate":
        raise UsageError(
            f"no WAL archive is known for {cluster.data_dir}",
            hint="Name the directory of the archived WAL with --wal-archive.",
        )
    return Recovery(target, archive)


# --- restore_command --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestoreCommand:
    """What the server runs for each WAL file; ``needs_feeder`` if it cannot read the archive."""

    text: str
    needs_feeder: bool = False


def make_restore_command(
    cluster: Cluster, archive: Path | None, run_dir: Path, feeder: Path
) -> RestoreCommand:
    """Return the restore_command that fetches from ``archive``, tried as the server's user.

    It runs ``wal_file`` alone: without click, and where the server's user cannot reach our
    interpreter or package (a checkout below /root), a copy in ``run_dir`` with the system's one.
    An archive that only root can read goes through a feeder at ``feeder``, if we are root. Raises
    HostError if nothing works.
    """
    if archive is None:
        return RestoreCommand("false")
    said = "no Python that this user can run"
    for program in _programs(cluster, run_dir):
        said = _try_as_server(cluster, [*program, "--archive", str(archive), "--check"]) or ""
        if not said:
            return RestoreCommand(_command(program, "--archive", archive))
        if os.geteuid() == 0 and os.access(archive, os.R_OK | os.X_OK) and archive.is_dir():
            trial = _try_as_server(cluster, [*program, "--archive", "/", "--check"])
            if trial is None:
                return RestoreCommand(_command(program, "--feeder", feeder), needs_feeder=True)
    raise HostError(
        f"{cluster.owner.name} cannot fetch WAL from {archive}: {said}",
        hint=f"The server runs restore_command as {cluster.owner.name}: let that user read "
        f"{archive}, or run this as root.",
    )


def _command(program: tuple[str, ...], option: str, place: Path) -> str:
    return " ".join(map(_quote, [*program, option, str(place)])) + " %f %p"


def _programs(cluster: Cluster, run_dir: Path) -> Iterator[tuple[str, ...]]:
    """Yield how the server's user may run ``wal_file``, best first."""
    script = Path(wal_file.__file__).resolve()
    interpreters = [sys.executable, os.path.realpath(sys.executable)]
    system = shutil.which("python3", path=os.defpath)
    interpreters += [system] if system else []
    usable = [
        name
        for name in dict.fromkeys(interpreters)
        if find_obstacle(cluster.owner, Path(name), os.X_OK) is None
    ]
    if find_obstacle(cluster.owner, script, os.R_OK) is not None:
        copy = run_dir / "wal_file.py"
        write_for(cluster.owner, copy, script.read_bytes())
        script = copy
    for name in usable:
        # -I: the working directory is PGDATA, and no module is to be found there; -S: quicker.
        yield name, "-I", "-S", str(script)


def _try_as_server(cluster: Cluster, command: list[str]) -> str | None:
    done = subprocess.run(
        command,
        cwd="/",
        env=cluster.owner.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        **cluster.owner.popen_identity(),
    )
    if done.returncode == 0:
        return None
    said = (os.fsdecode(done.stderr).strip().splitlines() or [f"exit {done.returncode}"])[-1]
    return re.sub(r"^pbkfs: (error: )?", "", said)


def _quote(word: str) -> str:
    # Source: src/common/percentrepl.c: %% is a per cent sign.
    return shlex.quote(word).replace("%", "%%")
