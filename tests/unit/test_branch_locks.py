"""Locks of heads: between threads, between processes, over a death."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pbkfs.branch.locks import LAYERS, Locks
from pbkfs.errors import BusyError


@pytest.fixture
def locks(tmp_path: Path) -> Locks:
    return Locks(tmp_path / "lock")


def test_one_at_a_time(locks: Locks) -> None:
    with locks.hold("a", what="branch 'a'"):
        assert locks.is_held("a")
        assert not locks.is_held("b")
        with (
            pytest.raises(BusyError, match="operation on branch 'a' is under way"),
            locks.hold("a", what="branch 'a'", wait_s=0),
        ):
            pass
        with locks.hold("b", what="b", wait_s=0):
            assert locks.is_held("b")
    assert not locks.is_held("a")


def test_layers_are_shared_by_those_who_make_them(locks: Locks) -> None:
    with (
        locks.hold(LAYERS, what="layers", shared=True),
        locks.hold(LAYERS, what="layers", shared=True, wait_s=0),
        pytest.raises(BusyError),
        locks.hold(LAYERS, what="layers", wait_s=0),
    ):
        pass
    with locks.hold(LAYERS, what="layers", wait_s=0):
        assert locks.is_held(LAYERS)


def test_a_thread_waits_for_another(locks: Locks) -> None:
    order: list[str] = []
    has_it, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with locks.hold("a", what="a"):
            has_it.set()
            may_end.wait(10)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert has_it.wait(10)
    threading.Timer(0.05, may_end.set).start()
    with locks.hold("a", what="a"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_lock_ends_with_its_process(locks: Locks) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locks.hold("a", what="a"):
            os.write(writer, b"x")
            signal.pause()
        os._exit(0)
    os.read(reader, 1)
    assert locks.is_held("a")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not locks.is_held("a")
    os.close(reader)
    os.close(writer)


def test_a_child_that_was_forked_meanwhile_does_not_keep_it(locks: Locks) -> None:
    with locks.hold("a", what="a"):
        child = os.fork()
        if child == 0:
            signal.pause()
    assert not locks.is_held("a")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
