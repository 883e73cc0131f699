"""The plot of `growth`; needs matplotlib (extra `plots`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from duc_dlc_jax.benchmark.growth import COSTS


def growth(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Costs over each axis, both relative to their first value; found: of `growth.sweep`.

    The suffix of `path` says the format.
    """
    columns = math.ceil(len(found) / 2)
    figure = Figure(figsize=(4 * columns, 6.5))
    grid = figure.subplots(2, columns, squeeze=False)
    for axes, (axis, rows) in zip(grid.flat, found.items(), strict=False):
        x = np.array([row["size"] for row in rows])
        for cost in (c for c in COSTS if c in rows[0]):
            y = np.array([row[cost] for row in rows])
            axes.loglog(x, y / y[0], marker="o", label=COSTS[cost][0])
        axes.loglog(x, x / x[0], "k:", label="linear")
        axes.set(xlabel=axis, ylabel="cost over the first")
        axes.set_xticks(x, [f"{n:,}" for n in x])
        axes.minorticks_off()
    grid.flat[0].legend()
    figure.tight_layout()
    metadata = {"Software": None} if path.suffix == ".png" else None  # an SVG has no such field
    figure.savefig(path, dpi=100, metadata=metadata)
