"""The worker dies between the halves of what must not come apart; all that was acknowledged stays.

``tests/crash`` does the same at every labelled step.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import LabelledRuns
from fix_mounts import Mounts
from fix_postgres import Programs


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "label",
    [
        "journal:pages",  # the pages are durable, their record is not there
        "journal:pages_live",  # the page is written, and nobody knows
        "copy_up:object:rename",  # the copy is durable, without its name
    ],
)
def test_death_at(
    mounts: Mounts, stopped_cluster: Path, newest_programs: Programs, label: str
) -> None:
    n = random.randint(1, 20)
    print(f"the {n}. {label}")
    runs = LabelledRuns(mounts, stopped_cluster, newest_programs.bindir, mounts.root / "steps")
    assert runs.check(label, n, is_first=True)
