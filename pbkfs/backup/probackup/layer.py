"""One opened member of a chain: its directory, its file list, its header map.

A layer keeps, per file of the *destination* backup, one byte of state and eight bytes of offset
into its list; names that the destination does not have are dropped at once, since only the
destination's list says which files exist. Used by ``composition`` and ``probackup.base``; belongs
to one thread.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from contextlib import suppress

from pbkfs.backup.probackup.catalog import CONTROL_FILE, LIST_FILE, stat_key
from pbkfs.backup.probackup.chain import LOSSY_LIST_BYTES, LOSSY_VERSIONS, Member
from pbkfs.backup.probackup.content import (
    DIRECTORY,
    MISSING,
    Entry,
    Name,
    read_entry,
    read_names,
)
from pbkfs.errors import ChainError, FormatError, HostError, NotFoundError, UnsupportedError

HEADER_MAP = b"page_header_map"
DATABASE = b"database/"

HEADER_MAP_SINCE = (2, 4, 0)
ZLIB_8192_UNTIL = (2, 0, 23)


class Layer:
    """One member of a chain with its descriptors."""

    def __init__(self, member: Member, *, force: bool) -> None:
        """Open the backup's directory and list; reads neither. Raises PbkfsError."""
        self.member = member
        self.name = member.name
        self.version = member.version
        self.force = force
        self.list_origin = str(member.backup.path / LIST_FILE)
        self.notes: list[str] = []
        self.content_crc = 0
        self.n_external: dict[int, int] = {}
        self.offsets = array("q")
        self.states = bytearray()
        self._list_fd = -1
        self.root_fd = _open_directory(member)
        try:
            self._list_fd = self._open_list()
            self.header_map_size = self._header_map_size()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptors. Idempotent."""
        root_fd, self.root_fd = self.root_fd, -1
        list_fd, self._list_fd = self._list_fd, -1
        for fd in (root_fd, list_fd):
            if fd >= 0:
                os.close(fd)

    @property
    def is_padded(self) -> bool:
        return self.version < HEADER_MAP_SINCE

    @property
    def is_old_zlib_8192(self) -> bool:
        return self.version < ZLIB_8192_UNTIL

    def _open_list(self) -> int:
        try:
            fd = os.open(
                LIST_FILE,
                os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                dir_fd=self.root_fd,
            )
        except FileNotFoundError as error:
            raise FormatError(
                f"the file list of backup {self.name} is missing: {self.list_origin}",
                hint="The backup is damaged; take another one.",
            ) from error
        except OSError as error:
            raise HostError(f"cannot open {self.list_origin}: {error.strerror}") from error
        size = os.fstat(fd).st_size
        problem: Exception | None = None
        if size == 0:
            problem = FormatError(f"the file list of backup {self.name} is empty")
        elif self.version in LOSSY_VERSIONS and size > LOSSY_LIST_BYTES and not self.force:
            problem = UnsupportedError(
                f"backup {self.name} was made by a pg_probackup that loses lines of long lists",
                hint="Files may be missing from it; --force mounts what is listed.",
            )
        if problem is not None:
            os.close(fd)
            raise problem
        return fd

    def _header_map_size(self) -> int:
        if self.version < HEADER_MAP_SINCE:
            return 0
        with suppress(FileNotFoundError):
            return os.stat(HEADER_MAP, dir_fd=self.root_fd, follow_symlinks=False).st_size
        return 0

    def read_list(
        self,
        crc32c: Callable[[bytes, int], int],
        on_name: Callable[[Name], int],
        n_files: Callable[[], int],
    ) -> None:
        """Read the list once: ``on_name`` maps a name to its file number or -1 to drop it.

        ``n_files`` tells how many numbers there are by now. Raises FormatError for a damaged list,
        a name that occurs twice, a list that does not match content-crc.
        """
        self._resize(n_files())
        last_header = 0
        for item in read_names(self._list_fd, self.list_origin, crc32c):
            if isinstance(item, int):
                self._check_crc(item)
                continue
            offset, path, state, _, external_dir_num, headers_end = item
            if external_dir_num:
                count = self.n_external.get(external_dir_num, 0)
                self.n_external[external_dir_num] = count + (state < DIRECTORY)
                continue
            if headers_end > last_header:
                last_header = headers_end
            number = on_name(item)
            if number < 0:
                continue
            if number >= len(self.states):
                self._resize(max(n_files(), 2 * number, 1024))
            if self.states[number] != MISSING:
                raise FormatError(
                    f"{self.list_origin} lists {os.fsdecode(path)!r} twice",
                    hint="The backup is damaged; take another one.",
                )
            self.states[number] = state
            self.offsets[number] = offset
        self._resize(n_files())
        self._check_header_map(last_header)

    def _resize(self, size: int) -> None:
        if size < len(self.states):
            del self.states[size:], self.offsets[size:]
        else:
            self.offsets.extend([-1] * (size - len(self.offsets)))
            self.states.extend(bytes(size - len(self.states)))

    def _check_crc(self, crc: int) -> None:
        self.content_crc = crc
        expected = self.member.control.content_crc
        if expected in (0, crc):
            return
        message = f"content-crc {expected} of backup {self.name} does not match its file list"
        if not self.force:
            raise FormatError(
                f"{message}, whose crc is {crc}",
                hint="The list was changed after the backup; take another one, or use --force.",
            )
        self.notes.append(f"The {message}.")

    def _check_header_map(self, headers_end: int) -> None:
        if self.version < HEADER_MAP_SINCE or headers_end <= self.header_map_size:
            return
        what = "truncated" if self.header_map_size else "missing"
        path = f"{self.member.backup.path}/{os.fsdecode(HEADER_MAP)}"
        if not self.force:
            raise FormatError(
                f"the header map of backup {self.name} is {what}: {path} has "
                f"{self.header_map_size} of {headers_end} bytes",
                hint="The backup is damaged; --force reads the headers inside of its data files.",
            )
        self.notes.append(f"The header map of backup {self.name} is {what}.")

    def entry(self, number: int, path: bytes) -> Entry:
        """Parse the line of a file that this layer has. Raises FormatError, OSError."""
        return read_entry(self._list_fd, self.offsets[number], path, self.list_origin)

    def check_unchanged(self) -> None:
        """Check that the backup is still what was opened. Raises ChainError."""
        backup = self.member.backup
        try:
            now = os.stat(backup.path, follow_symlinks=False)
            opened = os.fstat(self.root_fd)
            control = os.stat(CONTROL_FILE, dir_fd=self.root_fd, follow_symlinks=False)
        except OSError as error:
            raise ChainError(f"backup {self.name} was removed: {error.strerror}") from error
        is_same = (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
        if not is_same or stat_key(control) != backup.control_stat:
            raise ChainError(
                f"backup {self.name} changed while it was being opened",
                hint="Something merges or validates it; try again when that is done.",
            )


def _open_directory(member: Member) -> int:
    path = member.backup.path
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{path} is not a directory") from error
    except OSError as error:
        raise HostError(
            f"cannot open {path}: {error.strerror}", hint="Run as the owner of the store."
        ) from error
