"""The control socket: requests, refusals, bugs, strangers, dead ends."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from machine import ROOT

from pbkfs.errors import BusyError, HostError, NotRunningError, TimedOutError, UsageError
from pbkfs.mount import control
from pbkfs.mount.report import WorkerBugError


async def echo(request: dict[str, Any]) -> dict[str, Any]:
    return {"got": request.get("word")}


async def refuse(_request: dict[str, Any]) -> dict[str, Any]:
    raise BusyError("mount point /x is busy", hint="Wait.")


async def break_down(_request: dict[str, Any]) -> dict[str, Any]:
    raise ZeroDivisionError("oops")


HANDLERS: dict[str, control.Handler] = {"echo": echo, "refuse": refuse, "break": break_down}


async def ask(diff: Path, function: Callable[[], Any]) -> Any:
    """Serve ``diff`` while ``function`` runs in a thread."""
    with control.listen(diff) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve, server, HANDLERS)
            try:
                return await trio.to_thread.run_sync(function)
            finally:
                nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_request_and_reply(tmp_path: Path) -> None:
    assert await ask(tmp_path, lambda: control.call(tmp_path, "echo", word="hello\n")) == {
        "got": "hello\n"
    }


@pytest.mark.trio
async def test_refusal_keeps_its_class(tmp_path: Path) -> None:
    def call() -> None:
        with pytest.raises(BusyError, match="mount point /x is busy") as caught:
            control.call(tmp_path, "refuse")
        assert caught.value.hint == "Wait."
        with pytest.raises(UsageError):
            control.call(tmp_path, "no such thing")

    await ask(tmp_path, call)


@pytest.mark.trio
@pytest.mark.expect_log("control request break failed")
async def test_bug_is_logged_and_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def call() -> Any:
        with pytest.raises(WorkerBugError, match="ZeroDivisionError: oops"):
            control.call(tmp_path, "break")
        return control.call(tmp_path, "echo", word=1)

    with caplog.at_level(logging.ERROR):
        assert await ask(tmp_path, call) == {"got": 1}
    assert "control request break failed" in caplog.text


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[]\n", b"\xff\n", b'{"op": []}\n', b"7\n"])
@pytest.mark.trio
async def test_garbage_is_refused(tmp_path: Path, line: bytes) -> None:
    def call() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / control.NAME))
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(4096), b""))

    reply = await ask(tmp_path, call)
    if line != b"\n":
        assert json.loads(reply)["error"]["slug"] == "usage"


@pytest.mark.trio
async def test_several_requests_on_one_connection(tmp_path: Path) -> None:
    def call() -> list[Any]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / control.NAME))
            file = client.makefile("rwb")
            answers = []
            for word in range(3):
                file.write(json.dumps({"op": "echo", "word": word}).encode() + b"\n")
                file.flush()
                answers.append(json.loads(file.readline())["got"])
            file.close()
            return answers

    assert await ask(tmp_path, call) == [0, 1, 2]


@pytest.mark.trio
@pytest.mark.expect_log("refused")
async def test_other_users_are_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "_peer_uid", lambda _socket: os.geteuid() + 1)

    def call() -> None:
        with pytest.raises(NotRunningError):
            control.call(tmp_path, "echo")

    await ask(tmp_path, call)
    assert "refused" in caplog.text


@pytest.mark.trio
async def test_socket_is_private_and_replaces_a_dead_one(tmp_path: Path) -> None:
    (tmp_path / control.NAME).write_text("left over")
    with control.listen(tmp_path):
        assert (tmp_path / control.NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.trio
async def test_path_longer_than_an_address(tmp_path: Path) -> None:
    diff = tmp_path / ("x" * 200)
    diff.mkdir()
    assert await ask(diff, lambda: control.call(diff, "echo", word=2)) == {"got": 2}


def test_nobody_serves(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="no worker serves"):
        control.call(tmp_path, "ping")
    with pytest.raises(NotRunningError):
        control.call(tmp_path / "absent", "ping")
    with control.listen(tmp_path):
        pass
    with pytest.raises(NotRunningError):
        control.call(tmp_path, "ping")


def test_worker_that_hangs(tmp_path: Path) -> None:
    with control.listen(tmp_path), pytest.raises(TimedOutError, match=r"within 0\.05 s"):
        control.call(tmp_path, "ping", timeout_s=0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_stranger_gets_a_clear_error(place: Path) -> None:
    with control.listen(place):
        child = os.fork()
        if child == 0:
            os.setuid(65534)
            try:
                control.call(place, "ping")
            except HostError as error:
                os._exit(0 if "another user" in error.message else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


_ASK_AS = """
import os, sys
from pathlib import Path
from pbkfs.errors import PbkfsError
from pbkfs.mount import control
os.setuid(int(sys.argv[1]))
try:
    print(control.call(Path(sys.argv[2]), "echo", word=1))
except PbkfsError as error:
    print(error.slug)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.trio
@pytest.mark.expect_log("refused")
async def test_stranger_is_refused_where_the_mode_lets_him_in(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def call_as(uid: int) -> str:
        (place / control.NAME).chmod(0o666)
        command = [sys.executable, "-c", _ASK_AS, str(uid), place]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert await ask(place, lambda: call_as(0)) == "{'got': 1}\n"
    assert "refused" not in caplog.text
    assert await ask(place, lambda: call_as(65534)) == "not_running\n"
    assert "control request of user 65534 refused" in caplog.text
