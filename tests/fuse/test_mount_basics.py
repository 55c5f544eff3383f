"""What programs do with files, on a real mount of an empty tree."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.served import Served

MIB = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE_RANGE = 1, 2, 16, 8
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if libc.fallocate64(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def test_the_mount_is_what_it_says(served: Served) -> None:
    mnt = served.path
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    line = next(entry for entry in lines if entry.split(" ")[4] == str(mnt))
    options, _, rest = line.partition(" - ")
    kind, source, more = rest.split(" ")
    assert (kind, source) == ("fuse.pbkfs", str(served.diff))
    assert {"nosuid", "nodev"} <= set(options.split(" ")[5].split(","))
    assert "default_permissions" in more.split(",")
    assert "allow_other" not in more.split(",")
    root = mnt.stat()
    assert (root.st_ino, stat.S_IMODE(root.st_mode)) == (1, 0o700)


def test_write_read_stat(mnt: Path) -> None:
    file = mnt / "file"
    with open(file, "xb") as out:
        out.write(b"hello")
        out.flush()
        # The kernel holds the page dirty; the size is right all the same, however it is asked.
        assert os.fstat(out.fileno()).st_size == 5
        assert file.stat().st_size == 5
        assert os.lseek(out.fileno(), 0, os.SEEK_END) == 5
        assert file.read_bytes() == b"hello"
    found = file.stat()
    assert (found.st_size, found.st_blksize, found.st_nlink) == (5, 4096, 1)
    assert found.st_ino > 1
    with os.scandir(mnt) as entries:
        assert [(entry.name, entry.inode()) for entry in entries] == [("file", found.st_ino)]
    os.sync()
    assert file.stat().st_size == 5
    assert file.stat().st_blocks > 0


def test_size_while_it_grows(mnt: Path) -> None:
    with open(mnt / "file", "xb", buffering=0) as out:
        for n in range(1, 400):
            out.write(b"z" * 8192)
            assert os.fstat(out.fileno()).st_size == n * 8192
            if n % 50 == 0:
                os.fsync(out.fileno())
                assert os.stat(mnt / "file").st_size == n * 8192
    assert (mnt / "file").stat().st_size == 399 * 8192


def test_times_are_the_callers(mnt: Path) -> None:
    file = mnt / "file"
    file.write_bytes(b"x")
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    found = file.stat()
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    with open(file, "r+b") as out:
        out.write(b"y")
        os.fsync(out.fileno())
    assert file.stat().st_mtime_ns > 2_000_000_002
    os.utime(mnt, ns=(5, 6))
    assert (mnt.stat().st_atime_ns, mnt.stat().st_mtime_ns) == (5, 6)


def test_all_is_there_after_a_remount(serve: Callable[..., Served], place: Path) -> None:
    first = serve()
    content = os.urandom(3 * MIB + 17)
    (first.path / "d").mkdir(mode=0o750)
    (first.path / "d" / "file").write_bytes(content)
    os.chmod(first.path / "d" / "file", 0o640)
    os.utime(first.path / "d" / "file", ns=(10**9, 2 * 10**9 + 7))
    (first.path / "d" / "link").symlink_to("file")
    os.link(first.path / "d" / "file", first.path / "second")
    assert first.unmount() == {}
    assert first.wait() == 0
    assert os.listdir(place / "m") == []

    again = serve().path
    assert (again / "d" / "file").read_bytes() == content
    found = (again / "d" / "file").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o640, 2 * 10**9 + 7)
    assert (found.st_nlink, found.st_ino) == (2, (again / "second").stat().st_ino)
    assert stat.S_IMODE((again / "d").stat().st_mode) == 0o750
    assert os.readlink(again / "d" / "link") == "file"


def test_mmap(mnt: Path) -> None:
    file = mnt / "file"
    file.write_bytes(bytes(64 * 1024))
    with open(file, "r+b") as out, mmap.mmap(out.fileno(), 0) as shared:
        shared[8192:8197] = b"mmap!"
        assert os.pread(out.fileno(), 5, 8192) == b"mmap!"
        os.pwrite(out.fileno(), b"write", 20000)
        assert shared[20000:20005] == b"write"
        shared.flush()
        with mmap.mmap(out.fileno(), 0, mmap.MAP_PRIVATE) as private:
            private[0:7] = b"private"
        assert shared[0:7] == bytes(7)
    assert file.read_bytes()[8192:8197] == b"mmap!"


def test_append(mnt: Path) -> None:
    file = mnt / "log"
    flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
    one, two = os.open(file, flags, 0o600), os.open(file, flags)
    for n in range(100):
        os.write(one, b"1%06d\n" % n)
        os.write(two, b"2%06d\n" % n)
    os.close(one)
    os.close(two)
    lines = file.read_bytes().splitlines()
    assert len(lines) == 200
    assert lines[::2] == [b"1%06d" % n for n in range(100)]


def test_direct_io_is_tolerated(mnt: Path) -> None:
    fd = os.open(mnt / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
    with mmap.mmap(-1, 3 * MIB) as buffer:
        buffer[:] = os.urandom(3 * MIB)
        assert os.pwritev(fd, [buffer], 0) == 3 * MIB
        wrote = buffer[:]
        buffer[:] = bytes(3 * MIB)
        assert os.preadv(fd, [buffer], 0) == 3 * MIB
        assert buffer[:] == wrote
    # Beside cached access to the same file.
    cached = os.open(mnt / "file", os.O_RDWR)
    os.pwrite(cached, b"cached", 4096)
    with mmap.mmap(-1, 4096) as buffer:
        os.preadv(fd, [buffer], 4096)
        assert buffer[:6] == b"cached"
    os.close(fd)
    os.close(cached)


def test_locks(mnt: Path) -> None:
    file = mnt / "lock"
    file.touch()
    code = (
        "import fcntl, sys\n"
        "f = open(sys.argv[1], 'r+')\n"
        "try: getattr(fcntl, sys.argv[2])(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: sys.exit(3)\n"
    )

    def other_process(call: str) -> int:
        return subprocess.run([sys.executable, "-c", code, file, call], check=False).returncode

    for call in (fcntl.flock, fcntl.lockf):
        with open(file, "r+") as held:
            call(held, fcntl.LOCK_EX)
            assert other_process(call.__name__) == 3
            call(held, fcntl.LOCK_UN)
            assert other_process(call.__name__) == 0


def test_fallocate(mnt: Path) -> None:
    fd = os.open(mnt / "file", os.O_CREAT | os.O_RDWR, 0o600)
    os.write(fd, b"x" * 100)
    os.posix_fallocate(fd, 0, MIB)
    assert os.fstat(fd).st_size == MIB
    assert os.fstat(fd).st_blocks * 512 >= MIB, "really allocated"
    assert os.pread(fd, 200, 0) == b"x" * 100 + bytes(100)
    fallocate(fd, KEEP_SIZE, 0, 2 * MIB)
    assert os.fstat(fd).st_size == MIB
    os.pwrite(fd, b"y" * 30000, 0)
    fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 8192, 8192)
    assert os.pread(fd, 30000, 0) == b"y" * 8192 + bytes(8192) + b"y" * (30000 - 16384)
    fallocate(fd, ZERO_RANGE, 100, 100)
    assert os.pread(fd, 300, 0) == b"y" * 100 + bytes(100) + b"y" * 100
    with pytest.raises(OSError, match="fallocate") as caught:
        fallocate(fd, COLLAPSE_RANGE, 0, 4096)
    assert caught.value.errno == errno.EOPNOTSUPP
    os.close(fd)


def test_seek_data_and_hole_are_honest(mnt: Path) -> None:
    fd = os.open(mnt / "file", os.O_CREAT | os.O_RDWR, 0o600)
    os.pwrite(fd, b"x", 5 * MIB)
    # The whole file passes for data: always true enough, and never hides any.
    assert os.lseek(fd, 100, os.SEEK_DATA) == 100
    assert os.lseek(fd, 100, os.SEEK_HOLE) == 5 * MIB + 1
    with pytest.raises(OSError, match="No such device") as caught:
        os.lseek(fd, 6 * MIB, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    assert os.pread(fd, 4096, MIB) == bytes(4096)
    os.close(fd)


def test_copying_calls(mnt: Path) -> None:
    content = os.urandom(2 * MIB + 5)
    (mnt / "from").write_bytes(content)
    with open(mnt / "from", "rb") as source, open(mnt / "to", "xb") as target:
        left = len(content)
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    assert (mnt / "to").read_bytes() == content
    with open(mnt / "from", "rb") as source, open(mnt / "sent", "xb") as target:
        sent = 0
        while sent < len(content):
            sent += os.sendfile(target.fileno(), source.fileno(), sent, len(content) - sent)
    assert (mnt / "sent").read_bytes() == content


def test_xattrs_are_refused(mnt: Path) -> None:
    file = mnt / "file"
    file.touch()
    for call in (
        lambda: os.setxattr(file, "user.a", b"1"),
        lambda: os.getxattr(file, "user.a"),
        lambda: os.listxattr(file),
        lambda: os.removexattr(file, "user.a"),
    ):
        with pytest.raises(OSError, match="supported") as caught:
            call()
        assert caught.value.errno == errno.ENOTSUP
    with open(file, "rb") as opened, pytest.raises(OSError, match="ioctl") as caught:
        fcntl.ioctl(opened, 0x12345678)
    assert caught.value.errno == errno.ENOTTY


def test_remove_a_tree(mnt: Path) -> None:
    for directory in ("a", "a/b", "c"):
        (mnt / directory).mkdir()
    for n in range(1000):
        (mnt / "a" / "b" / f"file{n:04}").touch()
    assert len(os.listdir(mnt / "a" / "b")) == 1000
    subprocess.run(["rm", "-rf", mnt / "a"], check=True)
    assert os.listdir(mnt) == ["c"]


def test_remove_while_reading_the_directory(mnt: Path) -> None:
    for n in range(1000):
        (mnt / f"file{n:04}").touch()
    seen = []
    with os.scandir(mnt) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert sorted(seen) == [f"file{n:04}" for n in range(1000)]
    assert os.listdir(mnt) == []


def test_large_directory(mnt: Path) -> None:
    names = sorted(f"{n:05}-{'n' * 100}" for n in range(2000))
    for name in names:
        os.mkdir(mnt / name)
    for _ in range(2):
        assert sorted(os.listdir(mnt)) == names
    (mnt / names.pop(1234)).rmdir()
    (mnt / "new").touch()
    assert sorted(os.listdir(mnt)) == [*names, "new"]
    listed = subprocess.run(["ls", "-a", mnt], check=True, capture_output=True, text=True).stdout
    assert {".", ".."} <= set(listed.splitlines())


def test_rename_over_an_open_file(mnt: Path) -> None:
    (mnt / "old").write_bytes(b"old content")
    (mnt / "new").write_bytes(b"new")
    with open(mnt / "new", "r+b") as replaced:
        os.rename(mnt / "old", mnt / "new")
        assert (mnt / "new").read_bytes() == b"old content"
        assert replaced.read() == b"new"
        replaced.write(b" and more")
        replaced.flush()
        assert os.fstat(replaced.fileno()).st_nlink == 0
        assert os.fstat(replaced.fileno()).st_size == 12
    assert os.listdir(mnt) == ["new"]


def test_rename_a_directory_with_open_files(mnt: Path) -> None:
    (mnt / "d" / "e").mkdir(parents=True)
    with open(mnt / "d" / "e" / "file", "xb") as out:
        out.write(b"before ")
        os.rename(mnt / "d", mnt / "moved")
        out.write(b"after")
        out.flush()
        os.fsync(out.fileno())
    assert (mnt / "moved" / "e" / "file").read_bytes() == b"before after"
    with pytest.raises(FileNotFoundError):
        os.stat(mnt / "d")
    with pytest.raises(OSError, match="not empty"):
        os.rename(mnt / "moved" / "e", mnt / "moved")


def test_rename_flags(mnt: Path) -> None:
    (mnt / "a").write_bytes(b"a")
    (mnt / "b").write_bytes(b"b")
    with pytest.raises(OSError, match="renameat2") as caught:
        renameat2(mnt / "a", mnt / "b", NOREPLACE)
    assert caught.value.errno == errno.EEXIST
    renameat2(mnt / "a", mnt / "b", EXCHANGE)
    assert ((mnt / "a").read_bytes(), (mnt / "b").read_bytes()) == (b"b", b"a")
    renameat2(mnt / "a", mnt / "c", NOREPLACE)
    assert sorted(os.listdir(mnt)) == ["b", "c"]
    with pytest.raises(OSError, match="renameat2") as caught:
        renameat2(mnt / "b", mnt / "d", WHITEOUT)
    assert caught.value.errno == errno.EINVAL


def test_unlinked_file_lives_while_open(mnt: Path) -> None:
    with open(mnt / "file", "x+b", buffering=0) as file:
        file.write(b"a" * 20000)
        os.unlink(mnt / "file")
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"b" * 20000)
        os.fsync(file.fileno())
        os.ftruncate(file.fileno(), 30000)
        assert os.pread(file.fileno(), 40000, 0) == b"a" * 20000 + b"b" * 10000
        os.fchmod(file.fileno(), 0o644)
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o644
    assert os.listdir(mnt) == []


def test_hard_links(mnt: Path) -> None:
    (mnt / "one").write_bytes(b"content")
    os.link(mnt / "one", mnt / "two")
    assert (mnt / "one").stat().st_nlink == (mnt / "two").stat().st_nlink == 2
    assert (mnt / "one").samefile(mnt / "two")
    with open(mnt / "two", "ab") as out:
        out.write(b"!")
    assert (mnt / "one").read_bytes() == b"content!"
    os.utime(mnt / "two")
    assert (mnt / "two").stat().st_nlink == 2
    os.unlink(mnt / "one")
    assert (mnt / "two").stat().st_nlink == 1
    with pytest.raises(PermissionError):
        os.link(mnt, mnt / "directory")


def test_symbolic_links(mnt: Path) -> None:
    target = "t" * 4000
    os.symlink(target, mnt / "link")
    for _ in range(2):
        assert os.readlink(mnt / "link") == target
    assert (mnt / "link").lstat().st_size == 4000
    os.unlink(mnt / "link")
    os.symlink("other", mnt / "link")
    assert os.readlink(mnt / "link") == "other"


def test_truncate_both_ways(mnt: Path) -> None:
    file = mnt / "file"
    file.write_bytes(b"x" * 20000)
    os.truncate(file, 5000)
    assert file.read_bytes() == b"x" * 5000
    os.truncate(file, 20000)
    assert file.read_bytes() == b"x" * 5000 + bytes(15000)
    with open(file, "r+b") as out:
        out.seek(0)
        out.write(b"y" * 15000)
        out.truncate(12000)
        assert file.stat().st_size == 12000
    assert file.read_bytes() == b"y" * 12000
    with open(file, "wb"):
        assert file.stat().st_size == 0
    assert file.read_bytes() == b""


def test_modes_and_the_umask(mnt: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open(mnt / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(mnt / "directory", 0o777)
        os.mknod(mnt / "node", 0o666 | stat.S_IFREG)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE(os.stat(mnt / name).st_mode) for name in os.listdir(mnt)}
    assert modes == {"file": 0o640, "directory": 0o750, "node": 0o640}
    # The creator writes to it, whatever the mode says.
    fd = os.open(mnt / "read-only", os.O_CREAT | os.O_WRONLY, 0o400)
    os.write(fd, b"x")
    os.close(fd)
    os.chmod(mnt / "file", 0o600)
    assert stat.S_IMODE(os.stat(mnt / "file").st_mode) == 0o600


def test_no_devices_and_pipes(mnt: Path) -> None:
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR):
        with pytest.raises(PermissionError):
            os.mknod(mnt / "node", 0o600 | kind, 0)
    assert os.listdir(mnt) == []


def test_errors_of_names(mnt: Path) -> None:
    (mnt / "file").touch()
    (mnt / "directory").mkdir()
    with pytest.raises(FileExistsError):
        os.mkdir(mnt / "file")
    with pytest.raises(FileExistsError):
        os.open(mnt / "file", os.O_CREAT | os.O_EXCL)
    with pytest.raises(IsADirectoryError):
        os.unlink(mnt / "directory")
    with pytest.raises(NotADirectoryError):
        os.rmdir(mnt / "file")
    with pytest.raises(NotADirectoryError):
        os.stat(mnt / "file" / "below")
    with pytest.raises(OSError, match="too long"):
        os.mkdir(mnt / ("n" * 256))
    (mnt / ("n" * 255)).mkdir()
    (mnt / "directory" / "file").touch()
    with pytest.raises(OSError, match="not empty"):
        os.rmdir(mnt / "directory")


def test_sync_calls(mnt: Path, served: Served) -> None:
    served.reset()
    (mnt / "file").write_bytes(b"x" * 100000)
    for path, flags in ((mnt / "file", os.O_RDWR), (mnt, os.O_RDONLY | os.O_DIRECTORY)):
        fd = os.open(path, flags)
        os.fsync(fd)
        os.fdatasync(fd)
        assert libc.syncfs(fd) == 0
        os.close(fd)
    found = served.counters()
    assert found["fsync.native"] == 2
    assert found["fsyncdir.forwarded"] >= 2


def test_statfs(mnt: Path) -> None:
    here, there = os.statvfs(mnt), os.statvfs(mnt.parent)
    assert (here.f_namemax, here.f_blocks) == (255, there.f_blocks)
    assert shutil.disk_usage(mnt).total > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user")
def test_permissions_are_the_kernels(serve: Callable[..., Served]) -> None:
    mnt = serve(None, "--allow-other").path
    os.chmod(mnt, 0o777)
    (mnt / "private").write_bytes(b"secret")
    os.chmod(mnt / "private", 0o600)
    (mnt / "suid").write_bytes(b"x")
    os.chmod(mnt / "suid", 0o6777)

    def as_nobody(script: str) -> str:
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*user, "sh", "-c", script], cwd=mnt, check=False, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    assert "Permission denied" in as_nobody("cat private")
    assert as_nobody("echo x > theirs; stat -c '%u %g' theirs") == "65534 65534\n"
    assert "not permitted" in as_nobody("chown 0 theirs")
    # A write by somebody else takes the set-id bits away.
    assert as_nobody("echo y >> suid") == ""
    assert stat.S_IMODE(os.stat(mnt / "suid").st_mode) == 0o777
    os.chmod(mnt / "suid", 0o4755)
    os.chown(mnt / "suid", 65534, 65534)
    assert stat.S_IMODE(os.stat(mnt / "suid").st_mode) == 0o755


def test_readers_and_writers_at_once(mnt: Path) -> None:
    """Pages of one file, each written again and again: a reader sees one version of it, whole."""
    n_pages, failures = 64, []
    file = mnt / "file"
    file.write_bytes(b"".join(bytes([0]) * 8192 for _ in range(n_pages)))
    is_over = threading.Event()

    def write(first: int) -> None:
        fd = os.open(file, os.O_RDWR)
        for round_ in range(1, 40):
            for page in range(first, n_pages, 4):
                os.pwrite(fd, bytes([round_]) * 8192, page * 8192)
            if round_ % 10 == 0:
                os.fsync(fd)
        os.close(fd)

    def read() -> None:
        fd = os.open(file, os.O_RDONLY)
        while not is_over.is_set():
            for page in range(n_pages):
                # 4096: what the page cache itself keeps together.
                found = set(os.pread(fd, 4096, page * 8192))
                if len(found) != 1:
                    failures.append((page, found))
        os.close(fd)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    is_over.set()
    for thread in readers:
        thread.join()
    assert failures == []
    assert file.read_bytes() == bytes([39]) * (n_pages * 8192)


def test_requests_take_their_way(mnt: Path, served: Served) -> None:
    """Data is native, names are Python's, and what the kernel may keep is not asked again."""
    (mnt / "file").write_bytes(os.urandom(2 * MIB))
    served.reset()
    with open(mnt / "file", "r+b", buffering=0) as file:
        for n in range(64):
            os.pwrite(file.fileno(), b"x" * 8192, n * 8192)
            assert os.lseek(file.fileno(), 0, os.SEEK_END) == 2 * MIB
        os.fsync(file.fileno())
    found = served.counters()
    assert found["open.native"] == 1
    assert found["write.native"] >= 1
    assert found["fsync.native"] == 1
    assert found["write_bytes"] == 64 * 8192
    for cold in ("open", "read", "write", "fsync", "lookup", "setattr"):
        assert f"{cold}.forwarded" not in found
    # Of the directory, which has changed, and of the file, whose number of blocks may have.
    assert found.get("getattr.forwarded", 0) <= 2
    assert found["outstanding"] == found["outbox"] == found["reply_errors"] == 0

    for name in ("file", "missing"):
        os.path.exists(mnt / name)
    served.reset()
    for _ in range(10):
        assert os.path.exists(mnt / "file")
        assert not os.path.exists(mnt / "missing")
        assert os.listdir(mnt) == ["file"]
    found = served.counters()
    assert "lookup.forwarded" not in found
    assert found.get("getattr.forwarded", 0) <= 1
    assert found.get("readdirplus.forwarded", 0) <= 2


