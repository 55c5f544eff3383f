"""Fixtures of the tests of ``fuse``: mounts served by a process of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuse.served import Served
from machine import session_directory

Serve = Callable[..., Served]

MIB = 1 << 20


@pytest.fixture
def serve(place: Path) -> Iterator[Serve]:
    """A factory of mounts: ``serve(lower, name=…, args…)``; all are gone at teardown."""
    made: list[Served] = []

    def start(
        lower: Path | None = None, *args: str, name: str = "m", prefix: tuple[str, ...] = ()
    ) -> Served:
        point = place / name
        point.mkdir(exist_ok=True)
        if prefix:
            point.chmod(0o777)
        served = Served(point, place / f"{name}.diff", lower, *args, prefix=prefix)
        made.append(served)
        return served

    yield start
    for served in made:
        served.end()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One mount of an empty tree for all tests of a module: a process takes a second to start."""
    root = Path(tempfile.mkdtemp(prefix="f-", dir=session_directory()))
    (root / "m").mkdir()
    served = Served(root / "m", root / "m.diff", None)
    yield served
    served.end()
    shutil.rmtree(root)


@pytest.fixture
def mnt(served: Served) -> Iterator[Path]:
    """An empty directory on that mount."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir=served.path))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def lower(place: Path) -> Path:
    """A directory to lie below a mount: relation files (mapped when copied up) and small ones."""
    root = place / "lower"
    (root / "base" / "5").mkdir(parents=True)
    (root / "base" / "5" / "16384").write_bytes(os.urandom(MIB))
    (root / "base" / "5" / "16385").write_bytes(os.urandom(8 * MIB))
    (root / "base" / "5" / "16385_fsm").write_bytes(os.urandom(3 * 8192))
    (root / "postgresql.conf").write_bytes(b"port = 5432\n" * 100)
    (root / "large").write_bytes(os.urandom(3 * MIB + 1234))
    (root / "link").symlink_to("postgresql.conf")
    os.chmod(root, 0o755)
    return root
