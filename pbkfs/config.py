"""Defaults and places that are not part of a diff, from the environment (``PBKFS_*``).

The command line reads its options' own variables (``PBKFS_BACKUP_PATH`` for ``--backup-path``, and
so on) itself; what stands here is used below it.
"""

from __future__ import annotations

import os
from pathlib import Path

ENV_PREFIX = "PBKFS"

# Page indexes of compressed files: 8 bytes a block, so 64 MiB index 64 GiB of data that is in use.
DEFAULT_INDEX_BYTES = 64 << 20

# The worker answers "started" right after the fork; what takes longer than this hangs.
START_LIMIT_S = 10.0

# A graceful end of a worker flushes the kernel's dirty pages; after this long --force kills it.
STOP_LIMIT_S = 30.0


def state_log_path() -> Path:
    """Return the file that takes tracebacks of commands which have no diff to log into."""
    state_home = os.environ.get("XDG_STATE_HOME")
    if state_home:
        return Path(state_home) / "pbkfs" / "pbkfs.log"
    if os.geteuid() == 0:
        return Path("/var/log/pbkfs.log")
    return Path(os.path.expanduser("~/.local/state/pbkfs/pbkfs.log"))
