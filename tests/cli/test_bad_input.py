"""What mount refuses: one clear line, a hint, a code by class, and nothing changed on disk."""

from __future__ import annotations

import itertools
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from fix_place import Place, fill, snapshot
from machine import ROOT, own_mounts

from pbkfs import errors
from pbkfs.mount import lock


def refused(
    at: Place, *args: str | Path, cls: type[errors.PbkfsError], says: str, reuse: bool = False
) -> None:
    """Check that the mount is refused as it should be and that nothing changed below the place."""
    before = snapshot(at.root)
    done = at.mount(*args, *(["--reuse"] if reuse else []), check=False)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert done.returncode == cls.exit_code, done.stderr
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("pbkfs: error: ")
    assert says in lines[0]
    assert lines[1].startswith("hint: ")
    assert snapshot(at.root) == before


def test_mount_point_is_missing(at: Place) -> None:
    at.mnt.rmdir()
    refused(at, cls=errors.NotFoundError, says=f"mount point {at.mnt} does not exist")


def test_mount_point_is_not_empty(at: Place) -> None:
    (at.mnt / "file").write_text("x")
    refused(at, cls=errors.UsageError, says=f"mount point {at.mnt} is not empty")


def test_mount_point_is_a_file(at: Place) -> None:
    at.mnt.rmdir()
    at.mnt.write_text("x")
    refused(at, cls=errors.UsageError, says="is not a directory")


def test_mount_point_is_mounted(at: Place) -> None:
    at.mount()
    other = at.root / "other"
    done = run_pbkfs("mount", "--empty", "-D", at.mnt, "-d", other, check=False)
    assert done.returncode == errors.BusyError.exit_code
    assert f"is already mounted, with diff {at.diff}" in done.stderr
    assert not other.exists()


def test_diff_is_in_use(at: Place) -> None:
    at.mount()
    other = at.root / "other"
    other.mkdir()
    record = (at.diff / lock.NAME).read_bytes()
    done = run_pbkfs("mount", "-D", other, "-d", at.diff, check=False)
    assert done.returncode == errors.BusyError.exit_code
    assert f"in use by pid {at.owner().pid}" in done.stderr
    assert (at.diff / lock.NAME).read_bytes() == record
    assert (at.mnt / "x").write_text("still served")


def test_diff_is_a_file(at: Place) -> None:
    at.diff.write_text("x")
    refused(at, cls=errors.DiffError, says=f"diff {at.diff} is not a directory")


def test_diff_is_some_other_directory(at: Place) -> None:
    at.diff.mkdir()
    (at.diff / "thesis.tex").write_text("x")
    refused(at, cls=errors.DiffError, says="is not empty and is no diff")


@pytest.fixture
def used(at: Place) -> Place:
    """A place whose diff exists and is not mounted."""
    at.mount()
    (at.mnt / "file").write_text("x")
    run_pbkfs("unmount", "-D", at.mnt)
    return at


def test_diff_of_another_base(used: Place, tmp_path: Path) -> None:
    refused(used, "--base", tmp_path, cls=errors.DiffError, says="belongs to an empty base")


def test_diff_of_another_base_without_a_binding(used: Place, base: Path) -> None:
    (used.diff / "binding.json").unlink()
    refused(used, "--base", base, cls=errors.DiffError, says=f"diff {used.diff} belongs to empty")


def test_diff_of_another_format_version(used: Place) -> None:
    path = used.diff / "superblock.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    refused(used, cls=errors.DiffError, says="has format version 99", reuse=True)


def test_diff_with_a_damaged_superblock(used: Place) -> None:
    (used.diff / "superblock.json").write_text("{")
    refused(used, cls=errors.DiffError, says="damaged", reuse=True)


def test_diff_with_a_damaged_binding(used: Place) -> None:
    (used.diff / "binding.json").write_text("{")
    refused(used, cls=errors.DiffError, says="is unreadable", reuse=True)


@pytest.mark.parametrize("part", ["journal", "objects"])
def test_diff_with_a_missing_part(used: Place, part: str) -> None:
    (used.diff / part).rename(used.root / part)
    refused(used, cls=errors.DiffError, says=f"has no {part}", reuse=True)


