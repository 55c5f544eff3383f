"""What the kernel may hold back of what was written to a mount, and the space that is kept for it.

With the writeback cache a write is taken without asking whether there is room for it. So the dirty
bytes of the mount are bounded, and as much space of the diff's file system is out of reach of all
who can still be refused. Called by ``Session``, on any thread; reads and writes sysfs, never the
mount.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

# 512 MiB in pieces of 64 KiB, seconds until written / also synced, best of 3 beside other load:
# ext4 0.24 / 0.54; FUSE's default (strictly 1 % of the kernel's threshold) 1.06 / 1.38; not strict
# 0.28 / 0.93; strict at 1 GiB 0.28 / 1.05, 256 MiB 0.35 / 0.75, 64 MiB 0.57 / 0.90.
_MAX_BYTES, _MIN_BYTES = 256 << 20, 1 << 20
# Of a small file system, so much.
_MAX_SHARE = 16
_READ_AHEAD_KB = 1024

# A page that is dirty takes two records of one range at most: live, and durable.
_PAGE_BYTES_PER_JOURNAL_BYTE = 128

# Source: linux fs/fuse/inode.c, fuse_bdi_init(): strict, and this share of the threshold.
_DEFAULT_PERCENT = 1


@dataclass(frozen=True, slots=True)
class Writeback:
    """What is in force for a mount."""

    dirty_bytes: int
    """The most that may be written and not yet in the diff."""
    is_set: bool
    """Whether that is our bound; else it is the kernel's default, which only root can change."""
    reserve_bytes: int
    """Free space of the diff's file system that ``statfs`` hides and fallocate can't have."""


def bound(device: str | None, n_bytes: int) -> Writeback:
    """Bound the dirty bytes of the mount ``device`` (major:minor), whose diff's file system is of
    ``n_bytes``; returns what is in force then.

    The kernel keeps a share of its own threshold, which follows the memory that is free: call it
    again from time to time.
    """
    wanted = max(min(_MAX_BYTES, n_bytes // _MAX_SHARE), _MIN_BYTES)
    bdi = Path("/sys/class/bdi", device or "-")
    threshold = _threshold()
    # Older kernels know neither max_bytes nor strict_limit, and FUSE is strict.
    percent = str(min(max(wanted * 100 // max(threshold, 1), 1), 100))
    is_set = _write(bdi / "max_bytes", str(wanted)) or _write(bdi / "max_ratio", percent)
    if is_set:
        _write(bdi / "strict_limit", "1")
    dirty = min(_in_force(bdi, threshold), threshold)
    reserve = min(dirty, wanted)
    return Writeback(dirty, is_set, reserve + reserve // _PAGE_BYTES_PER_JOURNAL_BYTE)


def read_ahead(device: str | None) -> None:
    """Let the kernel read ahead as far as one request goes, where allowed."""
    _write(Path("/sys/class/bdi", device or "-", "read_ahead_kb"), str(_READ_AHEAD_KB))


def _threshold() -> int:
    """Return how many bytes of all file systems may be dirty."""
    with open("/proc/vmstat") as file:
        for line in file:
            name, _, value = line.partition(" ")
            if name == "nr_dirty_threshold":
                return int(value) * mmap.PAGESIZE
    return 0


def _in_force(bdi: Path, threshold: int) -> int:
    with contextlib.suppress(OSError):
        if (bdi / "strict_limit").read_text().strip() == "0":
            return threshold
        return int((bdi / "max_bytes").read_text())
    percent = _DEFAULT_PERCENT
    with contextlib.suppress(OSError):
        percent = int((bdi / "max_ratio").read_text())
    return threshold * percent // 100


def _write(path: Path, value: str) -> bool:
    """Write a setting; False where that is not allowed: not root, no sysfs, an older kernel."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(fd, "wb", buffering=0)) as file:
        try:
            file.write(value.encode())
        except OSError as error:
            logger.info("cannot set %s: %s", path, error.strerror)
            return False
    return True
