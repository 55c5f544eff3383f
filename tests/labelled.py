"""``pbkfs`` that logs the labels of its durable steps and dies at one of them.

    python tests/labelled.py LOG LABEL N HOW ARGUMENTS…

runs ``pbkfs ARGUMENTS`` (``mount``) and ends that process, command or worker, at the N-th step with
LABEL, by SIGKILL where HOW is "kill" and by _exit(2) where it is "exit"; with a label that does not
exist it only logs. Only this process: not a worker that takes over from it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pbkfs import _native, durable
from pbkfs.cli.main import main
from pbkfs.overlay import layer as layers

if __name__ == "__main__":
    log, label, n, how, *arguments = sys.argv[1:]
    _native.arm_steps(log, label, int(n), how == "kill")
    durable.on_step = _native.step
    layers.COMPACTION_BYTES = 4096  # a short load's journal is small
    main(arguments)
