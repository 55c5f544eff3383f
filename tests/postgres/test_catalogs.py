"""Every backup of every real catalog: mounted, compared with the truth, started, worked on.

The truth is what the real tool's restore gave (the manifests), and where that restore is known to
be wrong, the correct content. The work on the mount is short here; ``PBKFS_TEST_LONG=1`` runs
pgbench for 20 s on each, with the store on a read-only mount, and checks the cluster again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fix_mounts import Mounts, run_pbkfs
from machine import catalogs_directory, postgres_bindir, postgres_majors
from servers import MountedServer
from sql_truth import differences, read_truth

IS_LONG = bool(os.environ.get("PBKFS_TEST_LONG"))
TPCB_SECONDS = 20 if IS_LONG else 2
# Clusters of this catalog need a server that was built with 256 kB segments.
SPECIAL_BUILDS = {"i_small_segments_pg17"}


def _manifests() -> dict[str, dict[str, Any]]:
    return {
        path.name.removesuffix(".manifest.json"): json.loads(path.read_text())
        for path in sorted(catalogs_directory().glob("*.manifest.json"))
    }


MANIFESTS = _manifests()


def _first_good(backup: dict[str, Any]) -> dict[str, Any] | None:
    """The restore with a complete listing, taken without --force, or None: cannot be restored."""
    for restore in backup["restores"]:
        if restore["rc"] == 0 and "--force" not in restore["args"]:
            found: dict[str, Any] = restore
            return found
    return None


MOUNTABLE = [
    (catalog, backup_id)
    for catalog, manifest in MANIFESTS.items()
    for backup_id, backup in manifest["backups"].items()
    if _first_good(backup)
]
REFUSED = [
    (catalog, backup_id)
    for catalog, manifest in MANIFESTS.items()
    for backup_id, backup in manifest["backups"].items()
    if not _first_good(backup)
]


def fingerprint(store: Path) -> dict[str, tuple[Any, ...]]:
    """Name -> type, mode, size, mtime, sha256 of everything in a store."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(store.rglob("*")):
        info = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        is_file = stat.S_ISREG(info.st_mode)
        found[str(path.relative_to(store))] = (
            info.st_mode,
            info.st_size if is_file else None,
            info.st_mtime_ns if is_file else None,
            digest,
        )
    return found


def _listing(root: Path) -> dict[str, tuple[str, int, int | None, bytes | None]]:
    """Relative path -> (type, permission bits, size, link target or sha256 as bytes)."""
    found: dict[str, tuple[str, int, int | None, bytes | None]] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = os.path.join(directory, name)
            info = os.lstat(path)
            key = os.path.relpath(path, root)
            mode = stat.S_IMODE(info.st_mode)
            if stat.S_ISLNK(info.st_mode):
                found[key] = ("l", mode, None, os.readlink(path).encode())
            elif stat.S_ISDIR(info.st_mode):
                found[key] = ("d", mode, None, None)
            else:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").digest()
                found[key] = ("f", mode, info.st_size, digest)
    return found


def _has_zero_tail(path: Path, restored: dict[str, Any]) -> bool:
    """True if the file is the restored one and zeros after it."""
    data = path.read_bytes()
    size = restored["size"]
    return (
        hashlib.sha256(data[:size]).hexdigest() == restored["sha256"]
        and data[size:].count(0) == len(data) - size
    )


