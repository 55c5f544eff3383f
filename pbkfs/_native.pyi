"""The native half: page reads and writes, the journal's page records, the dispatcher.

Errors are OSError with an errno unless said otherwise. Every method that can wait for a disk or a
lock gives up the GIL. Descriptors stay the caller's and have to outlive the object they were given
to.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias, final

from typing_extensions import Buffer

BLCKSZ: int
NO_LIMIT: int  # 0xFFFFFFFF
INFLATE_LIBRARY: str  # "libdeflate" or "zlib"

# (root_fd, path of page_header_map, offset, size, crc, number of headers)
Headers: TypeAlias = tuple[int, bytes, int, int, int, int]
# ("raw", root_fd, path, size, label)
RawTuple: TypeAlias = tuple[Literal["raw"], int, bytes, int, str]
# ("pages", root_fd, path, stored_size, label, compress, limit, padded, old_zlib_8192, headers)
PagesTuple: TypeAlias = tuple[
    Literal["pages"], int, bytes, int, str, int, int, bool, bool, Headers | None
]
# ("object", objects_dir_fd, object_id, label, bitmap, limit); bitmap None: whole
ObjectTuple: TypeAlias = tuple[Literal["object"], int, int, str, bytes | None, int]
SourceTuple: TypeAlias = RawTuple | PagesTuple | ObjectTuple

def crc32c(data: Buffer, crc: int = 0, /) -> int:
    """CRC-32C of ``data``; ``crc`` is the result for what came before it."""

def pglz_decompress(data: Buffer, raw_size: int, /) -> bytes:
    """Exactly ``raw_size`` bytes out of exactly ``data``. ValueError if it is anything else."""

def open_beneath(root_fd: int, path: bytes, /) -> int:
    """Open a regular file below a directory for reading; returns the descriptor.

    No component of ``path`` may be a symbolic link or lead out of the directory. OSError.
    """

def scan_pages(
    root_fd: int, path: bytes, stored_size: int, padded: bool, /
) -> tuple[int, int, int | None]:
    """Walk a stored data file: pages stored, highest block + 1, blocks by a truncation marker.

    Raises OSError(EBADMSG) if it is malformed or shorter than ``stored_size``.
    """

def scan_journal(
    fd: int, session: Buffer, /
) -> tuple[int, list[bytes], dict[int, tuple[bytes, int, bool, bytes]]]:
    """Read a journal up to the first frame that does not check.

    Returns the length of the valid prefix, the payloads of the name records (types >= 16) in order,
    and for each object (changed blocks, limit or NO_LIMIT, whole, hydrated blocks): bitmaps of
    little-endian 64-bit words; hydrated blocks are in the object as well, as they are below.
    PAGES_LIVE records count only behind a SESSION record with ``session`` (16 bytes), so 16 zero
    bytes give what a power cut would leave; a hydrated block that one of them names, of whatever
    session, is a changed one. Raises OSError(EIO) for what can't be a journal.
    """

def arm_steps(log: str, die_at: str, n: int, by_signal: bool, /) -> None:
    """For tests: from now on each labelled step is a line in the file ``log``, and the process
    ends without a trace at the ``n``-th one (from 1) with the label ``die_at``."""

def step(label: str, /) -> None:
    """A labelled step of a caller in Python, like those of this module's own."""

@final
class Journal:
    """Appends checksummed frames to ``fd`` at ``end``.

    A write or sync that fails in a way that can't be taken back makes it answer an error to
    everything that follows.
    """

    def __new__(cls, fd: int, end: int) -> Journal: ...
    def append(self, payload: Buffer, /) -> None:
        """One frame of 1 byte to 16 MiB. A failed append leaves no trace."""
    def sync(self) -> None:
        """Return when everything that was appended before the call is durable."""
    @property
    def end(self) -> int: ...
    @property
    def synced(self) -> int: ...

