"""What another copy-on-write mount of backup chains got wrong, one test a defect.

Each test fails on a program that has the defect. The base is a directory with relation-named files
whose every block says which one it is; "seen anew" means after an unmount and a mount, so that no
page of the kernel's cache can answer.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fix_mounts import Mount, Mounts
from fix_postgres import wait_until

BLOCK = 8192
N_BLOCKS = 40
REL = "base/5/16384"


def block(name: str, blkno: int, version: int = 0) -> bytes:
    """A block that names itself."""
    text = f"{name}:{blkno}:{version};".encode()
    return (text * (BLOCK // len(text) + 1))[:BLOCK]


def content(name: str, n_blocks: int = N_BLOCKS) -> bytes:
    return b"".join(block(name, blkno) for blkno in range(n_blocks))


@pytest.fixture
def base(pgdata_template: Path, mounts: Mounts) -> Path:
    """A PGDATA with files of known content in base/5."""
    made = mounts.root / "base"
    shutil.copytree(pgdata_template, made, symlinks=True)
    for name in (REL, REL + ".1", "base/5/16390", "base/5/16391_fsm"):
        (made / name).write_bytes(content(name))
    (made / "base/77777").mkdir()
    for n in range(30):
        (made / f"base/77777/{20000 + n}").write_bytes(content(f"base/77777/{20000 + n}", 3))
    (made / "notes").write_bytes(b"n" * 20000)
    return made


@pytest.fixture
def mount(mounts: Mounts, base: Path) -> Mount:
    return mounts.mount("--base", base)


def seen_anew(mount: Mount) -> None:
    mount.unmount()
    mount.mount()


def pwrite(path: Path, data: bytes, offset: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def n_objects(mount: Mount) -> int:
    return sum(1 for path in (mount.diff / "objects").rglob("*") if path.is_file())


def worker(mount: Mount) -> psutil.Process:
    return psutil.Process(int(mount.stat()["pid"]))  # type: ignore[call-overload]


def test_b1_rewriting_the_last_block_keeps_the_ones_below(mount: Mount) -> None:
    path = mount.pgdata / REL
    wanted = bytearray(content(REL))
    for blkno in (3, 10, N_BLOCKS - 1):
        pwrite(path, block(REL, blkno, 1), blkno * BLOCK)
        wanted[blkno * BLOCK : (blkno + 1) * BLOCK] = block(REL, blkno, 1)
    pwrite(path, block(REL, N_BLOCKS - 1), (N_BLOCKS - 1) * BLOCK)
    wanted[(N_BLOCKS - 1) * BLOCK :] = block(REL, N_BLOCKS - 1)
    seen_anew(mount)
    assert path.read_bytes() == wanted


def test_b2_a_new_relation_keeps_its_pages(mount: Mount) -> None:
    path = mount.pgdata / "base/5/99999"
    data = content("new", 17)
    path.write_bytes(b"")
    for blkno in range(17):
        pwrite(path, data[blkno * BLOCK : (blkno + 1) * BLOCK], blkno * BLOCK)
    assert path.read_bytes() == data
    seen_anew(mount)
    assert path.read_bytes() == data


def test_b3_a_write_before_any_read_keeps_earlier_changes(mount: Mount) -> None:
    path = mount.pgdata / REL
    pwrite(path, block(REL, 5, 1), 5 * BLOCK)
    seen_anew(mount)
    pwrite(path, block(REL, 6, 2), 6 * BLOCK)
    seen_anew(mount)
    data = path.read_bytes()
    assert data[5 * BLOCK : 6 * BLOCK] == block(REL, 5, 1)
    assert data[6 * BLOCK : 7 * BLOCK] == block(REL, 6, 2)
    assert data[7 * BLOCK :] == content(REL)[7 * BLOCK :]


def test_b4_an_unaligned_write_keeps_the_rest(mount: Mount) -> None:
    path = mount.pgdata / REL
    pwrite(path, block(REL, 2, 1), 2 * BLOCK)
    pwrite(path, b"x" * 9000, 2 * BLOCK + 5000)
    wanted = bytearray(content(REL))
    wanted[2 * BLOCK : 3 * BLOCK] = block(REL, 2, 1)
    wanted[2 * BLOCK + 5000 : 2 * BLOCK + 14000] = b"x" * 9000
    assert path.read_bytes() == wanted
    seen_anew(mount)
    assert path.read_bytes() == wanted


def test_b5_renames_keep_content_and_children(mount: Mount) -> None:
    root = mount.pgdata
    pwrite(root / REL, block(REL, 1, 1), BLOCK)
    wanted = (root / REL).read_bytes()
    os.rename(root / REL, root / "base/5/moved")
    os.rename(root / "base/5/16390", root / "base/5/moved_untouched")
    os.rename(root / "base/77777", root / "base/88888")
    with pytest.raises(OSError) as failed:
        os.rename(root / "base/5", root / "base/88888")
    assert failed.value.errno == errno.ENOTEMPTY
    seen_anew(mount)
    assert (root / "base/5/moved").read_bytes() == wanted
    assert (root / "base/5/moved_untouched").read_bytes() == content("base/5/16390")
    assert not (root / REL).exists()
    assert not (root / "base/77777").exists()
    assert len(os.listdir(root / "base/88888")) == 30
    name = "base/77777/20007"
    assert (root / "base/88888/20007").read_bytes() == content(name, 3)
    # A rename that fails must not have removed its target.
    with pytest.raises(FileNotFoundError):
        os.rename(root / "base/5/nothing", root / "base/5/moved")
    assert (root / "base/5/moved").read_bytes() == wanted


def test_b6_a_crash_between_writes_leaves_every_block_old_or_new(mount: Mount) -> None:
    path = mount.pgdata / REL
    fd = os.open(path, os.O_RDWR)
    for blkno in range(0, N_BLOCKS, 2):
        os.pwrite(fd, block(REL, blkno, 1), blkno * BLOCK)
        if blkno == N_BLOCKS // 2:
            os.fsync(fd)
    process = worker(mount)
    process.kill()
    psutil.wait_procs([process], timeout=30)
    os.close(fd)
    mount.unmount("--force")
    mount.mount()
    data = path.read_bytes()
    for blkno in range(N_BLOCKS):
        got = data[blkno * BLOCK : (blkno + 1) * BLOCK]
        if blkno % 2:
            assert got == block(REL, blkno)
        elif blkno <= N_BLOCKS // 2:
            assert got == block(REL, blkno, 1), f"block {blkno} was fsynced"
        else:
            assert got in (block(REL, blkno), block(REL, blkno, 1))


def test_b7_truncation_works_both_ways(mount: Mount) -> None:
    path = mount.pgdata / REL
    os.truncate(path, 10 * BLOCK)
    assert path.stat().st_size == 10 * BLOCK
    os.truncate(path, 12 * BLOCK)
    wanted = content(REL)[: 10 * BLOCK] + bytes(2 * BLOCK)
    assert path.read_bytes() == wanted
    other = mount.pgdata / "base/5/16390"
    os.truncate(other, 0)
    assert other.read_bytes() == b""
    os.truncate(other, BLOCK)
    seen_anew(mount)
    assert path.read_bytes() == wanted
    assert other.read_bytes() == bytes(BLOCK)


def test_b8_fallocate_really_extends(mount: Mount) -> None:
    path = mount.pgdata / REL
    fd = os.open(path, os.O_RDWR)
    os.posix_fallocate(fd, N_BLOCKS * BLOCK, 16 * BLOCK)
    os.close(fd)
    assert path.stat().st_size == (N_BLOCKS + 16) * BLOCK
    seen_anew(mount)
    assert path.read_bytes() == content(REL) + bytes(16 * BLOCK)
    sizes = [p.stat().st_blocks * 512 for p in (mount.diff / "objects").rglob("*") if p.is_file()]
    assert max(sizes) >= 16 * BLOCK


@pytest.mark.expect_log("layer=|unreadable|failed")
def test_b9_an_unreadable_file_is_an_error_and_not_zeros(mount: Mount, base: Path) -> None:
    path = mount.pgdata / REL
    assert path.stat().st_size == N_BLOCKS * BLOCK
    os.truncate(base / REL, 7 * BLOCK)  # the store is damaged behind our back
    fd = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(fd, BLOCK, BLOCK) == block(REL, 1)
        with pytest.raises(OSError) as failed:
            os.pread(fd, BLOCK, 20 * BLOCK)
        assert failed.value.errno == errno.EIO
        assert os.pread(fd, BLOCK, N_BLOCKS * BLOCK) == b""
    finally:
        os.close(fd)
    # The native half's lines come to the log through a pipe.
    wait_until(lambda: REL.encode() in mount.worker_log.read_bytes())


def test_b10_an_index_is_loaded_once_however_many_blocks_are_read(mount: Mount) -> None:
    fd = os.open(mount.pgdata / "base/5/16390", os.O_RDONLY)
    for blkno in range(N_BLOCKS):
        os.pread(fd, BLOCK, blkno * BLOCK)
    os.close(fd)
    assert mount.stat()["overlay"]["index_loads"] <= 1


def test_b11_mounting_reads_no_pages_of_the_diff(mount: Mount) -> None:
    path = mount.pgdata / "base/5/99998"
    path.write_bytes(os.urandom(32 << 20))
    pwrite(mount.pgdata / REL, content(REL), 0)
    seen_anew(mount)
    assert worker(mount).io_counters().read_chars < 24 << 20


def test_b12_opening_for_writing_copies_nothing(mount: Mount) -> None:
    before = n_objects(mount)
    for directory, _, names in os.walk(mount.pgdata):
        for name in names:
            fd = os.open(os.path.join(directory, name), os.O_RDWR)
            os.fsync(fd)
            os.close(fd)
    assert n_objects(mount) == before


def test_b13_nothing_hangs_when_many_requests_meet(mount: Mount) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        except BaseException as problem:
            failures.append(problem)

    def work(number: int) -> None:
        own = mount.pgdata / f"base/5/7{number:04}"
        for turn in range(20):
            own.write_bytes(block("own", turn))
            pwrite(mount.pgdata / REL, block(REL, number, turn), number * BLOCK)
            os.listdir(mount.pgdata / "base/77777")
            assert (mount.pgdata / f"base/77777/{20000 + number}").stat().st_size == 3 * BLOCK
            own.rename(own.with_suffix(".1"))
            own.with_suffix(".1").unlink()

    threads = [threading.Thread(target=guarded, args=(work, n)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_b14_removed_files_are_forgotten(mount: Mount) -> None:
    directory = mount.pgdata / "base/5"

    def churn() -> None:
        for n in range(500):
            path = directory / f"8{n:05}"
            path.write_bytes(b"x")
            path.unlink()

    churn()
    before = mount.stat()["overlay"]["inodes"]
    churn()
    assert mount.stat()["overlay"]["inodes"] <= before + 10


def test_b15_nothing_of_ours_is_visible(mount: Mount, base: Path) -> None:
    def names(root: Path) -> set[str]:
        return {
            os.path.relpath(os.path.join(directory, name), root)
            for directory, dirs, files in os.walk(root)
            for name in dirs + files
        }

    pwrite(mount.pgdata / REL, b"y", 0)
    (mount.pgdata / "notes").unlink()
    visible = names(mount.pgdata)
    expected = {name for name in names(base) if not name.startswith("pg_wal/")} - {"notes"}
    assert visible == expected


def test_b16_segments_of_a_relation_are_files_of_their_own(mount: Mount) -> None:
    first, second = mount.pgdata / REL, mount.pgdata / (REL + ".1")
    pwrite(first, block(REL, 4, 1), 4 * BLOCK)
    pwrite(second, block(REL + ".1", 8, 1), 8 * BLOCK)
    seen_anew(mount)
    assert first.read_bytes()[4 * BLOCK : 5 * BLOCK] == block(REL, 4, 1)
    assert first.read_bytes()[8 * BLOCK : 9 * BLOCK] == block(REL, 8)
    assert second.read_bytes()[8 * BLOCK : 9 * BLOCK] == block(REL + ".1", 8, 1)
    assert second.read_bytes()[4 * BLOCK : 5 * BLOCK] == block(REL + ".1", 4)


def test_a_written_page_costs_a_page(mount: Mount) -> None:
    def used() -> int:
        objects = (mount.diff / "objects").rglob("*")
        return sum(p.stat().st_blocks * 512 for p in objects if p.is_file())

    pwrite(mount.pgdata / REL, block(REL, 9, 1), 9 * BLOCK)
    assert used() == BLOCK
    pwrite(mount.pgdata / REL, block(REL, 30, 1), 30 * BLOCK)
    assert used() == 2 * BLOCK
