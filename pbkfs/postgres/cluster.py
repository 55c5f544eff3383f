"""One PGDATA: its version, its owner, what its control file says, where its log goes.

``open_cluster`` is the check that a directory is a PGDATA at all. Called by the command line.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import FormatError, HostError, NotFoundError, NotRunningError, UnsupportedError
from pbkfs.pgdata import read_control_file
from pbkfs.postgres.account import Account, owner_of
from pbkfs.postgres.binaries import Binaries

# Source: src/include/catalog/pg_control.h, DBState.
_DB_IN_ARCHIVE_RECOVERY = 5

# What a mount answers whose worker has died.
MOUNT_IS_GONE = (errno.ENOTCONN, errno.ECONNABORTED)

# recovery.signal came with 12; recovery.conf is another world.
OLDEST_MAJOR = 12


@dataclass(frozen=True, slots=True)
class Cluster:
    """A PGDATA that exists. ``diff`` is the diff directory of the mount it lies on, or None."""

    data_dir: Path
    major: int
    owner: Account
    diff: Path | None

    @property
    def is_mount(self) -> bool:
        """Whether PGDATA lies on a mount of ours, so that its base is safe from every change."""
        return self.diff is not None

    def has(self, name: str) -> bool:
        """Return whether PGDATA has an entry ``name``."""
        return os.path.lexists(self.data_dir / name)

    def read(self, name: str) -> bytes:
        """Return the content of a file of PGDATA. Raises OSError."""
        return (self.data_dir / name).read_bytes()

    def write(self, name: str, text: str, mode: int = 0o600) -> None:
        """Write a small file of PGDATA for the server's user. Raises HostError."""
        path = self.data_dir / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(path, flags, mode)
            try:
                os.write(fd, text.encode("utf-8", "surrogateescape"))
                if os.geteuid() == 0:
                    os.fchown(fd, self.owner.uid, self.owner.gid)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Remove a file of PGDATA. Raises HostError."""
        path = self.data_dir / name
        try:
            path.unlink()
        except OSError as error:
            raise HostError(f"cannot remove {path}: {error.strerror}") from error


def open_cluster(path: Path, diff: Path | None = None) -> Cluster:
    """Return the PGDATA at ``path``.

    Raises NotFoundError if it is none, NotRunningError if it lies on a mount whose worker is gone,
    HostError if it may not be read, UnsupportedError for a version before 12.
    """
    data_dir = Path(os.path.realpath(path))
    try:
        version = (data_dir / "PG_VERSION").read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise _explain(data_dir, error) from error
    match = re.match(r"(\d+)(\.\d+)?$", version)
    if match is None:
        raise NotFoundError(
            f"{data_dir} is not a PGDATA: PG_VERSION says {version[:20]!r}",
            hint="Give the directory that a backup was mounted on.",
        )
    if int(match[1]) < OLDEST_MAJOR:
        raise UnsupportedError(
            f"{data_dir} is of PostgreSQL {version}, and servers from {OLDEST_MAJOR} can be started"
        )
    if not (data_dir / "global").is_dir() or not (data_dir / "base").is_dir():
        raise NotFoundError(
            f"{data_dir} is not a whole PGDATA: global or base is missing",
            hint="Give the directory that a backup was mounted on.",
        )
    return Cluster(data_dir, int(match[1]), owner_of(data_dir), diff)


def mount_is_gone(data_dir: Path) -> NotRunningError:
    """Return the error that says that nobody serves the mount that ``data_dir`` lies on."""
    return NotRunningError(
        f"{data_dir} is a mount whose worker is gone",
        hint="Unmount it with pbkfs unmount --force and mount it again; the diff is intact.",
    )


def _explain(data_dir: Path, error: OSError) -> NotFoundError | NotRunningError | HostError:
    if error.errno in MOUNT_IS_GONE:
        return mount_is_gone(data_dir)
    if error.errno in (errno.EACCES, errno.EPERM):
        return HostError(
            f"cannot look into {data_dir}: {error.strerror}",
            hint="Run this as the owner of the directory, or as root if the mount allows it.",
        )
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return HostError(f"cannot read {data_dir}/PG_VERSION: {error.strerror}")
    if not os.path.lexists(data_dir):
        return NotFoundError(f"{data_dir} does not exist")
    if not data_dir.is_dir():
        return NotFoundError(f"{data_dir} is not a directory")
    hint = "Give the directory that a backup was mounted on."
    if not os.listdir(data_dir):
        hint = "It is empty: mount a backup on it first, with pbkfs mount."
    return NotFoundError(f"{data_dir} is not a PGDATA: it has no PG_VERSION", hint=hint)


def check_permissions(cluster: Cluster) -> None:
    """Raise HostError where PostgreSQL would refuse PGDATA for its mode.

    Source: src/backend/utils/init/miscinit.c, checkDataDir: 0700 or 0750.
    """
    mode = stat.S_IMODE(cluster.data_dir.stat().st_mode)
    if mode & 0o027:
        raise HostError(
            f"{cluster.data_dir} has mode {mode:04o}, and PostgreSQL insists on 0700 or 0750",
            hint=f"Run chmod 0700 {cluster.data_dir}.",
        )


def read_control(cluster: Cluster, binaries: Binaries) -> dict[str, str]:
    """Return what pg_controldata says about PGDATA, by its English labels.

    Empty where that program is not installed. Raises FormatError for a damaged control file.
    """
    program = binaries.tool("pg_controldata")
    if program is None:
        return {}
    done = subprocess.run(
        [program, "-D", cluster.data_dir],
        cwd="/",
        env={**cluster.owner.environment(), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        **cluster.owner.popen_identity(),
    )
    output = done.stdout.decode(errors="replace")
    errors = done.stderr.decode(errors="replace")
    complaint = re.search(r"(?im)^.*\b(crc|checksum).* not match.*$", errors + output)
    if done.returncode != 0 or complaint is not None:
        said = complaint[0] if complaint else (errors.strip().splitlines() or ["no output"])[-1]
        said = re.sub(r"^pg_controldata: (error|warning|fatal): ", "", said, flags=re.IGNORECASE)
        raise FormatError(
            f"{cluster.data_dir}/global/pg_control is damaged: {said.strip().rstrip('.')}",
            hint="The backup or the copy is not usable; check it, or take another one.",
        )
    return parse_control(output)


def is_in_recovery(data_dir: Path) -> bool | None:
    """Return whether pg_control says that archive recovery goes on; None if it is unreadable."""
    try:
        data = (data_dir / "global" / "pg_control").read_bytes()
        return read_control_file(data).state == _DB_IN_ARCHIVE_RECOVERY
    except (OSError, FormatError, UnsupportedError):
        return None


def parse_control(output: str) -> dict[str, str]:
    """Return the ``label: value`` lines of pg_controldata."""
    pairs = (line.partition(":") for line in output.splitlines())
    return {label.strip(): value.strip() for label, colon, value in pairs if colon}
