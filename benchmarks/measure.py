"""Rounds, ratios and results: what a figure is.

A figure is one number a side and a round. The sides are run one after the other in every round
(A B C, A B C, …, starting with another one each time), since a shared machine drifts; a side's
result is the median of its per-round ratios to native, with the least and the largest of them
beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pbkfs

RESULTS = Path(__file__).resolve().parent / "results"
NATIVE = "native"


@dataclass
class Figure:
    """What was measured of one figure: values by side, one a round."""

    name: str
    unit: str
    is_time: bool  # less is better; ratios are native / side, so that more is always better
    values: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    wanted: str = ""

    def add(self, side: str, value: float, **notes: Any) -> None:
        self.values.setdefault(side, []).append(value)
        if notes:
            self.notes.setdefault(side, []).append(notes)

    def ratios(self, side: str, reference: str = NATIVE) -> list[float]:
        pairs = zip(self.values.get(reference, []), self.values[side], strict=False)
        return [(a / b) if self.is_time else (b / a) for a, b in pairs if a and b]

    def summary(self, side: str) -> dict[str, float | int]:
        values = self.values[side]
        made: dict[str, float | int] = {
            "n": len(values),
            "median": statistics.median(values),
            "best": min(values) if self.is_time else max(values),
        }
        ratios = self.ratios(side)
        if ratios:
            made |= {
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        return made

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "better": "less" if self.is_time else "more",
            "wanted": self.wanted,
            "sides": {side: self.summary(side) for side in self.values},
            "values": self.values,
            "notes": self.notes,
        }


def run_rounds(
    sides: Sequence[str], n_rounds: int, measure: Callable[[str, int], None], *, what: str
) -> None:
    """Call ``measure(side, round)`` for every side in every round, in a rotating order."""
    for number in range(n_rounds):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            say(f"{what}: round {number + 1}/{n_rounds}, {side}")
            measure(side, number)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def drop_caches() -> None:
    """Write what is dirty and forget what is clean: pages, entries and inodes. Needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def machine() -> dict[str, Any]:
    """The machine and the versions that a result was taken with."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    revision = _first_line(
        "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
    )
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release().partition("-")[0],
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_mib": int(memory) // 1024,
        "python": platform.python_version(),
        "pbkfs": pbkfs.__version__,
        "revision": revision,
        "fuse_overlayfs": _first_line("fuse-overlayfs", "--version"),
        "load": os.getloadavg()[0],
    }


def write_results(
    group: str, figures: Sequence[Figure], settings: dict[str, Any], directory: Path = RESULTS
) -> Path:
    """Write ``<date>-<group>.json`` and return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    described = machine()
    path = directory / f"{described['date'][:10]}-{group}.json"
    document = {
        "group": group,
        "machine": described,
        "settings": settings,
        "figures": [figure.as_dict() for figure in figures],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def print_table(figures: Sequence[Figure]) -> None:
    """Ratios to native; 1.00 is native, more is better."""
    for figure in figures:
        print(
            f"\n{figure.name} [{figure.unit}]"
            + (f"  wanted: {figure.wanted}" if figure.wanted else "")
        )
        for side in figure.values:
            found = figure.summary(side)
            line = f"  {side:<18} {found['median']:>12.4g}"
            if "ratio" in found:
                line += (
                    f"   x{found['ratio']:.2f} [{found['ratio_min']:.2f}-{found['ratio_max']:.2f}]"
                )
            print(f"{line}   n={found['n']}")
