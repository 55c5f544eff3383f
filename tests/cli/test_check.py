"""``pbkfs check`` through the real command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from fix_mounts import run_pbkfs
from fix_place import Place

from pbkfs.errors import BusyError, DiffError, NotFoundError


def test_sound_and_damaged(at: Place, base: Path) -> None:
    at.mount("--base", base)
    (at.mnt / "base/1/1259").write_bytes(b"other")
    busy = run_pbkfs("check", "-d", at.diff, check=False)
    assert busy.returncode == BusyError.exit_code
    assert str(at.mnt) in busy.stderr
    run_pbkfs("unmount", "-D", at.mnt)

    done = run_pbkfs("check", "-d", at.diff)
    assert done.stdout.startswith(f"diff {at.diff} is sound (")
    assert done.stderr == ""
    found = json.loads(run_pbkfs("check", "-d", at.diff, "--format", "json").stdout)
    assert (found["clean"], found["findings"], found["diff"]) == (True, [], str(at.diff))
    assert found["counts"]["objects"] == 1

    shutil.rmtree(at.diff / "pg_wal")
    done = run_pbkfs("check", "-d", at.diff, check=False)
    assert done.returncode == DiffError.exit_code
    first, last = done.stdout.splitlines()
    assert first.startswith(f"error: {at.diff}/pg_wal is missing")
    assert last.startswith(f"diff {at.diff} is damaged, 1 error (")
    found = json.loads(run_pbkfs("check", "-d", at.diff, "-o", "json", check=False).stdout)
    assert [each["kind"] for each in found["findings"]] == ["pg_wal"]


def test_diff_of_a_killed_worker_is_sound(at: Place, base: Path) -> None:
    at.mount("--base", base)
    (at.mnt / "base/1/1259").write_bytes(b"other")
    at.kill()
    assert run_pbkfs("check", "-d", at.diff).stdout.endswith(")\n")


def test_base_that_is_gone_is_said(at: Place, base: Path) -> None:
    at.mount("--base", base)
    run_pbkfs("unmount", "-D", at.mnt)
    base.rename(base.with_name("moved"))
    done = run_pbkfs("check", "-d", at.diff)
    assert "warning: the base of diff" in done.stderr
    assert "is sound" in done.stdout


def test_what_is_no_diff(place: Path) -> None:
    done = run_pbkfs("check", "-d", place / "absent", check=False)
    assert done.returncode == NotFoundError.exit_code
    done = run_pbkfs("check", "-d", place, check=False)
    assert done.returncode == DiffError.exit_code
    assert "error: cannot read superblock" in done.stdout
    assert run_pbkfs("check", check=False).returncode == 2


def leave_behind(at: Place, base: Path) -> None:
    """What a crash may leave, all of it."""
    at.mount("--base", base)
    (at.mnt / "base/1/1259").write_bytes(b"other")
    (at.mnt / "made").write_bytes(b"kept")
    os.sync()
    at.kill()
    run_pbkfs("unmount", "-D", at.mnt, "--force")
    with open(at.diff / "journal", "ab") as journal:
        journal.write(b"torn")
    (at.diff / "objects/ff").mkdir(exist_ok=True)
    (at.diff / "objects/ff/ff").write_bytes(b"orphan")
    (at.diff / "pg_wal.new").mkdir()
    (at.diff / "pg_wal.new" / "000000010000000000000001").write_bytes(b"half")
    (at.diff / ".superblock.json.0d6ab5e3f2c41987.tmp").write_bytes(b"half")
    (at.diff / ".mine.tmp").write_bytes(b"somebody's")
    (at.diff / "notes.txt").write_bytes(b"somebody's")


def test_repair_settles_what_a_crash_left(at: Place, base: Path) -> None:
    leave_behind(at, base)
    before = run_pbkfs("check", "-d", at.diff).stdout
    assert before == run_pbkfs("check", "-d", at.diff).stdout
    notes = {line.removeprefix("note: ") for line in before.splitlines()[:-1]}
    assert len(notes) == 6

    lines = run_pbkfs("check", "-d", at.diff, "--repair").stdout.splitlines()
    repaired = {line.removeprefix("repaired: ") for line in lines if line.startswith("repaired")}
    left = {line.removeprefix("note: ") for line in lines if line.startswith("note")}
    assert repaired | left == notes
    assert {name for name in (".mine.tmp", "notes.txt") if any(name in each for each in left)} == {
        ".mine.tmp",
        "notes.txt",
    }
    assert len(left) == 2
    assert not (at.diff / "objects/ff/ff").exists()
    assert not (at.diff / "pg_wal.new").exists()
    assert (at.diff / ".mine.tmp").read_bytes() == b"somebody's"
    assert (at.diff / "lock").read_bytes() == b""
    again = json.loads(run_pbkfs("check", "-d", at.diff, "--repair", "-o", "json").stdout)
    assert (again["clean"], again["repaired"], len(again["findings"])) == (True, [], 2)

    at.mount("--reuse")
    assert (at.mnt / "base/1/1259").read_bytes() == b"other"
    assert (at.mnt / "made").read_bytes() == b"kept"
    busy = run_pbkfs("check", "-d", at.diff, "--repair", check=False)
    assert busy.returncode == BusyError.exit_code


def test_a_damaged_diff_is_not_repaired(at: Place, base: Path) -> None:
    leave_behind(at, base)
    for path in (at.diff / "objects").glob("*/*"):
        if path.read_bytes() == b"other":
            path.unlink()
    journal = (at.diff / "journal").read_bytes()
    done = run_pbkfs("check", "-d", at.diff, "--repair", check=False)
    assert done.returncode == DiffError.exit_code
    assert "repaired:" not in done.stdout
    assert "is missing (file 'base/1/1259')" in done.stdout
    assert "nothing was repaired" in done.stderr
    assert (at.diff / "objects/ff/ff").exists()
    assert (at.diff / "pg_wal.new").exists()
    assert (at.diff / "journal").read_bytes() == journal


def test_repair_needs_the_base(at: Place, base: Path) -> None:
    at.mount("--base", base)
    run_pbkfs("unmount", "-D", at.mnt)
    (at.diff / "binding.json").unlink()
    done = run_pbkfs("check", "-d", at.diff, "--repair", check=False)
    assert done.returncode == DiffError.exit_code
    assert "the base of diff" in done.stderr
