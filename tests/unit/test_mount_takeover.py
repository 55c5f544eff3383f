"""What a worker that takes over asks of the ledger and of the file systems, before it opens."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pbkfs._native import Dispatcher
from pbkfs.errors import NotRunningError, PbkfsError
from pbkfs.mount import sealing, takeover, upgrading, write_errors
from pbkfs.mount.write_errors import WriteErrors
from pbkfs.overlay import ledger as ledgers
from pbkfs.overlay.ledger import Ledger, read_ledger
from pbkfs.overlay.sealing import BrokenSealError


def check_in_child(ledger: Ledger, place: Path, syncfs: Callable[[int], None]) -> int:
    """Ask for write errors in another process; returns its exit code."""
    fd = os.open(place, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            takeover.sync_file_system = syncfs
            takeover.check_file_systems(ledger, [fd])
            code = 0
        except takeover.RefusedError:
            code = takeover.EXIT_REFUSED
        finally:
            os._exit(code)
    os.close(fd)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_write_error_is_told_once_and_refused_for_good(tmp_path: Path) -> None:
    """Whoever dies between the kernel's word and his own has no successor."""
    ledger = Ledger.make()
    asked: list[int] = []

    def die_when_told(_fd: int) -> None:
        asked.append(_fd)
        if len(asked) == 2:  # the first one was this process's own
            os._exit(77)

    assert check_in_child(ledger, tmp_path, die_when_told) == 77
    with pytest.raises(PbkfsError, match="died while it asked for write errors"):
        read_ledger(ledger.fd)


def test_death_while_the_disk_writes_is_survived(tmp_path: Path) -> None:
    """What takes its time consumes nothing."""
    ledger = Ledger.make()
    assert check_in_child(ledger, tmp_path, lambda _fd: os._exit(77)) == 77
    read_ledger(ledger.fd)
    assert check_in_child(ledger, tmp_path, lambda _fd: None) == 0
    read_ledger(ledger.fd)


def test_write_error_ends_the_mount(tmp_path: Path) -> None:
    ledger = Ledger.make()

    def fail(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    assert check_in_child(ledger, tmp_path, fail) == takeover.EXIT_REFUSED
    with pytest.raises(PbkfsError):
        read_ledger(ledger.fd)


def test_write_error_that_was_told_once_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for an upgrade again gets the same answer."""
    asked: list[int] = []

    def fail_once(fd: int) -> None:
        asked.append(fd)
        if len(asked) == 1:
            raise OSError(5, "Input/output error")

    errors = WriteErrors()
    errors.watch(tmp_path)
    errors.watch(tmp_path)
    assert errors.ask() is None
    monkeypatch.setattr(write_errors, "sync_file_system", fail_once)
    for _ in range(2):
        found = errors.ask()
        assert found is not None
        assert found.endswith(f"{tmp_path} tells of a write error: input/output error")
    assert len(asked) == 2


def test_file_system_that_cannot_be_watched_is_not_trusted() -> None:
    errors = WriteErrors()
    errors.watch_again(-1)
    found = errors.ask()
    assert found is not None
    assert "can't be asked for write errors" in found


@pytest.mark.expect_log("half changed")
def test_nobody_takes_over_from_a_broken_seal() -> None:
    pid = os.fork()
    if pid == 0:
        sealing.end_worker(BrokenSealError("the stack of diff d is half changed"))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == takeover.EXIT_REFUSED


class _Steps:
    """A tree, its seal and a hydrator, of which only the order of the calls is looked at."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.hydration = self

    def paths_in_use(self) -> list[bytes]:
        return []

    def begin_seal(self, *_args: object) -> _Steps:
        return self

    def prepare(self) -> None:
        self.done.append("prepare")

    def switch(self) -> object:
        self.done.append("switch")
        layer = SimpleNamespace(uuid=uuid.uuid4(), path="sealed")
        return SimpleNamespace(layer=layer, gate_ns=0, wal_bytes=0)

    def finish(self) -> None:
        self.done.append("finish")

    def cancel(self) -> None:
        self.done.append("cancel")

    def forget(self) -> None:
        pass

    async def pause(self) -> bool:
        return False

    def resume(self, *, is_wanted: bool) -> None:
        assert not is_wanted


@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device")])
def test_keeper_has_the_new_layer_before_it_is_written_to(
    tmp_path: Path, error: OSError | None
) -> None:
    """Else a worker that dies after the switch would leave nobody who knows of write errors."""
    steps: Any = _Steps()

    def note(path: Path) -> None:
        steps.done.append(f"note {path.name}")
        if error is not None:
            raise error

    sealer = sealing.Sealer(
        steps, tmp_path, tmp_path, steps, lambda _paths: None, lambda _is_held: None, note
    )
    request = {"live": str(tmp_path / "new"), "hold": False}
    if error is None:
        trio.run(sealer.seal, request)
        assert steps.done == ["prepare", "note new", "switch", "finish"]
    else:
        with pytest.raises(PbkfsError, match="no space left"):
            trio.run(sealer.seal, request)
        assert steps.done == ["prepare", "note new", "cancel"]


@pytest.mark.parametrize("change", [b"", b"other"])
def test_answer_to_the_kernel_is_what_it_was(change: bytes) -> None:
    """Of another version of the program it may be another, which the kernel would never hear of."""
    said = bytes.fromhex("070000002d0000000000020000000000") + bytes(48)
    ledger = Ledger.make()
    ledger.note_init(said, Dispatcher.init_answer(said) + change)
    fds = {"ledger": ledger.fd}
    if not change:
        assert takeover.read_numbers(fds).init == said
    else:
        with pytest.raises(takeover.RefusedError, match="something else"):
            takeover.read_numbers(fds)


def test_ledger_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large; what was not read would be taken for torn, and cut off."""
    monkeypatch.setattr(ledgers, "_READ_BYTES", 100)
    ledger = Ledger.make()
    ledger.listed(1, [(b"name%d" % number, 2 * number, 2 * number + 1) for number in range(1, 99)])
    size = os.fstat(ledger.fd).st_size
    assert len(read_ledger(ledger.fd).names[1]) == 98
    assert os.fstat(ledger.fd).st_size == size


def test_upgrade_outlives_the_worker_that_was_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It had taken the call when it was killed; the next one is served by the new one."""
    versions = {"version": "1", "init": ""}
    answers: list[Any] = [
        versions | {"pid": 1},
        {"pid": 1},
        versions | {"pid": 1},
        NotRunningError("no worker serves diff /diff"),
        versions | {"pid": 2},
    ]

    def call(*_: object, **__: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    target = SimpleNamespace(diff=Path("/diff"), mountpoint=None, has_worker=lambda: bool(answers))
    monkeypatch.setattr(upgrading.control, "call", call)
    monkeypatch.setattr(upgrading, "find_target", lambda *_: target)
    assert upgrading.upgrade(None, target.diff).pid == 2
    answers[:] = [versions | {"pid": 1}, {"pid": 1}, NotRunningError("no worker serves diff /diff")]
    with pytest.raises(NotRunningError):
        upgrading.upgrade(None, target.diff)
