"""The power is cut at a few moments of a recorded run; what was acknowledged is there afterwards.

``tests/crash`` does the same at many more moments.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import HINTED, HINTING, LOADED, READY, PowerCuts, record_run
from fix_mounts import Mounts
from fix_postgres import Programs

N_CUTS = 3


@pytest.mark.timeout(600)
def test_power_cut(mounts: Mounts, stopped_cluster: Path, newest_programs: Programs) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    events = record_run(mounts, stopped_cluster, newest_programs.bindir, n_turns=1)
    cuts = PowerCuts(events, mounts, stopped_cluster, newest_programs.bindir)
    moments = [
        *cuts.moments(chance, HINTING, HINTED, 1),
        *cuts.moments(chance, READY, LOADED, N_CUTS - 1),
    ]
    for number, moment in enumerate(moments):
        print(f"cut {number} after event {moment} of {len(events)}")
        cuts.check(moment, chance, is_ordered=number % 2 == 0)
