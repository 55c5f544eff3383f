"""The worker is killed while the kernel holds back much of what was written to the mount."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from fix_place import Place

from pbkfs.mount import control

PAGE = 8192
# The kernel writes back 4 KiB at a time, and a death may come between the halves of a page.
HALF = PAGE // 2
N_BLOCKS = 1600
N_SYNCED, N_WHOLE, N_PARTIAL = 600, 400, 100
MIN_BYTES = 32


def fill(word: str, block: int) -> bytes:
    """A page that says in each of its 16 bytes what it is: a mixture of two is found."""
    return f"{word:<7} {block:08}".encode() * (PAGE // 16)


@dataclass
class Pages:
    """A relation, and what was written to it: what is durable, and what need not be."""

    path: Path
    durable: list[bytes]
    newest: list[bytes] = field(default_factory=list)

    def write(self, fd: int, block: int, offset: int, data: bytes) -> None:
        """Write a part of a page, or all of it."""
        page = self.newest[block]
        self.newest[block] = page[:offset] + data + page[offset + len(data) :]
        assert os.pwrite(fd, data, block * PAGE + offset) == len(data)

    def n_new(self, grain: int, fd: int | None = None) -> int:
        """How many pages have something new; each piece of ``grain`` bytes is old or new.

        ``fd``: read through it, because the close of any other one has the kernel write back.
        """
        content = self.path.read_bytes() if fd is None else os.pread(fd, 2 * N_BLOCKS * PAGE, 0)
        assert len(content) == len(self.durable) * PAGE
        n_new = 0
        for block, (old, new) in enumerate(zip(self.durable, self.newest, strict=True)):
            found = content[block * PAGE : (block + 1) * PAGE]
            for start in range(0, PAGE, grain):
                piece = found[start : start + grain]
                wanted = old[start : start + grain], new[start : start + grain]
                assert piece in wanted, f"block {block}, from byte {start}: {piece[:48]!r}…"
            n_new += found != old
        return n_new


def n_writes(at: Place) -> int:
    """How many writes of the kernel the worker has seen."""
    counters = control.call(at.diff, "stat")["stat"]["fuse"]
    return sum(counters.get(f"write.{how}", 0) for how in ("native", "forwarded"))


@pytest.fixture
def pages(at: Place, base: Path) -> Pages:
    """A mounted relation of a base; many of its pages were written once, and fsynced."""
    path = base / "base/1/16384"
    stored = [fill("base", block) for block in range(N_BLOCKS)]
    path.write_bytes(b"".join(stored))
    at.mount("--base", base)
    return Pages(at.mnt / "base/1/16384", stored)


@pytest.mark.parametrize("is_asked", [False, True], ids=["held back", "under way"])
def test_killed_over_dirty_pages(at: Place, pages: Pages, is_asked: bool) -> None:
    """Whole pages and parts of pages, over what was fsynced and over what lies in the base.

    ``is_asked``: a thread has the kernel write all of them when the worker dies.
    """
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    fd = os.open(pages.path, os.O_RDWR)
    pages.newest = list(pages.durable)
    for block in chance.sample(range(N_BLOCKS), N_SYNCED):
        pages.write(fd, block, 0, fill("synced", block))
    os.fsync(fd)
    pages.durable = list(pages.newest)
    before = n_writes(at)
    assert before > 0

    chosen = chance.sample(range(N_BLOCKS), N_WHOLE + N_PARTIAL)
    for block in chosen[:N_WHOLE]:
        pages.write(fd, block, 0, fill("new", block))
    for block in chosen[N_WHOLE:]:
        offset = chance.randrange(PAGE - MIN_BYTES)
        n_bytes = chance.randint(MIN_BYTES, PAGE - offset - 1)
        pages.write(fd, block, offset, fill("part", block)[offset : offset + n_bytes])
    assert n_writes(at) == before, "the kernel holds back nothing"
    assert pages.n_new(PAGE, fd) == len(chosen)  # as long as the worker lives
    assert n_writes(at) == before

    failed: list[int | None] = []

    def sync() -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            failed.append(error.errno)

    syncing = threading.Thread(target=sync)
    if is_asked:
        # What is written over the base takes space, which tells how far it is.
        found = max((at.diff / "objects").rglob("*"), key=lambda path: path.stat().st_size)
        goal = found.stat().st_blocks * 512 + chance.randrange(N_WHOLE // 2) * PAGE
        syncing.start()
        while syncing.is_alive() and found.stat().st_blocks * 512 <= goal:
            pass
    at.kill()
    if not is_asked:
        syncing.start()
    syncing.join(60)
    assert not syncing.is_alive()
    if not is_asked:
        assert failed == [errno.ENOTCONN]
    with contextlib.suppress(OSError):
        os.close(fd)

    assert at.is_dead()
    run_pbkfs("unmount", "-D", at.mnt, "--force")
    assert os.listdir(at.mnt) == []
    at.mount("--reuse")
    n_new = pages.n_new(HALF if is_asked else PAGE)
    print(f"{n_new} of {len(chosen)} pages are new, the fsync failed with {failed}")
    if not is_asked:
        assert n_new == 0  # nobody can have told the worker
    elif not failed:
        assert n_new == len(chosen)
    run_pbkfs("unmount", "-D", at.mnt)
    assert "is sound" in run_pbkfs("check", "-d", at.diff).stdout
