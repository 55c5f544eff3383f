"""The worker dies at every labelled step there is, under a load of PostgreSQL."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import LabelledRuns
from fix_mounts import Mounts, needs_takeovers
from fix_postgres import Programs

# Which steps a run takes, and how often, is another story each time.
_TRIES = 4


@pytest.mark.timeout(3600)
def test_every_label(mounts: Mounts, stopped_cluster: Path, newest_programs: Programs) -> None:
    """Of a new diff, and of one whose worker was killed before."""
    runs = LabelledRuns(mounts, stopped_cluster, newest_programs.bindir, mounts.root / "steps")
    die_at_each(runs, of_both=True)


@needs_takeovers
@pytest.mark.timeout(3600)
def test_every_label_where_another_worker_takes_over(
    mounts: Mounts, stopped_cluster: Path, newest_programs: Programs
) -> None:
    """No client and no server sees an error, from the moment on that the mount serves."""
    runs = LabelledRuns(
        mounts,
        stopped_cluster,
        newest_programs.bindir,
        mounts.root / "steps",
        is_supervised=True,
    )
    die_at_each(runs, of_both=False)


def die_at_each(runs: LabelledRuns, *, of_both: bool) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    first = runs.labels(is_first=True)
    second = runs.labels(is_first=False) if of_both else first
    for label in sorted(first.keys() | second.keys()):
        is_first = label in first
        for attempt in range(_TRIES):
            # Not among the last ones: the next run takes another course.
            n_most = (first if is_first else second)[label] * 2 // 3
            n = chance.randint(1, max(1, n_most)) if attempt == 0 else 1
            runs.how = chance.choice(["kill", "exit"])
            is_reached = runs.check(label, n, is_first=is_first)
            print(
                f"{label} {n} {'first' if is_first else 'again'} {runs.how}",
                "" if is_reached else "not reached",
            )
            if is_reached:
                break
        else:
            raise AssertionError(f"{label} was not reached in {_TRIES} runs")