def tree_differences(pgdata: Path, restore: dict[str, Any], *, is_stream: bool) -> list[str]:
    """Compare the tree under ``pgdata`` with one restore of the manifest."""
    seen = _listing(pgdata)
    kind, _, _, target = seen.pop("pg_wal")
    found = [] if kind == "l" else [f"pg_wal is {kind}"]
    assert target is not None
    seen["pg_wal"] = ("d", stat.S_IMODE(os.stat(pgdata / "pg_wal").st_mode), None, None)
    for name, entry in _listing(pgdata / "pg_wal").items():
        seen[f"pg_wal/{name}"] = entry
    tablespaces = {
        path: seen.pop(path) for path in list(seen) if (path + "/").startswith(".tblspc/")
    }
    wrong = {row["path"]: row for row in restore.get("restore_is_wrong_for", [])}
    shorter = {
        row["path"] if isinstance(row, dict) else row
        for row in restore.get("restored_shorter_than_n_blocks", [])
    }
    wanted = {row["path"]: row for row in restore["pgdata"]}
    wanted.pop("recovery.signal", None)

    def compare(name: str, row: dict[str, Any], where: Path) -> None:
        entry = listing.pop(prefix + name, None)
        if entry is None:
            found.append(f"{name} is missing")
            return
        kind, mode, size, digest = entry
        if row["type"] == "l":
            if kind != "l" or digest != f"../.tblspc/{Path(name).name}".encode():
                found.append(f"{name}: {entry} instead of a link into the mount")
            compare_tablespace(Path(name).name, row["target"])
            return
        if kind != row["type"]:
            found.append(f"{name}: type {kind} instead of {row['type']}")
            return
        wanted_mode = int(row["mode"], 8) if isinstance(row["mode"], str) else row["mode"]
        if mode != wanted_mode and name != "global/pg_control":
            found.append(f"{name}: mode {mode:o} instead of {wanted_mode:o}")
        if kind == "d":
            return
        assert digest is not None
        if name == "postgresql.auto.conf":
            plain = restore["postgresql_auto_conf"].split("\n# recovery settings added")[0]
            if (where / name).read_text() != plain:
                found.append(f"{name}: {(where / name).read_text()!r} instead of {plain!r}")
        elif name in wrong:
            if (size, digest.hex()) != (wrong[name]["correct_size"], wrong[name]["correct_sha256"]):
                found.append(f"{name}: {size} bytes, not the correct content")
        elif digest.hex() != row["sha256"] and not (
            name in shorter and _has_zero_tail(where / name, row)
        ):
            found.append(f"{name}: {size} bytes differ from the {row['size']} restored")

    def compare_tablespace(oid: str, target: str) -> None:
        nonlocal listing, prefix
        outer = listing, prefix
        listing, prefix = tablespaces, f".tblspc/{oid}/"
        for row in restore["tablespaces"][target]:
            compare(row["path"], row, pgdata / ".tblspc" / oid)
        listing.pop(f".tblspc/{oid}", None)
        listing, prefix = outer

    listing, prefix = seen, ""
    for name, row in wanted.items():
        compare(name, row, pgdata)
    tablespaces.pop(".tblspc", None)
    # The WAL of an ARCHIVE backup is not part of its restore; the mount brings what is needed.
    extra = [n for n in [*seen, *tablespaces] if is_stream or not n.startswith("pg_wal/")]
    return found + [f"{name} should not be there" for name in extra]


def _work(server: MountedServer, tablespace: Path) -> None:
    """Do what a developer does to a copy."""
    server.run("pgbench", "-i", "-q", "-s", "2")
    server.run("pgbench", "-T", str(TPCB_SECONDS), "-c", "4", "-j", "2")
    script = f"""
        vacuum full pgbench_accounts;
        create database made_here;
        create database dropped_here strategy file_copy;
        drop database dropped_here;
        create tablespace space_here location '{tablespace}';
        create table in_space (id int primary key, t text) tablespace space_here;
        insert into in_space select i, repeat('x', 100) from generate_series(1, 5000) i;
        create table emptied as select generate_series(1, 10000) as i;
        truncate emptied;
        insert into emptied values (42);
        create index on pgbench_history (tid);
        reindex database postgres;
        vacuum;
        checkpoint;
    """
    server.sql(*filter(str.strip, script.split(";")))


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Path]]:
    """Bind-mounts a directory read-only beside itself."""
    bound: list[Path] = []

    def bind(path: Path) -> Path:
        target = path.with_name(path.name + "-read-only")
        target.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", path, target], check=True)
        bound.append(target)
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        return target

    yield bind
    for target in bound:
        subprocess.run(["umount", target], check=True)
        target.rmdir()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("catalog", "backup_id"), MOUNTABLE)
