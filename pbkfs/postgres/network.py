"""Where a server listens: a free port and a directory for its Unix socket.

Called by the command line while a server starts. Nothing is reserved: between the look and the
server's own bind another process may take the port, and the caller then tries the next one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pbkfs.errors import BusyError, HostError, UsageError
from pbkfs.postgres.account import Account

FIRST_PORT = 5432
RUN_DIR_VARIABLE = "PBKFS_RUN_DIR"
_LAST_PORT = 65535
_BACKLOG = 128
# sockaddr_un.sun_path, less the final NUL. Source: unix(7).
_SUN_PATH_BYTES = 107
# The hba file of ``--trust-local``, in the run directory.
TRUSTING_HBA = "pg_hba.conf"
# What a start may leave in the run directory, beside the socket.
_OUR_FILES = (TRUSTING_HBA, "wal_file.py", "wal.sock")
_WILDCARDS = {"*": ("0.0.0.0", "::"), "0.0.0.0": ("0.0.0.0",), "::": ("::",)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens. ``listen_addresses`` is as PostgreSQL has it; may be empty."""

    port: int
    listen_addresses: str
    socket_dir: Path

    def uri(self, user: str, database: str = "postgres", *, prefer_socket: bool = False) -> str:
        """Return a connection URI: over TCP where the server listens there."""
        name = f"{quote(user, safe='')}@"
        address = first_address(self.listen_addresses)
        if address is None or prefer_socket:
            host = quote(str(self.socket_dir), safe="/")
            return f"postgresql://{name}/{quote(database)}?host={host}&port={self.port}"
        host = f"[{address}]" if ":" in address else address
        return f"postgresql://{name}{host}:{self.port}/{quote(database)}"


def first_address(listen_addresses: str) -> str | None:
    """Return an address that a client of this host can use, or None where only the socket is."""
    for item in listen_addresses.split(","):
        item = item.strip()
        if item:
            return {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(item, item)
    return None


def find_free_port(listen_addresses: str, first: int = FIRST_PORT, tries: int = 1000) -> int:
    """Return the first port from ``first`` that is free on all addresses. Raises BusyError."""
    last = min(first + tries - 1, _LAST_PORT)
    for port in range(first, last + 1):
        if port_is_free(listen_addresses, port):
            return port
    raise BusyError(
        f"no free port from {first} to {last} on {listen_addresses or 'this host'}",
        hint="Stop a server, or name a port with --port.",
    )


def check_port(listen_addresses: str, port: int) -> None:
    """Raise BusyError unless ``port`` is free."""
    if not port_is_free(listen_addresses, port):
        raise BusyError(
            f"port {port} is in use on {listen_addresses or 'this host'}",
            hint="Choose another one with --port, or leave it out to get the first free one.",
        )


def port_is_free(listen_addresses: str, port: int) -> bool:
    """Return whether a server could bind ``port`` on every address now.

    Without an address the port is only part of the socket's name, but it is looked at on the
    loopback all the same, so that no two servers of a host share a number.
    """
    names = [name for name in (part.strip() for part in listen_addresses.split(",")) if name]
    addresses: list[str] = []
    for name in names or ["127.0.0.1"]:
        addresses += _WILDCARDS.get(name, (name,))
    return all(_can_bind(address, port) for address in addresses)


def open_listeners(listen_addresses: str, port: int) -> list[socket.socket]:
    """Listen where a server with this setting would. Raises BusyError, UsageError."""
    made: list[socket.socket] = []
    try:
        for name in (part.strip() for part in listen_addresses.split(",")):
            for address in _WILDCARDS.get(name, (name,)):
                made += _listen(address, port)
        if not made:
            raise BusyError(f"no address of {listen_addresses!r} can be listened on")
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


def _listen(address: str, port: int) -> Iterator[socket.socket]:
    for family, kind, protocol, _, where in _resolve(address, port):
        try:
            made = socket.socket(family, kind, protocol)
        except OSError:
            continue  # a kernel without IPv6
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(where)
            made.listen(_BACKLOG)
        except OSError as error:
            made.close()
            if address == "::" and error.errno != errno.EADDRINUSE:
                continue  # IPv6 is switched off
            raise BusyError(
                f"port {port} of {address} can't be listened on: {error.strerror}"
            ) from error
        yield made


def _resolve(address: str, port: int) -> list[tuple[Any, ...]]:
    """Return what getaddrinfo says. Raises UsageError."""
    try:
        return [
            *socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ]
    except OSError as error:
        raise UsageError(
            f"cannot listen on {address!r}: {error.strerror}",
            hint="Give addresses or names of this host, separated by commas.",
        ) from error


def _can_bind(address: str, port: int) -> bool:
    for family, kind, protocol, _, where in _resolve(address, port):
        try:
            probe = socket.socket(family, kind, protocol)
        except OSError:
            continue  # a kernel without IPv6
        with probe:
            # As the server does, so that connections in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(where)
                # Without listen, another socket that is bound but not yet listening would pass.
                probe.listen(1)
            except OSError as error:
                if address == "::" and error.errno != errno.EADDRINUSE:
                    continue  # IPv6 is switched off: PostgreSQL then listens on the others
                return False
    return True


def run_directory(data_dir: Path, account: Account) -> Path:
    """Return the short path of the directory for the server's socket; it may not exist yet.

    PGDATA's own path is often too long for a socket, and a mount must show nothing of ours.
    """
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:12]
    named = os.environ.get(RUN_DIR_VARIABLE)
    if named:
        return Path(named).absolute() / name
    if os.geteuid() == 0 and os.access("/run", os.W_OK):
        return Path("/run/pbkfs") / name
    return Path(f"/tmp/pbkfs-{account.uid}") / name


