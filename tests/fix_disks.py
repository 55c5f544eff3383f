"""Disks that have less than they seem to: thin volumes, images on a file system that is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


class ThinDisk:
    """An ext4 of 32 MiB at ``path`` for which only 8 MiB are there."""

    def __init__(self, root: Path) -> None:
        self._below = root / "below"
        self._image = self._below / "image"
        self.path = root / "disk"

    def fill(self) -> None:
        """Take what is there: what is written to it from now on does not get anywhere."""
        with (self._below / "rest").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(65536))

    def make_room(self) -> None:
        """Have as much as it seems to have."""
        _run("mount", "-o", "remount,size=64m", self._below)

    def mount_again(self) -> None:
        """Take it away and bring it back: what the page cache had of it is gone."""
        _run("umount", self.path)
        _run("mount", "-o", "loop", self._image, self.path)


@contextmanager
def thin_disk(root: Path) -> Iterator[ThinDisk]:
    """Such a disk, below ``root``; nothing may use it any more at the end."""
    disk = ThinDisk(root)
    for path in (disk._below, disk.path):
        path.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=8m", "none", disk._below)
    try:
        with disk._image.open("xb") as file:
            file.truncate(32 << 20)
        # Without a journal, which could not be written, either, only the files' own pages fail.
        _run("mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=0", disk._image)
        if subprocess.run(["mount", "-o", "loop", disk._image, disk.path]).returncode:
            pytest.skip("no file can be mounted here")
        try:
            yield disk
        finally:
            if os.path.ismount(disk.path):
                _run("umount", disk.path)
    finally:
        _run("umount", disk._below)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True)
