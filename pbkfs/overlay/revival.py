"""What a ledger and the disk say together, at a takeover.

``decide`` asks the journal about the last change of names. Inodes without names that are in use are
known to the disk only by an object that the next mount would remove: ``describe`` says what one
consists of, for the ledger; ``revive`` makes it again in the tree of another process. Called by
``contents``, ``tree`` and ``mount`` on the thread that owns the tree.
"""

from __future__ import annotations

import os
import stat
import uuid

from pbkfs.errors import DiffError
from pbkfs.overlay.inode import NOT_LOADED, PINNED, Directory, File, Inode, Piece, SymbolicLink
from pbkfs.overlay.journal import find_frames
from pbkfs.overlay.layer import JOURNAL, Layer
from pbkfs.overlay.ledger import Ledger, Numbers, Orphan
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.stack import Stack


def decide(ledger: Ledger, numbers: Numbers, live: Layer) -> None:
    """Find out whether the last intent was carried out, and write it down before all else.

    ``live`` is open, not started: its journal is as the dead worker left it. Raises OSError.
    """
    intent = numbers.undecided
    if intent is None:
        return
    is_done = live.uuid != intent.layer  # then a seal came after it
    if not is_done:
        with open(live.path / JOURNAL, "rb") as file:
            file.seek(intent.end)
            is_done = intent.payload in find_frames(file.read())
    ledger.decided(is_done=is_done)
    if is_done:
        numbers.apply(intent)
    numbers.undecided = None


def describe(stack: Stack, inode: Inode, doomed: list[list[str | int]]) -> Orphan:
    """Return an inode as the ledger has it; ``doomed`` objects go with it: [layer, object]."""
    found: Orphan = {
        "mode": inode.mode,
        "uid": inode.uid,
        "gid": inode.gid,
        "times": [inode.atime_ns, inode.mtime_ns, inode.ctime_ns],
        "doomed": doomed,
    }
    if isinstance(inode, File):
        found["size"] = inode.size
        found["base_size"] = inode.base_size
        found["origin_dir"] = None if inode.origin_dir is None else os.fsdecode(inode.origin_dir)
        found["origin_name"] = os.fsdecode(inode.origin_name)
        found["live"] = None if stack.live_piece(inode) is None else stack.live.uuid.hex
        found["pieces"] = [
            [stack.layers[piece.layer].uuid.hex, piece.object_id, piece.is_mapped]
            for piece in inode.pieces
        ]
    elif isinstance(inode, SymbolicLink):
        found["target"] = None if inode.target is None else os.fsdecode(inode.target)
    return found


def revive(stack: Stack, namespace: Namespace, numbers: Numbers) -> dict[tuple[Layer, int], int]:
    """Make the inodes without names again; returns the objects that go with them.

    Raises DiffError where a layer is missing.
    """
    doomed: dict[tuple[Layer, int], int] = {}
    places = {layer.uuid: number for number, layer in enumerate(stack.layers)}
    for number, descriptions in numbers.orphans.items():
        found = _newest(descriptions, places)
        if found is None:
            raise DiffError(f"inode {number} of the ledger lies in layers that are gone")
        if number in namespace.inodes:
            raise DiffError(f"inode {number} of the ledger has lost its name, but has one")
        inode = _make(stack, places, number, found)
        inode.atime_ns, inode.mtime_ns, inode.ctime_ns = found["times"]
        inode.nlookup = PINNED
        namespace.inodes[number] = inode
        for layer, object_id in found["doomed"]:
            place = places.get(uuid.UUID(layer))
            if place is not None:
                doomed[stack.layers[place], object_id] = number
    return doomed


def _newest(descriptions: list[Orphan], places: dict[uuid.UUID, int]) -> Orphan | None:
    """Return the newest description whose layers are there: a fold may have failed after one."""
    for found in reversed(descriptions):
        if all(uuid.UUID(piece[0]) in places for piece in found.get("pieces", ())):
            return found
    return None


def _make(stack: Stack, places: dict[uuid.UUID, int], number: int, found: Orphan) -> Inode:
    mode, uid, gid = found["mode"], found["uid"], found["gid"]
    mtime_ns = found["times"][1]
    if stat.S_ISDIR(mode):
        directory = Directory(number, stat.S_IMODE(mode), uid, gid, mtime_ns)
        directory.children = {}
        return directory
    if stat.S_ISLNK(mode):
        target = found["target"]
        return SymbolicLink(
            number, uid, gid, mtime_ns, None if target is None else os.fsencode(target)
        )
    file = File(number, stat.S_IMODE(mode), uid, gid, mtime_ns, found["size"])
    file.base_size = found["base_size"]
    if found["origin_dir"] is not None:
        file.origin_dir = os.fsencode(found["origin_dir"])
        file.origin_name = os.fsencode(found["origin_name"])
    file.pieces = tuple(
        Piece(places[uuid.UUID(layer)], object_id, is_mapped)
        for layer, object_id, is_mapped in found["pieces"]
    )
    if found["live"] is not None and uuid.UUID(found["live"]) != stack.live.uuid:
        file.size = NOT_LOADED  # it was sealed since, and its newest object says all
    return file