def test_a_bug_fails_one_request(serve: Callable[..., Served]) -> None:
    served = serve(None, "--bug")
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output") as caught:
            os.stat(served.path / "bug")
        assert caught.value.errno == errno.EIO
    (served.path / "file").write_bytes(b"lives")
    assert (served.path / "file").read_bytes() == b"lives"
    assert "planted bug" in served.log
    assert "Traceback" in served.log


def test_attributes_follow_every_change_of_names(mnt: Path) -> None:
    """They are answered natively, from what the tree has told: it must not forget to."""
    outer, inner = mnt / "outer", mnt / "outer/inner"
    seen: list[int] = []

    def changed(path: Path, nlink: int) -> None:
        found = path.stat()
        assert found.st_nlink == nlink
        assert found.st_mtime_ns == found.st_ctime_ns
        assert found.st_mtime_ns not in seen
        seen.append(found.st_mtime_ns)

    outer.mkdir()
    changed(outer, 2)
    inner.mkdir()
    changed(outer, 3)
    changed(inner, 2)
    (inner / "file").touch()
    changed(inner, 2)
    (inner / "file").rename(outer / "file")
    changed(inner, 2)
    changed(outer, 3)
    os.link(outer / "file", outer / "second")
    changed(outer, 3)
    assert (outer / "file").stat().st_nlink == 2
    os.truncate(outer / "second", 100)
    assert (outer / "file").stat().st_nlink == 2
    (outer / "file").unlink()
    changed(outer, 3)
    os.truncate(outer / "second", 50)
    found = (outer / "second").stat()
    assert (found.st_nlink, found.st_size) == (1, 50)
    os.symlink("target", outer / "link")
    changed(outer, 3)
    inner.rmdir()
    changed(outer, 2)
    outer.chmod(0o711)
    assert stat.S_IMODE(outer.stat().st_mode) == 0o711
    os.utime(outer, ns=(1, 2))
    assert (outer.stat().st_atime_ns, outer.stat().st_mtime_ns) == (1, 2)


def test_truncating_a_file_without_a_name(mnt: Path) -> None:
    with open(mnt / "file", "w+b") as file:
        file.write(b"x" * 100)
        file.flush()
        (mnt / "file").unlink()
        os.ftruncate(file.fileno(), 10)
        found = os.fstat(file.fileno())
        assert (found.st_nlink, found.st_size) == (0, 10)
        assert os.pread(file.fileno(), 100, 0) == b"x" * 10
