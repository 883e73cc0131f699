"""The layer-wise floor: how fast a device could run the network layer by layer, at its best.

A convolution takes at least the longer of its arithmetic at the device's matrix rate and its
inputs, weights and outputs, each moved once at the device's copy rate. Training runs three of them:
the output, the input's gradient (not where the input is the image) and the weights' gradient. The
BN and ReLU after it move its output: in inference and forward once in, once out (the sums of a
forward pass are free, as if taken by the convolution); backward twice in for the sums of the
gradient, twice in and once out for the gradient. Convolutions without BN have none of this, and in
inference it could be folded away: both floors are there. Sums of branches, resizes, the loss and
the update count as free. g(I) counts as `DUC` computes it, at the pixels that the stride-4
convolution reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from duc_dlc_jax.benchmark.timing import seconds_per_call
from duc_dlc_jax.models import counts
from duc_dlc_jax.models.counts import Convolution
from duc_dlc_jax.models.segmenter import Segmenter

Ceilings = dict[str, float]  # flop_per_second, byte_per_second
Path = tuple[str, ...]  # of a module


def ceilings(dtype: Any) -> Ceilings:
    """Measured rates of the first device: a square matrix product in `dtype`, and a copy.

    Sizes by backend: 8192 and 2 GiB on an accelerator, 2048 and 256 MiB on a CPU. A copy counts its
    bytes twice, read and written.
    """
    small = jax.default_backend() == "cpu"
    side, numbers = (2048, 2**26) if small else (8192, 2**29)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((side, side), np.float32), dtype) for _ in range(2))
    source = jnp.asarray(np.resize(rng.standard_normal(2**20, np.float32), numbers))
    product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    return {
        "flop_per_second": 2 * side**3 / seconds_per_call(lambda: product(a, b), 7),
        "byte_per_second": 2 * source.nbytes / seconds_per_call(lambda: copy(source), 7),
    }


def executed(model: Segmenter, height: int, width: int) -> list[Convolution]:
    """`counts.convolutions` with g(I) as `DUC` computes it: one convolution of the image."""
    found = counts.convolutions(model, height, width)
    guidance = {c.path[-1]: c for c in found if c.path[0] == "duc"}
    if "guidance_conv" not in guidance:
        return found
    first, last = guidance["g_conv1"], guidance["guidance_conv"]
    taps = last.outputs // model.duc_width * model.guidance_kernel**2  # pixels that are read
    made = taps * 3 * model.guidance_width
    merged = Convolution(
        last.path, min(first.inputs, 3 * taps), first.weights + last.weights, last.outputs,
        last.macs + made,
    )  # fmt: skip
    fused = ("g_conv1", "g_conv2", "guidance_conv")
    rest = [c for c in found if c.path[0] != "duc" or c.path[-1] not in fused]
    return [merged, *rest]


def seconds(
    layers: list[Convolution],
    normalised: Collection[Path],
    batch: int,
    itemsize: int,
    ceilings: Ceilings,
    training: bool,
) -> dict[str, float]:
    """Floor in seconds of each layer group (`group_of`) for `batch` images.

    normalised: paths of the convolutions whose BN is executed; see `with_norm`.
    """
    found: dict[str, float] = defaultdict(float)
    for layer in layers:
        inputs, outputs = batch * layer.inputs, batch * layer.outputs
        moved = (inputs + outputs + layer.weights) * itemsize
        least = max(
            2 * batch * layer.macs / ceilings["flop_per_second"],
            moved / ceilings["byte_per_second"],
        )
        of_image = layer.path[-1] in ("guidance_conv", "stem_conv1") or layer.path == (
            "backbone",
            "conv1",
        )
        passes = (2 if of_image else 3) if training else 1
        found[group_of(layer.path)] += passes * least
        if layer.path in normalised:
            moved = (7 if training else 2) * outputs * itemsize
            found[group_of(layer.path)] += moved / ceilings["byte_per_second"]
    return dict(found)


def with_norm(layers: list[Convolution], batch_stats: Any) -> set[Path]:
    """Paths of the convolutions that a BN follows: `reduce_conv` where there is `reduce_bn`."""
    norms = {path[:-1] for path in traverse_util.flatten_dict(batch_stats)}
    paths = (layer.path for layer in layers)
    return {path for path in paths if (*path[:-1], path[-1].replace("conv", "bn")) in norms}


def group_of(path: tuple[str, ...]) -> str:
    """The layer group of a module: stem, layer1..4, guidance, duc, context, classifier, ..."""
    if path[0] == "backbone":
        return path[1].split("_")[0] if path[1].startswith("layer") else "stem"
    if path[0] == "duc":
        return "guidance" if path[-1].startswith(("g_", "guidance_")) else "duc"
    return path[0]