def test_diff_with_a_foreign_journal(used: Place) -> None:
    (used.diff / "journal").write_bytes(b"x" * 100)
    refused(used, cls=errors.DiffError, says="journal", reuse=True)


def test_no_base_is_named(at: Place) -> None:
    refused(at, cls=errors.UsageError, says="no base is given for the new diff", reuse=True)


def test_two_bases_are_named(at: Place) -> None:
    refused(
        at, "--empty", "--base", at.root, cls=errors.UsageError, says="--base and --empty exclude"
    )


def test_base_is_missing(at: Place) -> None:
    refused(at, "--base", at.root / "absent", cls=errors.NotFoundError, says="absent")


def test_places_in_one_another(at: Place, base: Path) -> None:
    before = snapshot(base)
    done = run_pbkfs("mount", "--base", base, "-D", at.mnt, "-d", base / "diff", check=False)
    assert done.returncode == errors.UsageError.exit_code
    assert f"diff {base}/diff lies inside of base {base}" in done.stderr
    assert snapshot(base) == before


def test_store_instance_and_backup_are_missing(at: Place, place: Path) -> None:
    refused(at, "-B", place / "no", "-i", "X", cls=errors.NotFoundError, says="does not exist")
    refused(at, "-B", at.mnt, "-i", "X", cls=errors.NotFoundError, says="is no pg_probackup store")
    for name in ("one", "two"):
        (place / "store" / "backups" / name).mkdir(parents=True)
    store = place / "store"
    refused(at, "-B", store, "-i", "X", cls=errors.UsageError, says="has 2 instances")
    refused(at, "-B", store, "-I", "one", cls=errors.UsageError, says="backup of instance one")
    refused(at, "-B", store, "-I", "x", "-i", "X", cls=errors.NotFoundError, says="no instance 'x'")
    refused(at, "-B", store, "-I", "one", "-i", "X", cls=errors.NotFoundError, says="backup 'X'")
    refused(
        at, "-B", store, "-I", "one", "-i", "latest", cls=errors.NotFoundError, says="no backup"
    )


def test_new_diff_on_a_full_disk(at: Place, full_disk: Path) -> None:
    done = run_pbkfs("mount", "--empty", "-D", at.mnt, "-d", full_disk / "diff", check=False)
    assert done.returncode == errors.HostError.exit_code
    assert "no space left on device" in done.stderr
    assert sorted(os.listdir(full_disk)) == ["filler"]


def test_wal_does_not_fit(at: Place, full_disk: Path, base: Path) -> None:
    (full_disk / "filler").write_bytes(b"x" * 300_000)
    done = run_pbkfs("mount", "--base", base, "-D", at.mnt, "-d", full_disk / "diff", check=False)
    assert done.returncode == errors.HostError.exit_code
    assert "no space left on device" in done.stderr
    assert sorted(os.listdir(full_disk)) == ["filler"]
    assert os.listdir(at.mnt) == []


def test_used_diff_on_a_full_disk(at: Place, full_disk: Path) -> None:
    (full_disk / "filler").unlink()
    at.diff = full_disk / "diff"
    at.mount()
    (at.mnt / "file").write_text("kept")
    run_pbkfs("unmount", "-D", at.mnt)
    fill(full_disk / "filler")

    def contents() -> dict[str, bytes]:
        # Log lines and the record of this boot may still find room in a block that is there.
        growing = ("diff/log/worker.log", "diff/journal")
        return {k: v[2] for k, v in snapshot(full_disk).items() if k not in growing}

    before = contents()
    done = at.mount("--reuse", check=False)
    assert done.returncode == errors.HostError.exit_code
    assert "no space left on device" in done.stderr
    assert contents() == before
    at.expected = ["no space left on device"]
    (full_disk / "filler").unlink()
    at.mount("--reuse")
    assert (at.mnt / "file").read_text() == "kept"
    run_pbkfs("unmount", "-D", at.mnt)


