"""The names: directories, their entries, and the inodes behind them, in memory.

Owns the inode table and the rules of POSIX for names. Every operation comes in two halves, a check
that raises OSError and changes nothing, and a change that cannot fail, so that ``tree`` can append
the journal's record between the two and ``replay`` can use the same halves. Directories of the base
are listed when they are first looked into. Used on the thread that owns the tree only.

Order in a directory: each name gets a cookie from one rising counter, and ``children`` is a dict
with rising cookies, because a new name always goes to its end. A reader that comes back with a
cookie goes on after it, whatever came or went meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator

from pbkfs import _native
from pbkfs.backup.base import TABLESPACE_ROOT, Base, BaseEntry, Kind
from pbkfs.errors import DiffError, PbkfsError
from pbkfs.overlay.inode import PINNED, Dentry, Directory, File, Inode, SymbolicLink, join
from pbkfs.overlay.journal import NAME_MAX
from pbkfs.overlay.ledger import Ledger, Numbers, listed_frames

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

ROOT_INO = 1

_MAX_DEAD_NAMES = 1024

_log = logging.getLogger(__name__)


def fail(number: int) -> OSError:
    """Return the OSError (of the right subclass) for an errno."""
    return OSError(number, os.strerror(number))


def check_name(name: bytes) -> None:
    """Raise OSError unless ``name`` can be the name of a directory entry."""
    if len(name) > NAME_MAX:
        raise fail(errno.ENAMETOOLONG)
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise fail(errno.EINVAL)


class Namespace:
    """All names and inodes of one tree. ``owner`` (uid, gid) owns what comes from the base."""

    def __init__(
        self, base: Base, owner: tuple[int, int], now_ns: int, last: int = ROOT_INO
    ) -> None:
        """``last``: up to here, numbers are not to be used, see ``adopt``."""
        self._base = base
        self._uid, self._gid = owner
        self._last = last
        self.n_loaded = 0
        self.root = Directory(ROOT_INO, 0o700, self._uid, self._gid, now_ns)
        self.root.origin = b""
        self.root.parent = self.root
        self.inodes: dict[int, Inode] = {ROOT_INO: self.root}
        self._nodes: _native.Nodes | None = None
        self.ledger: Ledger | None = None

    def tell(self, nodes: _native.Nodes) -> None:
        """Keep the native half informed of names from now on: it answers for missing ones."""
        self._nodes = nodes
        for inode in self.inodes.values():
            if isinstance(inode, Directory) and inode.children is not None:
                self._tell_names(nodes, inode)

    def _tell_names(self, nodes: _native.Nodes, directory: Directory) -> None:
        names = self.children(directory)
        if directory is self.root:
            nodes.names_known(directory.ino, [*names, TABLESPACE_ROOT])
        elif not self.may_appear(directory, b""):
            nodes.names_known(directory.ino, names)

    def may_appear(self, directory: Directory, name: bytes) -> bool:
        """Tell whether the worker itself may make ``name``: the kernel must not know it missing.

        Tablespaces and their directories are made so, see ``fuse.tablespaces``.
        """
        if directory is self.root:
            return name == TABLESPACE_ROOT
        top = directory if directory.parent is self.root else directory.parent
        return top is not None and top.parent is self.root and top.name == TABLESPACE_ROOT

    def new_number(self) -> int:
        """Return a number that was never used: for an inode or a cookie."""
        self._last += 1
        return self._last

    # --- finding ----------------------------------------------------------------------------

    def get(self, ino: int) -> Inode:
        """Return the inode ``ino``. Raises OSError ESTALE if there is none."""
        inode = self.inodes.get(ino)
        if inode is None:
            raise fail(errno.ESTALE)
        return inode

    def get_directory(self, ino: int) -> Directory:
        """Return the directory ``ino``. Raises OSError ENOTDIR, ESTALE."""
        inode = self.get(ino)
        if not isinstance(inode, Directory):
            raise fail(errno.ENOTDIR)
        return inode

    def children(self, directory: Directory) -> dict[bytes, Inode]:
        """Return the entries of ``directory``; lists it in the base if nobody looked before.

        Raises OSError if the base can't list it; nothing has changed then.
        """
        if directory.children is None:
            self._load(directory)
        assert directory.children is not None
        return directory.children

    def child(self, directory: Directory, name: bytes) -> Inode:
        """Return the inode behind a name. Raises OSError ENOENT, ENAMETOOLONG."""
        if len(name) > NAME_MAX:
            raise fail(errno.ENAMETOOLONG)
        inode = self.children(directory).get(name)
        if inode is None:
            raise fail(errno.ENOENT)
        return inode

    def resolve(self, path: bytes) -> Inode:
        """Return the inode at ``path``. Raises OSError ENOENT, ENOTDIR."""
        if not path:
            return self.root
        directory, name = self.resolve_parent(path)
        return self.child(directory, name)

    def resolve_parent(self, path: bytes) -> tuple[Directory, bytes]:
        """Return the directory and the last name of ``path``. Raises OSError ENOENT, ENOTDIR."""
        *parents, name = path.split(b"/")
        directory = self.root
        for part in parents:
            inode = self.child(directory, part)
            if not isinstance(inode, Directory):
                raise fail(errno.ENOTDIR)
            directory = inode
        return directory, name

    def path_in(self, directory: Directory, name: bytes) -> bytes:
        """Return the path of ``name`` in ``directory``, relative to the root."""
        names = [name]
        while directory is not self.root:
            names.append(directory.name)
            assert directory.parent is not None
            directory = directory.parent
        return b"/".join(reversed(names))

    def path_of(self, inode: Inode) -> bytes | None:
        """Return the path of the first name of ``inode``; None if it has no name any more."""
        if inode is self.root:
            return b""
        if inode.parent is None:
            return None
        return self.path_in(inode.parent, inode.name)

    def _load(self, directory: Directory) -> None:
        children: dict[bytes, Inode] = {}
        n_directories = 0
        if directory.origin is not None:
            for entry in self._scan(directory.origin):
                inode = self._make(entry, directory.origin)
                inode.parent, inode.name, inode.cookie = directory, entry.name, inode.ino
                children[entry.name] = inode
                n_directories += entry.kind is Kind.DIR
        self.inodes.update((inode.ino, inode) for inode in children.values())
        directory.children = children
        directory.n_directories = n_directories
        self.n_loaded += 1
        if self._nodes is not None:
            self._tell_names(self._nodes, directory)
        if self.ledger is not None:
            self.ledger.listed(directory.ino, self._positions(directory))

    def _scan(self, path: bytes) -> Iterable[BaseEntry]:
        try:
            return self._base.scandir(path)
        except PbkfsError as error:
            _log.error("%s: cannot list %r: %s", self._base.describe(), path, error)
            raise OSError(errno.EIO, error.message) from error

    def _make(self, entry: BaseEntry, origin: bytes) -> Inode:
        ino, uid, gid = self.new_number(), self._uid, self._gid
        if entry.kind is Kind.FILE:
            file = File(ino, entry.mode, uid, gid, entry.mtime_ns, entry.size)
            file.origin_dir, file.origin_name = origin, entry.name
            return file
        if entry.kind is Kind.DIR:
            directory = Directory(ino, entry.mode, uid, gid, entry.mtime_ns)
            directory.origin = join(origin, entry.name)
            return directory
        return SymbolicLink(ino, uid, gid, entry.mtime_ns, entry.target or b"")

    # --- checks -----------------------------------------------------------------------------

    def check_new(self, directory: Directory, name: bytes) -> None:
        """Raise OSError unless ``name`` can be made in ``directory``."""
        check_name(name)
        if directory.parent is None:
            raise fail(errno.ENOENT)
        if name in self.children(directory):
            raise fail(errno.EEXIST)

    def check_unlink(self, directory: Directory, name: bytes) -> Inode:
        """Return what unlink(2) would take the name of. Raises OSError."""
        inode = self.child(directory, name)
        if isinstance(inode, Directory):
            raise fail(errno.EISDIR)
        return inode

    def check_rmdir(self, directory: Directory, name: bytes) -> Directory:
        """Return the directory rmdir(2) would remove. Raises OSError."""
        inode = self.child(directory, name)
        if not isinstance(inode, Directory):
            raise fail(errno.ENOTDIR)
        if self.children(inode):
            raise fail(errno.ENOTEMPTY)
        return inode

    def check_rename(
        self,
        old_directory: Directory,
        old_name: bytes,
        new_directory: Directory,
        new_name: bytes,
        flags: int,
    ) -> bool:
        """Return False if renameat2(2) would do nothing; raise OSError if it would fail.

        Source: the order of the checks is that of do_renameat2 and vfs_rename in Linux'
        fs/namei.c.
        """
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == (
            RENAME_NOREPLACE | RENAME_EXCHANGE
        ):
            raise fail(errno.EINVAL)
        source = self.child(old_directory, old_name)
        check_name(new_name)
        if new_directory.parent is None:
            raise fail(errno.ENOENT)
        target = self.children(new_directory).get(new_name)
        is_exchange = bool(flags & RENAME_EXCHANGE)
        if flags & RENAME_NOREPLACE and target is not None:
            raise fail(errno.EEXIST)
        if is_exchange and target is None:
            raise fail(errno.ENOENT)
        if self._is_at_or_below(new_directory, source):
            raise fail(errno.EINVAL)
        if target is not None and self._is_at_or_below(old_directory, target):
            raise fail(errno.EINVAL if is_exchange else errno.ENOTEMPTY)
        if source is target:
            return False
        if target is not None and not is_exchange:
            if isinstance(source, Directory):
                if not isinstance(target, Directory):
                    raise fail(errno.ENOTDIR)
                if self.children(target):
                    raise fail(errno.ENOTEMPTY)
            elif isinstance(target, Directory):
                raise fail(errno.EISDIR)
        return True

    def _is_at_or_below(self, directory: Directory, ancestor: Inode) -> bool:
        if not isinstance(ancestor, Directory):
            return False
        while directory is not ancestor:
            if directory is self.root or directory.parent is None:
                return False
            directory = directory.parent
        return True

    # --- changes; the caller has checked ----------------------------------------------------

    def add(
        self, directory: Directory, name: bytes, inode: Inode, cookie: int | None = None
    ) -> None:
        """Give ``inode`` a name, its first or another one; ``cookie`` is a new number."""
        if cookie is None:
            cookie = self.new_number()
        if inode.parent is None:
            inode.parent, inode.name, inode.cookie = directory, name, cookie
            self.inodes[inode.ino] = inode
        else:
            inode.more = (*inode.more, Dentry(directory, name, cookie))
        self.children(directory)[name] = inode
        if self._nodes is not None:
            self._nodes.name_added(directory.ino, name)
        if isinstance(inode, Directory):
            directory.n_directories += 1
        if directory.listing is not None:
            cookies, names = directory.listing
            cookies.append(cookie)
            names.append(name)
            if len(names) > 2 * len(directory.children or ()) + _MAX_DEAD_NAMES:
                # Its reader has gone without reading to the end.
                directory.listing = None

    def drop(self, directory: Directory, name: bytes) -> Inode:
        """Take a name away; returns the inode, which has perhaps no name any more."""
        inode = self.children(directory).pop(name)
        if self._nodes is not None and not self.may_appear(directory, name):
            self._nodes.name_removed(directory.ino, name)
        if isinstance(inode, Directory):
            directory.n_directories -= 1
        if inode.parent is directory and inode.name == name:
            if inode.more:
                (inode.parent, inode.name, inode.cookie), *rest = inode.more
                inode.more = tuple(rest)
            else:
                inode.parent = None
        else:
            inode.more = tuple(
                dentry
                for dentry in inode.more
                if dentry.parent is not directory or dentry.name != name
            )
        return inode

    def rename(
        self,
        old_directory: Directory,
        old_name: bytes,
        new_directory: Directory,
        new_name: bytes,
        *,
        is_exchange: bool = False,
        cookies: tuple[int | None, int | None] = (None, None),
    ) -> Inode | None:
        """Move a name; returns the inode that was replaced, if there was one.

        ``cookies`` are new numbers for the new name and, in an exchange, the old one.
        """
        replaced = None
        if new_name in self.children(new_directory):
            replaced = self.drop(new_directory, new_name)
        moved = self.drop(old_directory, old_name)
        self.add(new_directory, new_name, moved, cookies[0])
        if is_exchange:
            assert replaced is not None
            self.add(old_directory, old_name, replaced, cookies[1])
            return None
        return replaced

    def forget(self, inode: Inode) -> None:
        """Take an inode without names and lookups out of the table."""
        self.inodes.pop(inode.ino, None)
        if self.ledger is not None:
            self.ledger.forgotten(inode.ino)
        if self._nodes is not None and isinstance(inode, Directory):
            self._nodes.name_removed(inode.ino, b"")

    def drop_subtree(self, directory: Directory, name: bytes) -> list[Inode]:
        """Take away a name and, of a directory, all below; returns the inodes without a name."""
        inode = self.drop(directory, name)
        gone = [] if inode.parent is not None else [inode]
        if isinstance(inode, Directory) and inode.children is not None:
            for child in list(inode.children):
                gone += self.drop_subtree(inode, child)
        return gone

    # --- taking over ------------------------------------------------------------------------

    def _positions(self, directory: Directory) -> Iterator[tuple[bytes, int, int]]:
        for name, inode in self.children(directory).items():
            yield name, inode.ino, inode.find_cookie(directory, name)

    def keep_ledger(self, ledger: Ledger, known: Container[int] = ()) -> None:
        """Have the ledger know all numbers from now on; it has those of the directories ``known``.

        Nobody must have been told a number that it does not have.
        """
        for inode in list(self.inodes.values()):
            if not isinstance(inode, Directory) or inode.children is None or inode.ino in known:
                continue
            ledger.listed(inode.ino, self._positions(inode))
        self.ledger = ledger

    def snapshot(self) -> Iterator[bytes]:
        """Yield the ledger's frames of all names."""
        for inode in self.inodes.values():
            if isinstance(inode, Directory) and inode.children is not None:
                yield from listed_frames(inode.ino, self._positions(inode))

    def adopt(self, numbers: Numbers) -> None:
        """Give the inodes and names the numbers that the kernel knows them by, once replayed.

        What the ledger lists has to be what is there, name by name. Numbers that it gives are
        pinned: how often the kernel looked them up is not known. Raises DiffError, OSError.
        """
        inodes: dict[int, Inode] = {}
        given: dict[int, int] = {}
        todo = [self.root]
        while todo:
            directory = todo.pop()
            inodes[directory.ino] = directory
            saved = numbers.names.get(directory.ino)
            if saved is not None:
                self._renumber(directory, saved, given)
            for inode in (directory.children or {}).values():
                if inodes.setdefault(inode.ino, inode) is not inode:
                    raise DiffError(f"inode {inode.ino} of the ledger is two files")
                if isinstance(inode, Directory):
                    todo.append(inode)
        self.inodes = inodes

    def _renumber(
        self, directory: Directory, saved: dict[bytes, tuple[int, int]], given: dict[int, int]
    ) -> None:
        present = self.children(directory)
        if present.keys() != saved.keys():
            differing = sorted(present.keys() ^ saved.keys())
            raise DiffError(
                f"directory {os.fsdecode(self.path_of(directory) or b'')!r} of the mount does not "
                f"hold what the ledger says: {len(differing)} names differ, {differing[0]!r} first"
            )
        ordered = sorted(saved.items(), key=lambda item: item[1][1])
        directory.children = {}
        for name, (number, cookie) in ordered:
            inode = present[name]
            if given.setdefault(id(inode), number) != number:
                raise DiffError(f"inode {number} of the ledger is another file")
            inode.ino = number
            inode.nlookup = PINNED
            inode.move_cookie(directory, name, cookie)
            directory.children[name] = inode

    # --- reading directories ----------------------------------------------------------------

    def entries(self, directory: Directory, start: int) -> Iterator[tuple[bytes, Inode, int]]:
        """Yield (name, inode, cookie) of the entries after the cookie ``start``.

        The names are taken down once for all the calls a reader needs, because it comes back
        every few entries: listing them anew each time is quadratic (and slow from some thousand
        entries on). The list is given back at its end.
        """
        children = self.children(directory)
        if directory.listing is None or start == 0:
            listing = (
                [inode.find_cookie(directory, name) for name, inode in children.items()],
                list(children),
            )
            directory.listing = listing
        else:
            listing = directory.listing
        cookies, names = listing
        index = bisect_right(cookies, start)
        while index < len(cookies):
            name, cookie = names[index], cookies[index]
            inode = children.get(name)
            if inode is not None and inode.find_cookie(directory, name) == cookie:
                yield name, inode, cookie
            index += 1
        if directory.listing is listing:
            directory.listing = None
