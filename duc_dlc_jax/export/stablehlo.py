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
from duc_dlc_jax.models.segmenter import Segmenter

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
    if network.model.logit_stride == 1:
        return network.ids(images)
    geometry = network.model, images.shape[1:3]
    return jax.lax.platform_dependent(
        network.logits(images, coarse=True),
        cpu=functools.partial(by_class, *geometry),
        default=functools.partial(at_once, *geometry),
    )


def by_class(model: Segmenter, size: tuple[int, int], logits: jax.Array) -> jax.Array:
    """Logits [B, h, w, K] on the network's own grid -> train ids uint8 [B, *size]."""
    tables = []
    for cells, pixels in zip(logits.shape[1:3], size, strict=True):
        sizes = jnp.asarray([cells]), jnp.asarray([pixels])
        step = 1 / model.logit_stride
        table = resizing.interpolation_positions(*sizes, pixels, model.resize_grid, step)
        tables.append([jnp.broadcast_to(x, (logits.shape[0], pixels)) for x in table])
    return class_by_class(logits, *tables)


def at_once(model: Segmenter, size: tuple[int, int], logits: jax.Array) -> jax.Array:
    """As `by_class`, of whole logits: what GPUs and TPUs run."""
    logits = resizing.resize_bilinear(logits, size, model.resize_grid, 1 / model.logit_stride)
    return logits.argmax(-1).astype(jnp.uint8)
