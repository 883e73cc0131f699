"""Padded images: which cells of a grid belong to the image, as int32 sizes at its top left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def valid_sizes(valid: jax.Array, size: Sequence[int], grid: Sequence[int]) -> jax.Array:
    """Height and width in cells of the unpadded part of each image on a grid: int32 [B, 2].

    valid: int32 [B, 2], height and width in pixels of the unpadded part, at the top left of each
    image; size: of the padded images (H, W). A grid of stride s, a power of 2, has ceil(size / s)
    cells.
    """
    strides = [2 ** math.ceil(math.log2(n / cells)) for n, cells in zip(size, grid, strict=True)]
    return -(-valid // jnp.asarray(strides, valid.dtype)[None])


def cells_within(sizes: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Which cells of a grid lie in the top left sizes, int32 [B, 2]: bool [B, *grid, 1]."""
    rows = jnp.arange(grid[0])[None] < sizes[:, :1]
    columns = jnp.arange(grid[1])[None] < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[..., None]


def zero_beyond(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """[B, H, W, C] with the cells at or beyond sizes, int32 [B, 2], set to 0."""
    return jnp.where(cells_within(sizes, x.shape[1:3]), x, 0)
