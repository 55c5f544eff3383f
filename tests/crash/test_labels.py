"""The worker dies at every labelled step there is, under a load of PostgreSQL."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import LabelledRuns
from fix_mounts import Mounts
from fix_postgres import Programs


@pytest.mark.timeout(3600)
def test_every_label(mounts: Mounts, stopped_cluster: Path, newest_programs: Programs) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    runs = LabelledRuns(mounts, stopped_cluster, newest_programs.bindir, mounts.root / "steps")
    first, second = runs.labels()
    missed = []
    for label in sorted(first.keys() | second.keys()):
        is_first = label in first
        # Not among the last ones: the next run takes another course.
        n = chance.randint(1, max(1, (first if is_first else second)[label] * 2 // 3))
        is_reached = runs.check(label, n, is_first=is_first)
        print(
            f"{label} {n} {'first' if is_first else 'again'}", "" if is_reached else "not reached"
        )
        if not is_reached:
            missed.append(label)
    assert len(missed) * 5 < len(first | second), f"not reached: {missed}"
