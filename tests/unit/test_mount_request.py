"""What is refused before anything changes: places, owners, rights."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from pbkfs.errors import DiffError, HostError, NotFoundError, UsageError
from pbkfs.mount import request as checks
from pbkfs.mount.binding import BaseAddress
from pbkfs.mount.request import MountRequest

EMPTY = BaseAddress("empty")


def test_mount_point_has_to_be_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        checks.check_mountpoint(tmp_path / "absent", Path("/diff"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is not a directory"):
        checks.check_mountpoint(tmp_path / "file", Path("/diff"))
    with pytest.raises(UsageError, match=r"is not empty \(1 entries\)"):
        checks.check_mountpoint(tmp_path, Path("/diff"))
    (tmp_path / "file").unlink()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    place = checks.check_mountpoint(tmp_path / "link", Path("/diff"))
    assert place.path == (tmp_path / "real").resolve()
    assert place.dead is None


def test_diff_is_new_or_a_diff(tmp_path: Path) -> None:
    assert checks.check_diff(tmp_path / "a" / "b") == (tmp_path / "a" / "b", False)
    assert not (tmp_path / "a").exists()
    assert checks.check_diff(tmp_path) == (tmp_path, False)
    (tmp_path / "lock").write_text("")
    assert checks.check_diff(tmp_path) == (tmp_path, False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DiffError, match="not empty and is no diff"):
        checks.check_diff(tmp_path)
    (tmp_path / checks.SUPERBLOCK).write_text("{}")
    assert checks.check_diff(tmp_path) == (tmp_path, True)


def test_diff_that_is_or_lies_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiffError, match="is not a directory"):
        checks.check_diff(tmp_path / "file")
    with pytest.raises(DiffError, match="is not a directory"):
        checks.check_diff(tmp_path / "file" / "diff")


@pytest.mark.parametrize(
    ("mountpoint", "diff", "base", "says"),
    [
        ("/m", "/m", EMPTY, "mount point and diff are the same directory"),
        ("/m", "/m/d", EMPTY, "diff /m/d lies inside of mount point /m"),
        ("/d/m", "/d", EMPTY, "mount point /d/m lies inside of diff /d"),
        ("/m", "/s/d", BaseAddress("probackup", store="/s"), "diff /s/d lies inside of store /s"),
        ("/b/m", "/d", BaseAddress("directory", path="/b"), "mount point /b/m lies inside of base"),
        ("/m", "/d", BaseAddress("directory", path="/d"), "diff and base are the same"),
    ],
)
def test_places_must_not_contain_each_other(
    mountpoint: str, diff: str, base: BaseAddress, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        checks.check_places(Path(mountpoint), Path(diff), base)


def test_neighbours_with_the_same_beginning_are_fine() -> None:
    checks.check_places(Path("/a/pg"), Path("/a/pg-diff"), BaseAddress("probackup", store="/a/p"))


def test_one_base_only() -> None:
    both = MountRequest(Path("/m"), Path("/d"), 1, backup_id="X", base_dir=Path("/b"))
    with pytest.raises(UsageError, match="--backup-path and --base exclude each other"):
        checks.check_base_options(both)
    both = MountRequest(Path("/m"), Path("/d"), 1, base_dir=Path("/b"), is_empty=True)
    with pytest.raises(UsageError, match="--base and --empty"):
        checks.check_base_options(both)


def test_parse_owner_option() -> None:
    me = pwd.getpwuid(0)
    assert checks.parse_owner_option("root") == (0, me.pw_gid)
    assert checks.parse_owner_option("0:17") == (0, 17)
    assert checks.parse_owner_option("root:root") == (0, 0)
    assert checks.parse_owner_option("4242424") == (4242424, 4242424)
    for name in ("nobody-here", "²"):
        with pytest.raises(UsageError, match=f"user '{name}' does not exist"):
            checks.parse_owner_option(name)
    for text in ("4294967295", "0:4294967295", "99999999999"):
        with pytest.raises(UsageError, match="is no number of a user or group"):
            checks.parse_owner_option(text)
    with pytest.raises(UsageError, match="group 'nogroup-here' does not exist"):
        checks.parse_owner_option("root:nogroup-here")


class TestAsRoot:
    """Root may not run a server, so it is never the default owner where another one is known."""

    @pytest.fixture(autouse=True)
    def _root(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(os, "getegid", lambda: 0)

    def test_order_of_owners(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert checks.choose_owner((7, 8), (1, 2), (3, 4)) == (7, 8)
        assert checks.choose_owner(None, (1, 2), (3, 4)) == (1, 2)
        assert checks.choose_owner(None, None, (3, 4)) == (3, 4)
        entry = pwd.struct_passwd(("postgres", "x", 555, 556, "", "/", "/bin/sh"))
        monkeypatch.setattr(pwd, "getpwnam", lambda _name: entry)
        assert checks.choose_owner(None, None, (0, 0)) == (555, 556)

    def test_without_user_postgres_root_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(_name: str) -> pwd.struct_passwd:
            raise KeyError

        monkeypatch.setattr(pwd, "getpwnam", missing)
        assert checks.choose_owner(None, None, None) == (0, 0)

    def test_others_may_enter(self) -> None:
        assert checks.choose_allow_other(None, (5, 5))
        assert not checks.choose_allow_other(False, (5, 5))


class TestAsUser:
    """A user shows his own files, and needs the host's leave to let others in."""

    @pytest.fixture(autouse=True)
    def _user(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(os, "getegid", lambda: 1000)
        monkeypatch.setattr(os, "getgroups", lambda: [1000, 27])
        monkeypatch.setattr(checks, "FUSE_CONF", tmp_path / "fuse.conf")

    def test_owner_is_the_user(self) -> None:
        assert checks.choose_owner(None, None, (3, 4)) == (1000, 1000)
        assert checks.choose_owner((1000, 27), None, None) == (1000, 27)
        with pytest.raises(HostError, match="files of owner 5:5"):
            checks.choose_owner((5, 5), None, None)

    def test_allow_other_needs_fuse_conf(self, tmp_path: Path) -> None:
        assert not checks.choose_allow_other(None, (1000, 1000))
        with pytest.raises(HostError, match="allow_other is not permitted"):
            checks.choose_allow_other(True, (1000, 1000))
        (tmp_path / "fuse.conf").write_text("#user_allow_other\nmount_max = 5\n")
        with pytest.raises(HostError):
            checks.choose_allow_other(True, (1000, 1000))
        (tmp_path / "fuse.conf").write_text("mount_max = 5\n user_allow_other # yes\n")
        assert checks.choose_allow_other(True, (1000, 1000))
