"""Plots of a grid; needs matplotlib (extra `plots`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duc_dlc_jax.ablate import crops
from duc_dlc_jax.ablate.results import Results
from duc_dlc_jax.ablate.significance import half_width
from duc_dlc_jax.ablate.table import Table

CROPS = "crops.png"
SIZE, DPI = (7.0, 4.5), 150  # inches, dots per inch


@dataclasses.dataclass(frozen=True)
class Plot:
    """A file's name, what it shows, and what draws it on a figure's axes."""

    name: str
    text: str
    draw: Callable[[Any], None]


def plots(table: Table, results: Results) -> list[Plot]:
    """The plots of a page; results: with the masks."""
    text = "Mean val mIoU with its 95% confidence interval against "
    found = [
        Plot(
            "cost_macs.png",
            text + "multiply-adds",
            lambda axes: _cost(table, axes, table.gmacs, "GMACs"),
        )
    ]
    if all(table.rates(name) for name in table.runs):
        label = f"training images/s on {table.device}"
        found.append(
            Plot(
                "cost_rate.png",
                text + "the training rate",
                lambda axes: _cost(table, axes, lambda name: table.rates(name)["train"], label),
            )
        )
    by_size = "Boundary IoU of each class, from the rarest to the most common"
    found.append(Plot("boundary_by_class.png", by_size, lambda axes: _boundary(table, axes)))
    if any(len(r["curve"]) > 1 for runs in table.runs.values() for r in runs):
        found.append(
            Plot("curves.png", "Val mIoU while training", lambda axes: _curves(table, axes))
        )
    titles = {"label": "label"} | {f"{n}-seed{seed}": n for n, seed in table.crop_runs().items()}
    masks = {name: results.masks(name) for name in titles}
    if len(masks) > 1 and all(path.exists() for path in masks.values()):
        text = "The crops: the label, and what each network makes of it (its lowest seed)"
        found.append(Plot(CROPS, text, lambda axes: _crops(axes, masks, titles)))
    return found


def write(found: Sequence[Plot], folder: Path) -> None:
    """Draws each into the folder; raises ImportError without matplotlib."""
    from matplotlib.figure import Figure  # late: the page's text needs no extra

    folder.mkdir(parents=True, exist_ok=True)
    for plot in found:
        figure = Figure(figsize=SIZE)
        plot.draw(figure.subplots())
        figure.tight_layout()
        figure.savefig(folder / plot.name, dpi=DPI, metadata={"Software": None})


def _coloured(path: Path) -> list[np.ndarray]:
    """A strip of palette masks -> its crops, uint8 RGB [side, side, 3] each."""
    with Image.open(path) as image:
        return crops.split(np.asarray(image.convert("RGB")))


def _crops(axes: Any, masks: dict[str, Path], titles: dict[str, str]) -> None:
    """A row per crop, a column per network, side by side in one picture."""
    columns = {name: _coloured(path) for name, path in masks.items()}
    figure, count = axes.figure, len(columns["label"])
    axes.remove()
    figure.set_size_inches(1.25 * len(columns) + 0.3, 1.25 * count + 0.3)
    grid = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, squares) in enumerate(columns.items()):
        grid[0, column].set_title(titles[name], fontsize=8)
        for row, square in enumerate(squares):
            grid[row, column].imshow(square, interpolation="nearest")
            grid[row, column].set(xticks=[], yticks=[])
    for row in range(count):
        grid[row, 0].set_ylabel(str(row + 1), fontsize=8, rotation=0, labelpad=8)


def _error(values: list[float]) -> float:
    """Half width of the confidence interval; 0, no bar, for a single run."""
    width = half_width(values)
    return width if np.isfinite(width) else 0.0


def _cost(table: Table, axes: Any, cost: Any, label: str) -> None:
    for i, name in enumerate(table.runs):
        values, color = list(table.scores(name, "mIoU").values()), f"C{i % 10}"
        x, y = cost(name), float(np.mean(values))
        axes.errorbar(x, y, _error(values), fmt="o", capsize=3, color=color)
        axes.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=color)
    axes.margins(x=0.15)  # room for the name of the rightmost
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel=label, ylabel="val mIoU")
    axes.grid(alpha=0.3)


def _boundary(table: Table, axes: Any) -> None:
    """Of the variants of the main questions."""
    names = table.shown()
    pixels = next(iter(table.runs.values()))[0]["val"]["pixels"]
    labels = sorted(pixels, key=lambda c: pixels[c])
    for i, name in enumerate(names):
        rows = [r["val"]["boundary"]["iou"] for r in table.runs[name]]
        values = [[row[c] for row in rows if row[c] is not None] for c in labels]
        means = [float(np.mean(v)) if v else np.nan for v in values]
        place = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.errorbar(
            place, means, [_error(v) for v in values], fmt="o", ms=3, capsize=2, label=name
        )
    total = sum(pixels.values())
    ticks = [f"{c}\n{pixels[c] / total:.1%}" for c in labels]
    axes.set_xticks(np.arange(len(labels)), ticks, fontsize=6)
    axes.set(xlabel="class and its share of the pixels", ylabel="boundary IoU")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=7, ncols=2)


def _curves(table: Table, axes: Any) -> None:
    for name, runs in table.runs.items():
        steps = [point["step"] for point in runs[0]["curve"]]
        means = [np.mean([r["curve"][i]["mIoU"] for r in runs]) for i in range(len(steps))]
        axes.plot(steps, means, marker=".", label=name)
    axes.set(xlabel="step", ylabel="val mIoU")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
