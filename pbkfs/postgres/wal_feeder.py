"""Hands archived WAL to a server whose user cannot read the archive.

A store of backups is often root's alone. Then ``pbkfs start``, called by root, leaves a process
behind that opens the files which restore_command asks for and passes the descriptors over a socket
that only the server's user can reach. It serves names of WAL files and nothing else, and ends with
the recovery or the server. Forked by ``launch``, before the caller has threads.
"""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

from pbkfs.errors import HostError
from pbkfs.postgres.account import Account
from pbkfs.postgres.recovery import SIGNAL
from pbkfs.postgres.wal_file import NAME_BYTES, ArchiveError, open_source

SOCKET_NAME = "wal.sock"
_POLL_MS = 1000
# A client that connects and says nothing must not keep the next one waiting for ever.
_CLIENT_LIMIT_S = 10.0


class WalFeeder:
    """The listening socket, made before the server is started; ``serve`` forks the process."""

    def __init__(self, archive: Path, run_dir: Path, owner: Account, data_dir: Path) -> None:
        """Bind the socket in ``run_dir``. Raises HostError."""
        self._archive = archive
        self._data_dir = data_dir
        self.path = run_dir / SOCKET_NAME
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.path.unlink(missing_ok=True)
            self._socket.bind(str(self.path))
            os.chown(self.path, owner.uid, owner.gid)
            self.path.chmod(0o600)
            self._socket.listen(8)
        except OSError as error:
            self._socket.close()
            raise HostError(f"cannot listen on {self.path}: {error.strerror}") from error

    def serve(self, server_pid: int) -> None:
        """Fork the process that serves as long as server ``server_pid`` recovers."""
        server = os.pidfd_open(server_pid)
        if os.fork() == 0:
            try:
                self._leave_terminal(server)
                self._loop(server)
            finally:
                os._exit(0)
        os.close(server)

    def close(self) -> None:
        """Close the caller's side."""
        self._socket.close()

    def _leave_terminal(self, server: int) -> None:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        kept = sorted({self._socket.fileno(), server})
        first = 3
        for fd in kept:
            os.closerange(first, fd)
            first = fd + 1
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))

    def _loop(self, server: int) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(server, select.POLLIN)
        has_ended = False
        while True:
            ready = {fd for fd, _ in poller.poll(_POLL_MS)}
            if server in ready:
                return
            if self._socket.fileno() in ready:
                self._serve_one()
                continue
            # PostgreSQL removes the file when recovery is over. Twice, because it asks for a last
            # history file around that moment.
            if not os.path.exists(self._data_dir / SIGNAL):
                if has_ended:
                    return
                has_ended = True

    def _serve_one(self) -> None:
        try:
            client, _ = self._socket.accept()
            with client:
                client.settimeout(_CLIENT_LIMIT_S)
                name = os.fsdecode(client.recv(NAME_BYTES))
                try:
                    found = open_source(str(self._archive), name)
                except ArchiveError as error:
                    client.send(b"!" + os.fsencode(str(error)))
                    return
                if found is None:
                    client.send(b"-")
                    return
                fd, source = found
                try:
                    socket.send_fds(client, [b"+" + os.fsencode(source)], [fd])
                finally:
                    os.close(fd)
        except OSError:
            return  # the client went away; it is the one who reports it
