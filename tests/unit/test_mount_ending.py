"""How long the end of a mount is waited for, and asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pbkfs.errors import NotRunningError, TimedOutError
from pbkfs.mount import ending


@pytest.mark.parametrize("limit_s", [0.0, 0.3, 2.5])
def test_worker_that_does_not_listen_is_asked_until_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    clock = SimpleNamespace(now=100.0)

    def ask(*_: Any, **__: Any) -> None:
        raise NotRunningError("no worker serves it")

    def wait(_owner: Any, limit_s: float | None) -> bool:
        assert limit_s is not None
        clock.now += limit_s
        return False

    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(ending.control, "call", ask)
    monkeypatch.setattr(ending, "wait_gone", wait)
    target: Any = SimpleNamespace(diff=Path("/diff"))
    owner: Any = SimpleNamespace(mountpoint="/mnt", pid=1)
    with pytest.raises(TimedOutError, match="still in progress"):
        ending._ask_worker(target, owner, limit_s)
    assert clock.now == pytest.approx(100 + limit_s)
