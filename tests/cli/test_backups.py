"""What a store holds, and what ``latest`` means, on hand-made stores through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from fix_place import Place, mine, snapshot
from handmade import Store, line

from pbkfs import errors


@pytest.fixture
def store(place: Path) -> Store:
    """FULL, DELTA, a damaged FULL, and a child of the damaged one."""
    made = Store(place / "store")
    full = made.add()
    made.add(mode="DELTA", parent=full)
    bad = made.add(status="CORRUPT")
    made.add(mode="DELTA", parent=bad)
    return made


def test_statuses_and_reasons(store: Store) -> None:
    rows = json.loads(run_pbkfs("backups", "-B", store.root, "-o", "json").stdout)
    assert [row["is_mountable"] for row in rows] == [True, True, False, False]
    assert [row["mode"] for row in rows] == ["FULL", "DELTA", "FULL", "DELTA"]
    assert rows[1]["parent_id"] == rows[0]["backup_id"]
    assert rows[2]["backup_id"] in rows[3]["reason"]
    lines = run_pbkfs("backups", "-B", store.root).stdout.splitlines()
    assert lines[0].split() == ["INSTANCE", "ID", "STATUS", "MODE", "WAL", "PG", "TIME", "(UTC)",
                                "MOUNTABLE"]  # fmt: skip
    assert lines[1].endswith("yes")
    assert "no: " in lines[3]
    assert "CORRUPT" in lines[3]


def test_all_instances_or_one(store: Store) -> None:
    Store(store.root, "other").add()
    rows = json.loads(run_pbkfs("backups", "-B", store.root, "-o", "json").stdout)
    assert {row["instance"] for row in rows} == {"main", "other"}
    rows = json.loads(run_pbkfs("backups", "-B", store.root, "-I", "other", "-o", "json").stdout)
    assert {row["instance"] for row in rows} == {"other"}
    done = run_pbkfs("backups", "-B", store.root, "-I", "none", check=False)
    assert done.returncode == errors.NotFoundError.exit_code
    assert "main, other" in done.stderr


def test_latest_is_the_newest_mountable(store: Store, at: Place) -> None:
    rows = json.loads(run_pbkfs("backups", "-B", store.root, "-o", "json").stdout)
    before = snapshot(store.root)
    at.mount("-B", store.root, "-i", "latest")
    (row,) = mine(at)
    assert row["base"]["backup_id"] == rows[1]["backup_id"]  # type: ignore[index]
    assert (at.mnt / "PG_VERSION").read_text() == "15\n"
    run_pbkfs("unmount", "-D", at.mnt)
    left = {k: v for k, v in snapshot(store.root).items() if not k.endswith("backup_ro.pid")}
    assert {k: v[2] for k, v in left.items()} == {k: v[2] for k, v in before.items()}


def test_chain_that_is_not_ok_needs_force(store: Store, at: Place) -> None:
    rows = json.loads(run_pbkfs("backups", "-B", store.root, "-o", "json").stdout)
    bad = rows[2]["backup_id"]
    done = at.mount("-B", store.root, "-i", bad, check=False)
    assert done.returncode == errors.ChainError.exit_code
    assert f"backup {bad} has status CORRUPT" in done.stderr
    assert not at.diff.exists()
    done = at.mount("-B", store.root, "-i", bad, "--force")
    assert "note: " in done.stderr
    run_pbkfs("unmount", "-D", at.mnt)
    # The status is looked at again at every mount.
    assert at.mount("--reuse", check=False).returncode == errors.ChainError.exit_code


def test_store_that_moved(store: Store, at: Place, place: Path) -> None:
    at.mount("-B", store.root, "-i", "latest")
    (at.mnt / "new").write_text("kept")
    run_pbkfs("unmount", "-D", at.mnt)
    moved = store.root.rename(place / "moved")
    done = at.mount("--reuse", check=False)
    assert done.returncode == errors.NotFoundError.exit_code
    done = at.mount("-B", moved, check=False)
    assert done.returncode == errors.DiffError.exit_code
    assert "--force" in done.stderr
    at.mount("-B", moved, "--force")
    assert (at.mnt / "new").read_text() == "kept"
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")


def test_backup_that_was_replaced_is_another_base(store: Store, at: Place) -> None:
    at.mount("-B", store.root, "-i", "latest")
    run_pbkfs("unmount", "-D", at.mnt)
    newest = sorted(store.path.iterdir())[1]
    content = newest / "backup_content.control"
    content.write_bytes(content.read_bytes() + line("postgresql.conf", 0))
    control = newest / "backup.control"
    lines = [row for row in control.read_text().splitlines() if "content-crc" not in row]
    control.write_text("\n".join(lines) + "\n")
    done = at.mount("--reuse", check=False)
    assert done.returncode == errors.DiffError.exit_code
    assert f"diff {at.diff} belongs to" in done.stderr
