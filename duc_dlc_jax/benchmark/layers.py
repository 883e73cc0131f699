"""Dilated convolutions one by one: output, input gradient and weight gradient, beside PyTorch.

The weight gradient comes in the ways that `models.layers` has: the compiler's, and matrix products
of shifted inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax import losses, pixel_scores
from duc_dlc_jax.benchmark.timing import seconds_per_call
from duc_dlc_jax.models import layers, resizing

# (channels in, channels out, side of the grid, dilation): DLC's branches at 1/8 of 480 pixels, the
# convolution of I_l, the dilated stages of output stride 16 and 8, layer1..4 at output stride 32.
SHAPES = [
    *((128, 128, 60, d) for d in (3, 6, 12, 18)),
    (2048, 512, 15, 2),
    (512, 512, 30, 2),
    (512, 512, 60, 4),
    (64, 64, 120, 1),
    (256, 256, 30, 1),
    (512, 512, 15, 1),
]


def arrays(shape: tuple[int, ...], batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input [B, s, s, C], kernel [3, 3, C, D] and the output's gradient [B, s, s, D], float32."""
    channels, features, side, _ = shape
    rng = np.random.default_rng(0)
    sizes = ((batch, side, side, channels), (3, 3, channels, features))
    sizes += ((batch, side, side, features),)
    x, kernel, dy = (rng.standard_normal(size, np.float32) for size in sizes)
    return x, kernel / np.sqrt(9 * channels).astype(np.float32), dy


def functions(dilation: int) -> dict[str, Callable[..., jax.Array]]:
    """(x, kernel, dy) -> one result each; the input's and the weights' gradients use only two."""

    def convolve(x, kernel):
        return layers.convolve(x, kernel, 1, dilation, 1, "compiler")

    def weights(way):
        def gradient(x, kernel, dy):
            _, back = jax.vjp(lambda w: layers.convolve(x, w, 1, dilation, 1, way), kernel)
            return back(dy)[0]

        return gradient

    return {
        "forward": lambda x, kernel, dy: convolve(x, kernel),
        "input gradient": lambda x, kernel, dy: jax.vjp(lambda v: convolve(v, kernel), x)[1](dy)[0],
        **{f"weight gradient, {way}": weights(way) for way in layers.WEIGHT_GRADIENTS},
    }


def table(dtype: Any, batch: int, steps: int, shapes: Any = None) -> list[dict[str, Any]]:
    """Rows {shape, flop, seconds of each function, error}; see `functions`.

    error: largest relative difference (Frobenius) of the ways to compute the weight gradient.
    """
    rows = []
    for shape in shapes or SHAPES:
        x, kernel, dy = (jnp.asarray(a, dtype) for a in arrays(shape, batch))
        row: dict[str, Any] = {"shape": list(shape), "flop": 2 * 9 * x.size * shape[1]}
        gradients = []
        for name, function in functions(shape[3]).items():
            jitted = jax.jit(function)
            row[name] = seconds_per_call(functools.partial(jitted, x, kernel, dy), steps)
            if name.startswith("weight"):
                gradients.append(np.asarray(jitted(x, kernel, dy), np.float64))
        first = np.linalg.norm(gradients[0])
        row["error"] = max(float(np.linalg.norm(g - gradients[0]) / first) for g in gradients)
        rows.append(row)
    return rows


def losses_table(batch: int, side: int, steps: int, classes: Any = (19, 150)) -> list[dict]:
    """Seconds of the loss of 1/8 logits and its gradient, in each way, with temporary bytes.

    "whole" has the logits at full size and JAX's own gradient; the others are `pixel_scores`, whose
    ways are those of CPUs, GPUs and TPUs.
    """
    rng, rows = np.random.default_rng(0), []
    cells = -(-side // 8)
    for k in classes:
        logits = jnp.asarray(rng.standard_normal((batch, cells, cells, k), np.float32))
        labels = jnp.asarray(rng.integers(0, k, (batch, side, side)).astype(np.uint8))

        def whole(logits, labels):
            x = resizing.resize_bilinear(logits, labels.shape[1:], "corners", 1 / 8)
            target = (labels[..., None] == jnp.arange(x.shape[-1])[None, None, None]) * x
            return (jax.nn.logsumexp(x, -1) - target.sum(-1)).mean()

        def slabs(way, rounded, logits, labels):
            how = (), "corners", 8, rounded, 1, way
            scores: Any = pixel_scores.pixel_scores(logits, labels, *how)
            return losses.mean(*losses.sums(scores, labels))

        row: dict[str, Any] = {"classes": k}
        named = {"whole": whole} | {
            f"slabs, {way}, {dtype} gradient": functools.partial(slabs, way, jnp.dtype(dtype))
            for way in pixel_scores.WAYS
            for dtype in ("float32", "bfloat16")
        }
        for name, function in named.items():
            program = jax.jit(jax.value_and_grad(function)).lower(logits, labels).compile()
            seconds = seconds_per_call(functools.partial(program, logits, labels), steps)
            memory: Any = program.memory_analysis()
            row[name] = {"seconds": seconds, "temporary_bytes": memory.temp_size_in_bytes}
        rows.append(row)
    return rows


def show_losses(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name, f in row.items():
            if name != "classes":
                memory = f"{f['temporary_bytes'] / 2**20:,.0f} MiB"
                print(
                    f"loss, {row['classes']} classes, {name}: {1e3 * f['seconds']:.2f} ms, {memory}"
                )


def show(rows: list[dict[str, Any]]) -> None:
    """Milliseconds and TFLOP/s of each function, a line each."""
    for row in rows:
        print("{} -> {} channels, {} cells a side, dilation {}".format(*row["shape"]))
        for name, seconds in row.items():
            if name not in ("shape", "flop", "error"):
                rate = row["flop"] / seconds / 1e12
                print(f"  {name:<28}{1e3 * seconds:>9.3f} ms{rate:>8.1f} TFLOP/s")
