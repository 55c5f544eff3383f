"""Every file of every mountable backup of the real catalogs, read through the native half."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import pytest
from fix_catalogs import CatalogStore, manifests, truth

from pbkfs import _native
from pbkfs.backup import Base, BaseEntry, Kind, RawSource, open_probackup

MANIFESTS = manifests()
MOUNTABLE = [
    (catalog, backup_id)
    for catalog, manifest in MANIFESTS.items()
    for backup_id, backup in manifest["backups"].items()
    if truth(backup)
]


def files(base: Base, path: bytes = b"") -> Iterator[tuple[bytes, BaseEntry]]:
    for entry in base.scandir(path):
        below = path + b"/" + entry.name if path else entry.name
        if entry.kind is Kind.DIR:
            yield from files(base, below)
        elif entry.kind is Kind.FILE:
            yield below, entry


@pytest.mark.parametrize(("catalog", "backup_id"), MOUNTABLE)
def test_pages_are_what_was_restored(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    restore = truth(manifest["backups"][backup_id])
    assert restore is not None
    digests = {row["path"].encode(): row["sha256"] for row in restore["pgdata"] if "sha256" in row}
    for wrong in restore.get("restore_is_wrong_for") or []:
        digests[wrong["path"].encode()] = wrong["correct_sha256"]
    # The restore appends its settings, with the time, and what it needs for its target.
    for path in (b"postgresql.auto.conf", b"recovery.signal"):
        digests.pop(path, None)
    base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id)
    root_fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    nodes = _native.Nodes(None, root_fd, -1, index_bytes=1 << 20)
    other = []
    try:
        for number, (path, entry) in enumerate(files(base), 1):
            if path not in digests:
                continue
            sources = [
                ("raw", s.root_fd, s.path, s.size, s.label)
                if isinstance(s, RawSource)
                else (
                    "pages",
                    s.root_fd,
                    s.path,
                    s.stored_size,
                    s.label,
                    s.compress,
                    s.limit,
                    s.padded,
                    s.old_zlib_8192,
                    s.headers,
                )
                for s in base.sources(path)
            ]
            nodes.add(number, entry.size, sources)  # type: ignore[arg-type]
            content = nodes.read(number, 0, entry.size + 1)
            if hashlib.sha256(content).hexdigest() != digests.pop(path):
                other.append(path)
            nodes.remove(number)
        assert other == []
        assert [path for path in digests if not path.startswith(b"pg_tblspc/")] == []
        assert nodes.counters()["read_errors"] == 0
    finally:
        nodes.close()
        os.close(root_fd)
        base.close()