def test_disk_is_full_at_the_end(at: Place, full_disk: Path, base: Path) -> None:
    """Pages reached the objects, but there is no room to record them: that is no good end.

    What was synced before is there, of the rest each page is as it was written, or as below.
    """
    at.diff = full_disk / "diff"
    at.expected = ["no space left", "No space left"]
    n_pages = 2000
    os.truncate(base / "base/1/1259", n_pages * 8192)
    (base / "pg_wal" / "000000010000000000000001").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", full_disk], check=True)
    at.mount("--base", base)
    below = (base / "base/1/1259").read_bytes()
    with (at.mnt / "base/1/1259").open("r+b", buffering=0) as file:
        for block in range(0, n_pages, 2):
            file.seek(block * 8192)
            file.write(b"x" * 8192)
            if block == n_pages // 2:
                os.fsync(file.fileno())
    fill(full_disk / "filler2")
    # The journal has some room of its own: use that up.
    with pytest.raises(OSError, match="No space left"):
        rename_for_ever(at.mnt / "PG_VERSION")
    done = run_pbkfs("unmount", "-D", at.mnt, check=False)
    assert done.returncode == errors.HostError.exit_code, done.stderr
    assert "is unmounted, but its last changes may not be on disk" in done.stderr
    assert not os.path.ismount(at.mnt)
    (full_disk / "filler2").unlink()
    at.mount("--reuse")
    content = (at.mnt / "base/1/1259").read_bytes()
    assert len(content) == len(below)
    for block in range(n_pages):
        start, end = block * 8192, (block + 1) * 8192
        is_written = block % 2 == 0 and content[start:end] == b"x" * 8192
        assert is_written or content[start:end] == below[start:end], block
        assert is_written or block % 2 or block > n_pages // 2, block
    run_pbkfs("unmount", "-D", at.mnt)


def rename_for_ever(path: Path) -> None:
    """Change a name again and again."""
    for n in itertools.count():
        path = path.rename(path.with_name(f"v{n}"))


@pytest.fixture
def full_disk(place: Path) -> Iterator[Path]:
    """A small file system without a free block."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    path = place / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    try:
        fill(path / "filler")
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_diff_on_a_read_only_file_system(used: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system read-only")
    subprocess.run(["mount", "--bind", used.diff, used.diff], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", used.diff], check=True)
        refused(used, cls=errors.HostError, says="the file system is read-only", reuse=True)
    finally:
        subprocess.run(["umount", used.diff], check=True)


def in_own_mounts(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own."""
    return subprocess.run(
        [*own_mounts(), "sh", "-ec", script, "sh", *args],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="hides a device in a mount namespace")
def test_no_fuse_device(at: Place) -> None:
    (at.root / "dev").mkdir()
    done = in_own_mounts(
        "touch $1/null; mount --bind /dev/null $1/null; mount --rbind $1 /dev;"
        'shift; exec "$@"', at.root / "dev",
        sys.executable, "-m", "pbkfs", "mount", "--empty", "-D", at.mnt, "-d", at.diff / "deep",
    )  # fmt: skip
    assert done.returncode == errors.HostError.exit_code, done.stderr
    assert "cannot open /dev/fuse: no such file or directory" in done.stderr
    assert "modprobe fuse" in done.stderr
    assert not at.diff.exists()


def test_mount_point_with_a_line_break(at: Place) -> None:
    at.mnt = at.root / "a\nb"
    at.mnt.mkdir()
    refused(at, cls=errors.UsageError, says=r"a\nb' has a line break in its name")


@pytest.mark.parametrize("option", ["--log-file", "--pid-file"])
def test_own_file_inside_of_the_mount(at: Place, option: str) -> None:
    (at.root / "link").symlink_to(at.mnt)
    for path in (at.mnt / "own", at.root / "link" / "own"):
        refused(at, option, path, cls=errors.UsageError, says=f"inside of mount point {at.mnt}")


@pytest.mark.parametrize("option", ["--log-file", "--pid-file"])
def test_own_file_is_a_symbolic_link(at: Place, option: str) -> None:
    victim = at.root / "victim"
    victim.write_text("as it was")
    (at.root / "link").symlink_to(victim)
    says = f"file {at.root / 'link'}: too many levels of symbolic links"
    refused(at, option, at.root / "link", cls=errors.HostError, says=says)
    assert victim.read_text() == "as it was"


