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
        aside.write_back(tmp_path / "missing", [], is_aside=is_aside)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    aside.write_back(tmp_path, [b"gone", b"file"], is_aside=is_aside)
    with pytest.raises(OSError, match="symbolic links"):
        aside.write_back(tmp_path, [b"link", b"file"], is_aside=is_aside)


@pytest.mark.expect_log("is called without .*: No such file")
def test_program_that_is_gone_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that could not be unmounted any more would be worse than one that may hang."""
    monkeypatch.setattr(aside, "PROGRAM", str(tmp_path / "gone"))
    assert aside.unmount(tmp_path, 0, is_aside=True) in (errno.EINVAL, errno.EPERM)
    aside.write_back(tmp_path, [], is_aside=True)