@final
class Nodes:
    """The data of all registered files. Unknown inode numbers raise OSError(ENOENT), and a closed
    object ValueError."""

    def __new__(
        cls, journal: Journal | None, objects_fd: int, log_fd: int, *, index_bytes: int = 64 << 20
    ) -> Nodes:
        """``log_fd`` is a pipe (or -1) that gets one line for each page that could not be read:
        ``file=… block=… layer=… reason=…``; path and layer escaped, the reason free text to the
        end of the line."""
    def add(self, ino: int, size: int, sources: Sequence[SourceTuple], /) -> None:
        """Register a file without an object, sources newest first. OSError(EEXIST).

        Requests of the kernel that are answered natively find it from ``publish`` on.
        """
    def attach(
        self,
        ino: int,
        object_id: int,
        *,
        bitmap: bytes | None,
        limit: int,
        mapped: bool,
        fresh: bool,
        hydrated: bytes | None = None,
        whole: bool = False,
    ) -> None:
        """Make an existing object the top of the node.

        ``bitmap`` are the blocks that the journal records as changed (None: none), ``hydrated``
        those that are in the object unchanged; all of them are if it is ``whole``. ``limit``:
        blocks from it on never come from below; NO_LIMIT is the length of the version below. An
        object that is shorter than that was truncated. ``fresh``: its directory entry is not known
        to be durable, so the first fsync makes it so.
        """
    def publish(self, ino: int, /) -> None:
        """All that belongs to the file has come to it, its object above all. Idempotent."""
    def remove(self, ino: int, /) -> None: ...
    def names_known(self, directory: int, names: Iterable[bytes], /) -> None:
        """These are all names of a directory: a lookup of another one is answered natively, "there
        is none". From then on ``name_added`` and ``name_removed`` have to tell every change, before
        the kernel hears of it."""
    def name_added(self, directory: int, name: bytes, /) -> None: ...
    def name_removed(self, directory: int, name: bytes, /) -> None:
        """The empty name takes back ``names_known``."""
    def is_absent(self, directory: int, name: bytes, /) -> bool:
        """Whether a directory is known not to have a name."""
    def directory_is(
        self,
        ino: int,
        mode: int,
        nlink: int,
        uid: int,
        gid: int,
        size: int,
        atime_ns: int,
        mtime_ns: int,
        ctime_ns: int,
        blocks: int,
        /,
    ) -> None:
        """The attributes of a directory, until told otherwise: they are answered natively, or
        forgotten when another directory needs the room."""
    def directory_changes(self, ino: int, /) -> None:
        """The attributes of a directory are no longer known."""
    def set_links(self, ino: int, n_links: int, /) -> None:
        """How many names a registered file has; 1 until told otherwise."""
    def has(self, ino: int, /) -> bool: ...
    def has_object(self, ino: int, /) -> bool: ...
    def stat(self, ino: int, /) -> tuple[int, int, int, int, int, int, int, int, int] | None:
        """Of the object: mode, uid, gid, size, atime_ns, mtime_ns, ctime_ns, blocks, nlink."""
    def size(self, ino: int, /) -> int: ...
    def read(self, ino: int, offset: int, length: int, /) -> bytes: ...
    def write(self, ino: int, offset: int, data: Buffer, /) -> int:
        """Write all of it. OSError(ENOTSUP) without an object; else a part may be written."""
    def truncate(self, ino: int, size: int, /) -> None: ...
    def fallocate(self, ino: int, mode: int, offset: int, length: int, /) -> None: ...
    def fsync(self, ino: int, datasync: bool, /) -> None:
        """Return when the file's data, its page records and the whole journal are durable."""
    def check_synced(self, ino: int, /) -> None:
        """Raise the OSError that a sync of the object has failed with since it was attached; it
        syncs nothing."""
    def copy_to(self, ino: int, fd: int, /) -> None:
        """Write the whole visible content to a regular file, from its start, and set its size."""
    def hydrate(self, ino: int, offset: int, length: int, /) -> tuple[int, int | None]:
        """Copy blocks that a mapped object has not got up into it, about ``length`` bytes of them.

        Returns the bytes copied and where to go on; None where nothing is left. Changes that are
        made meanwhile win. OSError(ENOTSUP) without an object.
        """
    def hydrate_sync(self, ino: int, /) -> bool:
        """Make what was hydrated durable and record it; returns whether the object is whole now."""
    def count_blocks(self, ino: int, /) -> tuple[int, int, int, bool]:
        """(blocks that could come from below, those in the object, those of these that were
        changed, whether the object is whole); (0, 0, 0, whole) unless it is mapped."""
    def opened(self) -> dict[int, int]:
        """How many handles of each inode the kernel has open; without those that have none."""
    def heat(self) -> dict[int, int]:
        """Reads and changes of each inode since it was registered; without those that had none."""
    def verify(self, ino: int, first_blkno: int, has_checksums: bool, /) -> None:
        """Look at each page that comes from the base when it is first read; one that PostgreSQL
        would not take is EIO. Once, right after ``add``; ``first_blkno`` is that of the file's
        first block in its fork."""
    def give_back_files(self) -> bool:
        """Close half of the descriptors of sources and objects, for somebody who finds none; False
        if there was none to close."""
    def set_reserve(self, n_bytes: int, /) -> None:
        """How much free space of the diff's file system fallocate has to leave, else ENOSPC: it is
        for what the kernel took without asking."""
    def drop_indexes(self) -> int:
        """Drop all loaded page indexes (they load again when needed); the bytes freed."""
    def gate_close(self) -> None:
        """Hold every change of data; returns when none is under way. Closes nest."""
    def gate_open(self) -> None:
        """Undo one gate_close. ValueError if the gate is open."""
    def prepare_restack(self, ino: int, size: int, sources: Sequence[SourceTuple], /) -> None:
        """Take what a registered file needs to have other sources that hold the same; ``size`` is
        that of the version below its object. Others that were prepared stay so. OSError."""
    def cancel_restack(self) -> None:
        """Give it back. Idempotent."""
    def restack(self) -> None:
        """Let all files that were prepared have their new sources, while they are in use. Nothing
        refers to the old descriptors afterwards. Does not fail."""
    def prepare_seal(self, label: str, /) -> None:
        """Take the memory that a seal needs, for all objects of now. The gate has to be closed, and
        nothing may be attached before ``seal`` or ``cancel_seal``. ``label`` names the layer in log
        lines. OSError, ValueError."""
    def cancel_seal(self) -> None:
        """Give it back. Idempotent."""
    def seal(self, journal: Journal, objects_fd: int, /) -> None:
        """Make all objects, which are synced, a part of what is below; from now on objects are
        those below ``objects_fd``, and ``journal`` tells of them. Does not fail after
        ``prepare_seal``. The old descriptors are needed as before."""
    def sync(self) -> None:
        """Return when all objects, their page records and the whole journal are durable. Raises the
        first OSError, after trying all."""
    def page_map(self, ino: int, /) -> tuple[bytes, int, bool, bytes] | None:
        """Of a mapped object: changed blocks, limit, whether it is whole, hydrated blocks (as
        ``scan_journal`` has them); None if there is none."""
    def counters(self) -> dict[str, int]: ...
    def reset_counters(self) -> None: ...
    def close(self) -> None: ...

