"""Links that a server makes for its tablespaces stay inside of the mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from fuse.conftest import Serve

VERSION = "PG_17_202406281"


@pytest.fixture
def location(place: Path) -> Path:
    """Where a tablespace was asked for: the server has made its directory there."""
    path = place / "location"
    (path / VERSION).mkdir(parents=True, mode=0o700)
    return path


def test_tablespace_lies_on_the_mount(serve: Serve, location: Path) -> None:
    mnt = serve().path
    (mnt / "pg_tblspc").mkdir()
    # What the kernel knows to be missing, and what it has listed, is made behind its back.
    for _ in range(2):
        assert not (mnt / ".tblspc").exists()
        assert os.listdir(mnt) == ["pg_tblspc"]
    link = mnt / "pg_tblspc/16384"
    link.symlink_to(location)
    assert os.readlink(link) == "../.tblspc/16384"
    (link / VERSION / "5").mkdir()
    (link / VERSION / "5/16385").write_bytes(b"x")
    assert sorted(os.listdir(mnt)) == [".tblspc", "pg_tblspc"]
    assert (mnt / f".tblspc/16384/{VERSION}/5/16385").read_bytes() == b"x"
    assert os.listdir(location) == []

    # The next one, and the same again as a replay makes it.
    assert not (mnt / ".tblspc/16390").exists()
    assert os.listdir(mnt / ".tblspc") == ["16384"]
    (location / VERSION).mkdir()
    (mnt / "pg_tblspc/16390").symlink_to(location)
    assert sorted(os.listdir(mnt / ".tblspc")) == ["16384", "16390"]
    link.unlink()
    (location / VERSION).mkdir()
    link.symlink_to(location)
    assert (link / VERSION / "5/16385").read_bytes() == b"x"
    assert os.listdir(location) == []
    (mnt / "pg_tblspc/16390" / VERSION).rmdir()
    assert not (mnt / "pg_tblspc/16390" / VERSION).exists()
    (mnt / "pg_tblspc/16390").unlink()
    (location / VERSION).mkdir()
    (mnt / "pg_tblspc/16390").symlink_to(location)
    (mnt / "pg_tblspc/16390" / VERSION / "7").mkdir()


@pytest.mark.expect_log("is in use by others")
def test_tablespace_of_somebody_else_is_left_alone(serve: Serve, location: Path) -> None:
    """As in the replay of a backup's WAL on the host that the backup came from."""
    (location / VERSION / "5").mkdir()
    (location / VERSION / "5/16385").write_bytes(b"original")
    (location / "PG_14_202107181").mkdir()
    served = serve()
    link = served.path / "pg_tblspc/16384"
    link.parent.mkdir()
    link.symlink_to(location)
    assert sorted(os.listdir(link)) == ["PG_14_202107181", VERSION]
    assert os.listdir(link / VERSION) == []
    assert os.listdir(location) == [VERSION]
    assert (location / VERSION / "5/16385").read_bytes() == b"original"
    assert "is in use by others; nothing in it is shown" in served.log


@pytest.mark.skipif(os.geteuid() != 0, reason="directories of others need root")
def test_directory_of_another_user_is_not_removed(serve: Serve, location: Path) -> None:
    os.chown(location / VERSION, 12345, 12345)
    mnt = serve().path
    (mnt / "pg_tblspc").mkdir()
    (mnt / "pg_tblspc/16384").symlink_to(location)
    assert os.listdir(location) == [VERSION]
    assert (mnt / "pg_tblspc/16384" / VERSION).stat().st_uid == 12345


@pytest.mark.expect_log("tablespace ")
def test_no_way_out(serve: Serve, location: Path) -> None:
    served = serve()
    mnt = served.path
    (mnt / "pg_tblspc").mkdir()
    with pytest.raises(FileNotFoundError):
        (mnt / "pg_tblspc/1").symlink_to(location / "none")
    with pytest.raises(PermissionError):
        (mnt / "pg_tblspc/1").symlink_to(mnt / "pg_tblspc/x")
    (mnt / "other").symlink_to(location)
    assert os.readlink(mnt / "other") == str(location)
    with pytest.raises(OSError) as caught:
        (mnt / "other").rename(mnt / "pg_tblspc/1")
    assert caught.value.errno == errno.EPERM
    assert os.listdir(mnt / "pg_tblspc") == []
    assert sorted(os.listdir(mnt)) == ["other", "pg_tblspc"]
    assert os.listdir(location) == [VERSION]
