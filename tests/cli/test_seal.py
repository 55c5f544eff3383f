"""Sealing a mount through its worker, with files in use and without a server; and offline."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from fix_mounts import run_pbkfs
from fix_place import Place
from fix_postgres import wait_until
from machine import TESTS

from pbkfs.errors import BusyError, DiffError, NotRunningError, PbkfsError
from pbkfs.mount import control, lock
from pbkfs.mount.owner import command_name
from pbkfs.mount.sealing import Child, SealReport, seal
from pbkfs.mount.standstill import Standstill, find_processes
from pbkfs.overlay.diff import live_path
from pbkfs.overlay.superblock import read_superblock

PAGE = 8192


def seal_at(at: Place, number: int, *, has_child: bool = True) -> SealReport:
    child = Child(at.root / f"child{number}", at.root / f"child{number}.live")
    return seal(at.diff, new_live=at.root / f"live{number}", child=child if has_child else None)


@contextmanager
def mounted(at: Place, diff: Path, base: Path) -> Iterator[Path]:
    """Another head of the same base on a mount point of its own."""
    mnt = at.root / f"{diff.name}.mnt"
    mnt.mkdir(exist_ok=True)
    owner = f"{os.geteuid()}:{os.getegid()}"
    run_pbkfs("mount", "--base", base, "-D", mnt, "-d", diff, "--owner", owner)
    try:
        yield mnt
    finally:
        run_pbkfs("unmount", "-D", mnt)
    log = (diff / "log" / "worker.log").read_text()
    assert not any(word in log for word in ("WARNING", "ERROR", "CRITICAL")), log


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and "pg_wal" not in path.parts
    }


def test_what_is_open_goes_on(at: Place, base: Path) -> None:
    """Written through a descriptor, a mapping, and after an unlink, across several seals."""
    at.mount("--base", base)
    relation = os.open(at.mnt / "base/1/1259", os.O_RDWR)
    gone = os.open(at.mnt / "gone", os.O_RDWR | os.O_CREAT)
    os.write(gone, b"gone" * PAGE)
    os.unlink(at.mnt / "gone")
    with mmap.mmap(relation, 3 * PAGE) as mapped:
        for number in range(1, 4):
            mapped[number : number + 4] = b"%04d" % number
            os.pwrite(relation, b"page %d" % number, (number - 1) * PAGE + 4000)
            os.ftruncate(relation, (3 + number) * PAGE)
            (at.mnt / f"file{number}").write_bytes(b"%d" % number * 5000)
            before = contents(at.mnt)
            report = seal_at(at, number)
            assert report.note is None
            assert report.held_ms == 0
            assert 0 < report.gate_ms < report.total_ms
            assert contents(at.mnt) == before
            assert os.pread(gone, 4, 4 * number) == b"gone"
            os.pwrite(gone, b"gone", 4 * number)
            mapped[2 * PAGE : 2 * PAGE + 6] = b"mapped"
            mapped.flush()
            with mounted(at, at.root / f"child{number}", base) as mnt:
                assert contents(mnt) == before
                (mnt / "own").write_bytes(b"x")
    os.fsync(relation)
    os.close(relation)
    os.close(gone)
    last = contents(at.mnt)
    assert "own" not in last
    run_pbkfs("unmount", "-D", at.mnt)
    assert "is sound" in run_pbkfs("check", "-d", at.diff).stdout
    at.mount("--reuse")
    assert contents(at.mnt) == last
    stat = run_pbkfs("stat", "-D", at.mnt, "-o", "json").stdout
    assert '"layers": 3' in stat
    # The directory has the first layer, which the children need.
    run_pbkfs("unmount", "-D", at.mnt)
    done = run_pbkfs("cleanup", "-d", at.diff, check=False)
    assert done.returncode == BusyError.exit_code
    assert "holds a sealed layer" in done.stderr
    run_pbkfs("cleanup", "-d", at.root / "child2")
    assert not (at.root / "child2.live").exists()
    with mounted(at, at.root / "child3", base) as mnt:
        assert "own" in contents(mnt)
    run_pbkfs("cleanup", "-d", at.diff, "--force")
    assert not (at.root / "live3").exists()
    assert (at.root / "live1" / "journal").exists()


def test_what_the_kernel_holds_back_is_sealed(at: Place, base: Path) -> None:
    """Thousands of pages of an open file, scattered, so that each is a write of its own."""
    n_blocks = 16384
    (base / "base/1/16384").write_bytes(bytes(n_blocks * PAGE))
    at.mount("--base", base)
    fd = os.open(at.mnt / "base/1/16384", os.O_RDWR)
    for block in range(0, n_blocks, 3):
        os.pwrite(fd, block.to_bytes(8, "little") * 1024, block * PAGE)
    assert seal_at(at, 1).note is None
    with mounted(at, at.root / "child1", base) as mnt:
        found = (mnt / "base/1/16384").read_bytes()
    os.close(fd)
    missing = [
        block
        for block in range(0, n_blocks, 3)
        if found[block * PAGE : block * PAGE + 8] != block.to_bytes(8, "little")
    ]
    assert missing == []


_WRITE = """
import os, sys, random
fd = os.open(sys.argv[1], os.O_RDWR)
seed = random.Random(1)
n = 0
while True:
    n += 1
    block = seed.randrange(64)
    os.pwrite(fd, n.to_bytes(8, "little") * 1024, block * 8192)
    if n % 20 == 0:
        os.fsync(fd)
        print(n, flush=True)
