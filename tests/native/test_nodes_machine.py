"""Random changes of one file, compared with a plain model, through remounts and power cuts.

A power cut is played on the journal, which is cut back to what was synced, while the object keeps
every byte. So an object says more than a real one could after a cut; whatever the journal does not
vouch for must all the same read as its version below, or as what was written, and never as anything
else.
"""

from __future__ import annotations

import errno
import os
import struct

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from native_store import (
    BLCKSZ,
    JOURNAL_HEADER,
    NO_LIMIT,
    NONE,
    SESSION,
    ZLIB,
    Layer,
    Place,
    bits_of,
    blocks_in,
    blocks_of,
    compose,
    page,
    pages_record,
)

from pbkfs import _native

INO = 3
OBJECT = 0x1234
MAX_BLOCKS = 150  # more than one chunk of a write
KEEP_SIZE, PUNCH, ZERO = 1, 2, 0x10

sizes = st.one_of(
    st.integers(0, MAX_BLOCKS).map(lambda b: b * BLCKSZ),
    st.integers(0, MAX_BLOCKS * BLCKSZ),
    st.integers(0, 5 * BLCKSZ),
)
offsets = st.one_of(st.integers(0, 2 * MAX_BLOCKS).map(lambda h: h * BLCKSZ // 2), sizes)
lengths = st.one_of(
    st.sampled_from([1, 4096, BLCKSZ, 3 * BLCKSZ, 3 * BLCKSZ // 2, 140 * BLCKSZ]),
    st.integers(0, 4 * BLCKSZ),
)


class NodesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = Place()
        self.has_object = False

    def teardown(self) -> None:
        self.place.close()

    @initialize(
        kind=st.sampled_from(["pages", "raw", "sealed", "nothing"]),
        size=sizes,
        seed=st.integers(0, 99),
        is_mapped=st.booleans(),
    )
    def start(self, kind: str, size: int, seed: int, is_mapped: bool) -> None:
        place = self.place
        chain = [
            Layer({b: page(seed + b) for b in range(0, MAX_BLOCKS, 7)}, ZLIB),
            Layer({b: page(seed + 3 * b + 1) for b in range(0, MAX_BLOCKS, 2)}, NONE),
        ]
        if kind == "nothing":
            self.below, self.sources = b"", []
        elif kind == "raw":
            self.below = b"".join(page(seed + 2 + b) for b in range(blocks_of(size)))[:size]
            self.sources = place.store_raw(self.below)
        else:
            size -= size % BLCKSZ if kind == "pages" else 0
            self.below = compose(chain, size)
            self.sources = place.store(chain)
        if kind == "sealed":
            content = b"".join(page(seed + 5 * b + 2) for b in range(blocks_of(size)))[:size]
            place.make_object(0x777, content)
            limit = blocks_of(size) * 2 // 3
            taken = {b for b in range(limit) if b % 3 == 0}
            self.sources.insert(
                0, ("object", place.objects_fd, 0x777, "sealed", bits_of(taken), limit)
            )
            below = bytearray(self.below)
            for b in (*taken, *range(limit, blocks_of(size))):
                end = min((b + 1) * BLCKSZ, size)
                below[b * BLCKSZ : end] = content[b * BLCKSZ : end]
            self.below = bytes(below)
        self.is_mapped = is_mapped
        self.content = bytearray(self.below)
        self.limit = blocks_of(len(self.below)) if is_mapped else 0
        self.durable: set[int] = set()  # blocks below the limit that a power cut must not touch
        self.present: set[int] = set()  # blocks below the limit that are in the object
        self.cut: set[int] = set()  # of these, cut off inside since the file last grew
        self.hydrated: set[int] = set()  # blocks below the limit that were recorded as hydrated
        self.unsure: set[int] = set()  # of these, changed without a record of it
        self.n_synced = 0  # of the journal
        self.session = SESSION
        place.nodes.add(INO, len(self.below), self.sources)

    # --- changes --------------------------------------------------------------------------------

    def copy_up(self) -> None:
        """As the tree does at a first write: the object is durable before its record."""
        if self.has_object:
            return
        size = len(self.below)
        if self.is_mapped:
            self.place.attach(INO, OBJECT, size)
        else:
            self.place.make_object(OBJECT, self.below)
            self.place.nodes.attach(INO, OBJECT, bitmap=None, limit=0, mapped=False, fresh=True)
        self.has_object = True

    def grow(self, size: int) -> None:
        if size > len(self.content):
            self.content.extend(bytes(size - len(self.content)))
            # A cut has to be durable before anything comes behind it.
            self.durable |= self.cut
            self.cut.clear()

    def take(self, offset: int, end: int) -> None:
        """The blocks that a change of these bytes brings into the object."""
        if end > offset:
            self.present |= {b for b in range(offset // BLCKSZ, blocks_of(end)) if b < self.limit}

    @rule(offset=offsets, length=lengths, seed=st.integers(0, 999))
    def write(self, offset: int, length: int, seed: int) -> None:
        self.copy_up()
        data = (page(seed | 1) * blocks_of(length))[:length]
        assert self.place.nodes.write(INO, offset, data) == length
        if length:
            self.grow(offset + length)
            self.content[offset : offset + length] = data
            self.take(offset, offset + length)

    @rule(size=sizes)
    def truncate(self, size: int) -> None:
        self.copy_up()
        self.place.nodes.truncate(INO, size)
        if size < len(self.content):
            del self.content[size:]
            if size % BLCKSZ and size // BLCKSZ < self.limit:
                self.present.add(size // BLCKSZ)
                self.cut.add(size // BLCKSZ)
            self.limit = min(self.limit, blocks_of(size))
            for blocks in (self.present, self.durable, self.cut):
                blocks.intersection_update(range(self.limit))
        else:
            self.grow(size)

    @rule(
        mode=st.sampled_from([0, KEEP_SIZE, PUNCH | KEEP_SIZE, ZERO, ZERO | KEEP_SIZE]),
        offset=offsets,
        length=lengths.filter(bool),
    )
    def fallocate(self, mode: int, offset: int, length: int) -> None:
        self.copy_up()
        try:
            self.place.nodes.fallocate(INO, mode, offset, length)
        except OSError as error:
            # Not every file system zeroes ranges.
            if error.errno != errno.EOPNOTSUPP or not mode & ZERO:
                raise
            return
        end = offset + length
        if mode & (PUNCH | ZERO):
            stop = min(end, len(self.content))
            if offset < stop:
                self.content[offset:stop] = bytes(stop - offset)
                self.take(offset, stop)
        if not mode & KEEP_SIZE:
            self.grow(end)

    @rule(datasync=st.booleans())
    def fsync(self, datasync: bool) -> None:
        self.place.nodes.fsync(INO, datasync)
        assert self.place.journal.synced == self.place.journal.end
        self.durable |= self.present
        self.cut.clear()

    @rule()
    def drop_indexes(self) -> None:
        self.place.nodes.drop_indexes()

    @rule(offset=offsets, length=lengths.filter(bool))
    def hydrate(self, offset: int, length: int) -> None:
        self.copy_up()
        n_bytes, following = self.place.nodes.hydrate(INO, offset, length)
        assert n_bytes % BLCKSZ == 0
        if not self.is_mapped:
            assert (n_bytes, following) == (0, None)
        elif following is None:
            assert n_bytes <= self.limit * BLCKSZ
        else:
            assert offset // BLCKSZ * BLCKSZ + n_bytes <= following < self.limit * BLCKSZ
            assert n_bytes >= length

    @rule()
    def hydrate_all(self) -> None:
        self.copy_up()
        offset: int | None = 0
        while offset is not None:
            _, offset = self.place.nodes.hydrate(INO, offset, 1 << 20)
        if self.is_mapped:
            n_blocks, n_present, _, _ = self.place.nodes.count_blocks(INO)
            assert n_blocks == n_present == self.limit

    @rule()
    def hydrate_sync(self) -> None:
        self.copy_up()
        n_blocks, n_present, _, was_whole = self.place.nodes.count_blocks(INO)
        is_whole = self.place.nodes.hydrate_sync(INO)
        assert is_whole == (was_whole or n_blocks == n_present)
        if self.is_mapped and (is_whole or n_present):
            self.hydrated |= set(range(self.limit)) if is_whole else set()

    def differs(self, block: int) -> bool:
        end = min((block + 1) * BLCKSZ, len(self.content))
        at = slice(block * BLCKSZ, end)
        return bytes(self.content[at]) != self.below[at].ljust(end - at.start, b"\0")

    # --- ends of a mount ------------------------------------------------------------------------

    def _reopen(self, end: int, session: bytes) -> set[int]:
        """Mount again with the journal's first ``end`` bytes; returns the blocks it vouches for."""
        place = self.place
        place.nodes.close()
        os.ftruncate(place.journal_fd, end)
        os.fsync(place.journal_fd)
        self.n_synced = end
        valid, _, maps = _native.scan_journal(place.journal_fd, session)
        assert valid == end
        place.journal = _native.Journal(place.journal_fd, end)
        place.journal.append(b"\x01" + self.session)
        place.nodes = place._new_nodes()
        place.nodes.add(INO, len(self.below), self.sources)
        bitmap, limit, is_whole, hydrated = maps.get(OBJECT, (b"", NO_LIMIT, False, b""))
        blocks = blocks_in(bitmap)
        assert not blocks & blocks_in(hydrated)
        # Whatever a crash left: a block that is not as it is below is known as changed.
        self.hydrated = (
            set(range(self.limit)) - blocks if is_whole else blocks_in(hydrated)
        ) & set(range(self.limit))
        if not self.has_object:
            return blocks
        size = place.object_path(OBJECT).stat().st_size
        if self.is_mapped:
            # Blocks that only a record of this session vouches for are recorded again.
            place.journal.append(pages_record(OBJECT, blocks))
            limit = min(limit, blocks_of(len(self.below)))
            if blocks_of(size) < limit:
                # The tree records what a crash inside of a truncate left out.
                limit = blocks_of(size)
                place.journal.append(struct.pack("<BQI", 4, OBJECT, limit))
        place.nodes.attach(
            INO,
            OBJECT,
            bitmap=bitmap,
            limit=limit,
            mapped=self.is_mapped,
            fresh=False,
            hydrated=hydrated,
            whole=is_whole,
        )
        return blocks

    @rule()
    def remount(self) -> None:
        """The worker died or ended: the page cache is still there, and PAGES_LIVE counts."""
        blocks = self._reopen(self.place.journal.end, self.session)
        if self.is_mapped:
            assert blocks >= self.present

    @precondition(lambda self: self.has_object and self.is_mapped)
    @rule()
    def cut_power(self) -> None:
        end = max(self.place.journal.synced, self.n_synced, len(JOURNAL_HEADER))
        self.session = bytes([*self.session[1:], self.session[0] ^ 0x80])
        blocks = self._reopen(end, self.session)
        assert blocks >= self.durable
        found = self.place.nodes.read(INO, 0, 1 << 30)
        assert len(found) == len(self.content)
        for b in range(blocks_of(len(found))):
            at = slice(b * BLCKSZ, (b + 1) * BLCKSZ)
            if found[at] == self.content[at]:
                continue
            assert b < self.limit, f"block {b} is at or above the limit {self.limit}"
            assert b not in self.durable, f"block {b} was durable"
            self.unsure.discard(b)
            assert found[at] == self.below[at].ljust(BLCKSZ, b"\0")[: len(found[at])]
        self.content = bytearray(found)
        self.present = {b for b in blocks if b < self.limit}
        # A write that was never synced may have reached a hydrated block on the disk all the same.
        self.unsure = {b for b in self.hydrated if self.differs(b)}
        self.durable = set(self.present)
        self.cut.clear()
        # What was cut inside before is the object's own again, by the attach that found it short.
        if len(found) % BLCKSZ and len(found) < len(self.below):
            cut = len(found) // BLCKSZ
            if cut < self.limit:
                self.present.add(cut)
                self.cut.add(cut)

    # --- checks ---------------------------------------------------------------------------------

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        assert self.place.nodes.read(INO, offset, length) == self.content[offset : offset + length]

    @rule()
    def read_everything(self) -> None:
        assert self.place.nodes.read(INO, 0, 1 << 30) == self.content

    @rule()
    def scan(self) -> None:
        """What a scan of this session calls changed covers all blocks that differ from below."""
        if not self.has_object or not self.is_mapped:
            return
        found = self.place.scan(self.session).get(OBJECT)
        changed = blocks_in(found[0]) if found is not None else set()
        differing = {b for b in range(self.limit) if self.differs(b)} - self.unsure
        assert differing <= changed
        assert self.place.nodes.count_blocks(INO)[2] == len(changed)

    @invariant()
    def size_is_right(self) -> None:
        assert self.place.nodes.size(INO) == len(self.content)
        if self.has_object:
            found = self.place.nodes.stat(INO)
            assert found is not None
            assert found[3] == len(self.content)
        assert self.place.lines() == []


TestNodes = NodesMachine.TestCase
TestNodes.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
