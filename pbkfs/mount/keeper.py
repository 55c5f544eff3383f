"""The keeper: the small process that owns a mount, keeps its connection with the kernel open, and
has a new worker take over when the worker dies.

Run as a script by a bare interpreter (``python -I -S keeper.py SOCKET PID COMMAND``), so nothing
but the standard library is there, and little of that. It never touches the mount, the diff or the
base: nothing can block it on what it is there to save. Its protocol with workers is JSON over a
SEQPACKET socket, descriptors beside it; it stays as it is over upgrades, so it may only grow.

worker -> keeper
  armed      command, log; descriptors by name: from now on a death is to be survived
  added      descriptors by name, beside those it has
  warm       a new worker has imported all it needs
  serving    a new worker serves
  replace    command: have another program take over, on purpose
keeper -> worker
  go         the descriptors, and why: take over
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time

_MAX_MESSAGE = 65536
_MAX_FDS = 16

# Worker's words at its end: unmounted; nobody can take over.
_EXIT_DONE, _EXIT_REFUSED = 0, 3

# So many deaths in a row without so much service are taken for a cause that does not go away.
_MAX_DEATHS = 5
_SERVICE_S = 1.0
_PAUSE_S = 0.2
# What is to replace a worker has so long to get ready; then the worker stays.
_WARM_LIMIT_S = 60.0


class Child:
    """One worker: its process, and this end of the socket to it."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.pidfd = os.pidfd_open(pid)
        self.serving_at: float | None = None
        self.is_silent = False

    def reap(self) -> int:
        """Return the exit code, negative for a signal. All its threads are gone then."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.sock.close()
        return os.waitstatus_to_exitcode(status)


class Keeper:
    """See the module. One thread; everything happens in ``run``."""

    def __init__(self, child: Child) -> None:
        self.worker = child
        self.heir: Child | None = None
        self.heir_until: float | None = None
        self.fds: dict[str, int] = {}
        self.command: list[str] = []
        self.fallback: list[str] | None = None
        self.heir_command: list[str] = []
        self.log: dict[str, str] | None = None
        self.n_deaths = 0
        self.n_takeovers = 0
        self.is_ending = False
        self.wake, wake_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        """Keep the mount until it ends; returns the exit code."""
        while True:
            poller = select.poll()
            poller.register(self.wake, select.POLLIN)
            for child in filter(None, (self.worker, self.heir)):
                poller.register(child.pidfd, select.POLLIN)
                if not child.is_silent:
                    poller.register(child.sock, select.POLLIN)
            left: float | None = None
            if self.heir_until is not None:
                left = max(0, self.heir_until - time.monotonic()) * 1000
            ready = {fd for fd, _ in poller.poll(left)}
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.is_ending = True
                self.forward_end()
            for child in filter(None, (self.worker, self.heir)):
                if not child.is_silent and child.sock.fileno() in ready:
                    self.receive(child)
            if self.heir is not None:
                if self.heir.pidfd in ready:
                    self.drop_heir(self.heir, "it died")
                elif self.heir_until is not None and time.monotonic() >= self.heir_until:
                    self.drop_heir(self.heir, "it was not ready in time")
            if self.worker.pidfd in ready:
                code = self.bury()
                if code is not None:
                    return code

    def forward_end(self) -> None:
        """Ask the worker to unmount, as whoever signalled the keeper wants."""
        if self.is_ending and (self.fds == {} or self.worker.serving_at is not None):
            self.is_ending = False
            signal.pidfd_send_signal(self.worker.pidfd, signal.SIGTERM)

    def receive(self, child: Child) -> None:
        """Take one message of a worker; what can't be understood is of a later version."""
        try:
            data, fds, _, _ = socket.recv_fds(child.sock, _MAX_MESSAGE, _MAX_FDS)
        except OSError:
            data, fds = b"", []
        if not data:
            child.is_silent = True  # its end is closed, and it is about to die
            return
        message = json.loads(data)
        event = message.get("event")
        for name, fd in zip(message.get("fds", ()), fds, strict=False):
            os.set_inheritable(fd, False)
            if name in self.fds:
                os.close(self.fds[name])
            self.fds[name] = fd
        if event == "armed":
            self.command, self.log = message["command"], message["log"]
            child.serving_at = time.monotonic()
        elif event == "serving":
            child.serving_at = time.monotonic()
            self.n_takeovers += 1
            self.forward_end()
        elif event == "replace" and self.heir is None and child is self.worker:
            self.heir_command = message["command"]
            self.heir = self.spawn(self.heir_command)
            self.heir_until = time.monotonic() + _WARM_LIMIT_S
        elif event == "warm" and child is self.heir:
            self.heir_until = None
            # An end on purpose is one by SIGKILL, too: there is only one way to take over.
            signal.pidfd_send_signal(self.worker.pidfd, signal.SIGKILL)

    def drop_heir(self, heir: Child, why: str) -> None:
        """Let the worker go on: what was to replace it is not able to."""
        self.heir = self.heir_until = None
        signal.pidfd_send_signal(heir.pidfd, signal.SIGKILL)
        heir.reap()
        self.say(
            "ERROR", f"worker {self.worker.pid} stays; {heir.pid} was to replace it, but {why}"
        )

    def bury(self) -> int | None:
        """Reap the worker and have another one take over; returns an exit code where that ends."""
        dead = self.worker
        while not dead.is_silent and select.select([dead.sock], [], [], 0)[0]:
            self.receive(dead)  # its last words
        code = dead.reap()
        if code == _EXIT_DONE or "fuse" not in self.fds:
            return code if code >= 0 else 1
        how = f"worker {dead.pid} "
        how += f"died of signal {-code}" if code < 0 else f"failed ({code})"
        if code == _EXIT_REFUSED:
            self.say("ERROR", "nobody can take over; the mount ends")
            return code
        served_s = 0.0 if dead.serving_at is None else time.monotonic() - dead.serving_at
        heir = self.heir
        is_wanted = heir is not None
        self.n_deaths = 0 if is_wanted or served_s >= _SERVICE_S else self.n_deaths + 1
        if self.n_deaths >= _MAX_DEATHS and self.fallback is not None:
            self.say("ERROR", f"{how}: going back to the program before")
            self.command, self.fallback, self.n_deaths = self.fallback, None, 0
        if self.n_deaths >= _MAX_DEATHS:
            self.say("ERROR", f"{how}, as did {self.n_deaths - 1} before it; the mount ends")
            return 1
        if self.n_deaths > 1:
            time.sleep(_PAUSE_S * self.n_deaths)
        if heir is not None:
            self.fallback, self.command = self.command, self.heir_command
            self.worker, self.heir, self.heir_until = heir, None, None
            how = f"worker {dead.pid} was replaced"
        else:
            self.worker = self.spawn(self.command)
        names = sorted(self.fds)
        message = {
            "event": "go",
            "fds": names,
            "why": how,
            "n_takeovers": self.n_takeovers + 1,
            "keeper": os.getpid(),
        }
        fds = [self.fds[name] for name in names]
        try:
            socket.send_fds(self.worker.sock, [json.dumps(message).encode()], fds)
        except OSError as error:
            self.say("ERROR", f"worker {self.worker.pid} can't be told: {error.strerror}")
        return None

    def spawn(self, command: list[str]) -> Child:
        """Start a worker, which gets its end of the socket as descriptor 3."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.posix_spawn(
                command[0],
                command,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)],
            )
        return Child(pid, ours)

    def say(self, level: str, text: str) -> None:
        """Write a line into the worker's log, in its format."""
        if self.log is None:
            return
        now = time.time()
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        moment += f".{int(now % 1 * 1000):03d}Z"
        if self.log["style"] == "json":
            line = json.dumps(
                {
                    "time": moment,
                    "level": level.lower(),
                    "pid": os.getpid(),
                    "logger": "pbkfs.keeper",
                    "message": text,
                }
            )
        else:
            line = f"{moment} {level:<7} [{os.getpid()}] pbkfs.keeper: {text}"
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            fd = os.open(self.log["path"], flags, 0o640)
        except OSError:
            return
        try:
            os.write(fd, line.encode(errors="replace") + b"\n")
        except OSError:
            return
        finally:
            os.close(fd)


def main() -> int:
    """Keep the mount of the worker that this process has made before it became a keeper."""
    fd, pid = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    return Keeper(Child(pid, sock)).run()


if __name__ == "__main__":
    sys.exit(main())
