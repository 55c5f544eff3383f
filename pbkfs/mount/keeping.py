"""The worker's side of its keeper: whether there is one, how a process becomes one, what is said.

``become_keeper`` belongs to the process that is about to be the worker, in ``launch``; a ``Link``
to the worker's main thread. The other side is a program of its own, native/keeper/keeper.c, which
says what they talk about.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pbkfs.aside import PROGRAM, errno_of
from pbkfs.errors import HostError
from pbkfs.mount import privileges
from pbkfs.overlay.layer import Layer

# What a worker ends with that can't take over: the keeper's word, see there.
EXIT_REFUSED = 64

# Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1
# The kernel that can be asked to send again what a dead worker had taken (FUSE_NOTIFY_RESEND).
_FIRST_KERNEL = (6, 9)
# File systems whose syncfs(2) tells of every write error: ext4 and its like, XFS, Btrfs, F2FS and
# tmpfs. overlayfs tells of none: the one below it has them. Source: linux/magic.h.
_TELLING = (0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994)
_STATFS_BYTES = 256
_MAX_MESSAGE = 65536
_MAX_FDS = 64
_ENDING = (signal.SIGTERM, signal.SIGINT)
# Their default is to end the process, and with it the mount under a server.
_IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE)

# Not run as a file of this package: its directory would be searched before the library.
_SCRIPT = "import sys; sys.path[:] = {path!r}; from pbkfs.mount.takeover import main; main()"


def check_host() -> None:
    """Raise HostError where no mount can outlive its worker."""
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < _FIRST_KERNEL:
        raise HostError(
            f"a mount can't be supervised on Linux {release}",
            hint="That needs Linux 6.9 or later; leave --supervised out.",
        )
    if not os.access(PROGRAM, os.X_OK):
        raise HostError(
            f"a mount can't be supervised without {PROGRAM}",
            hint="Install pbkfs again, or leave --supervised out.",
        )


def check_layer(layer: Layer) -> None:
    """Raise HostError where a diff that writes to ``layer`` can't be served by one after another.

    Raises OSError.
    """
    if not tells_errors(layer.objects.fd):
        raise HostError(
            f"a mount can't be supervised with its diff on the file system of {layer.path}, which "
            "does not tell of write errors",
            hint="Put the diff on ext4, XFS, Btrfs, F2FS or tmpfs, or leave --supervised out.",
        )


def tells_errors(fd: int) -> bool:
    """Return whether the file system of ``fd`` tells whoever takes over of its write errors."""
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if number := errno_of("fstatfs", fd, found):
        raise OSError(number, os.strerror(number))
    # Source: statfs(2): f_type comes first, a long.
    return int(struct.unpack_from("@l", found)[0]) in _TELLING


def command() -> list[str]:
    """Return how a worker of this very program is started to take over."""
    path = [entry for entry in sys.path if entry]
    root = str(Path(__file__).parents[2])
    if root not in path:
        path.insert(0, root)
    return [sys.executable, "-c", _SCRIPT.format(path=path)]


class Link:
    """The worker's end of the socket to its keeper, the process ``pid``."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self._sock = sock

    def send(
        self,
        event: str,
        fds: Mapping[str, int] | None = None,
        command: Sequence[str] = (),
        **fields: str,
    ) -> None:
        """Tell the keeper something. Raises OSError."""
        fds = fds or {}
        words = [event, *(f"fd={name}" for name in fds), *(f"arg={word}" for word in command)]
        words += [f"{name}={value}" for name, value in fields.items()]
        message = b"".join(os.fsencode(word) + b"\0" for word in words)
        if fds:
            socket.send_fds(self._sock, [message], list(fds.values()))
        else:
            self._sock.send(message)

    def receive(self) -> tuple[dict[str, str], dict[str, int]]:
        """Wait for the keeper's word; returns it with its descriptors by name. Raises HostError."""
        data, fds, flags, _ = socket.recv_fds(self._sock, _MAX_MESSAGE, _MAX_FDS)
        for fd in fds:
            os.set_inheritable(fd, False)
        if not data:
            raise HostError("the keeper of the mount is gone")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise HostError("what the keeper of the mount has kept did not all arrive")
        _, *words = os.fsdecode(data).split("\0")[:-1]
        pairs = [word.partition("=")[::2] for word in words]
        names = [value for name, value in pairs if name == "fd"]
        return dict(pairs), dict(zip(names, fds, strict=True))


@dataclass(frozen=True, slots=True)
class Taken:
    """What a worker gets from the keeper to take over."""

    link: Link
    fds: Mapping[str, int]
    why: str
    n_takeovers: int


def become_keeper() -> Link:
    """Split in two: this process becomes the keeper; its child, the worker, gets the link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keeper = os.getpid()
    # The keeper lets them in once it can pass them on; until then they wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    child = os.fork()
    if child == 0:
        ours.close()
        end_with(keeper)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Link(theirs, keeper)
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if null > 2:
            os.close(null)
        os.set_inheritable(ours.fileno(), True)
        # For good, and so for all that it starts: what a worker may have it start, above all.
        privileges.drop()
        os.execv(PROGRAM, [PROGRAM, "keep", str(ours.fileno()), str(child)])
    finally:
        # It can't be a keeper; so it only sees the worker die, which ends the mount.
        _, status = os.waitpid(child, 0)
        os._exit(max(os.waitstatus_to_exitcode(status), 0))


def end_with(parent: int) -> None:
    """Have the kernel kill this process when ``parent`` dies: a mount has one owner."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
