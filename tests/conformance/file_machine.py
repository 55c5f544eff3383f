"""Random file operations on a driver and on a plain directory, which is the oracle.

``FileMachine`` has the rules; a subclass gives it the thing to be tested (``start``) and may take
part in rules that need more than system calls. Both sides have to give the same result or errno at
each step, and the same tree (names, types, sizes, modes, links, bytes) whenever they are compared.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import time_ns
from typing import Any

from conformance.drivers import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    Driver,
    OsDriver,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

PAGE = 8192

# Times that the utime rule sets are in 2001, so that they can be told from those of a change.
_LATEST_SET_TIME_NS = 1_009_843_200 * 10**9

_NAMES = [b"a", b"b", b"16384", b"16384.1", b"16385_vm", b"5", b"d", b"n" * 255, b"n" * 256]
_FLAGS = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR]
# Without privilege, what the owner may not do is refused before a file system is asked.
_MODES = [0o600, 0o640, 0o700, 0o755, 0o400] if os.geteuid() == 0 else [0o700, 0o750, 0o755]
_FALLOCATE_MODES = [
    0,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE,
    FALLOC_ZERO_RANGE,
    FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE,
]

_offsets = st.one_of(
    st.sampled_from([0, 1, 4096, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE]),
    st.integers(0, 7 * PAGE),
)
_lengths = st.one_of(
    st.sampled_from([1, 512, 4096, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]), st.integers(1, 3 * PAGE)
)
_choices = st.integers(0, 1 << 16)


def make_lower(root: Path) -> None:
    """Make the tree that lies below: relations (mapped), other files (whole), a link."""
    for name in ("base/5", "base/6", "global", "pg_xact", "empty"):
        (root / name).mkdir(parents=True)
    for name, size in (
        ("base/5/16384", 5 * PAGE),
        ("base/5/16385", 3 * PAGE + 1000),
        ("base/5/16385_vm", PAGE),
        ("base/5/16386", 0),
        ("base/6/16384", 2 * PAGE),
        ("base/5/PG_VERSION", 3),
        ("global/1262", 2 * PAGE),
        ("pg_xact/0000", PAGE),
        ("big", 4 * PAGE + 77),
        ("postgresql.conf", 900),
    ):
        (root / name).write_bytes(pattern(hash_seed(name), size))
    (root / "link").symlink_to("nowhere/at/all")


def hash_seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def pattern(seed: int, size: int) -> bytes:
    """Return ``size`` bytes that differ by seed and by place."""
    block = hashlib.sha256(seed.to_bytes(8, "little")).digest()
    return b"".join(
        bytes([i & 255, i >> 8 & 255]) + block[2:] for i in range(size // len(block) + 1)
    )[:size]


def find_fallocate_modes(place: Path) -> set[int]:
    """Return what the oracle's file system can do: tmpfs has no FALLOC_FL_ZERO_RANGE."""
    driver = OsDriver(place)
    handle = driver.open(b"probe", os.O_RDWR | os.O_CREAT)
    found = set()
    for mode in _FALLOCATE_MODES:
        try:
            driver.fallocate(handle, mode, 0, PAGE)
            found.add(mode)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
    driver.close(handle)
    driver.unlink(b"probe")
    return found


@dataclass(frozen=True)
class Entry:
    """What a comparison sees of one name. ``group`` is equal for the names of one file."""

    kind: str
    mode: int
    nlink: int
    size: int | None
    target: bytes
    group: int
    content: bytes
    set_mtime_ns: int | None


Snapshot = dict[bytes, Entry]


def take_snapshot(driver: Driver) -> Snapshot:
    """Return all of a tree: path -> entry; files of several names are numbered by their first."""
    snapshot: Snapshot = {}
    groups: dict[int, int] = {}

    def visit(path: bytes) -> None:
        found = driver.stat(path)
        content = driver.read_file(path) if found.kind == "file" else b""
        target = driver.readlink(path) if found.kind == "link" else b""
        is_set = found.kind != "dir" and found.mtime_ns < _LATEST_SET_TIME_NS
        snapshot[path] = Entry(
            found.kind,
            found.mode,
            found.nlink,
            found.size,
            target,
            groups.setdefault(found.ino, len(groups)),
            content,
            found.mtime_ns if is_set else None,
        )
        if found.kind == "dir":
            names = driver.listdir(path)
            assert len(names) == len(set(names)), f"{path!r} lists a name twice: {names}"
            for name in sorted(names):
                visit(path + b"/" + name if path else name)

    visit(b"")
    return snapshot


