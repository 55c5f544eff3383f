"""The ledger: what another process needs to go on with a mount whose worker has died.

The kernel keeps inode numbers and directory cookies for the life of the mount, but they are only
counted, and nothing on the disk has them. The ledger does, in a memory file that outlives the
worker: frames in the order in which things happened, each written by one pwrite(2), so a SIGKILL
leaves all but perhaps the last. It is no second truth about names: those come from the disk, and
what the ledger says has to fit them (``namespace.adopt``), or nobody takes over.

A change of names is written down *before* its record is appended to the journal (``intend``). One
thread owns the tree, so only the last one can be undecided, and the journal knows.

Written by ``namespace``, ``tree`` and ``contents`` on the thread that owns the tree, and by the
worker on the same one; read by ``read_ledger`` at the begin of a takeover.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import struct
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pbkfs import _native, durable
from pbkfs.errors import DiffError
from pbkfs.overlay.journal import find_frames

VERSION = 1

# Magic, version, whether it is usable, where the frames begin.
_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"PBKFSLDG"
_HEADER_BYTES = 64
_IS_USABLE_AT, _BEGIN_AT = 12, 16
_FRAME = struct.Struct("<II")

# A request that was not answered is one of the last; these are remembered beyond a rewrite.
_MAX_REQUESTS = 4096
# Below this size nothing is worth a rewrite.
_REWRITE_BYTES = 4 << 20

# A frame stays far below what ``find_frames`` believes.
_NAMES_PER_FRAME = 10_000

_READ_BYTES = 1 << 30

# Source: linux/falloc.h.
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)

Orphan = dict[str, Any]

_log = logging.getLogger(__name__)


class Add(NamedTuple):
    """A name appears: of ``number``, at ``cookie``."""

    parent: int
    name: bytes
    number: int
    cookie: int


class Drop(NamedTuple):
    """A name goes; ``orphan`` describes its inode if that was the last one."""

    parent: int
    name: bytes
    orphan: Orphan | None


Change = Add | Drop


@dataclass(frozen=True, slots=True)
class Intent:
    """What was about to be appended to the journal ``layer`` at or behind ``end``."""

    request: int
    layer: uuid.UUID
    end: int
    payload: bytes
    changes: Sequence[Change]


@dataclass(slots=True)
class Numbers:
    """All that a ledger says. ``names``: directory -> name -> (number, cookie).

    ``orphans``: number -> descriptions, oldest first; the newest one whose layers are there counts.
    ``done``: number of a request -> the inode that it made, or 0. ``undecided``: see the module.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    init: bytes = b""
    init_answer: bytes = b""
    names: dict[int, dict[bytes, tuple[int, int]]] = field(default_factory=dict)
    orphans: dict[int, list[Orphan]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    last: int = 1
    undecided: Intent | None = None
    parts: dict[int, dict[bytes, tuple[int, int]]] = field(default_factory=dict)
    """Of listings whose last frame was not read yet."""

    def apply(self, intent: Intent) -> None:
        """Take note of what an intent has brought about."""
        made = 0
        for change in intent.changes:
            names = self.names.setdefault(change.parent, {})
            if isinstance(change, Add):
                names[change.name] = (change.number, change.cookie)
                self.last = max(self.last, change.number, change.cookie)
                made = made or change.number
            else:
                number, _ = names.pop(change.name, (0, 0))
                if change.orphan is not None:
                    self.orphans[number] = [change.orphan]
        if intent.request:
            self.done[intent.request] = made


class Ledger:
    """The writer of one ledger; ``fd`` is its memory file."""

    def __init__(self, fd: int, end: int) -> None:
        self.fd = fd
        self.request = 0
        """The kernel's number of the request that is carried out; 0: none."""
        self._end = end
        self._begin = _HEADER_BYTES
        self._rewrite_at = _REWRITE_BYTES
        self._snapshot: Callable[[], Iterable[bytes]] | None = None
        self._meta: dict[str, Any] = {}
        self._init = self._init_answer = b""
        self._requests: deque[tuple[int, int]] = deque(maxlen=_MAX_REQUESTS)
        self._is_usable = True

    @classmethod
    def make(cls) -> Ledger:
        """Make an empty one. Raises OSError."""
        fd = os.memfd_create("pbkfs-ledger", os.MFD_CLOEXEC)
        header = _HEADER.pack(_MAGIC, VERSION, 1, _HEADER_BYTES)
        os.pwrite(fd, header.ljust(_HEADER_BYTES, b"\0"), 0)
        return cls(fd, _HEADER_BYTES)

    @classmethod
    def resume(cls, fd: int, numbers: Numbers) -> Ledger:
        """Go on with the ledger that was read from ``fd``. Raises OSError."""
        ledger = cls(fd, os.fstat(fd).st_size)
        _, _, _, ledger._begin = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        ledger._meta = numbers.meta
        ledger._init, ledger._init_answer = numbers.init, numbers.init_answer
        ledger._requests.extend(numbers.done.items())
        return ledger

    @property
    def is_usable(self) -> bool:
        """Whether somebody could take over by it."""
        return self._is_usable

    @property
    def n_bytes(self) -> int:
        """How much memory it takes; about."""
        return self._end - self._begin

    @property
    def meta(self) -> dict[str, Any]:
        """What was noted of how the mount is served."""
        return self._meta

    @property
    def init(self) -> bytes:
        """What the kernel said at INIT."""
        return self._init

    @property
    def init_answer(self) -> bytes:
        """What it was told then, and relies on since."""
        return self._init_answer

    def on_rewrite(self, snapshot: Callable[[], Iterable[bytes]]) -> None:
        """``snapshot`` yields the frames that say what the tree has now (``listed_frame`` …)."""
        self._snapshot = snapshot

    # --- what is written ------------------------------------------------------------------------

    def note(self, **fields: object) -> None:
        """Note how the mount is served; later values replace earlier ones."""
        self._meta.update(fields)
        self._append(encode("meta", fields))

    def note_init(self, said: bytes, answer: bytes) -> None:
        """Note what the kernel said at INIT, and what it was told."""
        self._init, self._init_answer = said, answer
        self._append(encode("init", said.hex(), answer.hex()))

    def listed(self, directory: int, names: Iterable[tuple[bytes, int, int]]) -> None:
        """Note (name, number, cookie) of what a directory holds, before anybody is told."""
        for frame in listed_frames(directory, names):
            self._append(frame)

    def intend(self, layer: uuid.UUID, end: int, payload: bytes, changes: Sequence[Change]) -> None:
        """Note what is about to be appended, and what follows from it."""
        request = self.request
        frame = encode("intent", request, layer.hex, end, payload.hex(), _format_changes(changes))
        self._append(frame)
        made = next((change.number for change in changes if isinstance(change, Add)), 0)
        if request:
            self._requests.append((request, made))

    def cancel(self) -> None:
        """Note that the last intent came to nothing."""
        if self.request and self._requests:
            self._requests.pop()
        self._append(encode("cancel"))

    def decided(self, *, is_done: bool) -> None:
        """Note, at a takeover, whether the last intent was carried out."""
        self._append(encode("done" if is_done else "cancel"))

    def orphaned(self, number: int, orphan: Orphan) -> None:
        """Note what an inode without names consists of now."""
        self._append(orphan_frame(number, orphan))

    def forgotten(self, number: int) -> None:
        """Note that nobody knows this number any more."""
        self._append(encode("forgotten", number))

    def _append(self, frame: bytes) -> None:
        if not self._is_usable:
            return
        durable.on_step("ledger:append")
        try:
            n_written = os.pwrite(self.fd, frame, self._end)
        except OSError as error:
            n_written, reason = 0, error.strerror
        else:
            reason = "no memory"
        if n_written != len(frame):
            self.give_up(f"its ledger failed: {reason}")
            return
        self._end += n_written

    @contextlib.contextmanager
    def unusable(self) -> Iterator[None]:
        """Nobody can take over from whoever dies in here, or fails."""
        self._say_usable(False)
        yield
        self._say_usable(True)

    def _say_usable(self, is_usable: bool) -> None:
        os.pwrite(self.fd, struct.pack("<I", is_usable), _IS_USABLE_AT)

    def give_up(self, reason: str) -> None:
        """Say that nobody can take over by this ledger; the mount itself goes on."""
        self._is_usable = False
        self._say_usable(False)
        _log.warning("the death of this worker will end the mount: %s", reason)

    def tidy(self) -> None:
        """Write what counts anew, if most of it does not; between two changes of the tree."""
        if self._is_usable and self._snapshot is not None and self.n_bytes > self._rewrite_at:
            self.rewrite(self._snapshot())

    def rewrite(self, snapshot: Iterable[bytes]) -> None:
        """Write what counts behind the end, then begin there."""
        begin = self._end
        self._append(encode("meta", self._meta))
        self._append(encode("init", self._init.hex(), self._init_answer.hex()))
        for frame in snapshot:
            self._append(frame)
        self._append(encode("requests", list(self._requests)))
        self._rewrite_at = max(_REWRITE_BYTES, 2 * (self._end - begin))
        if not self._is_usable:
            return
        os.pwrite(self.fd, struct.pack("<Q", begin), _BEGIN_AT)
        _punch(self.fd, self._begin, begin)
        self._begin = begin


def encode(kind: str, *fields: object) -> bytes:
    """Return a frame."""
    payload = json.dumps([kind, *fields], separators=(",", ":")).encode("ascii")
    length = struct.pack("<I", len(payload))
    return _FRAME.pack(_native.crc32c(length + payload), len(payload)) + payload


def listed_frames(directory: int, names: Iterable[tuple[bytes, int, int]]) -> Iterator[bytes]:
    """Yield the frames of ``Ledger.listed``: it counts with the last one."""
    rows = [[os.fsdecode(name), *rest] for name, *rest in names]
    parts = [rows[i : i + _NAMES_PER_FRAME] for i in range(0, len(rows), _NAMES_PER_FRAME)] or [[]]
    for index, part in enumerate(parts[:-1]):
        yield encode("part", directory, index, part)
    yield encode("list", directory, len(parts) - 1, parts[-1])


def orphan_frame(number: int, orphan: Orphan) -> bytes:
    """Return the frame of ``Ledger.orphaned``."""
    return encode("orphan", number, orphan)


def _format_changes(changes: Sequence[Change]) -> list[list[object]]:
    return [
        ["add", change.parent, os.fsdecode(change.name), change.number, change.cookie]
        if isinstance(change, Add)
        else ["drop", change.parent, os.fsdecode(change.name), change.orphan]
        for change in changes
    ]


def _parse_change(fields: list[Any]) -> Change:
    if fields[0] == "add":
        return Add(fields[1], os.fsencode(fields[2]), fields[3], fields[4])
    return Drop(fields[1], os.fsencode(fields[2]), fields[3])


def _punch(fd: int, start: int, end: int) -> None:
    # Whole pages only; the rest of one stays in memory.
    start, end = -(-start // 4096) * 4096, end // 4096 * 4096
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if end > start and _libc.fallocate(fd, mode, ctypes.c_long(start), ctypes.c_long(end - start)):
        _log.warning("memory of the ledger is not given back: %s", os.strerror(ctypes.get_errno()))


def read_ledger(fd: int) -> Numbers:
    """Return what the ledger in ``fd`` says. Raises DiffError for one that can't be used."""
    magic, version, is_usable, begin = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if magic != _MAGIC or version != VERSION:
        raise DiffError(f"the ledger of the mount is of version {version}, not {VERSION}")
    if not is_usable:
        raise DiffError("it had failed, or a worker died while it asked for write errors")
    data = _read_from(fd, begin)
    numbers = Numbers()
    n_bytes = 0
    for payload in find_frames(data):
        n_bytes += _FRAME.size + len(payload)
        _read_frame(numbers, *json.loads(payload))
    torn = data[n_bytes:]
    if torn:
        # Part of a frame that the dead worker was writing: what it was about was not begun.
        if len(torn) >= _FRAME.size and len(torn) >= _FRAME.size + _FRAME.unpack_from(torn)[1]:
            raise DiffError(f"the ledger of the mount is damaged at byte {begin + n_bytes}")
        os.ftruncate(fd, begin + n_bytes)
    return numbers


def _read_from(fd: int, begin: int) -> bytes:
    """Return what is behind ``begin``. One read takes 2 GiB at most, source: read(2)."""
    parts = []
    while part := os.pread(fd, _READ_BYTES, begin):
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


def _read_frame(numbers: Numbers, kind: str, *fields: Any) -> None:
    waiting, numbers.undecided = numbers.undecided, None
    if waiting is not None and kind != "cancel":
        numbers.apply(waiting)
    match kind:
        case "meta":
            numbers.meta.update(fields[0])
        case "init":
            numbers.init, numbers.init_answer = map(bytes.fromhex, fields)
        case "part" | "list":
            directory, index, rows = fields
            names = {os.fsencode(name): (number, cookie) for name, number, cookie in rows}
            if index > 0:
                names = {**numbers.parts.pop(directory), **names}
            if kind == "part":
                numbers.parts[directory] = names
                return
            numbers.names[directory] = names
            highest = max((max(pair) for pair in names.values()), default=0)
            numbers.last = max(numbers.last, directory, highest)
        case "intent":
            request, layer, end, payload, changes = fields
            numbers.undecided = Intent(
                request,
                uuid.UUID(layer),
                end,
                bytes.fromhex(payload),
                [_parse_change(change) for change in changes],
            )
        case "orphan":
            numbers.orphans.setdefault(fields[0], []).append(fields[1])
            numbers.last = max(numbers.last, fields[0])
        case "forgotten":
            numbers.orphans.pop(fields[0], None)
            numbers.names.pop(fields[0], None)
        case "requests":
            numbers.done.update(map(tuple, fields[0]))
        case "cancel" | "done":
            pass
        case _:
            raise DiffError(f"the ledger of the mount has a record {kind!r}")