def test_mounted_backup_is_the_cluster(
    catalog: str,
    backup_id: str,
    mounts: Mounts,
    catalog_store: Any,
    read_only: Callable[[Path], Path],
) -> None:
    manifest = MANIFESTS[catalog]
    backup = manifest["backups"][backup_id]
    restore = _first_good(backup)
    assert restore is not None
    store: Path = catalog_store(catalog)
    if IS_LONG:
        store = read_only(store)
    before = fingerprint(store)

    mount = mounts.mount("-B", store, "--instance", manifest["instance"], "-i", backup_id)
    is_stream = backup["control"]["stream"] in (True, "true")
    assert tree_differences(mount.pgdata, restore, is_stream=is_stream) == []

    major = int(manifest["pg_major"])
    if catalog not in SPECIAL_BUILDS and major in postgres_majors():
        server = MountedServer(mount, postgres_bindir(major))
        server.start()
        wanted = restore.get("with_correct_files_instead", restore)["sql"]
        is_exact = not restore.get("restored_shorter_than_n_blocks")
        assert differences(read_truth(server.uri), wanted, sizes=is_exact) == []
        server.check_cluster()

        tablespace = mounts.root / "tablespace"
        tablespace.mkdir()
        os.chown(tablespace, *(int(part) for part in mounts.owner.split(":")))
        _work(server, tablespace)
        worked = read_truth(server.uri)
        server.stop()
        mount.unmount()

        mount.mount()
        server.start()
        assert differences(read_truth(server.uri), worked) == []
        if IS_LONG:
            server.check_cluster()
        server.stop()
    mount.unmount()
    assert mount.unexpected_log_lines() == []
    assert fingerprint(store) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="bind mounts need root")
def test_read_only_store_is_enough(
    mounts: Mounts, catalog_store: Any, read_only: Callable[[Path], Path]
) -> None:
    catalog, backup_id = MOUNTABLE[-1]
    manifest = MANIFESTS[catalog]
    restore = _first_good(manifest["backups"][backup_id])
    assert restore is not None
    store = read_only(catalog_store(catalog))
    before = fingerprint(store)
    mount = mounts.mount("-B", store, "--instance", manifest["instance"], "-i", backup_id)
    assert tree_differences(mount.pgdata, restore, is_stream=True) == []
    server = MountedServer(mount, postgres_bindir(int(manifest["pg_major"])))
    server.start()
    assert differences(read_truth(server.uri), restore["sql"]) == []
    server.sql("create table made_here as select generate_series(1, 1000) as i", "checkpoint")
    server.stop()
    mount.unmount()
    mount.mount()
    server.start()
    assert server.sql("select count(*) from made_here") == "1000"
    server.stop()
    mount.unmount()
    assert fingerprint(store) == before


@pytest.mark.parametrize(("catalog", "backup_id"), REFUSED)
def test_unusable_backup_is_refused(
    catalog: str, backup_id: str, mounts: Mounts, catalog_store: Any
) -> None:
    manifest = MANIFESTS[catalog]
    store: Path = catalog_store(catalog)
    before = fingerprint(store)
    mount = mounts.prepare("-B", store, "--instance", manifest["instance"], "-i", backup_id)
    done = run_pbkfs(
        "mount", *mount.args, "-D", mount.pgdata, "-d", mount.diff, "--owner", mount.owner,
        "--wait", check=False,
    )  # fmt: skip
    assert done.returncode == 5
    lines = done.stderr.splitlines()
    assert lines[0].startswith("pbkfs: error: ")
    assert any(line.startswith("hint: ") for line in lines)
    status = manifest["backups"][backup_id]["control"].get("status", "")
    assert status in done.stderr if status != "OK" else "parent" in done.stderr
    assert not mount.diff.exists()
    assert not os.path.ismount(mount.pgdata)
    assert fingerprint(store) == before