@final
class Dispatcher:
    """Answers hot FUSE requests in threads without the interpreter; forwards the others."""

    def __new__(
        cls,
        nodes: Nodes,
        fuse_fd: int,
        *,
        n_readers: int = 0,
        n_fsync: int = 4,
        log_fd: int = -1,
        hold_s: int = 0,
        supervised: bool = False,
        init: bytes = b"",
    ) -> Dispatcher:
        """``supervised``: another process is to take over when this one dies. ``init``: what the
        kernel said at INIT to a process that has died; its connection is taken over, and what it
        had not answered is sent again."""
    @property
    def socket_fd(self) -> int:
        """What pyfuse3 talks to in the kernel's place."""
    @property
    def event_fd(self) -> int:
        """Readable once the connection is gone."""
    def start(self) -> None: ...
    def stop(self) -> None:
        """Join all threads; may be called again."""
    def invalidate(self, ino: int, offset: int, length: int, /) -> None: ...
    def invalidate_entry(self, parent: int, name: bytes, /) -> None: ...
    @property
    def init_request(self) -> bytes:
        """What the kernel said at INIT; empty before that."""
    @staticmethod
    def init_answer(request: bytes, /) -> bytes:
        """What this program says to what the kernel said at INIT."""
    def request(self, token: int, /) -> tuple[int, int]:
        """Number and process of the request that has this token (Python sees that in the place of
        the process) and waits; zeros for an unknown one."""
    def is_known(self, ino: int, /) -> bool:
        """Whether the kernel has this inode. May wait for a reader. Raises OSError."""
    def counters(self) -> dict[str, int]: ...
    def reset_counters(self) -> None: ...
