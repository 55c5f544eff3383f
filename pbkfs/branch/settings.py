"""What the environment says about trunks and branches: ``PBKFS_*``, or the older ``PGBRANCH_*``.

Read once, at the start of a command or of the daemon. Where both are set, ``PBKFS_*`` counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pbkfs.branch.durations import parse_duration
from pbkfs.errors import UsageError

PREFIXES = ("PBKFS_", "PGBRANCH_")
MAIN = "main"
LOG_LEVELS = ("debug", "info", "warn", "error")
ENGINES = ("overlay", "zfs", "lvm", "auto")


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings; the defaults are those of an empty environment."""

    data_dir: Path
    metadata_path: Path
    api_port: int = 8080
    api_token: str = ""
    log_level: str = "info"
    storage_backend: str = "overlay"
    pg_bin_dir: Path | None = None
    owner: tuple[int, int] | None = None
    """(uid, gid) of who runs the servers of trunks that root makes, unless named with these."""
    pg_user: str = "postgres"
    pg_database: str = "postgres"
    listen_addresses: str = "127.0.0.1"
    port_range_start: int = 5500
    port_range_end: int = 5599
    trunk_port: int = 5432
    trunk_auto_start: bool = True
    wal_level: str = "replica"
    max_branches: int = 50
    max_depth: int = 10
    max_layers: int = 32
    reaper_interval_s: float = 30.0


def default_data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where trunks and branches are kept unless the environment says otherwise."""
    environ = os.environ if environ is None else environ
    if os.geteuid() == 0:
        return Path("/var/lib/pbkfs")
    home = environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "pbkfs"


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of an environment, by default this process's. Raises UsageError."""
    reader = _Reader(os.environ if environ is None else environ)
    # As mounts resolve it: layers are found again by their paths.
    data_dir = Path(os.path.realpath(reader.text("DATA_DIR") or default_data_dir(reader.environ)))
    metadata = reader.text("METADATA_PATH")
    bindir = reader.text("PG_BIN_DIR")
    found = Settings(
        data_dir=data_dir,
        metadata_path=Path(os.path.abspath(metadata)) if metadata else data_dir / "metadata.db",
        api_port=reader.number("API_PORT", 8080, 0, 65535),
        api_token=reader.text("API_TOKEN"),
        log_level=reader.choice("LOG_LEVEL", "info", LOG_LEVELS),
        storage_backend=reader.choice("STORAGE_BACKEND", "overlay", ENGINES),
        pg_bin_dir=Path(os.path.abspath(bindir)) if bindir else None,
        owner=reader.owner("OWNER"),
        pg_user=reader.text("DEFAULT_PG_USER") or "postgres",
        pg_database=reader.text("DEFAULT_PG_DB") or "postgres",
        listen_addresses=reader.text("LISTEN_ADDRESSES") or "127.0.0.1",
        port_range_start=reader.number("PORT_RANGE_START", 5500, 1, 65535),
        port_range_end=reader.number("PORT_RANGE_END", 5599, 1, 65535),
        trunk_port=reader.number("DEFAULT_TRUNK_PORT", 5432, 1, 65535, "MAIN_PORT"),
        trunk_auto_start=reader.flag("TRUNK_AUTO_START", True, "MAIN_AUTO_START"),
        wal_level=reader.choice(
            "DEFAULT_WAL_LEVEL", "replica", ("minimal", "replica", "logical"), "MAIN_WAL_LEVEL"
        ),
        max_branches=reader.number("MAX_BRANCHES", 50, 0, 1_000_000),
        max_depth=reader.number("MAX_DEPTH", 10, 1, 1000),
        max_layers=reader.number("MAX_LAYERS", 32, 1, 1000),
        reaper_interval_s=reader.duration("REAPER_INTERVAL", 30.0),
    )
    if found.port_range_start > found.port_range_end:
        raise UsageError(
            f"PBKFS_PORT_RANGE_START is {found.port_range_start} and PBKFS_PORT_RANGE_END is "
            f"{found.port_range_end}: that is no range",
            hint="Set both, the smaller one first.",
        )
    return found


class _Reader:
    """Values of an environment by their name without a prefix."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, *names: str) -> str:
        return self._find(names)[1]

    def number(self, name: str, default: int, low: int, high: int, *older: str) -> int:
        variable, text = self._find((name, *older))
        if not text:
            return default
        if not text.strip().isdigit() or not low <= int(text) <= high:
            raise _bad(variable, text, f"Set a number from {low} to {high}.")
        return int(text)

    def flag(self, name: str, default: bool, *older: str) -> bool:
        variable, text = self._find((name, *older))
        word = text.strip().lower()
        if not word:
            return default
        if word in ("1", "true", "yes", "on"):
            return True
        if word in ("0", "false", "no", "off"):
            return False
        raise _bad(variable, text, "Set true or false.")

    def choice(self, name: str, default: str, allowed: tuple[str, ...], *older: str) -> str:
        variable, text = self._find((name, *older))
        word = text.strip().lower()
        if word and word not in allowed:
            raise _bad(variable, text, f"Set one of {', '.join(allowed)}.")
        return word or default

    def owner(self, name: str) -> tuple[int, int] | None:
        variable, text = self._find((name,))
        if not text:
            return None
        # Most commands have none, and need not import it.
        from pbkfs.mount.request import parse_owner_option

        try:
            return parse_owner_option(text)
        except UsageError as error:
            raise UsageError(f"{variable}: {error.message}", hint=error.hint) from error

    def duration(self, name: str, default: float) -> float:
        variable, text = self._find((name,))
        if not text:
            return default
        try:
            seconds = parse_duration(text)
        except UsageError:
            seconds = 0.0
        if seconds <= 0:
            raise _bad(variable, text, "Set a duration like 30s or 5m.")
        return seconds

    def _find(self, names: tuple[str, ...]) -> tuple[str, str]:
        """Return the variable that is set to something, and its value."""
        for name in names:
            for prefix in PREFIXES:
                if self.environ.get(prefix + name):
                    return prefix + name, self.environ[prefix + name]
        return PREFIXES[0] + names[0], ""


def _bad(variable: str, text: str, hint: str) -> UsageError:
    return UsageError(f"{variable} is set to {text!r}, which is not possible", hint=hint)
