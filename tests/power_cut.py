"""What a disk may hold after a power cut, of what ``iotrace`` saw.

``Disk`` plays events and knows of each what an fsync made durable since. ``save`` writes the state
of a cut into a directory: what was durable, and of the rest an arbitrary part. Pages of 4 KiB reach
the disk in any order, each in any of its versions. Of names, sizes and attributes:

* ``ordered``: as in a journalling file system (ext4), whose transactions are durable in order: all
  changes up to some moment, which is not before what the newest fsync asked for;
* else: little more than POSIX promises: for each directory its entries up to some moment of their
  own, not before its last fsync, and for each file likewise its size and attributes. But where an
  entry is, its inode has the attributes that it had when it got there: nobody writes one without
  the other.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from iotrace import Event

from pbkfs.overlay.journal import HEADER_BYTES, encode_frame, find_frames

_PAGE = 4096
_PUNCH, _KEEP_SIZE, _ZERO = 2, 1, 16
_NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class _Node:
    """A file or directory: what is durable, and what happened since, as (moment, event)."""

    ino: int
    mode: int
    uid: int
    gid: int
    born: int
    content: bytearray = field(default_factory=bytearray)
    size: int = 0
    """Of the file as it is now."""
    changes: list[tuple[int, Event]] = field(default_factory=list)
    attributes: list[tuple[int, Event]] = field(default_factory=list)
    moved: int = 0
    entries: dict[str, _Node] = field(default_factory=dict)
    durable_entries: dict[str, _Node] = field(default_factory=dict)
    entry_changes: list[tuple[int, dict[str, _Node | None]]] = field(default_factory=list)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def _is_metadata(event: Event, size: int) -> bool:
    return event.kind != "W" or event.a + len(event.data) > size


class Disk:
    """The tree below the root of a trace that began before the root was filled."""

    def __init__(self) -> None:
        self.root = _Node(0, stat.S_IFDIR | 0o711, 0, 0, -1)
        self.now = 0
        self._nodes: dict[int, _Node] = {}
        self._syncs: dict[int, tuple[int, str, _Node | None]] = {}
        self._committed = 0

    # --- playing ----------------------------------------------------------------------------

    def play(self, events: Iterable[Event]) -> None:
        """Go on by these events."""
        for event in events:
            self.now += 1
            self._play(event)

    def _play(self, event: Event) -> None:
        match event.kind:
            case "O":
                self._open(event)
            case "W" | "T" | "F":
                self._change(event)
            case "A":
                node = self._nodes.get(event.ino)
                if node is not None:
                    node.attributes.append((self.now, event))
            case "S" | "D" | "Y":
                self._syncs[event.a] = (self.now, event.kind, self._nodes.get(event.ino))
            case "E":
                self._synced(*self._syncs.pop(event.a))
            case "U":
                parent, name = self._parent(event.old)
                self._set(parent, {name: None})
            case "K":
                if event.old:
                    parent, name = self._parent(event.old)
                    self._set(parent, {name: self._new(event)})
                else:
                    self._nodes[event.ino] = self.root
            case "R" | "L":
                self._move(event)
            case _:
                assert event.kind.islower(), f"event of kind {event.kind!r}"

    def _parent(self, path: str) -> tuple[_Node, str]:
        *parents, name = path.split("/")
        node = self.root
        for part in parents:
            node = node.entries[part]
        return node, name

    def _new(self, event: Event) -> _Node:
        node = _Node(event.ino, event.mode, event.uid, event.gid, self.now)
        self._nodes[event.ino] = node
        return node

    def _open(self, event: Event) -> None:
        if not event.old or event.old.endswith(" (deleted)"):
            return
        parent, name = self._parent(event.old)
        node = parent.entries.get(name)
        if node is None or node.ino != event.ino:
            self._set(parent, {name: self._new(event)})
        elif event.flag and node.size:
            truncated = Event("T", 0, 0, 0, 0, event.ino, 0, 0, "", "", b"")
            node.changes.append((self.now, truncated))
            node.size = 0

    def _change(self, event: Event) -> None:
        node = self._nodes.get(event.ino)
        if node is None:
            return
        node.changes.append((self.now, event))
        if event.kind == "W":
            node.size = max(node.size, event.a + len(event.data))
        elif event.kind == "T":
            node.size = event.a
        elif not event.flag & _KEEP_SIZE:
            node.size = max(node.size, event.a + event.b)

    def _move(self, event: Event) -> None:
        old_parent, old_name = self._parent(event.old)
        new_parent, new_name = self._parent(event.new)
        node = old_parent.entries[old_name]
        node.moved = self.now
        if event.kind == "L":
            self._set(new_parent, {new_name: node})
        elif old_parent is new_parent:
            self._set(old_parent, {old_name: None, new_name: node})
        else:
            self._set(new_parent, {new_name: node})
            self._set(old_parent, {old_name: None})

    def _set(self, directory: _Node, change: dict[str, _Node | None]) -> None:
        directory.entry_changes.append((self.now, change))
        _apply_entries(directory.entries, change)

    def _synced(self, moment: int, kind: str, node: _Node | None) -> None:
        if kind == "Y":
            self._committed = max(self._committed, moment)
            for each in {id(n): n for n in (self.root, *self._nodes.values())}.values():
                self._settle(each, moment, is_all=True)
        elif node is not None:
            self._settle(node, moment, is_all=kind == "S")

    def _settle(self, node: _Node, moment: int, *, is_all: bool) -> None:
        """Make durable what happened to a node before ``moment``."""
        needed = [node.born, node.moved] if node.moved < moment else [node.born]
        size = len(node.content)
        for at, event in node.changes:
            if at < moment and _is_metadata(event, size):
                needed.append(at)
        _apply(node.content, (event for at, event in node.changes if at < moment))
        node.changes = [each for each in node.changes if each[0] >= moment]
        if is_all:
            for at, event in node.attributes:
                if at < moment:
                    node.mode, node.uid, node.gid = event.mode, event.uid, event.gid
                    needed.append(at)
            node.attributes = [each for each in node.attributes if each[0] >= moment]
        for at, change in node.entry_changes:
            if at < moment:
                _apply_entries(node.durable_entries, change)
                needed.append(at)
        node.entry_changes = [each for each in node.entry_changes if each[0] >= moment]
        self._committed = max(self._committed, *needed)

    # --- the cut ----------------------------------------------------------------------------

    def save(self, target: Path, chance: random.Random, *, is_ordered: bool) -> None:
        """Write the tree as a power cut now could leave it into the directory ``target``."""
        some = chance.randint(self._committed, self.now)
        moment = chance.choice((self._committed, some, self.now))
        _Cut(chance, None, moment if is_ordered else None, self.now).write(self.root, target)

    def save_all(self, target: Path) -> None:
        """Write the tree as it is, nothing lost."""
        _Cut(random.Random(0), 1.0, self.now, self.now).write(self.root, target)


@dataclass(frozen=True, slots=True)
class _Cut:
    """One choice of what reached the disk.

    ``keep`` is the part of it, None: one for each file and each directory. ``moment`` is that of
    all metadata, None: each has its own.
    """

    chance: random.Random
    keep: float | None
    moment: int | None
    now: int

    def _metadata_until(self, pending: list[tuple[int, object]]) -> int:
        if self.moment is not None:
            return self.moment
        if self.chance.random() < self._draw_keep():
            return self.now
        return self.chance.choice([0, *(at for at, _ in pending)])

    def _draw_keep(self) -> float:
        return self.chance.choice((0.0, 0.1, 0.5, 0.9, 1.0)) if self.keep is None else self.keep

    def write(self, node: _Node, target: Path) -> None:
        target.mkdir(exist_ok=True)
        until = self._metadata_until([*node.entry_changes])
        entries = dict(node.durable_entries)
        for at, change in node.entry_changes:
            if at <= until:
                _apply_entries(entries, change)
        for name, child in sorted(entries.items()):
            path = target / name
            if child.is_directory:
                self.write(child, path)
            else:
                path.write_bytes(self._content(child))
            self._give(child, path)

    def _give(self, node: _Node, path: Path) -> None:
        until = max(self._metadata_until([*node.attributes]), node.moved)
        mode, uid, gid = node.mode, node.uid, node.gid
        for at, event in node.attributes:
            if at <= until:
                mode, uid, gid = event.mode, event.uid, event.gid
        if os.geteuid() == 0:
            os.chown(path, uid, gid)
        os.chmod(path, stat.S_IMODE(mode))

    def _content(self, node: _Node) -> bytes:
        if not node.changes:
            return bytes(node.content)
        until = self._metadata_until([*node.changes])
        content = bytearray(node.content)
        size = len(content)
        versions: dict[int, int] = {}
        keep = self._draw_keep()
        for at, event in node.changes:
            if event.kind == "W":
                self._write_pages(content, at, event, versions, keep)
                if at <= until:
                    size = max(size, event.a + len(event.data))
            elif at <= until:
                _apply(content, [event])
                size = len(content)
        del content[size:]
        return bytes(content) + bytes(size - len(content))

    def _write_pages(
        self, content: bytearray, at: int, event: Event, versions: dict[int, int], keep: float
    ) -> None:
        end = event.a + len(event.data)
        for page in range(event.a // _PAGE, (end - 1) // _PAGE + 1):
            if page not in versions:
                versions[page] = self._newest_version(keep)
            if at > versions[page]:
                continue
            start, stop = max(page * _PAGE, event.a), min((page + 1) * _PAGE, end)
            _put(content, start, event.data[start - event.a : stop - event.a])

    def _newest_version(self, keep: float) -> int:
        if self.chance.random() < keep:
            return _NEVER
        return self.chance.choice((0, self.chance.randint(0, self.now)))


def _apply_entries(entries: dict[str, _Node], change: dict[str, _Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


def _put(content: bytearray, start: int, data: bytes) -> None:
    if start > len(content):
        content.extend(bytes(start - len(content)))
    content[start : start + len(data)] = data


def _apply(content: bytearray, events: Iterable[Event]) -> None:
    for event in events:
        if event.kind == "W":
            _put(content, event.a, event.data)
        elif event.kind == "T":
            if event.a < len(content):
                del content[event.a :]
            else:
                content.extend(bytes(event.a - len(content)))
        else:
            end = event.a + event.b
            if event.flag & (_PUNCH | _ZERO):
                stop = min(end, len(content))
                if event.a < stop:
                    content[event.a : stop] = bytes(stop - event.a)
            if not event.flag & _KEEP_SIZE and end > len(content):
                content.extend(bytes(end - len(content)))


def boot_anew(diff: Path) -> None:
    """Make the journals in a diff such that were written in another boot of the kernel.

    After a real power cut the boot id differs, and so must it after one that is played.
    """
    for path in (diff / "journal", *diff.glob("*/journal")):
        if path.exists():
            _boot_anew(path)


def _boot_anew(path: Path) -> None:
    data = path.read_bytes()
    frames = b""
    n_bytes = HEADER_BYTES
    for payload in find_frames(data[HEADER_BYTES:]):
        n_bytes += 8 + len(payload)
        if payload[0] == 1:
            payload = b"\1" + bytes(byte ^ 0xFF for byte in payload[1:])
        frames += encode_frame(payload)
    with path.open("r+b") as journal:
        journal.write(data[:HEADER_BYTES] + frames + data[n_bytes:])
