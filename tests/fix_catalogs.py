"""The real catalogs, unpacked.

``shared_catalog(name)`` gives the one copy of a catalog that all tests of this machine share: it is
unpacked once, found again by the hash of its archive, and must not be written to.
``catalog_store(name)`` gives a test a copy of its own, which is removed after it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from machine import catalogs_directory, session_directory

CatalogStore = Callable[[str], Path]

# The archives are compressed with --long=27.
WINDOW = 1 << 27


def manifests() -> dict[str, dict[str, Any]]:
    """Catalog name -> its manifest, of all catalogs that there are."""
    return {
        path.name.removesuffix(".manifest.json"): json.loads(path.read_text())
        for path in sorted(catalogs_directory().glob("*.manifest.json"))
    }


def truth(backup: dict[str, Any], *, is_forced: bool = False) -> dict[str, Any] | None:
    """The first restore that worked and lists every file; None: the real tool could not either."""
    for restore in backup["restores"]:
        if (
            restore["rc"] == 0
            and "pgdata" in restore
            and ("--force" in restore["args"]) == is_forced
        ):
            found: dict[str, Any] = restore
            return found
    return None


def _cache_directory() -> Path:
    """Where unpacked catalogs are kept from session to session, if this user may write there."""
    for place in (Path("/var/tmp/pbkfs-tests/catalogs"), session_directory() / "catalogs"):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise OSError("no place to unpack catalogs to")


def _unpack(archive: Path, target: Path) -> None:
    with (
        archive.open("rb") as packed,
        zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(packed) as plain,
        tarfile.open(fileobj=plain, mode="r|") as tar,
    ):
        if hasattr(tarfile, "fully_trusted_filter"):
            tar.extractall(target, filter="fully_trusted")
        else:
            tar.extractall(target)
    # Servers and mounts of other users read it too.
    for directory, _, files in os.walk(target):
        os.chmod(directory, 0o755)
        for name in files:
            os.chmod(os.path.join(directory, name), 0o644)


def unpacked(name: str) -> Path:
    """Path of ``pbk_store`` of a catalog, unpacked if it is not yet."""
    archive = catalogs_directory() / f"{name}.tar.zst"
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    cache = _cache_directory()
    ready = cache / digest[:24]
    with (cache / f"{digest[:24]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            # Unpacked beside it and renamed, so that what is there is whole.
            partial = Path(tempfile.mkdtemp(prefix="unpacking-", dir=cache))
            try:
                _unpack(archive, partial)
                partial.chmod(0o755)
                partial.rename(ready)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return ready / "pbk_store"


@pytest.fixture(scope="session")
def shared_catalog() -> CatalogStore:
    """Name of a catalog -> its store. Not to be written to."""
    known: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in known:
            known[name] = unpacked(name)
        return known[name]

    return find


@pytest.fixture
def catalog_store(shared_catalog: CatalogStore) -> Iterator[CatalogStore]:
    """Name of a catalog -> a copy of its store for this test alone, with all times and modes."""
    root = Path(tempfile.mkdtemp(prefix="c-", dir=session_directory()))
    root.chmod(0o755)

    def copy(name: str) -> Path:
        target = root / name
        if not target.exists():
            shutil.copytree(shared_catalog(name), target, symlinks=True)
        return target

    yield copy
    shutil.rmtree(root, ignore_errors=True)
