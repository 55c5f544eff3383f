"""Offline check of a diff, like fsck: reads everything, changes nothing.

Owns what ``pbkfs check`` finds; the command line has the diff's lock and opens the base. Goes the
way of a mount (superblock, journal, names, objects, page maps), but goes on after a problem as far
as what follows still means something. An *error* is damage; a *note* is what a crash may leave and
the next mount settles. Any thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pbkfs.backup.base import Base
from pbkfs.errors import PbkfsError
from pbkfs.overlay import journal as records
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.inode import File, SymbolicLink
from pbkfs.overlay.layer import EMPTY_MAP, JOURNAL, OBJECTS, Layer, Named, PageMap
from pbkfs.overlay.namespace import Namespace
from pbkfs.overlay.objects import object_path
from pbkfs.overlay.replay import WAL_NAME, Replay, find_named
from pbkfs.overlay.stack import Stack, count_blocks
from pbkfs.overlay.superblock import NAME as SUPERBLOCK
from pbkfs.overlay.superblock import check_base, read_superblock

# A hint takes more lines than it helps beyond these.
_MAX_EACH = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as a clean end of a mount leaves it. ``kind`` is stable."""

    severity: Literal["error", "note"]
    kind: str
    message: str


@dataclass(slots=True)
class Report:
    """What a check found. ``counts`` say how much was looked at."""

    diff: Path
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is damaged."""
        return not any(finding.severity == "error" for finding in self.findings)

    def error(self, kind: str, message: str) -> None:
        """Add damage."""
        self.findings.append(Finding("error", kind, message))

    def note(self, kind: str, message: str) -> None:
        """Add something that the next mount settles, or that means nothing."""
        self.findings.append(Finding("note", kind, message))


def check_diff(path: Path, base: Base | None) -> Report:
    """Check the diff at ``path``, which nobody else may use meanwhile.

    Without ``base`` names can't be replayed, and what depends on them is not looked at. What can't
    be read is a finding; raises nothing but bugs.
    """
    report = Report(path)
    with _as_findings(report, "superblock"):
        superblock = read_superblock(path)
        if base is not None:
            with _as_findings(report, "base"):
                check_base(superblock, base.identity, base.system_identifier, path)
        with _as_findings(report, "journal"), closing(Diff.read(path)) as diff:
            _check_journal(report, diff.live)
            report.counts["layers"] = len(diff.superblock.layers)
            layers: list[Layer] | None = None
            with _as_findings(report, "layers"):
                layers = open_layers(diff)
            try:
                if base is not None and layers is not None:
                    _Contents(report, diff, layers, base).check()
            finally:
                for layer in layers or ():
                    layer.close()
        _check_directory(report)
    return report


@contextmanager
def _as_findings(report: Report, kind: str) -> Iterator[None]:
    try:
        yield
    except PbkfsError as error:
        report.error(kind, error.message)
    except OSError as error:
        name = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        report.error(kind, f"cannot read {kind}: {(error.strerror or str(error)).lower()}{name}")


def _check_journal(report: Report, live: Layer) -> None:
    report.counts["journal_bytes"] = live.end
    marks = sum(payload[0] == records.Synced.type_code for payload in live.names)
    report.counts["names"] = len(live.names) - marks
    tail = live.read_tail()
    if not tail:
        return
    where = f"{len(tail)} bytes from byte {live.end} of the journal on"
    if records.is_damaged(tail, live.end):
        report.error("journal", f"{where} are damaged: they were durable once")
    else:
        report.note("journal_tail", f"{where} are no record and were never synced")


class _Contents:
    """Names, and the objects and page maps behind them. ``layers`` are newest first."""

    def __init__(self, report: Report, diff: Diff, layers: list[Layer], base: Base) -> None:
        self._report = report
        self._live = diff.live
        self._stack = Stack(base, diff, layers)
        self._namespace = Namespace(base, (0, 0), 0)

    def check(self) -> None:
        created: set[int] = set()
        with _as_findings(self._report, "names"):
            for number, layer in enumerate(self._stack.layers):
                replay = Replay(self._namespace, self._stack, number)
                replay.run(layer, layer.names)
                created = replay.created
            named = find_named(self._stack, self._namespace, created)
            for layer, found in zip(self._stack.layers[:-1], named, strict=False):
                self._check_sealed(layer, found)
            self._check_objects(named[-1])
            self._check_wal()

    def _check_sealed(self, layer: Layer, named: Mapping[int, Named]) -> None:
        if layer.read_tail():
            self._report.error(
                "journal",
                f"the journal of sealed layer {layer.path} is damaged at byte {layer.end}",
            )
        missing = sorted(named.keys() - layer.objects.scan())
        for object_id in missing[:_MAX_EACH]:
            self._missing(layer, object_id, named[object_id])

    def _missing(self, layer: Layer, object_id: int, named: Named) -> None:
        self._report.error(
            "object_missing",
            f"object {object_path(object_id)} of {layer.path} is missing "
            f"(file {os.fsdecode(named.path)!r})",
        )

    def _check_objects(self, named: Mapping[int, Named]) -> None:
        leftovers: list[str] = []
        present = self._live.objects.scan(leftovers=leftovers)
        self._report.counts["objects"] = len(present)
        for object_id in sorted(named.keys() - present):
            if named[object_id].is_created:
                self._report.note(
                    "object_lost",
                    f"object {object_path(object_id)} of the new file "
                    f"{os.fsdecode(named[object_id].path)!r} was never synced; "
                    "the file will be empty",
                )
            else:
                self._missing(self._live, object_id, named[object_id])
        orphans = sorted(present - named.keys())
        for what, names in (
            ("objects that no name leads to", [object_path(each) for each in orphans]),
            ("half-made objects", sorted(leftovers)),
        ):
            if names:
                some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
                self._report.note("orphans", f"{len(names)} {what}: {some}")
        for object_id in sorted(named.keys() & present):
            self._check_object(object_id, named[object_id])

    def _check_object(self, object_id: int, named: Named) -> None:
        what = f"object {object_path(object_id)} (file {os.fsdecode(named.path)!r})"
        found = os.stat(object_path(object_id), dir_fd=self._live.objects.fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            self._report.error("object_type", f"{what} is no regular file")
            return
        page_map = self._live.page_maps.get(object_id, EMPTY_MAP)
        if not named.is_mapped:
            if page_map != EMPTY_MAP:
                self._report.error("page_map", f"{what} is whole and has a page map")
            return
        self._check_map(what, found.st_size, page_map, named)

    def _check_map(self, what: str, size: int, page_map: PageMap, named: Named) -> None:
        if page_map.is_whole:
            return
        self._report.counts["mapped"] = self._report.counts.get("mapped", 0) + 1
        file = self._namespace.resolve(named.path)
        assert isinstance(file, File)
        self._stack.load(file)
        n_blocks = count_blocks(size)
        below = count_blocks(file.size)
        last = max(map(_count_bits, (page_map.changed, page_map.hydrated)))
        if last > below:
            self._report.error(
                "page_map", f"{what} has a map of {last} blocks over {below} blocks below it"
            )
        if n_blocks < min(page_map.limit, below):
            self._report.note(
                "truncation",
                f"{what} ends at block {n_blocks}, and no record says that it was truncated; "
                "the next mount finishes that",
            )

    def _check_wal(self) -> None:
        children = self._namespace.children(self._namespace.root)
        link = children.get(WAL_NAME)
        is_out = isinstance(link, SymbolicLink) and link.target is None
        wal = self._stack.diff.wal_path
        exists = os.path.lexists(wal)
        if is_out and not (wal.is_dir() and not wal.is_symlink()):
            what = "is no directory" if exists else "is missing"
            self._report.error("pg_wal", f"{wal} {what}, and the tree's pg_wal leads there")
        elif exists and not is_out:
            self._report.note("pg_wal", f"{wal} is of a mount that was cut short; it is made anew")


def _count_bits(bitmap: bytes) -> int:
    """Return the number of the highest bit that is set, plus one."""
    return int.from_bytes(bitmap, "little").bit_length()


# What a diff's directory holds besides its parts of this package: ``mount`` puts it there.
_OTHERS = frozenset(
    {"lock", "binding.json", "control.sock", "layers", "log", "pg_wal", "lost+found"}
)


def _check_directory(report: Report) -> None:
    for name in sorted(os.listdir(report.diff)):
        if name in (SUPERBLOCK, JOURNAL, OBJECTS) or name in _OTHERS:
            continue
        if name == "pg_wal.new" or (name.startswith(".") and name.endswith(".tmp")):
            report.note("leftover", f"{name} was left by something that was cut short")
        else:
            report.note("stranger", f"{name} is not of pbkfs")
