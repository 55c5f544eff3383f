"""Benchmarks: every figure is a ratio to native ext4 on the same data. ``./run bench --help``.

The catalog writer is shared with the tests and lies beside them.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
