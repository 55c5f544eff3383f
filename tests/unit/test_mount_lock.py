"""At most one owner of a diff; a crash leaves a record, a good end leaves none."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pbkfs.errors import BusyError, DiffError, HostError
from pbkfs.mount import lock
from pbkfs.mount.owner import this_process


def test_second_owner_is_refused_by_name(tmp_path: Path) -> None:
    first = lock.acquire(tmp_path)
    first.write(this_process("/mnt/first"))
    with pytest.raises(BusyError, match=rf"pid {os.getpid()} on host .* mounted on /mnt/first"):
        lock.acquire(tmp_path)
    assert lock.is_held(tmp_path)
    first.close()
    assert not lock.is_held(tmp_path)


def test_force_does_not_override_a_live_owner(tmp_path: Path) -> None:
    first = lock.acquire(tmp_path)
    with pytest.raises(BusyError):
        lock.acquire(tmp_path, force=True)
    first.close()


def test_lock_lives_as_long_as_a_child_has_it(tmp_path: Path) -> None:
    taken = lock.acquire(tmp_path)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    taken.close()
    assert lock.is_held(tmp_path)
    os.close(write_end)
    os.waitpid(child, 0)
    assert not lock.is_held(tmp_path)


def test_crash_is_recovered_and_seen(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from pbkfs.mount import lock, owner;"
        "l = lock.acquire(Path(sys.argv[1])); l.write(owner.this_process('/mnt')); os._exit(9)"
    )
    crashed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert crashed.returncode == 9
    record = lock.read_owner(tmp_path)
    assert record is not None
    assert not record.is_alive()
    taken = lock.acquire(tmp_path)
    assert taken.previous == record
    taken.clear()
    taken.close()
    assert lock.read_owner(tmp_path) is None


def test_another_hosts_record_needs_force(tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(
        this_process("/mnt"), boot_id="b", machine_id="m", host="elsewhere"
    )
    (tmp_path / lock.NAME).write_bytes(elsewhere.to_json())
    with pytest.raises(BusyError, match="host elsewhere"):
        lock.acquire(tmp_path)
    assert not lock.is_held(tmp_path)
    lock.acquire(tmp_path, force=True).close()


def test_failed_mount_puts_the_record_back(tmp_path: Path) -> None:
    before = dataclasses.replace(this_process("/mnt"), start_ticks=1)
    (tmp_path / lock.NAME).write_bytes(before.to_json())
    taken = lock.acquire(tmp_path)
    taken.write(this_process("/mnt/other"))
    taken.restore()
    taken.close()
    assert lock.read_owner(tmp_path) == before


def test_lock_of_a_removed_directory_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lock.fcntl.flock

    def remove_then_lock(fd: int, operation: int) -> None:
        (tmp_path / lock.NAME).unlink()
        real(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", remove_then_lock)
    with pytest.raises(BusyError, match="was removed"):
        lock.acquire(tmp_path)


def test_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / lock.NAME).symlink_to("elsewhere")
    with pytest.raises(DiffError, match="symbolic link"):
        lock.acquire(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no such file or directory"):
        lock.acquire(tmp_path / "absent")
    assert lock.read_owner(tmp_path / "absent") is None
    assert not lock.is_held(tmp_path / "absent")
