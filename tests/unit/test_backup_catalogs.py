"""Bases of every backup of every real catalog, held against what the real restore gave."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
from fix_catalogs import CatalogStore, manifests, truth

from pbkfs.backup import Base, BaseEntry, Kind, PageSource, list_backups, open_probackup
from pbkfs.errors import ChainError

MANIFESTS = manifests()
BACKUPS = [
    (catalog, backup_id)
    for catalog, manifest in MANIFESTS.items()
    for backup_id in manifest["backups"]
]
MOUNTABLE = [(c, b) for c, b in BACKUPS if truth(MANIFESTS[c]["backups"][b])]
REFUSED = [(c, b) for c, b in BACKUPS if not truth(MANIFESTS[c]["backups"][b])]
FORCED = [(c, b) for c, b in REFUSED if truth(MANIFESTS[c]["backups"][b], is_forced=True)]


def walk(base: Base, path: bytes = b"") -> Iterator[tuple[bytes, BaseEntry]]:
    for entry in base.scandir(path):
        below = path + b"/" + entry.name if path else entry.name
        yield below, entry
        if entry.kind is Kind.DIR:
            yield from walk(base, below)


class Truth:
    """What one restore of a manifest says of each path, as a mount has to show it."""

    def __init__(self, restore: dict[str, Any]) -> None:
        self._restore = restore
        self.rows = {row["path"].encode(): row for row in restore["pgdata"]}
        self.rows.pop(b"recovery.signal", None)  # written by the restore for its target
        self.wrong = {r["path"].encode(): r for r in restore.get("restore_is_wrong_for") or []}
        self.tablespaces = {}
        for path, row in list(self.rows.items()):
            if row["type"] == "l":
                oid = path.rpartition(b"/")[2]
                self.tablespaces[oid] = row["target"]
                self.rows[b".tblspc/" + oid] = {"type": "d", "mode": "0o700"}
                for below in restore["tablespaces"][row["target"]]:
                    self.rows[b".tblspc/" + oid + b"/" + below["path"].encode()] = below
        if self.tablespaces:
            self.rows[b".tblspc"] = {"type": "d", "mode": "0o700"}

    def size(self, path: bytes) -> int:
        found: int = self.wrong.get(path, {}).get("correct_size", self.rows[path].get("size"))
        return found

    def is_content(self, path: bytes, content: bytes) -> bool:
        """True if ``content`` is what the cluster had."""
        if path == b"postgresql.auto.conf":
            # The restore appends its own settings, with the time of the restore.
            plain = self._restore["postgresql_auto_conf"].split("\n# recovery settings added")[0]
            return content.decode() == plain
        if path in self.wrong:
            wanted = self.wrong[path]["correct_sha256"]
        else:
            wanted = self.rows[path]["sha256"]
        return bool(hashlib.sha256(content).hexdigest() == wanted)


def fingerprint(root: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> type and mode, size, time and hash of everything, directories included."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        info = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[str(path)] = info.st_mode, info.st_size, info.st_mtime_ns, digest
    return found


def differences(base: Base, expected: Truth) -> list[str]:
    """Where the names, types, modes, sizes and bytes of a base are not the expected ones."""
    seen = list(walk(base))
    found = [
        f"{path!r} twice" for path in {p for p, _ in seen} if [p for p, _ in seen].count(path) > 1
    ]
    entries = dict(seen)
    found += [f"{path!r} is missing" for path in expected.rows.keys() - entries.keys()]
    found += [f"{path!r} should not be there" for path in entries.keys() - expected.rows.keys()]
    for path in expected.rows.keys() & entries.keys():
        row, entry = expected.rows[path], entries[path]
        if entry.kind.value != row["type"]:
            found.append(f"{path!r} is {entry.kind}")
        elif entry.kind is Kind.LINK:
            target = b"../.tblspc/" + path.rpartition(b"/")[2]
            if entry.target != target or entry.size != len(target):
                found.append(f"{path!r} leads to {entry.target!r}")
        # The restore leaves pg_control with the mode of the umask; the list's mode is shown.
        elif entry.mode != int(row["mode"], 8) and path != b"global/pg_control":
            found.append(f"{path!r} has mode {entry.mode:o}")
        elif entry.kind is Kind.FILE:
            if entry.size != expected.size(path) and path != b"postgresql.auto.conf":
                found.append(f"{path!r} has size {entry.size} instead of {expected.size(path)}")
            content = reference.read_sources(base.sources(path), entry.size)
            if not expected.is_content(path, content):
                found.append(f"{path!r} has other bytes")
    return found


@pytest.mark.parametrize(("catalog", "backup_id"), MOUNTABLE)
def test_base_is_what_was_restored(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    restore = truth(manifest["backups"][backup_id])
    assert restore is not None
    base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id)
    try:
        assert differences(base, Truth(restore)) == []
        assert base.pg_major == int(manifest["pg_major"])
        label = base.sources(b"backup_label")
        text = reference.read_sources(label, label[0].size).decode()  # type: ignore[union-attr]
        assert text == restore["backup_label"]
    finally:
        base.close()


@pytest.mark.parametrize(("catalog", "backup_id"), MOUNTABLE)
def test_reference_is_what_was_restored(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    restore = truth(manifest["backups"][backup_id])
    assert restore is not None
    expected = Truth(restore)
    found = []
    seen = {path for path in expected.rows if path.count(b"/") < 2 and path.startswith(b".tbl")}
    composed = reference.Catalog(shared_catalog(catalog), manifest["instance"]).compose(backup_id)
    for path, entry in composed:
        if path.startswith(b"pg_tblspc/"):
            shown = b".tblspc/" + path.removeprefix(b"pg_tblspc/")
            if shown.count(b"/") == 1:
                seen.add(path)  # the link
                continue
        else:
            shown = path
        seen.add(shown)
        if shown not in expected.rows:
            found.append(f"{shown!r} should not be there")
        elif entry.kind == "f" and not expected.is_content(shown, entry.content):
            found.append(f"{shown!r} has other bytes")
    assert found == []
    assert seen == set(expected.rows)


@pytest.mark.parametrize(("catalog", "backup_id"), REFUSED)
def test_unusable_backup_is_refused(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    status = manifest["backups"][backup_id]["control"]["status"]
    with pytest.raises(ChainError) as caught:
        open_probackup(shared_catalog(catalog), manifest["instance"], backup_id)
    assert caught.value.hint
    assert backup_id in caught.value.message
    if status == "OK":
        parent = manifest["backups"][backup_id]["control"]["parent-backup-id"]
        assert f"parent {parent} " in caught.value.message
        assert "missing" in caught.value.message
    else:
        assert f"status {status}" in caught.value.message


@pytest.mark.parametrize(("catalog", "backup_id"), FORCED)
def test_forced_base_is_what_was_restored_by_force(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    restore = truth(manifest["backups"][backup_id], is_forced=True)
    assert restore is not None
    base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id, force=True)
    try:
        assert differences(base, Truth(restore)) == []
        assert any("status" in note for note in base.notes)
    finally:
        base.close()


@pytest.mark.parametrize(("catalog", "backup_id"), [r for r in REFUSED if r not in FORCED])
def test_force_does_not_help_what_cannot_be_composed(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    status = manifest["backups"][backup_id]["control"]["status"]
    if status == "CORRUPT":
        # Damaged pages only: undamaged files can be read, the damaged one is an error.
        base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id, force=True)
        n_damaged = 0
        for path, entry in walk(base):
            if entry.kind is Kind.FILE:
                try:
                    reference.read_sources(base.sources(path), entry.size)
                except reference.Damage:
                    n_damaged += 1
        base.close()
        assert n_damaged == 1
    else:
        with pytest.raises(ChainError):
            open_probackup(shared_catalog(catalog), manifest["instance"], backup_id, force=True)


@pytest.mark.parametrize("catalog", MANIFESTS)
def test_list_says_what_can_be_mounted(catalog: str, shared_catalog: CatalogStore) -> None:
    manifest = MANIFESTS[catalog]
    listed = list_backups(shared_catalog(catalog), manifest["instance"])
    assert [row.backup_id for row in listed] == sorted(manifest["backups"])
    for row in listed:
        control = manifest["backups"][row.backup_id]["control"]
        assert row.is_mountable == ((catalog, row.backup_id) in MOUNTABLE)
        assert (row.reason is None) == row.is_mountable
        assert row.status == control["status"]
        assert row.mode == control["backup-mode"]
        assert row.parent_id == control.get("parent-backup-id")


# A copy of a catalog is written for each: three that differ are enough, mounts try them all.
@pytest.mark.parametrize("catalog", [name for name in MANIFESTS if name[0] in "abg"])
def test_opening_and_guarding_leaves_the_store_as_it_was(
    catalog: str, catalog_store: CatalogStore
) -> None:
    manifest = MANIFESTS[catalog]
    store = catalog_store(catalog)
    before = fingerprint(store)
    for backup_id in manifest["backups"]:
        if (catalog, backup_id) not in MOUNTABLE:
            with pytest.raises(ChainError):
                open_probackup(store, manifest["instance"], backup_id)
            continue
        base = open_probackup(store, manifest["instance"], backup_id)
        base.acquire(os.getpid())
        n_guards = len(list(store.rglob("backup_ro.pid")))
        base.release(os.getpid())
        base.close()
        chain = base.identity["chain"]
        assert isinstance(chain, str)
        assert n_guards == len(chain.split())
    assert fingerprint(store) == before


def test_archive_backups_bring_their_wal(shared_catalog: CatalogStore) -> None:
    n_segments = 0
    for catalog, backup_id in MOUNTABLE:
        manifest = MANIFESTS[catalog]
        control = manifest["backups"][backup_id]["control"]
        base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id)
        seeds = list(base.wal_seed())
        if control["stream"] == "true":
            assert seeds == []
        else:
            size = manifest["wal_segment_mb"] << 20
            first = int(control["start-lsn"].partition("/")[2], 16) // size
            last = int(control["stop-lsn"].partition("/")[2], 16) // size
            names = [f"{1:08X}{0:08X}{segno:08X}".encode() for segno in range(first, last + 1)]
            assert [seed.name for seed in seeds] == names
            for seed in seeds:
                n_segments += 1
                with seed.open() as file:
                    data = file.read()
                assert len(data) == seed.size == size
                # A long page header: its system identifier is the cluster's.
                assert int.from_bytes(data[24:32], "little") == base.system_identifier
        base.close()
    assert n_segments or len(MANIFESTS) == 1


def test_external_directories_are_told_and_not_shown(shared_catalog: CatalogStore) -> None:
    for catalog, backup_id in MOUNTABLE:
        manifest = MANIFESTS[catalog]
        control = manifest["backups"][backup_id]["control"]
        restore = truth(manifest["backups"][backup_id])
        assert restore is not None
        base = open_probackup(shared_catalog(catalog), manifest["instance"], backup_id)
        wanted = sorted(path for path in control.get("external-dirs", "").split(":") if path)
        counts = {
            Path(path).name: sum(row["type"] == "f" for row in rows)
            for path, rows in (restore.get("external") or {}).items()
        }
        listed = base.external_directories()
        assert listed == [(n, path, counts[Path(path).name]) for n, path in enumerate(wanted, 1)]
        assert all(any(path in note for note in base.notes) for path in wanted)
        base.close()


@pytest.mark.parametrize(("catalog", "backup_id"), MOUNTABLE)
def test_limits_only_fall_and_layers_are_the_chain(
    catalog: str, backup_id: str, shared_catalog: CatalogStore
) -> None:
    base = open_probackup(shared_catalog(catalog), MANIFESTS[catalog]["instance"], backup_id)
    chain = base.identity["chain"]
    assert isinstance(chain, str)
    order = {part.partition(":")[0]: number for number, part in enumerate(chain.split())}
    for path, entry in walk(base):
        if entry.kind is not Kind.FILE:
            continue
        sources = base.sources(path)
        labels = [order[source.label] for source in sources]
        assert labels == sorted(set(labels))
        limits = [source.limit for source in sources if isinstance(source, PageSource)]
        assert limits == sorted(limits, reverse=True)
        for source in sources:
            status = os.stat(source.path, dir_fd=source.root_fd, follow_symlinks=False)
            assert stat.S_ISREG(status.st_mode)
    base.close()
