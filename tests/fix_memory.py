"""A place in memory, for tests that sync thousands of times and test no disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_SHARED = "/dev/shm"


def memory_root() -> str | None:
    """A directory of a file system in memory; None (the usual temporary place) if there is none."""
    return _SHARED if os.access(_SHARED, os.W_OK | os.X_OK) else None


@pytest.fixture
def memory() -> Iterator[Path]:
    """An empty directory, in memory where that is possible; removed after the test."""
    with tempfile.TemporaryDirectory(prefix="pbkfs-memory-", dir=memory_root()) as name:
        yield Path(name)
