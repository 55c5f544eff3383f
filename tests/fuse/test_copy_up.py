"""Files of a lower layer on a real mount: read, changed for the first time, and kept apart."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.served import Served

MIB = 1 << 20
Serve = Callable[..., Served]


def digest_tree(root: Path) -> dict[str, tuple[str, int]]:
    """Path -> (sha256 of the content or the link's target, size), of everything below."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            content = os.fsencode(os.readlink(path)) if path.is_symlink() else path.read_bytes()
            found[str(path.relative_to(root))] = (
                hashlib.sha256(content).hexdigest(),
                path.lstat().st_size,
            )
    return found


def test_lower_files_are_shown_as_they_are(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    assert digest_tree(served.path) == digest_tree(lower)
    for path in ("large", "base/5/16385"):
        here, there = os.stat(served.path / path), os.stat(lower / path)
        assert stat.S_IMODE(here.st_mode) == stat.S_IMODE(there.st_mode)
        assert here.st_mtime_ns == there.st_mtime_ns
    assert served.counters()["copy_up_waits"] == 0, "a read copies nothing"


@pytest.mark.parametrize("name", ["base/5/16384", "postgresql.conf", "large"])
@pytest.mark.parametrize("is_remounted", [False, True])
def test_a_small_write_changes_what_it_says(
    serve: Serve, lower: Path, name: str, is_remounted: bool
) -> None:
    served = serve(lower)
    before = digest_tree(lower)
    expected = bytearray((lower / name).read_bytes())
    with open(served.path / name, "r+b", buffering=0) as file:
        for offset, data in ((5, b"early"), (len(expected) - 3, b"over the end"), (700, b"x" * 50)):
            os.pwrite(file.fileno(), data, offset)
            expected[offset : offset + len(data)] = data
        assert os.fstat(file.fileno()).st_size == len(expected)
        os.fsync(file.fileno())
    counted = served.counters()
    assert counted["copy_up_waits"] >= 1
    assert counted["outstanding"] == counted["retry_queue"] == 0
    if is_remounted:
        served.unmount()
        served = serve(lower)
    assert (served.path / name).read_bytes() == expected
    assert digest_tree(lower) == before


def test_first_writes_from_many_threads(serve: Serve, lower: Path) -> None:
    """All pages of two files at once, some in halves: everybody waits for one copy-up."""
    served = serve(lower)
    names = ["base/5/16385", "large"]
    expected = {name: bytearray((lower / name).read_bytes()) for name in names}

    def write(name: str, first: int) -> None:
        size = len(expected[name])
        fd = os.open(served.path / name, os.O_RDWR)
        for start in range(first * 4096, size - 4096, 8 * 4096):
            data = os.urandom(4096)
            expected[name][start : start + 4096] = data
            os.pwrite(fd, data, start)
        os.fsync(fd)
        os.close(fd)

    threads = [
        threading.Thread(target=write, args=(n, first)) for n in names for first in (1, 4, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert (served.path / name).read_bytes() == expected[name]
    served.unmount()
    again = serve(lower)
    for name in names:
        assert (again.path / name).read_bytes() == expected[name]


def test_unmount_with_dirty_pages_of_a_lower_file(serve: Serve, lower: Path) -> None:
    """The unmount itself makes the kernel write, and that write needs a copy-up from Python."""
    served = serve(lower)
    fd = os.open(served.path / "base/5/16385", os.O_RDWR)
    with mmap.mmap(fd, 0) as shared:
        shared[5 * MIB : 5 * MIB + 5] = b"dirty"
    os.close(fd)
    assert served.unmount() == {}
    with open(serve(lower).path / "base/5/16385", "rb") as file:
        file.seek(5 * MIB)
        assert file.read(5) == b"dirty"


def test_truncate_hides_what_is_below(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    content = (lower / "base/5/16385").read_bytes()
    file = served.path / "base/5/16385"
    with open(file, "r+b") as opened:
        os.ftruncate(opened.fileno(), 100_000)
        os.ftruncate(opened.fileno(), MIB)
        assert opened.read() == content[:100_000] + bytes(MIB - 100_000)
    os.truncate(served.path / "large", 0)
    os.truncate(served.path / "large", 5000)
    (served.path / "postgresql.conf").write_bytes(b"new")
    served.unmount()
    again = serve(lower).path
    assert (again / "base/5/16385").read_bytes() == content[:100_000] + bytes(MIB - 100_000)
    assert (again / "large").read_bytes() == bytes(5000)
    assert (again / "postgresql.conf").read_bytes() == b"new"


def test_fallocate_of_a_lower_file(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    content = (lower / "base/5/16384").read_bytes()
    fd = os.open(served.path / "base/5/16384", os.O_RDWR)
    os.posix_fallocate(fd, MIB, MIB)
    assert os.fstat(fd).st_size == 2 * MIB
    assert os.pread(fd, 2 * MIB, 0) == content + bytes(MIB)
    os.close(fd)
    assert served.counters()["copy_up_waits"] == 1


def test_attributes_without_a_copy_up(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    file = served.path / "base/5/16385"
    os.chmod(file, 0o640)
    os.utime(file, ns=(1, 2))
    assert (stat.S_IMODE(file.stat().st_mode), file.stat().st_mtime_ns) == (0o640, 2)
    assert served.counters()["copy_up_waits"] == 0
    with open(file, "r+b") as opened:
        opened.write(b"x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert file.stat().st_mtime_ns > 2


def test_names_of_lower_files(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    mnt = served.path
    content = (lower / "large").read_bytes()
    with open(mnt / "large", "rb") as opened:
        os.rename(mnt / "large", mnt / "base" / "moved")
        os.rename(mnt / "postgresql.conf", mnt / "base" / "moved")
        assert opened.read() == content
    os.rename(mnt / "base", mnt / "base2")
    assert (mnt / "base2" / "moved").read_bytes() == (lower / "postgresql.conf").read_bytes()
    assert (mnt / "base2/5/16385").read_bytes() == (lower / "base/5/16385").read_bytes()
    os.mkdir(mnt / "base")
    assert os.listdir(mnt / "base") == []
    shutil.rmtree(mnt / "base2")
    assert sorted(os.listdir(mnt)) == ["base", "link"]
    served.unmount()
    assert sorted(os.listdir(serve(lower).path)) == ["base", "link"]


def test_write_to_an_unlinked_lower_file(serve: Serve, lower: Path) -> None:
    served = serve(lower)
    content = (lower / "large").read_bytes()
    with open(served.path / "large", "r+b", buffering=0) as file:
        os.unlink(served.path / "large")
        os.pwrite(file.fileno(), b"still here", 10)
        os.fsync(file.fileno())
        assert os.pread(file.fileno(), 40, 0) == content[:10] + b"still here" + content[20:40]
        assert os.fstat(file.fileno()).st_nlink == 0
    assert not (served.path / "large").exists()


def test_a_copy_up_that_fails_is_the_callers_error(serve: Serve, lower: Path) -> None:
    served = serve(lower, "--full")
    with open(served.path / "large", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"never", 0)
        with pytest.raises(OSError, match="space") as caught:
            os.fsync(file.fileno())
        assert caught.value.errno == errno.ENOSPC
    # The mount lives, other files are not touched by it.
    (served.path / "new").write_bytes(b"x" * 100)
    assert (served.path / "postgresql.conf").read_bytes() == (
        lower / "postgresql.conf"
    ).read_bytes()
    assert served.unmount() == {}


def test_the_cache_can_be_dropped(serve: Serve, lower: Path) -> None:
    """What a seal will need: dirty pages come first, then everything is asked for anew."""
    served = serve(lower)
    file = served.path / "base/5/16384"
    with open(file, "r+b", buffering=0) as opened:
        os.pwrite(opened.fileno(), b"dirty", 8192)
        ino = os.fstat(opened.fileno()).st_ino
        served.reset()
        served.ask("invalidate", ino=ino)
        served.ask("invalidate", ino=987654321)  # unknown to the kernel: nothing to drop
        while served.counters()["notified"] < 2:
            pass
        assert os.pread(opened.fileno(), 5, 8192) == b"dirty"
    found = served.counters()
    assert found["write.native"] >= 1
    assert found["read.native"] >= 1
    assert found["notify_errors"] == 0


def test_first_readers_come_together(serve: Serve, lower: Path) -> None:
    """Whoever opens a file while another first opens it sees what was written, not what is below.

    Of one kind a page lies in the diff and the rest below; of the other nothing is below.
    """
    page = 8192
    names = [f"base/5/{20000 + i}" for i in range(10)]
    new_names = [f"base/5/{30000 + i}" for i in range(10)]
    for name in names:
        (lower / name).write_bytes(b"old" * page)
    served = serve(lower)
    for name in names + new_names:
        with open(served.path / name, "r+b" if name in names else "wb") as file:
            file.write(b"new!" * (page // 4))
    assert served.unmount() == {}
    served = serve(lower, "--slow-attach")
    together = threading.Barrier(4)
    wrong: list[str] = []

    def read() -> None:
        for name in names + new_names:
            path = os.fspath(served.path / name)
            os.stat(path)
            together.wait()
            fd = os.open(path, os.O_RDONLY)
            if os.pread(fd, page, 0) != b"new!" * (page // 4):
                wrong.append(name)
            os.close(fd)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
