"""A folded network as StableHLO: one file that XLA compiles for CPU, CUDA and TPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from duc_dlc_jax.export.folding import FoldedNetwork
from duc_dlc_jax.inference import class_by_class
from duc_dlc_jax.models import resizing

PLATFORMS = ("cpu", "cuda", "tpu")
MIN_SIDE = 32  # pixels: a cell of the coarsest grid


def build(network: FoldedNetwork, size: tuple[int, int] | None, dtype: Any, kind: str) -> bytes:
    """The serialised function image [B, H, W, 3] of `dtype` -> `ids` or `logits`.

    size: (height, width) in pixels, or None for any; the batch is always free. `jax.export`
    deserialises it; each size is compiled when it is first called.
    """
    sides = ("height", "width") if size is None else map(str, size)
    bounds = [f"{name} >= {MIN_SIDE}" for name in ("height", "width")] if size is None else []
    shape = export.symbolic_shape(", ".join(["batch", *sides, "3"]), constraints=bounds)
    function = network.logits if kind == "logits" else functools.partial(_ids, network)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)
    return bytes(exported(jax.ShapeDtypeStruct(shape, dtype)).serialize())


def _ids(network: FoldedNetwork, images: jax.Array) -> jax.Array:
    """As `FoldedNetwork.ids`; on a CPU class by class, as the evaluation finds them."""
    model, size = network.model, images.shape[1:3]
    grid, stride = model.resize_grid, model.logit_stride
    if stride == 1:
        return network.ids(images)

    def by_class(logits):
        tables = []
        for cells, pixels in zip(logits.shape[1:3], size, strict=True):
            sizes = jnp.asarray([cells]), jnp.asarray([pixels])
            table = resizing.interpolation_positions(*sizes, pixels, grid, 1 / stride)
            tables.append([jnp.broadcast_to(x, (logits.shape[0], pixels)) for x in table])
        return class_by_class(logits, *tables)

    def at_once(logits):
        logits = resizing.resize_bilinear(logits, size, grid, 1 / stride)
        return logits.argmax(-1).astype(jnp.uint8)

    logits = network.logits(images, coarse=True)
    return jax.lax.platform_dependent(logits, cpu=by_class, default=at_once)
