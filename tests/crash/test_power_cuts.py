"""The power is cut at many moments of recorded runs, from the first mount on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from crashes import HINTED, HINTING, LOADED, READY, PowerCuts, record_run
from fix_mounts import Mounts
from fix_postgres import Programs

N_RUNS = 3
N_CUTS = 24
N_HINT_CUTS = 4
N_EARLY_CUTS = 6


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("is_ordered", [True, False], ids=["ordered", "posix"])
@pytest.mark.parametrize("run", range(N_RUNS))
def test_power_cuts(
    mounts: Mounts, stopped_cluster: Path, newest_programs: Programs, run: int, is_ordered: bool
) -> None:
    seed = random.randrange(1 << 32)
    print(f"run {run}, seed {seed}")
    chance = random.Random(seed)
    events = record_run(mounts, stopped_cluster, newest_programs.bindir, n_turns=2)
    cuts = PowerCuts(events, mounts, stopped_cluster, newest_programs.bindir)
    moments = sorted(
        {
            *cuts.moments(chance, HINTING, HINTED, N_HINT_CUTS),
            *chance.sample(range(1, cuts.position(READY)), N_EARLY_CUTS),
            *cuts.moments(chance, READY, LOADED, N_CUTS - N_HINT_CUTS - N_EARLY_CUTS),
        }
    )
    for number, moment in enumerate(moments):
        print(f"cut {number} after event {moment} of {len(events)}")
        cuts.check(moment, chance, is_ordered=is_ordered)