def describe_difference(expected: Snapshot, found: Snapshot) -> str:
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        left, right = expected.get(path), found.get(path)
        if left == right:
            continue
        if left is None or right is None:
            lines.append(f"{path!r}: {'only found' if left is None else 'missing'}")
            continue
        for name in Entry.__dataclass_fields__:
            a, b = getattr(left, name), getattr(right, name)
            if a == b:
                continue
            if name == "content":
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
                lines.append(f"{path!r}: content differs from byte {at} on")
            else:
                lines.append(f"{path!r}: {name} should be {a!r}, is {b!r}")
    return "\n".join(lines)


class FileMachine(RuleBasedStateMachine):
    """The rules. ``driver`` is under test, ``oracle`` is the plain directory."""

    driver: Driver
    max_handles = 4
    root: str | None = None
    """Where the machine's directories are made; None is the usual temporary place."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="pbkfs-machine-", dir=self.root))
        self.lower = self.place / "lower"
        self.lower.mkdir(mode=0o700)
        make_lower(self.lower)
        shutil.copytree(self.lower, self.place / "oracle", symlinks=True)
        self.oracle = OsDriver(self.place / "oracle")
        self.handles: list[tuple[int, int]] = []
        self.fallocate_modes = find_fallocate_modes(self.place)
        try:
            self.start()
        except BaseException:
            self.clean_up()
            raise

    # --- for subclasses -----------------------------------------------------------------------

    def start(self) -> None:
        """Set ``driver`` to something that shows ``lower``."""
        raise NotImplementedError

    def stop(self) -> None:
        """End what ``start`` began; it may have failed half-way."""

    def changed(self, oracle_handle: int | None, path: bytes | None = None) -> None:
        """Called after a file's content may have changed; the file is given by either."""

    def synced(self, oracle_handle: int | None) -> None:
        """Called after an fsync of a file, or (None) of names."""

    # --- the frame ----------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.compare()
        finally:
            self.clean_up()

    def clean_up(self) -> None:
        self.close_handles()
        self.stop()
        shutil.rmtree(self.place)

    def close_handles(self) -> None:
        while self.handles:
            mine, theirs = self.handles.pop()
            self.oracle.close(theirs)
            self.driver.close(mine)

    def compare(self) -> None:
        expected, found = take_snapshot(self.oracle), take_snapshot(self.driver)
        assert expected == found, describe_difference(expected, found)

    def both(self, what: str, action: Callable[[Driver], Any]) -> tuple[bool, Any, Any]:
        """Do something on both sides; returns whether it worked, and both results."""
        results: list[Any] = []
        errors: list[int | None] = []
        for driver in (self.oracle, self.driver):
            try:
                results.append(action(driver))
                errors.append(None)
            except OSError as error:
                results.append(None)
                errors.append(error.errno)
        wanted, got = (
            "success" if number is None else errno.errorcode[number] for number in errors
        )
        assert wanted == got, f"{what}: should be {wanted}, is {got}"
        return errors[0] is None, results[0], results[1]

    def paths(self) -> list[bytes]:
        """Return all paths of the oracle but for the root."""
        found: list[bytes] = []

        def visit(path: bytes) -> None:
            for name in sorted(self.oracle.listdir(path)):
                child = path + b"/" + name if path else name
                found.append(child)
                if self.oracle.stat(child).kind == "dir":
                    visit(child)

        visit(b"")
        return found

    def pick(self, choice: int, *, is_new: bool = False) -> bytes:
        """Return a path: mostly one that exists, or with ``is_new`` mostly one that does not."""
        there = self.paths()
        directories = [b"", *(p for p in there if self.oracle.stat(p).kind == "dir")]
        choice, kind = divmod(choice, 8)
        if there and (kind > 0) != is_new:
            return there[choice % len(there)]
        choice, at = divmod(choice, len(_NAMES))
        parents = directories if kind < 6 else [b"missing", b"postgresql.conf", *directories]
        parent = parents[choice % len(parents)]
        return parent + b"/" + _NAMES[at] if parent else _NAMES[at]

    # --- files --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.handles) < self.max_handles)
    @rule(choice=_choices, flags=st.sampled_from(_FLAGS), how=st.integers(0, 7))
    def open(self, choice: int, flags: int, how: int) -> None:
        is_creating = how in (0, 1, 2)
        path = self.pick(choice, is_new=is_creating)
        if is_creating:
            flags |= os.O_CREAT | (os.O_EXCL if how == 0 else 0)
        if how in (2, 3) and flags & os.O_ACCMODE != os.O_RDONLY:
            flags |= os.O_TRUNC
        if self.oracle_kind(path) == "dir" and flags == os.O_RDONLY:
            return
        worked, theirs, mine = self.both(
            f"open {path!r} {flags:#o}", lambda d: d.open(path, flags, 0o640)
        )
        if worked:
            self.handles.append((mine, theirs))
            self.changed(theirs)

    @precondition(lambda self: self.handles)
    @rule(choice=_choices)
    def close(self, choice: int) -> None:
        mine, theirs = self.handles.pop(choice % len(self.handles))
        self.oracle.close(theirs)
        self.driver.close(mine)

    def on_handle(self, what: str, choice: int, action: Callable[[Driver, int], Any]) -> None:
        mine, theirs = self.handles[choice % len(self.handles)]
        if not _is_writable(theirs):
            return  # the kernel refuses it before a file system is asked
        self.both(what, lambda d: action(d, theirs if d is self.oracle else mine))
        self.changed(theirs)

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, offset=_offsets, length=_lengths, seed=st.integers(0, 255))
    def write(self, choice: int, offset: int, length: int, seed: int) -> None:
        data = pattern(seed, length)
        self.on_handle("write", choice, lambda d, h: _expect(d.pwrite(h, data, offset), length))

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, size=st.one_of(_offsets, st.just(0)))
    def ftruncate(self, choice: int, size: int) -> None:
        self.on_handle(f"ftruncate {size}", choice, lambda d, h: d.ftruncate(h, size))

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, mode=st.sampled_from(_FALLOCATE_MODES), offset=_offsets, length=_lengths)
    def fallocate(self, choice: int, mode: int, offset: int, length: int) -> None:
        if mode not in self.fallocate_modes:
            return
        self.on_handle(
            f"fallocate {mode} {offset} {length}",
            choice,
            lambda d, h: d.fallocate(h, mode, offset, length),
        )

    @precondition(lambda self: self.handles)
    @rule(choice=_choices, offset=_offsets, length=_lengths)
    def read(self, choice: int, offset: int, length: int) -> None:
        mine, theirs = self.handles[choice % len(self.handles)]
        if _is_readable(theirs):
            expected = self.oracle.pread(theirs, length, offset)
            assert self.driver.pread(mine, length, offset) == expected
        left, right = self.oracle.fstat(theirs), self.driver.fstat(mine)
        assert (left.kind, left.mode, left.nlink, left.size) == (
            right.kind,
            right.mode,
            right.nlink,
            right.size,
        )

    @precondition(lambda self: self.handles)
    @rule(choice=_choices)
    def fsync(self, choice: int) -> None:
        mine, theirs = self.handles[choice % len(self.handles)]
        self.driver.fsync(mine)
        self.synced(theirs)

    @rule(choice=_choices, size=st.one_of(_offsets, st.just(0)))
    def truncate(self, choice: int, size: int) -> None:
        path = self.pick(choice)
        before = None
        with suppress(OSError):
            before = self.oracle.stat(path).size
        worked, _, _ = self.both(f"truncate {path!r} {size}", lambda d: d.truncate(path, size))
        if worked and before == size:
            # File systems differ in whether that changes the time of modification.
            now = time_ns()
            self.both(f"touch {path!r}", lambda d: d.utime(path, now, now))
        if worked:
            self.changed(None, path)

    # --- attributes ---------------------------------------------------------------------------

    @rule(choice=_choices, mode=st.sampled_from(_MODES))
    def chmod(self, choice: int, mode: int) -> None:
        path = self.pick(choice)
        self.both(f"chmod {path!r} {mode:#o}", lambda d: d.chmod(path, mode))

    @rule(choice=_choices, time=st.integers(10**9, _LATEST_SET_TIME_NS // 10**9 - 1))
    def utime(self, choice: int, time: int) -> None:
        path = self.pick(choice)
        times = (time * 10**9 + 5, time * 10**9 + 123_456_789)
        worked, _, _ = self.both(f"utime {path!r}", lambda d: d.utime(path, *times))
        if worked:
            assert self.driver.stat(path).mtime_ns == times[1]

    # --- names --------------------------------------------------------------------------------

    @rule(
        old=_choices, new=_choices, is_new=st.booleans(), flags=st.sampled_from([0, 0, 0, 1, 2, 3])
    )
    def rename(self, old: int, new: int, is_new: bool, flags: int) -> None:
        source, target = self.pick(old), self.pick(new, is_new=is_new)
        if not self.oracle_kind(source) and len(os.path.basename(target)) > 255:
            return  # two errors: which of them comes first differs between kernels
        self.both(
            f"rename {source!r} {target!r} {flags}", lambda d: d.rename(source, target, flags)
        )

    @rule(existing=_choices, new=_choices)
    def link(self, existing: int, new: int) -> None:
        source, target = self.pick(existing), self.pick(new, is_new=True)
        self.both(f"link {source!r} {target!r}", lambda d: d.link(source, target))

    @rule(choice=_choices)
    def unlink(self, choice: int) -> None:
        path = self.pick(choice)
        self.both(f"unlink {path!r}", lambda d: d.unlink(path))

    @rule(choice=_choices, mode=st.sampled_from(_MODES))
    def mkdir(self, choice: int, mode: int) -> None:
        path = self.pick(choice, is_new=True)
        self.both(f"mkdir {path!r}", lambda d: d.mkdir(path, mode))

    @rule(choice=_choices)
    def rmdir(self, choice: int) -> None:
        path = self.pick(choice)
        self.both(f"rmdir {path!r}", lambda d: d.rmdir(path))

    @rule(choice=_choices, length=st.sampled_from([1, 20, 4095, 4096]))
    def symlink(self, choice: int, length: int) -> None:
        path, target = self.pick(choice, is_new=True), (b"nowhere/" * 512)[:length]
        self.both(f"symlink {path!r} {length}", lambda d: d.symlink(target, path))

    @rule(choice=_choices)
    def readdir(self, choice: int) -> None:
        path = self.pick(choice)
        if self.oracle_kind(path) == "dir":
            assert sorted(self.driver.listdir(path)) == sorted(self.oracle.listdir(path))

    def oracle_kind(self, path: bytes) -> str:
        try:
            return self.oracle.stat(path).kind
        except OSError:
            return ""

    @rule(choice=_choices)
    def stat(self, choice: int) -> None:
        path = self.pick(choice)
        worked, left, right = self.both(f"stat {path!r}", lambda d: d.stat(path))
        if worked:
            assert (left.kind, left.mode, left.nlink, left.size) == (
                right.kind,
                right.mode,
                right.nlink,
                right.size,
            ), f"stat of {path!r}"

    @rule(choice=_choices)
    def fsync_directory(self, choice: int) -> None:
        path = self.pick(choice)
        if self.oracle_kind(path) == "dir":
            self.driver.fsync_directory(path)
            self.synced(None)


def _expect(found: int, wanted: int) -> None:
    assert found == wanted


def _access(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def _is_writable(fd: int) -> bool:
    return _access(fd) != os.O_RDONLY


def _is_readable(fd: int) -> bool:
    return _access(fd) != os.O_WRONLY
