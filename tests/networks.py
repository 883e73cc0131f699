"""Tiny networks for tests: quick to compile, with variables drawn by NumPy."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax import config as config_lib
from duc_dlc_jax import programs
from duc_dlc_jax.models import segmenter

NARROW = {  # fields of config.model: the 14-layer network at a quarter of its width
    "depth": 14,
    "width": 4,
    "duc_width": 8,
    "guidance_width": 4,
    "dlc_width": 8,
    "dlc_growth": 4,
}

# Of the whole network, by depth: with 150, 59 and 19 classes.
PARAMETERS = {
    50: (35_927_638, 35_834_363, 35_793_363),
    101: (54_919_766, 54_826_491, 54_785_491),
    152: (70_563_414, 70_470_139, 70_429_139),
    269: (112_443_990, 112_350_715, 112_309_715),
}

# Compiling dominates these tests: the programs run once on tiny arrays.
QUICK = dict(programs.QUICK_CPU)
if jax.__version_info__ < (0, 12):  # the option is gone since
    QUICK["xla_cpu_use_fusion_emitters"] = False
jit = functools.partial(jax.jit, compiler_options=QUICK)
IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device; arrays cannot be placed on it."""

    id: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def shapes_of(model, *inputs, **static):
    init = functools.partial(model.init, **static)
    return jax.eval_shape(init, jax.random.key(0), *(inputs or (IMAGE,)))


def random_variables(model, *inputs, seed=0, **static):
    """{params, batch_stats} drawn by NumPy, without compiling; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, values = path[-1].key, rng.normal(size=leaf.shape)
        if name == "kernel":
            values /= math.sqrt(math.prod(leaf.shape[:-1]))
        elif name in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values *= 0.1
        return jnp.asarray(values, leaf.dtype)

    shapes = shapes_of(model, *inputs, **static)
    shapes = {name: shapes[name] for name in ("params", "batch_stats") if name in shapes}
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network(grid, dtype="float64", classes=11):
    """A tiny model, its variables and its jitted application; float64 needs 64-bit JAX."""
    with jax.enable_x64(dtype == "float64"):
        c = config_lib.default()
        c.model.update(NARROW | {"resize_grid": grid, "dtype": dtype})
        model = segmenter.create(c.model, classes)
        apply = jit(model.apply, static_argnames="coarse")
        return model, random_variables(model), apply


def images_of(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def on_canvas(images, size):
    """uint8 [B, *size, 3]; beyond an image there is noise, which nothing may read."""
    canvas = np.random.default_rng(9).integers(0, 256, (len(images), *size, 3), np.uint8)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return canvas
