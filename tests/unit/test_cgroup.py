"""Limits by cgroups: what is written where, in which order, on what looks like cgroupfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pbkfs.branch.errors import InvalidRequestError
from pbkfs.branch.limits import parse_limits
from pbkfs.errors import HostError, UnsupportedError
from pbkfs.postgres import cgroup
from pbkfs.postgres.cgroup import Cgroups, Limits

_FILES = ("cgroup.controllers", "cgroup.subtree_control", "cgroup.procs", "cpu.max", "memory.max")


class Tree:
    """A directory that behaves like cgroupfs, as far as these tests look."""

    def __init__(self, root: Path) -> None:
        self.root = root / "cgroup"
        self.proc = root / "proc"
        self.writes: list[tuple[str, str]] = []
        self.proc.mkdir()
        self.add("", "cpu io memory")
        self.proc.joinpath("mountinfo").write_text(
            f"30 1 0:26 / {self.root} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
        )
        self.proc.joinpath("cgroup").write_text("0::/user/session\n")

    def add(self, name: str, controllers: str = "") -> None:
        """Make a group with the kernel's files."""
        group = self.root / name
        group.mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            group.joinpath(file).touch()
        group.joinpath("cgroup.controllers").write_text(controllers)

    def write(self, path: Path, text: str) -> None:
        """What ``_write`` does."""
        self.writes.append((str(path.relative_to(self.root)), text))
        if not path.parent.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(path))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path)
    monkeypatch.setattr(cgroup, "_write", made.write)
    return made


def test_order_of_writes(tree: Tree) -> None:
    tree.add("user/session")
    groups = Cgroups(tree.proc, is_root=True)
    limits = Limits(cpus=0.5, memory_bytes=512 << 20)
    groups.check(limits)
    assert not (tree.root / "pbkfs.slice").exists()
    group = groups.make("id", limits)
    assert group == tree.root / "pbkfs.slice/id"
    assert tree.writes == [
        ("cgroup.subtree_control", "+cpu +memory"),
        ("pbkfs.slice/cgroup.subtree_control", "+cpu +memory"),
        ("pbkfs.slice/id/cpu.max", "50000 100000"),
        ("pbkfs.slice/id/memory.max", "536870912"),
    ]
    tree.writes.clear()
    with groups.entered(group):
        assert tree.writes == [("pbkfs.slice/id/cgroup.procs", str(os.getpid()))]
    # Back to where it was: its children stay.
    assert tree.writes[1:] == [("user/session/cgroup.procs", str(os.getpid()))]
    groups.remove("id")
    assert not group.exists()
    groups.remove("id")


def test_only_what_is_asked_for(tree: Tree) -> None:
    tree.root.joinpath("cgroup.subtree_control").write_text("cpu memory pids")
    groups = Cgroups(tree.proc, is_root=True)
    assert groups.make("id", Limits()) is None
    with groups.entered(None):
        pass
    assert tree.writes == []
    groups.make("id", Limits(memory_bytes=1 << 30))
    assert tree.writes == [
        ("pbkfs.slice/cgroup.subtree_control", "+memory"),
        ("pbkfs.slice/id/memory.max", "1073741824"),
    ]


def test_place_of_an_ordinary_user(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.add("user", "cpu memory")
    tree.add("user/session", "memory")
    # Delegated is what the user may write to, from his own group upwards.
    own = [tree.root / "user/session", tree.root / "user"]
    monkeypatch.setattr(
        os, "access", lambda path, _mode: Path(path) in own or Path(path).parent in own
    )
    groups = Cgroups(tree.proc, is_root=False)
    assert groups.make("id", Limits(cpus=2)) == tree.root / "user/pbkfs.slice/id"
    del own[1:]
    with pytest.raises(UnsupportedError, match=r"user/session lacks the cpu controller"):
        groups.check(Limits(cpus=2))
    own.clear()
    with pytest.raises(UnsupportedError, match="delegated"):
        groups.check(Limits(cpus=2))


def test_what_is_missing_is_said(tree: Tree) -> None:
    groups = Cgroups(tree.proc, is_root=True)
    tree.root.joinpath("cgroup.controllers").write_text("hugetlb memory\n")
    with pytest.raises(UnsupportedError, match=r"cpu is not available here: .* the cpu controller"):
        groups.check(Limits(cpus=1))
    tree.proc.joinpath("mountinfo").write_text("")
    with pytest.raises(UnsupportedError, match="no cgroup2 file system"):
        groups.make("id", Limits(memory_bytes=1))
    groups.remove("id")


def test_refusals_of_the_kernel(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _text: str) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(cgroup, "_write", refuse)
    groups = Cgroups(tree.proc, is_root=True)
    with pytest.raises(HostError, match=r"subtree_control: device or resource busy"):
        groups.make("id", Limits(cpus=1))
    with pytest.raises(HostError, match="cannot move"), groups.entered(tree.root):
        pass


def test_values() -> None:
    assert parse_limits("500m", "512Mi") == Limits(0.5, 512 << 20)
    assert parse_limits("2", None) == Limits(2.0, None)
    assert parse_limits(".25", "1G") == Limits(0.25, 1 << 30)
    for cpu in ("", "0", "-1", "m", "1 ", "1e3", "9" * 400):
        with pytest.raises(InvalidRequestError):
            parse_limits(cpu, None)
    for memory in ("", "0", "1M", "-1G", "1G\n", "much", "9" * 400):
        with pytest.raises(InvalidRequestError):
            parse_limits(None, memory)
