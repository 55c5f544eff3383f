"""A write-back below fails, and the kernel calls the pages clean: what a mount after that believes.

What matters is what is on the disk, so the page cache is emptied in the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fix_disks import ThinDisk, thin_disk
from fix_mounts import run_pbkfs
from fix_place import Place

from pbkfs.errors import HostError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a disk without room")

PAGE = 8192
N_PAGES = 300
RELATION = "base/1/16384"


@pytest.fixture
def disk(at: Place) -> Iterator[ThinDisk]:
    """A thin disk with the diff on it."""
    with thin_disk(at.root) as made:
        at.diff = made.path / "diff"
        at.expected += [r"can.t be synced", r"periodic sync .* failed", r"worker failed"]
        at.expected += [r"cannot sync", r"could not be made durable", r"Input/output error"]
        try:
            yield made
        finally:
            at.close()
            found, at.diff = at.unexpected(), at.root / "nothing"
    assert found == []


def fails_to_unmount(at: Place) -> None:
    done = run_pbkfs("unmount", "-D", at.mnt, check=False)
    assert done.returncode == HostError.exit_code, done.stderr
    assert "its last changes may not be on disk" in done.stderr


def test_page_whose_sync_failed_reads_as_its_version_below(
    at: Place, base: Path, disk: ThinDisk
) -> None:
    (base / RELATION).write_bytes(b"o" * PAGE * N_PAGES)
    at.mount("--base", base)
    fd = os.open(at.mnt / RELATION, os.O_RDWR)
    os.pwrite(fd, b"n" * PAGE, 0)
    os.fsync(fd)
    disk.fill()
    os.pwrite(fd, b"n" * PAGE, 200 * PAGE)
    with pytest.raises(OSError, match=r"Input/output error|No space left"):
        os.fsync(fd)
    os.close(fd)
    fails_to_unmount(at)
    disk.make_room()
    expected = b"n" * PAGE + b"o" * PAGE * (N_PAGES - 1)
    for _ in range(2):
        at.mount("--reuse")
        found = (at.mnt / RELATION).read_bytes()
        run_pbkfs("unmount", "-D", at.mnt)
        assert [i for i in range(N_PAGES) if found[i * PAGE] != expected[i * PAGE]] == []
        assert found == expected
        disk.mount_again()


def test_names_after_a_sync_of_the_journal_that_failed(at: Place, disk: ThinDisk) -> None:
    at.mount()
    (at.mnt / "before").mkdir()
    root = os.open(at.mnt, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(root)
    disk.fill()
    for number in range(2500):
        (at.mnt / f"directory{number}").mkdir()
    with pytest.raises(OSError, match=r"Input/output error|No space left"):
        os.fsync(root)
    os.close(root)
    fails_to_unmount(at)
    disk.make_room()
    at.mount("--reuse")
    with (at.mnt / "late").open("wb", buffering=0) as file:
        file.write(b"late")
        os.fsync(file.fileno())
    names = sorted(os.listdir(at.mnt))
    run_pbkfs("unmount", "-D", at.mnt)
    disk.mount_again()
    run_pbkfs("check", "-d", at.diff)
    at.mount("--reuse")
    assert sorted(os.listdir(at.mnt)) == names
    assert (at.mnt / "late").read_bytes() == b"late"
    run_pbkfs("unmount", "-D", at.mnt)
