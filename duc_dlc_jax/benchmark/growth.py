"""How the training step's cost grows with the image, the batch, the classes and the depth.

FLOPs, bytes that kernels move, and memory are read from compiled programs, so that any machine
says the same; seconds, where asked for, are this machine's. One of the four grows at a time, from
the configuration. A cost that is c x^p has the exponent p: the slope of its logarithm over that of
x, by least squares over all values and, where a fixed part hides it, between the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import forecast, markdown, programs, sharding
from duc_dlc_jax.benchmark import model
from duc_dlc_jax.data.records import find_spec
from duc_dlc_jax.models import segmenter
from duc_dlc_jax.models.resnet import BLOCKS
from duc_dlc_jax.train_step import init_variables

COSTS = {
    "flops": ("FLOPs", 1e9, "GFLOP"),
    "bytes": ("bytes moved", 1e6, "MB"),
    "temporaries": ("temporaries", 1e6, "MB"),
    "seconds": ("time of a step", 1, "s"),
}
# What an axis changes, and the number that grows with it.
AXES: dict[str, tuple[str, Callable[[int], int]]] = {
    "pixels": ("data.crop_size", lambda side: side * side),
    "batch": ("train.batch_size", lambda images: images),
    "classes": ("", lambda classes: classes),
    "blocks": ("model.depth", lambda depth: sum(BLOCKS[depth])),
}


def measure(
    config: ml_collections.ConfigDict, classes: int, timed: bool = False
) -> dict[str, float]:
    """`COSTS` of the training step of `config` on one device; seconds only if `timed`."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    if timed:
        data = model.random_batch(config, classes)
        network = segmenter.create(config.model, classes)
        step = model.Step(config, network, mesh, init_variables(network, 0), data, 10)
        compiled = step.compiled
    else:
        lowered = forecast.lowered_step(config, classes, mesh)
        on_cpu = jax.default_backend() == "cpu"
        compiled = lowered.compile(programs.QUICK_CPU if on_cpu else None)
    flops, moved = programs.cost(compiled)
    memory = compiled.memory_analysis()
    found = {"flops": flops, "bytes": moved, "temporaries": memory.temp_size_in_bytes}
    if timed:
        found["seconds"] = model.median_seconds(step, 3)
    return found


def sweep(
    config: ml_collections.ConfigDict,
    values: Mapping[str, Sequence[int]],
    timed: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """{axis: [{value, size, *COSTS}]}; values: of each axis to measure; timed: axes with seconds.

    A program that two axes have in common is compiled once.
    """
    known: dict[tuple[str, int, bool], dict[str, float]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, chosen in values.items():
        field, size = AXES[axis]
        for value in chosen:
            changed = config.copy_and_resolve_references()
            classes = find_spec(config.data).num_classes
            if field:
                changed.update_from_flattened_dict({field: value})
            else:
                classes = value
            key = config_lib.to_json(changed), classes, axis in timed
            if key not in known:
                known[key] = measure(changed, classes, axis in timed)
            row = {"value": value, "size": size(value)} | known[key]
            found.setdefault(axis, []).append(row)
            print(sentence(axis, row), flush=True)
    return found


def sentence(axis: str, row: dict[str, Any]) -> str:
    costs = (f"{row[c] / by:,.4g} {unit}" for c, (_, by, unit) in COSTS.items() if c in row)
    return f"{axis} {row['size']:,}: " + ", ".join(costs)


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{cost: {all, last}}: see the module; of the costs that the rows have."""
    x = np.log([row["size"] for row in rows])
    found = {}
    for cost in (c for c in COSTS if c in rows[0]):
        y = np.log([row[cost] for row in rows])
        last = (y[-1] - y[-2]) / (x[-1] - x[-2])
        found[cost] = {"all": float(np.polyfit(x, y, 1)[0]), "last": float(last)}
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Exponents of each axis and cost as Markdown: over all values, and between the last two."""
    shown = [c for c in COSTS if any(c in rows[0] for rows in found.values())]
    lines = []
    for axis, rows in found.items():
        slopes = exponents(rows)
        cells = (
            f"{slopes[c]['all']:.2f}, {slopes[c]['last']:.2f}" if c in slopes else "" for c in shown
        )
        lines.append([axis, f"{rows[0]['size']:,}, {rows[-1]['size']:,}", *cells])
    return markdown.table(["grows", "from, to", *(COSTS[c][0] for c in shown)], lines)