def put(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("fifo", "it is a fifo and no regular file"),
        ("socket", "it is a socket and no regular file"),
        pytest.param(
            "device",
            "it is a device and no regular file",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a device"),
        ),
        ("directory", "is a directory"),
    ],
)
@pytest.mark.parametrize("option", ["log-file", "pid-file"])
def test_own_file_is_no_regular_one(at: Place, option: str, kind: str, says: str) -> None:
    path = at.root / "own"
    put(path, kind)
    says = f"cannot write {option.replace('-', ' ')} {path}: {says}"
    refused(at, f"--{option}", path, cls=errors.HostError, says=says)


def test_default_log_is_a_fifo(at: Place) -> None:
    at.mount()
    run_pbkfs("unmount", "-D", at.mnt)
    path = at.diff / "log" / "worker.log"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    done = at.mount("--reuse", check=False)
    assert done.returncode == errors.HostError.exit_code
    assert f"cannot write log file {path}: it is a fifo and no regular file" in done.stderr
    path.unlink()


def test_own_file_inside_of_the_base(at: Place, base: Path) -> None:
    says = f"log file {base / 'log'} lies inside of base {base}"
    refused(at, "--base", base, "--log-file", base / "log", cls=errors.UsageError, says=says)


def test_empty_path(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(at.diff.parent)
    for arguments in (["mount", "--empty", "-D", at.mnt, "-d", ""], ["cleanup", "-d", ""]):
        done = run_pbkfs(*arguments, check=False)
        assert done.returncode == errors.UsageError.exit_code
        assert "the path is empty" in done.stderr


def test_diff_where_nothing_can_be_made(at: Place) -> None:
    at.diff = Path("/proc/pbkfs/diff")
    refused(at, cls=errors.HostError, says="no such file or directory")


def test_log_file_cannot_be_written(at: Place) -> None:
    log = at.root / "absent" / "log"
    refused(at, "--log-file", log, cls=errors.HostError, says=f"cannot write log file {log}")


def test_pid_file_cannot_be_written(at: Place) -> None:
    path = at.root / "absent" / "pid"
    refused(at, "--pid-file", path, cls=errors.HostError, says=f"cannot write pid file {path}")
    assert os.listdir(at.mnt) == []


def test_no_journald(at: Place) -> None:
    if Path("/run/systemd/journal/socket").exists():
        pytest.skip("this machine has a journald")
    refused(at, "--log-sink", "journald", cls=errors.HostError, says="cannot reach journald")


def test_bug_in_the_worker_is_told_with_its_traceback(at: Place) -> None:
    site = at.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "from pbkfs.mount import wal\n"
        "def broken(*args): raise ZeroDivisionError('oops')\n"
        "wal.move_out = broken\n"
    )
    done = run_pbkfs(
        "mount", "--empty", "-D", at.mnt, "-d", at.diff, check=False,
        PYTHONPATH=f"{site}:{ROOT}", XDG_STATE_HOME=str(at.root / "state"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "ZeroDivisionError: oops" in done.stderr
    assert "this is a bug" in done.stderr
    log = at.root / "state" / "pbkfs" / "pbkfs.log"
    assert str(log) in done.stderr
    assert "in broken" in log.read_text()
    assert not at.diff.exists()


def test_worker_that_dies_without_a_word(at: Place) -> None:
    site = at.root / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\nfrom pbkfs.mount import wal\n"
        "def broken(*args): os.kill(os.getpid(), 9)\n"
        "wal.move_out = broken\n"
    )
    done = run_pbkfs(
        "mount", "--empty", "-D", at.mnt, "-d", at.diff, check=False, PYTHONPATH=f"{site}:{ROOT}"
    )
    assert done.returncode == errors.HostError.exit_code
    assert "died before it had mounted" in done.stderr
    assert not at.diff.exists()


def test_failed_remount_keeps_the_dead_owners_record(used: Place) -> None:
    used.mount("--reuse")
    dead = used.kill()
    run_pbkfs("unmount", "-D", used.mnt)
    (used.mnt / "in the way").write_text("x")
    record = json.loads((used.diff / lock.NAME).read_bytes())
    assert record["pid"] == dead.pid
    refused(used, cls=errors.UsageError, says="is not empty", reuse=True)
    (used.mnt / "in the way").unlink()
    log = used.root / "absent" / "log"
    done = used.mount("--reuse", "--log-file", log, check=False)
    assert done.returncode == errors.HostError.exit_code
    assert json.loads((used.diff / lock.NAME).read_bytes()) == record