"""


def test_writes_and_names_beside_many_seals(at: Place, base: Path) -> None:
    """No page is torn or lost, and every child is a moment of the whole."""
    (base / "base/1/16384").write_bytes(bytes(64 * PAGE))
    at.mount("--base", base)
    path = at.mnt / "base/1/16384"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITE, path], stdout=subprocess.PIPE, text=True
    )
    synced: list[int] = []
    assert writer.stdout is not None
    reader = threading.Thread(target=lambda: synced.extend(map(int, writer.stdout or ())))
    reader.start()
    bounds = []
    try:
        for number in range(1, 6):
            wait_until(lambda: len(synced) > 3 * number)  # noqa: B023 - called at once
            for name in ("a", "b"):
                (at.mnt / f"{name}{number}").mkdir()
            before = synced[-1]
            seal_at(at, number)
            bounds.append(before)
            (at.mnt / f"a{number}").rmdir()
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
        reader.join()
        writer.stdout.close()
    for number, before in enumerate(bounds, 1):
        with mounted(at, at.root / f"child{number}", base) as mnt:
            stamps = check_pages((mnt / "base/1/16384").read_bytes())
            assert max(stamps) >= before
            expected = {f"b{n}" for n in range(1, number + 1)} | {f"a{number}"}
            assert {
                p.name for p in mnt.iterdir() if p.name[0] in "ab" and p.name[1:].isdigit()
            } == (expected)
    assert max(check_pages(path.read_bytes())) >= synced[-1]


def check_pages(content: bytes) -> list[int]:
    """Return what each half page was written as: the kernel writes back 4 KiB at a time."""
    stamps = []
    for start in range(0, len(content), PAGE // 2):
        half = content[start : start + PAGE // 2]
        assert half == half[:8] * (PAGE // 16), f"a torn page at {start}"
        stamps.append(int.from_bytes(half[:8], "little"))
    return stamps


def test_hydration_goes_on_after_a_seal(at: Place, base: Path) -> None:
    for number in range(20):
        (base / f"base/1/{20000 + number}").write_bytes(b"%02d" % number * PAGE * 8)
    at.mount("--base", base, "--hydrate=256kB")

    def found() -> dict[str, object]:
        answer: dict[str, object] = control.call(at.diff, "hydration")["hydration"]
        return answer

    wait_until(lambda: found()["bytes_done"] != 0)
    before = contents(at.mnt)
    seal_at(at, 1, has_child=False)
    assert found()["state"] in ("looking", "running")
    run_pbkfs("hydrate", "-D", at.mnt, "--rate", "0", "--watch")
    assert found()["state"] == "done"
    assert contents(at.mnt) == before
    run_pbkfs("unmount", "-D", at.mnt)
    shutil.rmtree(at.diff / "objects")  # of the sealed layer: nothing needs it any more
    (at.diff / "objects").mkdir()
    target = at.root / "detached"
    done = run_pbkfs("detach", "-d", at.diff, "--to", target, check=False)
    assert done.returncode == DiffError.exit_code  # but a mount looks at all layers


def test_detaching_what_was_sealed(at: Place, base: Path) -> None:
    at.mount("--base", base)
    (at.mnt / "base/1/1259").write_bytes(b"changed")
    (at.mnt / "global/pg_control").touch()
    seal_at(at, 1)
    (at.mnt / "later").write_bytes(b"later")
    before = contents(at.mnt)
    run_pbkfs("unmount", "-D", at.mnt)
    run_pbkfs("detach", "-d", at.diff, "--to", at.root / "detached")
    assert contents(at.root / "detached") == before
    assert not (at.root / "live1").exists()
    # What the child lies upon is left.
    assert sorted(os.listdir(at.diff)) == ["journal", "objects"]
    with mounted(at, at.root / "child1", base) as mnt:
        assert (mnt / "base/1/1259").read_bytes() == b"changed"


def test_refused(at: Place, base: Path) -> None:
    at.mount("--base", base)
    with pytest.raises(DiffError, match="exists already"):
        seal(at.diff, new_live=at.mnt)
    with pytest.raises(DiffError, match="exists already"):
        seal(at.diff, new_live=at.root / "live", child=Child(at.diff, at.root / "l"))
    assert not (at.root / "live").exists()
    (at.mnt / "still").write_bytes(b"works")
    at.kill()
    with pytest.raises(NotRunningError):
        control.call(at.diff, "seal")


def test_diff_that_is_not_mounted(at: Place, base: Path) -> None:
    """Also one that a dead worker has left."""
    at.mount("--base", base)
    (at.mnt / "base/1/1259").write_bytes(b"one")
    run_pbkfs("unmount", "-D", at.mnt)
    report = seal_at(at, 1)
    assert report.held_ms == 0
    at.mount("--reuse")
    (at.mnt / "base/1/1259").write_bytes(b"two")
    at.kill()
    run_pbkfs("unmount", "-D", at.mnt, "--force", check=False)
    seal_at(at, 2)
    for number, expected in ((1, b"one"), (2, b"two")):
        with mounted(at, at.root / f"child{number}", base) as mnt:
            assert (mnt / "base/1/1259").read_bytes() == expected
    at.mount("--reuse")
    assert (at.mnt / "base/1/1259").read_bytes() == b"two"


@pytest.mark.parametrize(
    ("label", "is_switched"),
    [
        ("layer:journal:rename", False),
        ("seal:child:superblock:rename", False),
        ("journal:end:append", False),
        ("seal:superblock:rename", False),
        ("seal:superblock:fsync_dir", True),
        ("seal:child:rename", True),
    ],
)
def test_worker_dies_in_a_seal(at: Place, base: Path, label: str, is_switched: bool) -> None:
    """The next mount finds the old layer or the new one, and all that was synced; and seals."""
    n = "2" if label.startswith("layer:") else "1"  # the diff was made so, too
    owner = f"{os.geteuid()}:{os.getegid()}"
    words = ["mount", "--base", base, "-D", at.mnt, "-d", at.diff, "--owner", owner]
    command = [sys.executable, TESTS / "labelled.py", at.root / "steps", label, n, "exit", *words]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    for path in (at.mnt / "base/1/1259", at.mnt / "new"):
        with path.open("wb") as file:
            file.write(b"changed" * 3000)
            os.fsync(file.fileno())
    before = contents(at.mnt)
    with pytest.raises(DiffError, match="exists already"):
        seal_at(at, 1)
    assert label in (at.root / "steps").read_text().splitlines()
    wait_until(at.is_dead)
    assert not (at.root / "child1").exists()
    at.mount("--reuse")
    assert (live_path(at.diff, read_superblock(at.diff)) != at.diff) == is_switched
    assert contents(at.mnt) == before
    seal_at(at, 2)
    assert contents(at.mnt) == before
    with mounted(at, at.root / "child2", base) as mnt:
        assert contents(mnt) == before


def test_worker_dies_while_the_kernel_writes_back_for_a_seal(at: Place, base: Path) -> None:
    """Were it the worker who waits for that, it could not end, and the mount would hang."""
    owner = f"{os.geteuid()}:{os.getegid()}"
    words = ["mount", "--base", base, "-D", at.mnt, "-d", at.diff, "--owner", owner]
    at_fsync = ["object:fsync", "1", "kill"]
    command = [sys.executable, TESTS / "labelled.py", at.root / "steps", *at_fsync, *words]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    owner_on_record = lock.read_owner(at.diff)
    assert owner_on_record is not None
    worker = psutil.Process(owner_on_record.pid)
    before = (at.mnt / "base/1/1259").read_bytes()
    fd = os.open(at.mnt / "base/1/1259", os.O_RDWR)
    os.pwrite(fd, b"changed" * 3000, 0)
    with suppress(PbkfsError):  # the diff of a dead worker can be sealed, too
        seal_at(at, 1)
    _, alive = psutil.wait_procs([worker], timeout=20)
    if alive:
        run_pbkfs("unmount", "-D", at.mnt, "--force", check=False)  # frees who waits
    with suppress(OSError):
        os.close(fd)
    assert not alive
    assert "object:fsync" in (at.root / "steps").read_text().splitlines()
    wait_until(at.is_dead)
    at.mount("--reuse")
    assert len((at.mnt / "base/1/1259").read_bytes()) == max(len(before), 21000)


# --- standing still -------------------------------------------------------------------------------


@pytest.fixture
def servers(at: Place, place: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Make processes that look like a server's, on the mount."""
    program = place / "postgres"
    shutil.copy("/bin/sleep", program)
    made: list[subprocess.Popen[bytes]] = []
    at.mount()

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([program, "600"], cwd=at.mnt)
        made.append(process)
        # Popen returns before the kernel has given the process its new name.
        wait_until(lambda: command_name(process.pid) == "postgres" and state(process) == "S")
        return process

    yield start
    for process in made:
        process.kill()
        process.wait()


