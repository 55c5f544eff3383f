"""Replacing a file where others may write beside it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbkfs import durable


@pytest.fixture
def guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The temporary name that is going to be used next, as if somebody knew it."""
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * (2 * n))
    yield tmp_path / ".report.0000000000000000.tmp"
    assert not (tmp_path / "report").exists()


def test_temporary_name_cannot_be_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    rename = os.rename

    def spy(source: str, target: str) -> None:
        names.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", spy)
    for _ in range(2):
        durable.replace_file(tmp_path / "report", b"x", label="test")
    assert len(set(names)) == 2
    assert os.listdir(tmp_path) == ["report"]


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "fifo"])
def test_what_lies_under_the_temporary_name_is_not_written_to(
    tmp_path: Path, guessed: Path, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"somebody's")
    if kind == "file":
        guessed.write_bytes(b"planted")
    elif kind == "link":
        guessed.symlink_to(victim)
    elif kind == "hard link":
        guessed.hardlink_to(victim)
    else:
        os.mkfifo(guessed)
    before = os.lstat(guessed)
    with pytest.raises(FileExistsError):
        durable.replace_file(tmp_path / "report", b"x", label="test")
    assert victim.read_bytes() == b"somebody's"
    assert os.lstat(guessed) == before
