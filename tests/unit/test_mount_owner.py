"""An owner is one process: a recycled pid, another boot or another host is somebody else."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pbkfs.mount import owner
from pbkfs.mount.owner import Owner, parse_owner, this_process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps until it is ended."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def owner_of(pid: int) -> Owner:
    ticks = owner.start_ticks(pid)
    assert ticks is not None
    return dataclasses.replace(this_process("/mnt"), pid=pid, start_ticks=ticks)


def test_record_comes_back() -> None:
    me = this_process("/mnt/some place")
    assert parse_owner(me.to_json()) == me
    assert me.is_alive()
    assert me.is_here()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"pid": 1}', b"\xff\xfe"])
def test_unreadable_record_is_no_owner(data: bytes) -> None:
    assert parse_owner(data) is None


def test_recycled_pid_is_not_the_owner(child: subprocess.Popen[bytes]) -> None:
    found = owner_of(child.pid)
    assert found.is_alive()
    assert not dataclasses.replace(found, start_ticks=found.start_ticks - 1).is_alive()


def test_another_boot_is_dead_but_here(child: subprocess.Popen[bytes]) -> None:
    found = dataclasses.replace(owner_of(child.pid), boot_id="another")
    assert not found.is_alive()
    assert found.is_here()


def test_another_host_is_not_here() -> None:
    found = dataclasses.replace(
        this_process("/mnt"), boot_id="another", machine_id="another", host="elsewhere"
    )
    assert not found.is_here()


def test_zombie_does_not_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owner.start_ticks(process.pid) is None
    process.wait()


def test_name_with_parentheses_is_read_right(tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "a) S 1 (b")
    os.symlink("/bin/sleep", program)
    with subprocess.Popen([program, "600"]) as process:
        try:
            reference = owner.start_ticks(os.getpid())
            found = owner.start_ticks(process.pid)
            assert reference is not None
            assert found is not None
            assert found >= reference
        finally:
            process.kill()


def test_wait_gone_sees_the_end(child: subprocess.Popen[bytes]) -> None:
    found = owner_of(child.pid)
    assert not owner.wait_gone(found, 0.01)
    child.kill()
    assert owner.wait_gone(found, 10)


def test_signal_reaches_only_the_owner(child: subprocess.Popen[bytes]) -> None:
    found = owner_of(child.pid)
    impostor = dataclasses.replace(found, start_ticks=found.start_ticks + 1)
    assert not owner.send_signal(impostor, signal.SIGKILL)
    assert child.poll() is None
    assert owner.send_signal(found, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not owner.send_signal(found, signal.SIGKILL)
