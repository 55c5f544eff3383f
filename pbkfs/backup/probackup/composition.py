"""What a file of a chain is made of: which layers store it, up to which block, how long it is.

The rule: walk from the destination down; a layer that does not have the file, or has it empty, ends
the walk; blocks at or above the number of blocks that any newer layer names did not exist then, so
older copies of them are dead. pg_probackup's own restore ignores the numbers in between and can
bring deleted rows back. Used by ``probackup.base``; belongs to one thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pbkfs.backup.base import NO_LIMIT, PageSource, RawSource, Source
from pbkfs.backup.probackup.content import EMPTY, MISSING, STORED, UNCHANGED, Entry
from pbkfs.backup.probackup.layer import DATABASE, HEADER_MAP, Layer
from pbkfs.errors import FormatError
from pbkfs.pgdata import BLCKSZ

_HINT = "The backup's metadata is damaged; take another one."


class Composition:
    """Sources and sizes of the files of a chain. ``layers`` are newest first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._lengths: dict[int, int] = {}

    def find_damage(self, paths: Sequence[bytes]) -> FormatError | None:
        """Look for files that are said to be unchanged where nothing older has them.

        Costs one pass over the bytes of state; returns the first error, if any.
        """
        suspects: set[int] = set()
        for index, layer in enumerate(self._layers):
            if index + 1 == len(self._layers):
                position = layer.states.find(UNCHANGED)
                while position >= 0:
                    suspects.add(position)
                    position = layer.states.find(UNCHANGED, position + 1)
            else:
                older = self._layers[index + 1].states
                pair = (UNCHANGED, MISSING)
                suspects.update(
                    number
                    for number, states in enumerate(zip(layer.states, older, strict=True))
                    if states == pair
                )
        for number in sorted(suspects):
            try:
                self._walk(number, paths[number])
            except FormatError as error:
                return error
        return None

    def _walk(self, number: int, path: bytes) -> list[tuple[Layer, Entry]]:
        """Layers that count for a file, newest first: with state UNCHANGED or STORED.

        Raises FormatError when the file is unchanged in the last one.
        """
        walk: list[tuple[Layer, Entry]] = []
        for layer in self._layers:
            state = layer.states[number]
            if state == MISSING:
                break
            if state == EMPTY:
                return walk
            if state not in (UNCHANGED, STORED):
                raise FormatError(
                    f"{os.fsdecode(path)} is a file in backup {self._layers[0].name} but not in "
                    f"{layer.name}",
                    hint=_HINT,
                )
            entry = layer.entry(number, path)
            if walk and entry.is_datafile != walk[0][1].is_datafile:
                raise FormatError(
                    f"{os.fsdecode(path)} is a data file in one of the backups "
                    f"{walk[0][0].name} and {layer.name} but not in the other",
                    hint=_HINT,
                )
            walk.append((layer, entry))
            if entry.size > 0 and not entry.is_datafile:
                return walk
        if walk and walk[-1][1].size == -1:
            layer = walk[-1][0]
            why = (
                "which is a FULL backup"
                if layer is self._layers[-1]
                else "but its parent does not have it"
            )
            raise FormatError(
                f"{os.fsdecode(path)} is listed as unchanged in backup {layer.name}, {why}",
                hint=_HINT,
            )
        return walk

    def sources(self, number: int, path: bytes) -> tuple[Source, ...]:
        """Where the content of a file is. Raises FormatError for damaged metadata."""
        sources: list[Source] = []
        limit = NO_LIMIT
        for layer, entry in self._walk(number, path):
            if not entry.is_datafile:
                if entry.size > 0:
                    sources.append(
                        RawSource(layer.root_fd, DATABASE + path, entry.size, layer.name)
                    )
                continue
            if entry.n_blocks is not None:
                limit = min(limit, entry.n_blocks)
            if entry.size > 0:
                sources.append(_page_source(layer, entry, limit))
        return tuple(sources)

    def size(self, number: int, path: bytes, entry: Entry) -> int:
        """Length of a file in bytes; ``entry`` is its line in the destination's list."""
        if entry.size == 0:
            return 0
        if not entry.is_datafile:
            if entry.size > 0:
                return entry.size
            if entry.full_size is not None:
                return entry.full_size
        elif entry.n_blocks is not None:
            return entry.n_blocks * BLCKSZ
        length = self._lengths.get(number)
        if length is None:
            walk = self._walk(number, path)
            if entry.is_datafile:
                length = self._count_blocks(walk) * BLCKSZ
            else:
                length = max(0, walk[-1][1].size) if walk else 0
            self._lengths[number] = length
        return length

    def _count_blocks(self, walk: list[tuple[Layer, Entry]]) -> int:
        """Blocks of a data file whose newest layers don't name a number (before 2.3.0).

        A layer knows the length when it names it or has a truncation marker; otherwise the file
        is as long as it was one layer below, or reaches to the highest block stored.
        """
        from pbkfs._native import scan_pages

        n_blocks = 0
        for layer, entry in walk:
            if entry.n_blocks is not None:
                return max(n_blocks, entry.n_blocks)
            if entry.size <= 0:
                continue
            _, end, marker = scan_pages(
                layer.root_fd, DATABASE + entry.path, entry.size, layer.is_padded
            )
            n_blocks = max(n_blocks, end)
            if marker is not None:
                return max(n_blocks, marker)
        return n_blocks


def _page_source(layer: Layer, entry: Entry, limit: int) -> PageSource:
    headers = None
    if (
        entry.n_headers
        and not layer.is_padded
        # Before 2.4.11 offsets over 2 GB are negative (pg_probackup issue 351).
        and entry.hdr_off >= 0
        and entry.hdr_off + entry.hdr_size <= layer.header_map_size
    ):
        headers = (
            layer.root_fd,
            HEADER_MAP,
            entry.hdr_off,
            entry.hdr_size,
            entry.hdr_crc,
            entry.n_headers,
        )
    return PageSource(
        root_fd=layer.root_fd,
        path=DATABASE + entry.path,
        stored_size=entry.size,
        label=layer.name,
        compress=entry.compress,
        limit=limit,
        padded=layer.is_padded,
        old_zlib_8192=layer.is_old_zlib_8192,
        headers=headers,
    )