def state(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_server_stands_still_and_goes_on(
    at: Place, servers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    processes = [servers(), servers()]
    held = servers()
    held.send_signal(signal.SIGSTOP)
    wait_until(lambda: state(held) == "T")
    assert find_processes(os.stat(at.mnt).st_dev) == [p.pid for p in (*processes, held)]
    standstill = Standstill(at.mnt, 60)
    assert standstill.begin() is None
    assert [state(process) for process in processes] == ["T", "T"]
    assert standstill.end()
    wait_until(lambda: {state(process) for process in processes} == {"S"})
    assert state(held) == "T"  # somebody else's business
    assert standstill.held_s > 0
    assert not standstill.end()
    report = seal(at.diff, new_live=at.root / "live")
    assert report.held_ms > 0
    wait_until(lambda: {state(process) for process in processes} == {"S"})


@pytest.mark.parametrize("ended_by", ["unmount", "mount"])
def test_server_whose_worker_died_is_let_go_at_the_end(
    at: Place, servers: Callable[[], subprocess.Popen[bytes]], ended_by: str
) -> None:
    """One that stands still for ever could not even be stopped."""
    process = servers()
    process.send_signal(signal.SIGSTOP)  # as for a seal that its worker did not survive
    wait_until(lambda: state(process) == "T")
    at.kill()
    if ended_by == "unmount":
        run_pbkfs("unmount", "-D", at.mnt, "--force")
    else:
        at.expected.append("is still used by pid")
        at.mount("--reuse")
    wait_until(lambda: state(process) == "S")


@pytest.mark.expect_log("the server was let go after")
def test_server_is_let_go_in_time(
    at: Place, servers: Callable[[], subprocess.Popen[bytes]]
) -> None:
    process = servers()
    limit_s = 2.0  # the server has to be stopped within it, too, on a busy machine
    standstill = Standstill(at.mnt, limit_s)
    began = time.monotonic()
    assert standstill.begin() is None
    wait_until(lambda: state(process) == "S")
    assert time.monotonic() - began >= limit_s
    assert not standstill.end()
