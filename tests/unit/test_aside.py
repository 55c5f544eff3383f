"""System calls that wait for the mount, with the program that makes them and without."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pbkfs import aside


def check_errors(directory: Path) -> None:
    assert aside.unmount(directory, 0) in (errno.EINVAL, errno.EPERM)
    with pytest.raises(FileNotFoundError):
        aside.write_back(directory / "missing", [])
    (directory / "file").touch()
    (directory / "link").symlink_to("file")
    aside.write_back(directory, [b"gone", b"file"])
    with pytest.raises(OSError, match="symbolic links"):
        aside.write_back(directory, [b"link", b"file"])


def test_errors_are_told(tmp_path: Path) -> None:
    check_errors(tmp_path)


@pytest.mark.expect_log("is called without .*: No such file")
def test_program_that_is_gone_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that could not be unmounted any more would be worse than one that may hang."""
    monkeypatch.setattr(aside, "PROGRAM", str(tmp_path / "gone"))
    check_errors(tmp_path)
