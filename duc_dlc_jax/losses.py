"""Per-pixel cross-entropy (eq. 6), averaged over the pixels that are not ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from duc_dlc_jax.data.labels import IGNORE
from duc_dlc_jax.models.layers import interpolation_matrix, resize_columns

SLAB_BYTES = 2**24  # of one image's logits that are there at a time


def cross_entropy_sum(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [B, H, W, K], labels uint8 [B, H, W] -> (summed cross-entropy, valid pixels).

    Both are sums over the global batch, so that dividing them averages over pixels and not over
    devices. The target's logit is selected by comparison: its gradient needs no scatter.
    """
    valid = labels != IGNORE
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, None, None]
    target = jnp.where(labels[..., None] == classes, logits, 0).sum(-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - target
    return jnp.where(valid, losses, 0).sum(), valid.sum()


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over non-ignored pixels; 0 (with zero gradient) where every pixel is ignored."""
    total, count = cross_entropy_sum(logits, labels)
    return total / jnp.maximum(count, 1)


def over_slabs(
    sums: Callable[[jax.Array, jax.Array], Any],
    logits: jax.Array,
    labels: jax.Array,
    grid: str,
    stride: int,
    columns: str = "",
) -> Any:
    """sums(logits resized to the labels' size, labels), without ever having all of these logits.

    logits: [B, ceil(H / stride), ceil(W / stride), K]; labels: uint8 [B, H, W]. `sums` takes some
    rows of both and returns sums over their pixels (a tree), in which ignored pixels count nothing.
    The rows are resized, reduced, and in the backward pass resized once more, slab by slab.
    columns: how `layers.resize_columns` does its part.
    """
    batch, height, width = labels.shape
    bytes_per_image = height * width * logits.shape[-1] * logits.dtype.itemsize
    count = min(-(-bytes_per_image // SLAB_BYTES), height)
    rows = -(-height // count)
    matrix = interpolation_matrix(logits.shape[1], height, grid, 1 / stride)
    matrix = jnp.pad(matrix, ((0, rows * count - height), (0, 0))).astype(logits.dtype)
    padding = ((0, 0), (0, rows * count - height), (0, 0))
    labels = jnp.pad(labels, padding, constant_values=IGNORE)
    labels = jnp.moveaxis(labels.reshape(batch, count, rows, width), 1, 0)

    def slab(logits, matrix, labels):
        exact = jax.lax.Precision.HIGHEST
        some = jnp.einsum("rh,bhwk->brwk", matrix, logits, precision=exact)
        return sums(resize_columns(some, width, grid, 1 / stride, columns), labels)

    if count == 1:
        return slab(logits, matrix, labels[0])
    slab = jax.checkpoint(slab)
    empty = jax.eval_shape(slab, logits, matrix[:rows], labels[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)

    def add(total, part):
        return jax.tree.map(jnp.add, total, slab(logits, *part)), None

    return jax.lax.scan(add, zeros, (matrix.reshape(count, rows, -1), labels))[0]
