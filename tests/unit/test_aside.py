"""System calls that wait for the mount, with the program that makes them and without."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pbkfs import aside


@pytest.mark.parametrize("is_aside", [True, False])
def test_errors_are_told(tmp_path: Path, is_aside: bool) -> None:
    assert aside.unmount(tmp_path, 0, is_aside=is_aside) in (errno.EINVAL, errno.EPERM)
    with pytest.raises(FileNotFoundError):
        aside.sync(tmp_path / "missing", is_aside=is_aside)
    aside.sync(Path("/dev/shm"), is_aside=is_aside)


@pytest.mark.expect_log("is called without .*: No such file")
def test_program_that_is_gone_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that could not be unmounted any more would be worse than one that may hang."""
    monkeypatch.setattr(aside, "PROGRAM", str(tmp_path / "gone"))
    assert aside.unmount(tmp_path, 0, is_aside=True) in (errno.EINVAL, errno.EPERM)
    aside.sync(Path("/dev/shm"), is_aside=True)
