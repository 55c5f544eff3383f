"""``pbkfs check`` through the real command line."""

from __future__ import annotations

import json
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
