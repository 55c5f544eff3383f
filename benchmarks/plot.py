"""PNG plots of a result file: ratios to native by figure and side. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3")


def plot(path: Path) -> Path | None:
    """Write a PNG beside the result file; None without matplotlib or anything to compare."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    document = json.loads(path.read_text())
    figures = [f for f in document["figures"] if any("ratio" in s for s in f["sides"].values())]
    if not figures:
        return None
    names = list(dict.fromkeys(s for f in figures for s in f["sides"] if s != "native"))
    height = 0.8 / len(names)
    canvas, axes = pyplot.subplots(figsize=(9, 1.2 + 0.22 * len(figures) * (len(names) + 1)))
    for number, name in enumerate(names):
        at, width, low, high = [], [], [], []
        for row, figure in enumerate(figures):
            found: dict[str, Any] = figure["sides"].get(name, {})
            if "ratio" not in found:
                continue
            at.append(row + number * height)
            width.append(found["ratio"])
            low.append(found["ratio"] - found["ratio_min"])
            high.append(found["ratio_max"] - found["ratio"])
        axes.barh(
            at, width, height, xerr=[low, high], label=name, color=COLOURS[number % len(COLOURS)],
            error_kw={"elinewidth": 0.7},
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(figures))])
    axes.set_yticklabels([figure["name"] for figure in figures], fontsize=8)
    axes.invert_yaxis()
    machine = document["machine"]
    axes.set_xlabel("speed, native ext4 on the same data = 1 (median and range of the rounds)")
    axes.set_title(
        f"{document['group']}: {machine['date'][:10]}, Linux {machine['kernel']},"
        f" {machine['cores']} cores",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    canvas.tight_layout()
    target = path.with_suffix(".png")
    canvas.savefig(target, dpi=110)
    pyplot.close(canvas)
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(plot(Path(argument)))
