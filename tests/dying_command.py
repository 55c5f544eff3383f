"""Run as ``dying_command.py N ARGS``: ``pbkfs ARGS``, killed with SIGKILL before its Nth step.

A step is a durable change on the disk, a transaction of the store, or the begin and the end of what
an engine or a server is told to do. Only the command dies, not the worker or server it has started.
With N = 0 it counts: it prints the number of steps on stderr, as its last line.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from pbkfs import durable
from pbkfs.branch import overlay, serving, store
from pbkfs.cli.main import run
from pbkfs.mount import ending, launch, sealing

_PID = os.getpid()
_die_at = int(sys.argv[1])
_n_steps = 0


def step(label: str) -> None:
    """Count; die if it is time."""
    del label
    global _n_steps
    if os.getpid() != _PID:
        return
    _n_steps += 1
    if _n_steps == _die_at:
        os.kill(_PID, signal.SIGKILL)


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a step before and after it."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        step("before")
        result = function(*args, **kwargs)
        step("after")
        return result

    return wrapped


def main() -> int:
    """Arm the steps and run the command."""
    durable.on_step = step
    for owner, names in (
        (store.Store, ("transaction",)),
        (overlay.OverlayEngine, ("create", "mount", "clone", "clone_point", "reset", "destroy")),
        (serving.Serving, ("start", "stop", "set_password")),
        (sealing, ("seal",)),
        (launch, ("start_worker",)),
        (ending, ("unmount",)),
    ):
        for name in names:
            setattr(owner, name, stepping(getattr(owner, name)))
    code = run(sys.argv[2:])
    print(_n_steps, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
