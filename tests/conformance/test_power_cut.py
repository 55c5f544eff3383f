"""The power is cut at a few moments of a recorded run; what was acknowledged is there afterwards.

``tests/crash`` does the same at many more moments.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import LOADED, READY, PowerCuts, record_run
from fix_mounts import Mounts
from fix_postgres import Programs

N_CUTS = 4


@pytest.mark.timeout(600)
def test_power_cut(mounts: Mounts, basebackup: Path, newest_programs: Programs) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    events = record_run(mounts, basebackup, newest_programs.bindir, n_turns=1)
    cuts = PowerCuts(events, mounts, basebackup, newest_programs.bindir)
    first, last = cuts.position(READY), cuts.position(LOADED)
    for number, moment in enumerate(sorted(chance.sample(range(first + 1, last), N_CUTS))):
        print(f"cut {number} after event {moment} of {len(events)}")
        cuts.check(moment, chance, is_ordered=number % 2 == 0)
