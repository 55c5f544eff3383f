"""Where the daemon listens: a Unix socket of its user's own, and TCP on the loopback.

Called once, before the first thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from pbkfs.errors import BusyError, HostError, UsageError

_BACKLOG = 1024


def check_address(host: str, token: str) -> None:
    """Refuse to listen for other hosts without a token. Raises UsageError."""
    if token or is_loopback(host):
        return
    raise UsageError(
        f"listening on {host} without a token would give every host that gets there all servers",
        hint="Set PBKFS_API_TOKEN, or listen on 127.0.0.1.",
    )


def is_loopback(host: str) -> bool:
    """Tell whether only this host gets to an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def listen_tcp(host: str, port: int) -> socket.socket:
    """Listen on an address. Raises BusyError, HostError, UsageError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(
            f"address {host!r} is not known: {error.strerror}", hint="Name an IP address."
        ) from error
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise BusyError(
                f"port {port} of {host} is in use",
                hint="Choose another one with --port or PBKFS_API_PORT; 0: only the socket.",
            ) from error
        raise HostError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return made


@contextlib.contextmanager
def only_daemon(path: Path) -> Iterator[None]:
    """Hold the lock of the one daemon of a DATA directory. Raises BusyError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode(errors="replace").strip()
            raise BusyError(
                f"a daemon works on {path.parent} already (pid {pid})",
                hint="Stop it, or name another directory with PBKFS_DATA_DIR.",
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(fd)


def listen_unix(path: Path) -> socket.socket:
    """Listen on a socket, 0600, in the place of a dead one; the caller has the daemon's lock.

    A path of any length will do. Raises HostError.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        before = os.umask(0o177)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            made.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.umask(before)
            os.close(directory)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise HostError(f"cannot listen on {path}: {error.strerror}") from error
    return made
