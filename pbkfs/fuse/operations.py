"""pyfuse3's operations over the tree: one line each, and one translation of errors.

pyfuse3 calls these on the trio task that serves the mount, for whatever the native dispatcher does
not answer itself. Permissions are the kernel's (``default_permissions``), modes arrive with the
caller's umask applied, and the handle of every open file and directory is its inode.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from pbkfs.errors import PbkfsError
from pbkfs.fuse import tablespaces

if TYPE_CHECKING:
    from pbkfs.overlay.tree import Attr, Tree

logger = logging.getLogger(__name__)

# The mount is the only writer, so the kernel may keep names and attributes for as long as it
# lives. The native half says the same (PBK_FUSE_VALID_S).
VALID_S = 3650 * 86400.0

# Source: pyfuse3 and libfuse take errno values only within these bounds, as does the kernel.
_MAX_ERRNO = 511

# The d_ino of "..": readdir does not know it, and nobody asks. Source: libfuse, FUSE_UNKNOWN_INO.
_UNKNOWN_INO = 0xFFFFFFFF
# Cookies of "." and ".."; the tree's own come after them.
_DOT, _DOT_DOT, _OWN_COOKIES = 1, 2, 2

P = ParamSpec("P")
R = TypeVar("R")
_Method = Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]


def error_number(error: BaseException) -> int:
    """Return the errno that stands for ``error`` in an answer; logs what should not have been."""
    if isinstance(error, OSError):
        number = error.errno or errno.EIO
        if number == errno.ENOSYS:
            # The kernel would never ask again for the life of the mount.
            return errno.EOPNOTSUPP
        return number if 0 < number <= _MAX_ERRNO else errno.EIO
    if isinstance(error, PbkfsError):
        logger.error("request failed: %s", error.message)
        return error.errno
    logger.error("request failed by a bug", exc_info=error)
    return errno.EIO


def _answered(method: _Method[P, R]) -> _Method[P, R]:
    """Turn every failure into the errno of this one request: the mount must not die of it."""

    @functools.wraps(method)
    async def wrapper(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(error_number(error)) from None

    return wrapper


class Operations(pyfuse3.Operations):
    """What pyfuse3 calls. READ, WRITE, FSYNC, RELEASE and their like never come here."""

    supports_dot_lookup = False
    enable_writeback_cache = True
    enable_acl = False

    def __init__(
        self,
        tree: Tree,
        invalidate: Callable[[int], None],
        find_request: Callable[[int], tuple[int, int]],
        forget_name: Callable[[int, bytes], None],
    ) -> None:
        """``invalidate`` has the kernel forget the attributes and the listing of an inode,
        ``find_request`` knows the number of a request and the process behind it, ``forget_name``
        has the kernel ask again for a name in a directory."""
        super().__init__()
        self._tree = tree
        self._invalidate = invalidate
        self._find_request = find_request
        self._forget_name = forget_name

    def _was_done(self, ctx: pyfuse3.RequestContext) -> int | None:
        """Begin a change of names; returns what it has made if a dead worker has carried it out."""
        # The dispatcher has put the request's token there.
        number, _ = self._find_request(ctx.pid & 0xFFFFFFFF)
        return self._tree.was_done(number)

    @contextlib.contextmanager
    def _making(self, parent: int, name: bytes) -> Iterator[None]:
        """Make a name. The kernel only asks for one that it holds to be missing.

        Is it there, the kernel is wrong: a dead worker had made it, and its caller was killed after
        the kernel had been told to send the request again, and before it had. So it is told.
        """
        try:
            yield
        except FileExistsError:
            self._forget_name(parent, name)
            raise

    # --- names --------------------------------------------------------------------------------

    @_answered
    async def lookup(
        self, parent_inode: int, name: bytes, _ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return entry_of(self._tree.lookup(parent_inode, name))
        except FileNotFoundError:
            # A missing name is cached like one that is there: inode 0.
            missing = pyfuse3.EntryAttributes()
            is_open = self._tree.may_appear(parent_inode, name)
            missing.entry_timeout = 0 if is_open else VALID_S
            return missing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take lookups back. Nobody waits for an answer, so a failure ends in the log."""
        for ino, n_lookups in inode_list:
            try:
                self._tree.forget(ino, n_lookups)
            except Exception as error:
                logger.error("forget of inode %d failed", ino, exc_info=error)

    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        tree = self._tree
        if start_id < _DOT and not _reply_dot(token, b".", fh, _DOT):
            return
        if start_id < _DOT_DOT and not _reply_dot(token, b"..", _UNKNOWN_INO, _DOT_DOT):
            return
        for name, attr, cookie in tree.readdir(fh, max(start_id - _OWN_COOKIES, 0)):
            if not pyfuse3.readdir_reply(token, name, entry_of(attr), cookie + _OWN_COOKIES):
                break
            tree.remember(attr.ino)

    @_answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = self._was_done(ctx)
        if made is not None:
            return entry_of(self._tree.getattr(made))
        mode = stat.S_IMODE(mode)
        with self._making(parent_inode, name):
            return entry_of(self._tree.mkdir(parent_inode, name, mode, ctx.uid, ctx.gid))

    @_answered
    async def create(
        self,
        parent_inode: int,
        name: bytes,
        mode: int,
        _flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        made = self._was_done(ctx)
        if made is not None:
            self._tree.open(made)
            return pyfuse3.FileInfo(fh=made, keep_cache=True), entry_of(self._tree.getattr(made))
        with self._making(parent_inode, name):
            attr = self._tree.create(parent_inode, name, stat.S_IMODE(mode), ctx.uid, ctx.gid)
        return pyfuse3.FileInfo(fh=attr.ino, keep_cache=True), entry_of(attr)

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, _rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EPERM, "only regular files")
        made = self._was_done(ctx)
        if made is not None:
            return entry_of(self._tree.getattr(made))
        mode = stat.S_IMODE(mode)
        with self._making(parent_inode, name):
            return entry_of(self._tree.create(parent_inode, name, mode, ctx.uid, ctx.gid))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if tablespaces.is_tablespace_link(self._tree, parent_inode, name, target):
            return await self._keep_tablespace(parent_inode, name, target, ctx)
        made = self._was_done(ctx)
        if made is not None:
            return entry_of(self._tree.getattr(made))
        with self._making(parent_inode, name):
            return entry_of(self._tree.symlink(parent_inode, name, target, ctx.uid, ctx.gid))

    async def _keep_tablespace(
        self, parent: int, oid: bytes, location: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        place = os.fsdecode(location)
        _, pid = self._find_request(ctx.pid & 0xFFFFFFFF)
        try:
            found = await trio.to_thread.run_sync(
                tablespaces.find_directories, location, pid, abandon_on_cancel=True
            )
        except OSError as error:
            logger.warning("tablespace %s: %s: %s", os.fsdecode(oid), place, error.strerror)
            raise
        # What comes before the link is looked for first, so it may be done twice.
        self._tree.was_done(0)
        changed = tablespaces.keep(self._tree, oid, found, ctx.uid, ctx.gid)
        made = self._was_done(ctx)
        if made is not None:
            attr = self._tree.getattr(made)
        else:
            target = tablespaces.shown_target(oid)
            attr = self._tree.symlink(parent, oid, target, ctx.uid, ctx.gid)
        for ino in changed:
            self._invalidate(ino)
        logger.info("tablespace %s lies on the mount, not in %s", os.fsdecode(oid), place)
        try:
            await trio.to_thread.run_sync(
                tablespaces.remove_empty, location, pid, found, ctx.uid, abandon_on_cancel=True
            )
        except OSError as error:
            logger.warning("%s is empty, but not removed: %s", place, error.strerror)
        return entry_of(attr)

    @_answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        made = self._was_done(ctx)
        if made is not None:
            return entry_of(self._tree.getattr(made))
        with self._making(new_parent_inode, new_name):
            return entry_of(self._tree.link(inode, new_parent_inode, new_name))

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self._was_done(ctx) is None:
            self._tree.unlink(parent_inode, name)

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self._was_done(ctx) is None:
            self._tree.rmdir(parent_inode, name)

    @_answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        if self._was_done(ctx) is not None:
            return
        self._check_moved(parent_inode_old, name_old, parent_inode_new, name_new)
        self._tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    def _check_moved(self, old: int, old_name: bytes, new: int, new_name: bytes) -> None:
        """Refuse to make a link that leads out of the mount one of a tablespace, afterwards."""
        if not tablespaces.is_tablespace_name(self._tree, new, new_name):
            return
        try:
            attr = self._tree.lookup(old, old_name)
        except FileNotFoundError:
            return
        self._tree.forget(attr.ino, 1)
        if stat.S_ISLNK(attr.mode) and self._tree.readlink(attr.ino).startswith(b"/"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    # --- inodes -------------------------------------------------------------------------------

    @_answered
    async def getattr(self, inode: int, _ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return entry_of(self._tree.getattr(inode))

    @_answered
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        _fh: int | None,
        _ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes: dict[str, int] = {}
        if fields.update_size:
            changes["size"] = attr.st_size
        if fields.update_mode:
            changes["mode"] = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["atime_ns"] = attr.st_atime_ns
        if fields.update_mtime:
            changes["mtime_ns"] = attr.st_mtime_ns
        return entry_of(self._tree.setattr(inode, **changes))

    @_answered
    async def readlink(self, inode: int, _ctx: pyfuse3.RequestContext) -> bytes:
        return self._tree.readlink(inode)

    @_answered
    async def open(self, inode: int, _flags: int, _ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Register the file with the native half, which answers for it from then on."""
        self._tree.open(inode)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_answered
    async def write(self, fh: int, _off: int, buf: bytes) -> int:
        """A write of nothing asks for a copy-up: the native half had to write and has no object."""
        if buf:
            raise OSError(errno.EIO, "data is written natively")
        self._tree.copy_up(fh)
        return 0

    @_answered
    async def fsyncdir(self, fh: int, _datasync: bool) -> None:
        await trio.to_thread.run_sync(self._tree.fsyncdir, fh)

    @_answered
    async def statfs(self, _ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = self._tree.statfs()
        # What the kernel may take without asking is not free for anybody else.
        reserve = -(-self._tree.reserve_bytes // found.f_frsize)
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = found.f_bsize
        answer.f_frsize = found.f_frsize
        answer.f_blocks = found.f_blocks
        answer.f_bfree = max(found.f_bfree - reserve, 0)
        answer.f_bavail = max(found.f_bavail - reserve, 0)
        answer.f_files = found.f_files
        answer.f_ffree = found.f_ffree
        answer.f_favail = found.f_favail
        answer.f_namemax = found.f_namemax
        return answer


def entry_of(attr: Attr) -> pyfuse3.EntryAttributes:
    """Return ``attr`` in the words of the protocol."""
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = VALID_S
    entry.attr_timeout = VALID_S
    entry.st_ino = attr.ino
    entry.st_mode = attr.mode
    entry.st_nlink = attr.nlink
    entry.st_uid = attr.uid
    entry.st_gid = attr.gid
    entry.st_size = attr.size
    entry.st_blocks = attr.blocks
    entry.st_atime_ns = attr.atime_ns
    entry.st_mtime_ns = attr.mtime_ns
    entry.st_ctime_ns = attr.ctime_ns
    return entry


def _reply_dot(token: pyfuse3.ReaddirToken, name: bytes, ino: int, cookie: int) -> bool:
    # The kernel takes the name and the type of these two, and counts no lookup for them.
    entry: Any = pyfuse3.EntryAttributes()
    entry.st_ino = ino
    entry.st_mode = stat.S_IFDIR
    return pyfuse3.readdir_reply(token, name, entry, cookie)
