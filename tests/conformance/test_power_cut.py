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
def test_power_cut(
    mounts: Mounts, stopped_cluster: Path, newest_programs: Programs, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    bindir = newest_programs.bindir
    recording = record_run(mounts, stopped_cluster, bindir, n_turns=1)
    cuts = PowerCuts(recording, mounts, stopped_cluster, bindir, tmp_path / "recording")
    moments = [
        *cuts.moments(chance, HINTING, HINTED, 1),
        *cuts.moments(chance, READY, LOADED, N_CUTS - 1),
    ]
    for number, moment in enumerate(moments):
        print(f"cut {number} after event {moment} of {len(recording.events)}")
        cuts.check(moment, seed, is_ordered=number % 2 == 0)
