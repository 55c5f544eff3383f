"""A directory, shown by a file system that fails on request: errors of a disk without a broken one.

    python tests/faulty.py SOURCE MOUNTPOINT RULES

serves SOURCE until it is unmounted. RULES is a JSON list, read at each request:
``{"op": "read", "path": "part of the path", "errno": 5}``; no file, no rule. Nothing is cached, so
a rule holds from the next request on. ``Faulty`` is that process for a test.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyfuse3
import trio


class Faulty:
    """``path``, mounted over itself by the failing file system, until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = Path(tempfile.mkdtemp(prefix="faulty-", dir=path.parent))
        self._rules = self._place / "rules"
        # What is below the mount stays reachable for it through this descriptor.
        below = os.open(path, os.O_PATH | os.O_DIRECTORY)
        command = [sys.executable, __file__, f"/proc/self/fd/{below}", path, self._rules]
        self._process = subprocess.Popen(command, pass_fds=(below,), stdout=subprocess.PIPE)
        os.close(below)
        assert self._process.stdout is not None
        try:
            assert self._process.stdout.readline() == b"ready\n"
        except BaseException:
            self._process.kill()
            raise

    def fail(self, *rules: dict[str, Any]) -> None:
        """Fail from now on as these rules say; without any, work."""
        new = self._place / "new"
        new.write_text(json.dumps(rules))
        new.rename(self._rules)

    def close(self) -> None:
        """Unmount, when nobody uses it any more; what was there before is there again."""
        subprocess.run(["umount", self.path], check=True)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(30)
        self._rules.unlink(missing_ok=True)
        self._place.rmdir()


class _Operations(pyfuse3.Operations):
    """One descriptor an inode, and what they name."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, source: str, rules: Path) -> None:
        super().__init__()
        self._rules = rules
        self._root = os.open(source, os.O_PATH | os.O_DIRECTORY)
        self._fds: dict[int, int] = {pyfuse3.ROOT_INODE: self._root}

    def _link(self, ino: int) -> bytes:
        return b"/proc/self/fd/%d" % self._fds[ino]

    def _check(self, op: str, ino: int) -> None:
        try:
            rules = json.loads(self._rules.read_text())
        except FileNotFoundError:
            return
        where = os.readlink(self._link(ino)).decode()
        for rule in rules:
            if rule["op"] == op and rule["path"] in where:
                raise pyfuse3.FUSEError(rule["errno"])

    def _entry(self, fd: int) -> pyfuse3.EntryAttributes:
        entry, found = pyfuse3.EntryAttributes(), os.fstat(fd)
        entry.st_ino = pyfuse3.ROOT_INODE if fd == self._root else found.st_ino
        for name in (
            "st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_size", "st_blksize",
            "st_blocks", "st_atime_ns", "st_mtime_ns", "st_ctime_ns",
        ):  # fmt: skip
            setattr(entry, name, getattr(found, name))
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _known(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._fds[parent])
        entry = self._entry(fd)
        if self._fds.setdefault(entry.st_ino, fd) != fd:
            os.close(fd)
        return entry

    async def lookup(self, parent_inode, name, ctx):  # noqa: ARG002
        with _errors():
            self._check("lookup", parent_inode)
            return self._known(parent_inode, name)

    async def forget(self, inode_list):
        pass  # it does not live for long

    async def getattr(self, inode, ctx):  # noqa: ARG002
        with _errors():
            return self._entry(self._fds[inode])

    async def setattr(self, inode, attr, fields, fh, ctx):  # noqa: ARG002
        with _errors():
            where = self._link(inode)
            if fields.update_size:
                self._check("write", inode)
                os.truncate(where, attr.st_size)
            if fields.update_mode:
                os.chmod(where, attr.st_mode & 0o7777)
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                os.chown(where, uid, attr.st_gid if fields.update_gid else -1)
            if fields.update_atime or fields.update_mtime:
                old = os.stat(where)
                atime = attr.st_atime_ns if fields.update_atime else old.st_atime_ns
                mtime = attr.st_mtime_ns if fields.update_mtime else old.st_mtime_ns
                os.utime(where, ns=(atime, mtime))
            return self._entry(self._fds[inode])

    async def opendir(self, inode, ctx):  # noqa: ARG002
        return inode

    async def readdir(self, fh, start_id, token):
        names = sorted(os.fsencode(name) for name in os.listdir(self._link(fh)))
        for number, name in enumerate(names[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._known(fh, name), number):
                break

    async def open(self, inode, flags, ctx):  # noqa: ARG002
        with _errors():
            self._check("open", inode)
            flags &= ~(os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL)
            return pyfuse3.FileInfo(fh=os.open(self._link(inode), flags), direct_io=True)

    async def create(self, parent_inode, name, mode, flags, ctx):  # noqa: ARG002
        with _errors():
            self._check("create", parent_inode)
            fd = os.open(name, flags | os.O_CREAT, mode, dir_fd=self._fds[parent_inode])
            entry = self._known(parent_inode, name)
            return pyfuse3.FileInfo(fh=fd, direct_io=True), entry

    async def read(self, fh, off, size):
        with _errors():
            self._check("read", _inode(fh, self._fds))
            return os.pread(fh, size, off)

    async def write(self, fh, off, buf):
        with _errors():
            self._check("write", _inode(fh, self._fds))
            return os.pwrite(fh, buf, off)

    async def fsync(self, fh, datasync):
        with _errors():
            self._check("fsync", _inode(fh, self._fds))
            (os.fdatasync if datasync else os.fsync)(fh)

    async def fsyncdir(self, fh, datasync):
        pass

    async def flush(self, fh):
        pass

    async def release(self, fh):
        os.close(fh)

    async def mkdir(self, parent_inode, name, mode, ctx):  # noqa: ARG002
        with _errors():
            os.mkdir(name, mode, dir_fd=self._fds[parent_inode])
            return self._known(parent_inode, name)

    async def unlink(self, parent_inode, name, ctx):  # noqa: ARG002
        with _errors():
            os.unlink(name, dir_fd=self._fds[parent_inode])

    async def rmdir(self, parent_inode, name, ctx):  # noqa: ARG002
        with _errors():
            os.rmdir(name, dir_fd=self._fds[parent_inode])

    async def rename(self, parent_inode_old, name_old, parent_inode_new, name_new, flags, ctx):  # noqa: ARG002
        with _errors():
            old, new = self._fds[parent_inode_old], self._fds[parent_inode_new]
            os.rename(name_old, name_new, src_dir_fd=old, dst_dir_fd=new)

    async def statfs(self, ctx):  # noqa: ARG002
        found, answer = os.statvfs(self._link(pyfuse3.ROOT_INODE)), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(answer, f"f_{name}", getattr(found, f"f_{name}"))
        answer.f_namemax = 255
        return answer


def _inode(fh: int, fds: dict[int, int]) -> int:
    found = os.fstat(fh).st_ino
    return found if found in fds else pyfuse3.ROOT_INODE


@contextlib.contextmanager
def _errors():
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None


async def _serve() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        print("ready", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Serve until unmounted."""
    source, mountpoint, rules = arguments
    operations = _Operations(source, Path(rules))
    pyfuse3.init(operations, mountpoint, {"fsname=faulty", "allow_other", "default_permissions"})
    try:
        trio.run(_serve)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(sys.argv[1:])
