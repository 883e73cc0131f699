"""Pyramid pooling of PSPNet (Zhao et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

BINS = (1, 2, 3, 6)


class PSP(nn.Module):
    """Means over 1, 4, 9 and 36 bins, 1x1 -> C / 4 each, beside the input; then 3x3 -> width.

    [B, h, w, C] -> [B, h, w, width]. Bins are those of PyTorch's adaptive pooling (they may share
    cells) and return to the grid with corners on corners, whatever `resize_grid` says: no stride
    belongs to them. Published: width 512. `valid_sizes`: as in `resizing.resize_bilinear`.
    """

    width: int
    conv: Any
    norm: Any
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        grid = x.shape[1:3]
        sizes = jnp.asarray([grid]) if self.valid_sizes is None else self.valid_sizes(grid)
        parts = [x]
        for bins in BINS:
            y = _both_axes(x, [_pooling(sizes[:, i], bins, grid[i]) for i in (0, 1)])
            y = self.conv(x.shape[-1] // len(BINS), name=f"bins{bins}_conv")(y)
            y = nn.relu(self.norm(valid_sizes=None, name=f"bins{bins}_bn")(y))
            parts.append(_both_axes(y, [_returning(sizes[:, i], bins, grid[i]) for i in (0, 1)]))
        x = self.conv(self.width, 3, name="out_conv")(jnp.concatenate(parts, axis=-1))
        return nn.relu(self.norm(name="out_bn")(x))


def _pooling(sizes: jax.Array, bins: int, cells: int) -> jax.Array:
    """[B, bins, cells]: the mean of the cells [i n / bins, ceil((i + 1) n / bins)), n in sizes."""
    i, n, cell = jnp.arange(bins)[None, :, None], sizes[:, None, None], jnp.arange(cells)
    inside = (cell[None, None] >= i * n // bins) & (cell[None, None] < -(-(i + 1) * n // bins))
    return inside / inside.sum(-1, keepdims=True)


def _returning(sizes: jax.Array, bins: int, cells: int) -> jax.Array:
    """[B, cells, bins]: bilinear weights from the bins to the n cells, corners on corners."""
    n, cell = sizes[:, None, None], jnp.arange(cells)[None, :, None]
    place = cell * (bins - 1) / jnp.maximum(n - 1, 1)
    return jnp.maximum(1 - jnp.abs(place - jnp.arange(bins)[None, None]), 0)


def _both_axes(x: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
    """[B, H, W, C] with [B, h, H] and [B, w, W] -> [B, h, w, C] in x's dtype; sums are wider."""
    rows, columns = (jnp.broadcast_to(m, (x.shape[0], *m.shape[1:])) for m in matrices)
    y = jnp.einsum("bhy,bwx,byxc->bhwc", rows, columns, x, precision="highest")
    return y.astype(x.dtype)
