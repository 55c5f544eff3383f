"""The kernel's list of mounts, and who keeps one busy."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from pbkfs.mount import holders
from pbkfs.mount.holders import Holder
from pbkfs.mount.mounts import find_mountpoint, our_mounts, parse_mountinfo, read_mounts

LINES = rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
90 22 0:51 / /mnt/a\040b\134c\011d rw shared:3 - fuse.pbkfs /d/\040x rw,user_id=0,allow_other
91 22 0:51 /base /mnt/part rw - fuse.pbkfs /d/\040x rw,user_id=0
92 22 0:52 / /mnt/\377 rw - tmpfs tmpfs rw
short line
"""


def test_parse_mountinfo_undoes_escapes() -> None:
    entries = parse_mountinfo(LINES)
    assert [entry.fstype for entry in entries] == ["ext4", "fuse.pbkfs", "fuse.pbkfs", "tmpfs"]
    ours = entries[1]
    assert ours.mountpoint == Path("/mnt/a b\\c\td")
    assert ours.source == "/d/ x"
    assert ours.device == "0:51"
    assert ours.options == ("rw", "user_id=0", "allow_other")
    assert entries[2].root == "/base"
    assert os.fsencode(entries[3].mountpoint) == b"/mnt/\xff"


def test_own_root_is_mounted() -> None:
    root = find_mountpoint(Path("/"))
    assert root is not None
    assert root in read_mounts()
    assert all(entry.fstype == "fuse.pbkfs" for entry in our_mounts())
    assert find_mountpoint(Path("/nowhere at all")) is None


def test_holders_names_who_stands_in_a_directory(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    place = tmp_path / "pg"
    place.mkdir()
    (tmp_path / "pg-2").mkdir()
    # A neighbour whose name begins the same must not be named.
    outside = subprocess.Popen(["sleep", "600"], cwd=tmp_path / "pg-2")
    inside = subprocess.Popen(["sleep", "600"], cwd=place)
    try:
        found = holders.find_holders("0:99999", place)
        assert [holder.pid for holder in found] == [inside.pid]
        assert found[0].command == "sleep"
        assert not found[0].is_postmaster
    finally:
        for process in (inside, outside):
            process.kill()
            process.wait()
    assert holders.find_holders(f"{os.major(device)}:99999", place) == []


def test_holders_sees_an_open_file(tmp_path: Path) -> None:
    place = tmp_path / "pg"
    place.mkdir()
    with (place / "file").open("w") as file, subprocess.Popen(["sleep", "600"], stdout=file) as p:
        try:
            assert [holder.pid for holder in holders.find_holders("0:99999", place)] == [p.pid]
        finally:
            p.kill()


def test_busy_error_gives_the_next_step() -> None:
    place = Path("/mnt/pg")
    server = holders.busy_error(place, [Holder(7, "postgres", True), Holder(8, "bash", False)])
    assert server.message == "mount point /mnt/pg is busy: in use by pid 7 (postgres), pid 8 (bash)"
    assert server.hint is not None
    assert "pbkfs stop -D /mnt/pg" in server.hint
    shell = holders.busy_error(place, [Holder(8, "bash", False)])
    assert shell.hint is not None
    assert "pbkfs stop" not in shell.hint
    assert "busy" in holders.busy_error(place, []).message


def test_describe_cuts_long_lists() -> None:
    users = [Holder(n, "x", False) for n in range(12)]
    assert holders.describe(users, limit=2) == "pid 0 (x), pid 1 (x) and 10 more"


def test_only_lines_that_name_a_path(tmp_path: Path) -> None:
    everywhere = read_mounts()
    for entry in everywhere:
        assert entry in read_mounts(entry.mountpoint)
    # A name that is written in another way is looked for in all lines.
    assert read_mounts(tmp_path / "with a blank") == everywhere
    assert read_mounts(tmp_path / "nothing") == []
