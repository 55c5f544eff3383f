"""Another program takes over a mount that is in use: ``pbkfs upgrade``.

For the command line, synchronous. The worker hands the wish on to its keeper (control op
``upgrade``), which starts this command's own program, waits until it is ready, kills the worker and
has the new one take over: as after a crash, so there is only one way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pbkfs.errors import HostError, NotRunningError
from pbkfs.mount import control, keeping
from pbkfs.mount.target import find_target
from pbkfs.overlay import ledger

# What the keeper gives the new program to get ready, and somewhat more.
_LIMIT_S = 75.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What an upgrade did; ``pid`` is that of the new worker."""

    mountpoint: Path | None
    diff: Path
    old_version: str
    version: str
    pid: int


def upgrade(mountpoint: Path | None, diff: Path | None) -> Upgraded:
    """Have this program serve a mount that another version of it serves; its users only wait.

    Raises NotRunningError, HostError where it can't be, BusyError while it must not be.
    """
    from pbkfs.fuse.session import init_answer

    target = find_target(mountpoint, diff)
    before = control.call(target.diff, "ping")
    control.call(
        target.diff,
        "upgrade",
        timeout_s=_LIMIT_S,  # it asks the file systems below, which write out first
        command=keeping.command(),
        ledger_version=ledger.VERSION,
        init_answer=init_answer(bytes.fromhex(before.get("init", ""))).hex(),
    )
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        # Between the two workers nobody answers, and the keeper holds the socket.
        try:
            now = control.call(target.diff, "ping", timeout_s=_LIMIT_S)
        except NotRunningError:
            # The old worker had taken the call when it was killed; the keeper is on record.
            if not target.has_worker():
                raise
            now = before
        if now["pid"] != before["pid"]:
            return Upgraded(
                target.mountpoint, target.diff, before["version"], now["version"], now["pid"]
            )
        time.sleep(_POLL_S)
    raise HostError(
        f"the new program did not take over the mount of {target.diff}; the old one goes on",
        hint=f"Its log says why: {target.diff / 'log' / 'worker.log'}",
    )
