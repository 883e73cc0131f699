"""A folded network as StableHLO: one file that XLA compiles for CPU, CUDA and TPU."""

from __future__ import annotations

from typing import Any

import jax
from jax import export

from duc_dlc_jax.export.folding import FoldedNetwork

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
    function = jax.jit(network.output(kind))
    exported = export.export(function, platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, dtype))
    return bytes(exported.serialize())
