"""The power is cut at many moments of recorded runs, from the first mount on.

At each moment several subsets of what was not durable are kept. In the last of the runs the diff is
hydrated and sealed. ``PBKFS_TEST_ENDURANCE=N`` makes N times as many cuts, up to 100 moments a run.

A failure keeps the recording and its base below pytest's directory; the next session removes that,
but for one with ``PBKFS_TEST_RECORDING`` naming it: then all that is done is that cut again.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from crashes import (
    HINTED,
    HINTING,
    LOADED,
    READY,
    SEALED,
    SEALING,
    PowerCuts,
    load_cut,
    record_run,
)
from fix_mounts import Mounts
from fix_postgres import Programs, copy_tree
from machine import kept_recording

N_RUNS = 3
N_SUBSETS = 2
N_CUTS = min(100, round(30 * float(os.environ.get("PBKFS_TEST_ENDURANCE", "1"))))
N_HINT_CUTS = N_CUTS // 6
N_EARLY_CUTS = N_CUTS // 4
N_SEAL_CUTS = N_CUTS // 4

KEPT = kept_recording()

if KEPT is None:

    @pytest.mark.timeout(3600)
    @pytest.mark.parametrize("is_ordered", [True, False], ids=["ordered", "posix"])
    @pytest.mark.parametrize("run", range(N_RUNS))
    def test_power_cuts(
        mounts: Mounts,
        stopped_cluster: Path,
        newest_programs: Programs,
        tmp_path: Path,
        run: int,
        is_ordered: bool,
    ) -> None:
        seed = random.randrange(1 << 32)
        print(f"run {run}, seed {seed}")
        chance = random.Random(seed)
        bindir, is_sealed = newest_programs.bindir, run == N_RUNS - 1
        recording = record_run(mounts, stopped_cluster, bindir, n_turns=2, is_sealed=is_sealed)
        cuts = PowerCuts(recording, mounts, stopped_cluster, bindir, tmp_path / "recording")
        n_seal_cuts = N_SEAL_CUTS if is_sealed else 0
        n_load_cuts = N_CUTS - N_HINT_CUTS - N_EARLY_CUTS - n_seal_cuts
        moments = {
            *cuts.moments(chance, HINTING, HINTED, N_HINT_CUTS),
            *chance.sample(range(1, cuts.position(READY)), N_EARLY_CUTS),
            *(cuts.moments(chance, SEALING, SEALED, n_seal_cuts) if is_sealed else ()),
            *cuts.moments(chance, READY, LOADED, n_load_cuts),
        }
        for number, moment in enumerate(sorted(moments)):
            print(f"cut {number} after event {moment} of {len(recording.events)}")
            cuts.check(moment, seed, is_ordered=is_ordered, subsets=range(N_SUBSETS))

else:

    def test_power_cut_once_more(
        mounts: Mounts, place: Path, newest_programs: Programs, tmp_path: Path
    ) -> None:
        assert KEPT is not None
        recording, cut = load_cut(KEPT)
        print(cut)
        base = copy_tree(KEPT / "base", place / "base")  # where the server's user can read it
        kept = tmp_path / "recording"
        cuts = PowerCuts(recording, mounts, base, newest_programs.bindir, kept)
        cuts.check(cut.moment, cut.seed, is_ordered=cut.is_ordered, subsets=[cut.subset])
