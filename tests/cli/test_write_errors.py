"""A page that can't be written back: who has the file open hears of it once, as on ext4."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import Faulty
from fix_mounts import run_pbkfs
from fix_place import Place

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file system that fails")

BLOCK = 8192


def error_of(call: Callable[[int], None], fd: int) -> int:
    """Return the errno that a call on a descriptor ends with, 0 for none."""
    try:
        call(fd)
    except OSError as error:
        return error.errno or -1
    return 0


def test_each_descriptor_hears_of_it_once(at: Place, base: Path) -> None:
    at.expected += ["object can't be changed: EIO"]
    relation = base / "base" / "1" / "16384"
    relation.write_bytes(b"o" * BLOCK * 3)
    at.mount("--base", base)
    path = at.mnt / "base" / "1" / "16384"
    with open(path, "r+b", buffering=0) as file:
        file.write(b"1" * BLOCK)
        os.fsync(file.fileno())
    run_pbkfs("unmount", "-D", at.mnt)

    faulty = Faulty(at.diff / "objects")
    fds = []
    try:
        at.mount("--reuse")
        fds = [os.open(path, os.O_RDWR) for _ in range(2)]
        faulty.fail({"op": "write", "path": "", "errno": errno.EIO})
        os.pwrite(fds[0], b"2" * BLOCK, BLOCK)
        assert [error_of(os.fsync, fd) for fd in fds] == [errno.EIO, errno.EIO]
        assert [error_of(os.fdatasync, fd) for fd in fds] == [0, 0]
        # What could not be written is lost, and nothing else: the page has its old version.
        os.posix_fadvise(fds[0], 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fds[1], 3 * BLOCK, 0) == b"1" * BLOCK + b"o" * BLOCK * 2
        stat = json.loads(run_pbkfs("stat", "-D", at.mnt, "-o", "json").stdout)
        assert stat["overlay"]["write_errors"] >= 1
        [line] = [each for each in at.log().splitlines() if "object can't be changed" in each]
        assert "block=1 layer=diff" in line
        assert "(of 'base/1/16384')" in line

        faulty.fail()
        os.pwrite(fds[0], b"3" * BLOCK, BLOCK)
        assert [error_of(os.fsync, fd) for fd in fds] == [0, 0]
    finally:
        for fd in fds:
            os.close(fd)
        at.close()
        faulty.close()
    at.mount("--reuse")
    assert path.read_bytes() == b"1" * BLOCK + b"3" * BLOCK + b"o" * BLOCK


def test_a_failed_sync_of_the_diff_is_never_taken_back(at: Place, base: Path) -> None:
    """The kernel below reports lost pages once; this file is not called durable again."""
    at.expected += ["object can't be synced: EIO", "cannot sync object", "worker failed"]
    relation = base / "base" / "1" / "16384"
    relation.write_bytes(b"o" * BLOCK)
    at.mount("--base", base)
    with open(at.mnt / "base" / "1" / "16384", "r+b", buffering=0) as file:
        file.write(b"0")
    run_pbkfs("unmount", "-D", at.mnt)
    faulty = Faulty(at.diff / "objects")
    try:
        at.mount("--reuse")
        with open(at.mnt / "base" / "1" / "16384", "r+b", buffering=0) as file:
            file.write(b"1" * BLOCK)
            faulty.fail({"op": "fsync", "path": "", "errno": errno.EIO})
            assert error_of(os.fsync, file.fileno()) == errno.EIO
            faulty.fail()
            assert error_of(os.fsync, file.fileno()) == errno.EIO
        with open(at.mnt / "base" / "1" / "other", "xb", buffering=0) as file:
            file.write(b"x")
            assert error_of(os.fsync, file.fileno()) == 0
    finally:
        at.close()
        faulty.close()


def test_an_object_that_cannot_be_made(at: Place, base: Path) -> None:
    at.expected += ["no object can be made for 'base/1/16384'"]
    relation = base / "base" / "1" / "16384"
    relation.write_bytes(b"o" * BLOCK)
    at.mount("--base", base)
    run_pbkfs("unmount", "-D", at.mnt)
    faulty = Faulty(at.diff / "objects")
    try:
        at.mount("--reuse")
        with open(at.mnt / "base" / "1" / "16384", "r+b", buffering=0) as file:
            file.write(b"1" * BLOCK)
            faulty.fail({"op": "create", "path": "", "errno": errno.EIO})
            assert error_of(os.fsync, file.fileno()) == errno.EIO
            faulty.fail()
            file.seek(0)
            file.write(b"2" * BLOCK)
            assert error_of(os.fsync, file.fileno()) == 0
    finally:
        at.close()
        faulty.close()


@pytest.mark.parametrize("op", ["write", "open", "create"])
def test_a_file_system_that_became_read_only(at: Place, base: Path, op: str) -> None:
    """At a write, or where an object has to be opened again for it, or made."""
    at.expected += {
        "write": ["object can't be changed: EROFS"],
        "open": ["object can't be opened: EROFS"],
        "create": ["no object can be made for 'base/1/16384': .*Read-only file system"],
    }[op]
    relation = base / "base" / "1" / "16384"
    relation.write_bytes(b"o" * BLOCK * 2)
    at.mount("--base", base)
    path = at.mnt / "base" / "1" / "16384"
    others = [at.mnt / str(number) for number in range(20)]
    for other in others:
        other.write_bytes(b"x")
    if op != "create":
        with open(path, "r+b", buffering=0) as file:
            file.write(b"o")
    run_pbkfs("unmount", "-D", at.mnt)
    faulty = Faulty(at.diff / "objects")
    try:
        with few_descriptors():
            at.mount("--reuse")
        with contextlib.ExitStack() as stack, open(path, "r+b", buffering=0) as file:
            if op == "open":
                # What nobody has open any more would be closed before it.
                found = [stack.enter_context(open(other, "rb")).read() for other in others]
                assert set(found) == {b"x"}
            faulty.fail({"op": op, "path": "", "errno": errno.EROFS})
            file.write(b"1" * BLOCK)
            assert error_of(os.fsync, file.fileno()) == errno.EROFS
            # The mount goes on: what needs no change of an object is done.
            assert (at.mnt / "PG_VERSION").read_text() == "15\n"
            os.rename(at.mnt / "postgresql.conf", at.mnt / "renamed.conf")

            faulty.fail()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 2 * BLOCK, 0) == b"o" * BLOCK * 2
            os.pwrite(file.fileno(), b"2" * BLOCK, BLOCK)
            assert error_of(os.fsync, file.fileno()) == 0
        run_pbkfs("unmount", "-D", at.mnt)
        at.mount("--reuse")
        assert path.read_bytes() == b"o" * BLOCK + b"2" * BLOCK
    finally:
        at.close()
        faulty.close()


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    """Of what is mounted meanwhile, no more than 16 files are kept open below, the last used."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