def make_run_directory(data_dir: Path, account: Account) -> Path:
    """Make the run directory, 0700 and owned by ``account``. Raises HostError."""
    path = run_directory(data_dir, account)
    parent = path.parent
    try:
        parent.mkdir(mode=0o755, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        for directory in (parent, path):
            _check_private(directory, account)
        if os.geteuid() == 0:
            os.chown(path, account.uid, account.gid)
            path.chmod(0o700)
            if parent.parent == Path("/tmp"):
                os.chown(parent, account.uid, account.gid)
    except OSError as error:
        raise HostError(
            f"cannot make the socket directory {path}: {error.strerror}",
            hint="Name another directory with --socket-dir.",
        ) from error
    return path


def remove_dead_sockets(run_dir: Path) -> None:
    """Remove the sockets that a killed server left in its run directory, which is its own.

    PostgreSQL does so itself, but looks at the lock file's process with kill(pid, 0), which finds
    a dead one too, until somebody has waited for it.
    """
    with contextlib.suppress(OSError):
        for entry in os.listdir(run_dir):
            if entry.startswith(".s.PGSQL."):
                (run_dir / entry).unlink()


def remove_run_directory(data_dir: Path, account: Account) -> None:
    """Remove the run directory and what a killed server left in it."""
    path = run_directory(data_dir, account)
    try:
        _check_private(path, account)
        for entry in os.listdir(path):
            if entry.startswith(".s.PGSQL.") or entry in _OUR_FILES:
                (path / entry).unlink()
        path.rmdir()
        path.parent.rmdir()
    except (OSError, HostError):
        return  # not empty, not ours, or used by another server: harmless


def check_socket_directory(path: Path) -> None:
    """Raise UsageError if a socket in ``path`` would have too long a name."""
    n_bytes = len(os.fsencode(path / f".s.PGSQL.{_LAST_PORT}"))
    if n_bytes > _SUN_PATH_BYTES:
        raise UsageError(
            f"socket directory {path} is too long: a socket's path has at most "
            f"{_SUN_PATH_BYTES} bytes",
            hint="Name a shorter directory with --socket-dir.",
        )


def _check_private(path: Path, account: Account) -> None:
    """Raise HostError unless only root or ``account`` can change ``path``: /tmp is everybody's."""
    status = os.lstat(path)
    is_safe = (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid in (0, account.uid, os.geteuid())
        and not status.st_mode & 0o022
    )
    if not is_safe:
        raise HostError(
            f"{path} belongs to somebody else or can be changed by others",
            hint="Remove it, or name another directory with --socket-dir.",
        )


def split_addresses(values: Sequence[str]) -> str:
    """Return the setting listen_addresses for ``--listen`` given any number of times."""
    return ",".join(part.strip() for value in values for part in value.split(",") if part.strip())
