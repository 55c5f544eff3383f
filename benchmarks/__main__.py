"""``./run bench [GROUP…]``: run groups of figures and write benchmarks/results.

Needs root (it drops the kernel's caches), a PostgreSQL and some 20 GB on one file system; the data
lies below ``--place`` and is removed at the end unless ``--keep`` is given.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pbkfs
from benchmarks.branches import Branches
from benchmarks.dataset import Data, Sizes
from benchmarks.measure import NATIVE, RESULTS, Figure, print_table, say, write_results
from benchmarks.memory import Memory
from benchmarks.micro import Micro
from benchmarks.mount import Mounting
from benchmarks.plot import plot
from benchmarks.postgres import Postgres
from benchmarks.restore import Restore
from benchmarks.server import SERVER_USER
from benchmarks.sides import NativeSide, OverlaySide, PbkfsSide, Side

GROUPS: dict[str, Any] = {
    "mount": Mounting,
    "micro": Micro,
    "postgres": Postgres,
    "memory": Memory,
    "restore": Restore,
    "branches": Branches,
}
COMPARED = ("micro", "postgres")  # groups that run on all sides
SIDES = (
    "native", "raw", "zlib", "chain5", "chain5-zlib", "hydrated", "overlay", "fuse-overlayfs",
)  # fmt: skip


def make_sides(group: str, data: Data, names: Sequence[str], options: list[str]) -> dict[str, Side]:
    dataset = data.pages() if group == "micro" else data.cluster()
    sides: dict[str, Side] = {}
    for name in names:
        if name == NATIVE:
            sides[name] = NativeSide(name, dataset.native, data.place)
        elif name in ("overlay", "fuse-overlayfs"):
            if name == "fuse-overlayfs" and shutil.which(name) is None:
                say("fuse-overlayfs is not installed: left out")
                continue
            sides[name] = OverlaySide(name, dataset.native, data.place, in_kernel=name == "overlay")
        else:
            is_hydrated = name == "hydrated"
            chain = dataset.chains["raw" if is_hydrated else name]
            sides[name] = PbkfsSide(
                name, chain, data.place, SERVER_USER, options, is_hydrated=is_hydrated
            )
    return sides


def run_group(group: str, data: Data, args: argparse.Namespace) -> None:
    sides: dict[str, Side] = {}
    figures: list[Figure] = []
    made = None
    started = time.monotonic()
    try:
        if group in COMPARED:
            sides = make_sides(group, data, args.sides, args.mount_option)
            for side in sides.values():
                side.fresh()
        made = GROUPS[group](data, sides, args.rounds, is_quick=args.quick)
        for name in args.figure or made.FIGURES:
            found = getattr(made, name)()
            figures += found if isinstance(found, list) else [found]
    finally:
        if isinstance(made, Postgres):
            made.close()
        for side in sides.values():
            side.close()
        if figures:
            _report(group, figures, sides, args, time.monotonic() - started)


def _report(
    group: str,
    figures: Sequence[Figure],
    sides: dict[str, Side],
    args: argparse.Namespace,
    seconds: float,
) -> None:
    """Print and write what was measured, also when a later figure failed."""
    print_table(figures)
    settings = {
        "rounds": args.rounds,
        "quick": args.quick,
        "figures": args.figure or "all",
        "sides": list(sides),
        "mount_options": args.mount_option,
        "seconds": round(seconds),
    }
    path = write_results(group, figures, settings, args.results)
    say(f"results: {path}")
    image = plot(path)
    say(f"plot: {image}" if image else "no plot (matplotlib is not installed, or no ratios)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("group", nargs="*", choices=[*GROUPS, []], metavar="GROUP",
                        help=f"of {', '.join(GROUPS)}; all by default")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="little data and few rounds")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--figure", action="append", help="only this one (several times)")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--mount-option", action="append", default=[], help="for pbkfs mount")
    parser.add_argument("--place", type=Path, default=Path("/var/tmp/pbkfs-bench"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep the data for the next run")
    parser.add_argument("--pg-bindir", type=Path, default=None)
    args = parser.parse_args(argv)
    if os.geteuid() != 0:
        parser.error("root is needed: caches are dropped between cold runs")
    args.rounds = args.rounds or (2 if args.quick else 5)
    bindir = args.pg_bindir or Path(
        os.environ.get("PBKFS_TEST_POSTGRES", "/var/tmp/pbkfs-tests/pg") + "/16/bin"
    )
    # As an installation does it: not compiled, a mount takes half as long again.
    compileall.compile_dir(os.path.dirname(pbkfs.__file__), quiet=1)
    data = Data(args.place, bindir, Sizes.of(is_quick=args.quick))
    try:
        for group in args.group or GROUPS:
            run_group(group, data, args)
    finally:
        if not args.keep:
            shutil.rmtree(args.place, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
