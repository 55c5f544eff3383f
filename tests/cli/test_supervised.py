"""Mounts whose worker may die: what is refused, and what the next worker finds. No server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from fix_disks import thin_disk
from fix_mounts import needs_takeovers, run_pbkfs
from fix_place import Place

from pbkfs import errors
from pbkfs.mount import control, privileges

PAGE = 8192


@pytest.fixture
def on(at: Place) -> Place:
    """A place whose log may say that workers died."""
    at.expected += ["died of signal 9; this one takes over", "was replaced; this one takes over"]
    return at


def kill_worker(place: Place) -> None:
    """Kill the process that serves, and wait until another one does."""
    before = control.call(place.diff, "ping")
    os.kill(before["pid"], signal.SIGKILL)
    after = control.call(place.diff, "ping", timeout_s=60)
    assert after["pid"] != before["pid"]
    assert after["n_takeovers"] == before["n_takeovers"] + 1


def test_in_front_nobody_takes_over(at: Place) -> None:
    done = at.mount("--console", "--supervised", check=False)
    assert done.returncode == errors.UsageError.exit_code
    assert "--console and --supervised exclude each other" in done.stderr
    assert not at.diff.exists()


@needs_takeovers
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: an overlayfs")
def test_diff_on_an_overlayfs_is_refused(at: Place) -> None:
    """It does not tell of write errors."""
    layers = [at.root / name for name in ("below", "above", "work")]
    for path in layers:
        path.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(*layers)
    place = at.root / "overlay"
    place.mkdir()
    if subprocess.run(["mount", "-t", "overlay", "none", "-o", options, place]).returncode:
        pytest.skip("no overlayfs can be mounted here")
    try:
        at.diff = place / "diff"
        done = at.mount("--supervised", check=False)
        assert done.returncode == errors.HostError.exit_code
        assert "which does not tell of write errors" in done.stderr
        assert not at.diff.exists()
    finally:
        subprocess.run(["umount", place], check=True)


def test_upgrade_of_a_mount_that_is_not_supervised_is_refused(at: Place) -> None:
    at.mount()
    done = run_pbkfs("upgrade", "-D", at.mnt, check=False)
    assert done.returncode == errors.HostError.exit_code
    assert f"the mount on {at.mnt} is not supervised" in done.stderr
    assert "--supervised" in done.stderr.splitlines()[-1]
    run_pbkfs("unmount", "-D", at.mnt)


def test_dead_worker_is_a_dead_mount_without_it(at: Place) -> None:
    at.mount()
    at.kill()
    assert at.is_dead()
    run_pbkfs("unmount", "-D", at.mnt)


@needs_takeovers
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no privilege to give up")
def test_keeper_and_workers_keep_of_root_what_they_need(on: Place) -> None:
    on.mount("--supervised")
    kill_worker(on)
    allowed = sum(1 << number for number in privileges.KEPT.values())
    for pid in (on.owner().pid, control.call(on.diff, "ping")["pid"]):
        text = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\t(\w+)$", text, re.MULTILINE))
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(found[name], 16) & ~allowed == 0, (pid, found)
        assert found["NoNewPrivs"] == "1"
    run_pbkfs("unmount", "-D", on.mnt)


@needs_takeovers
def test_log_that_cannot_be_opened_ends_no_mount(on: Place) -> None:
    path = on.root / "here.log"
    on.mount("--supervised", "--log-file", path)
    (on.mnt / "file").write_text("before")
    path.unlink()
    os.mkfifo(path)
    kill_worker(on)
    assert (on.mnt / "file").read_text() == "before"
    path.unlink()
    run_pbkfs("unmount", "-D", on.mnt)
    assert f"unmounted {on.mnt}" in path.read_text()


@needs_takeovers
def test_first_readers_after_a_takeover_see_what_was_written(on: Place, base: Path) -> None:
    """All files are registered anew then, each with several requests that wait for it."""
    names = [base / "base" / "1" / str(20000 + number) for number in range(60)]
    for name in names:
        name.write_bytes(b"old!" * 2 * PAGE)
    on.mount("--base", base, "--supervised")
    paths = [on.mnt / name.relative_to(base) for name in names]
    paths += [on.mnt / "base" / "1" / str(30000 + number) for number in range(60)]
    fds = []
    for path in paths:
        fds.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.pwrite(fds[-1], b"new!" * PAGE, 0)
        os.posix_fadvise(fds[-1], 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(3):
        for fd in fds:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        kill_worker(on)
        together = threading.Barrier(4)
        wrong: list[int] = []

        def read(
            part: int, together: threading.Barrier = together, wrong: list[int] = wrong
        ) -> None:
            for number, fd in enumerate(fds):
                together.wait()
                # A page of its own each: else they would wait for one request.
                if os.pread(fd, PAGE, part * PAGE) != b"new!" * (PAGE // 4):
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
    for fd in fds:
        os.close(fd)
    run_pbkfs("unmount", "-D", on.mnt)


@needs_takeovers
def test_forced_unmount_lets_go_of_those_who_wait(on: Place) -> None:
    """Also where the kernel has something that was not answered."""
    on.expected += ["forced"]
    on.mount("--supervised")
    kill_worker(on)
    path = on.mnt / "file"
    with path.open("xb") as file:
        keeper = psutil.Process(on.owner().pid)
        run_pbkfs("unmount", "-D", on.mnt, "--force")
        with pytest.raises(OSError, match="not connected"):
            os.fstatvfs(file.fileno())
    _, alive = psutil.wait_procs([keeper], timeout=30)
    assert not alive
    assert run_pbkfs("check", "-d", on.diff).returncode == 0


@needs_takeovers
def test_keeper_knows_the_file_system_of_a_new_layer(on: Place) -> None:
    """Of a seal: what is written there may fail, too."""
    elsewhere = Path(tempfile.mkdtemp(prefix="pbkfs-test-", dir="/dev/shm"))
    try:
        on.mount("--supervised")
        (on.mnt / "file").write_text("before")
        live = elsewhere / "live"
        control.call(on.diff, "seal", live=str(live), child=None, hold=False)
        keeper = Path(f"/proc/{on.owner().pid}/fd")
        assert str(live / "objects") in [os.readlink(path) for path in keeper.iterdir()]
        (on.mnt / "other").write_text("after")
        kill_worker(on)
        assert [(on.mnt / name).read_text() for name in ("file", "other")] == ["before", "after"]
        run_pbkfs("unmount", "-D", on.mnt)
    finally:
        on.close()
        shutil.rmtree(elsewhere)


@needs_takeovers
def test_what_the_kernel_held_back_before_a_takeover_is_sealed(on: Place, base: Path) -> None:
    """Nobody has counted what it has open."""
    n_blocks = 1024
    (base / "base/1/16384").write_bytes(bytes(n_blocks * PAGE))
    on.mount("--base", base, "--supervised")
    fd = os.open(on.mnt / "base/1/16384", os.O_RDWR)
    for block in range(0, n_blocks, 3):
        os.pwrite(fd, block.to_bytes(8, "little") * 1024, block * PAGE)
    kill_worker(on)
    child = [str(on.root / "child"), str(on.root / "child.live")]
    control.call(on.diff, "seal", live=str(on.root / "live"), child=child, hold=True)
    os.close(fd)
    run_pbkfs("unmount", "-D", on.mnt)
    run_pbkfs("mount", "--base", base, "-D", on.mnt, "-d", child[0])
    found = (on.mnt / "base/1/16384").read_bytes()
    run_pbkfs("unmount", "-D", on.mnt)
    expected = b"".join(
        bytes(PAGE) if block % 3 else block.to_bytes(8, "little") * 1024
        for block in range(n_blocks)
    )
    assert found == expected


@needs_takeovers
def test_upgrade_goes_on_with_what_is_open(on: Place) -> None:
    on.mount("--supervised")
    with (on.mnt / "file").open("x+") as file:
        file.write("before")
        file.flush()
        said = run_pbkfs("upgrade", "-D", on.mnt).stdout
        assert f"(pid {control.call(on.diff, 'ping')['pid']})" in said
        file.write(" and after")
        file.flush()
        os.fsync(file.fileno())
    stat = json.loads(run_pbkfs("stat", "-D", on.mnt, "--format", "json").stdout)
    assert stat["pid"] == control.call(on.diff, "ping")["pid"]
    assert (on.mnt / "file").read_text() == "before and after"
    run_pbkfs("unmount", "-D", on.mnt)


@needs_takeovers
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a disk without room")
@pytest.mark.parametrize("part", ["diff", "layer"])
def test_upgrade_is_refused_after_a_write_error_of_anybody(on: Place, part: str) -> None:
    """Each time; the mount, which would end by it, goes on."""
    with thin_disk(on.root) as thin:
        disk = thin.path
        try:
            if part == "diff":
                on.diff = disk / "diff"
                on.mount("--supervised")
                kill_worker(on)
                run_pbkfs("upgrade", "-D", on.mnt)
            else:
                on.mount("--supervised")
                control.call(on.diff, "seal", live=str(disk / "layer"), child=None, hold=False)
            with (disk / "strange").open("xb", buffering=0) as file:
                file.write(os.urandom(12 << 20))
                with pytest.raises(OSError, match=r"Input/output error|No space left"):
                    os.fsync(file.fileno())
            thin.make_room()
            worker = control.call(on.diff, "ping")["pid"]
            for _ in range(2):
                done = run_pbkfs("upgrade", "-D", on.mnt, check=False)
                assert done.returncode == errors.HostError.exit_code
                told = f"the file system of {disk / part}/objects tells of a write error"
                assert told in done.stderr
                assert "Unmount it, and mount it again" in done.stderr.splitlines()[-1]
            assert control.call(on.diff, "ping")["pid"] == worker
            (on.mnt / "file").write_text("goes on")
            run_pbkfs("unmount", "-D", on.mnt)
        finally:
            on.close()
