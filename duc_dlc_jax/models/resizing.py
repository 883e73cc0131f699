"""Bilinear resizing on the grids the network uses: matrix products, or gathers for valid sizes.

Arrays are [batch, height, width, channels].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.models.layers import parameter_dtype


def interpolation_matrix(size_in: int, size_out: int, grid: str, step: float) -> np.ndarray:
    """[size_out, size_in] float64 bilinear weights along one axis.

    grid: "corners" maps the end cells onto each other (align_corners=True); "stride" puts output
    cell i at input position i * step, clamped to the last cell, which is where strided convolutions
    with symmetric padding really sample; "half_pixel" maps the outer edges of the end cells onto
    each other (align_corners=False). step: output stride over input stride, for "stride" alone.
    """
    index = np.arange(size_out)
    if grid == "corners":
        position = index * (size_in - 1) / max(size_out - 1, 1)
    elif grid == "half_pixel":
        position = ((2 * index + 1) * size_in - size_out) / (2 * size_out)
        position = np.clip(position, 0, size_in - 1)
    else:
        position = np.minimum(index * step, size_in - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, size_in - 1)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (index, low), 1 - (position - low))
    np.add.at(matrix, (index, high), position - low)
    return matrix


def resize_bilinear(
    x: jax.Array,
    size: Sequence[int],
    grid: str,
    step: float,
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None,
    axes: Sequence[int] = (0, 1),
) -> jax.Array:
    """Bilinear resize of [B, H, W, C] to [B, *size, C] in x's dtype; axes: 0 rows, 1 columns.

    Matrix products in the highest precision for float32, so that neither TF32 nor bf16 passes move
    an arg-max. With `valid_sizes` (`valid_cells.valid_sizes`) each image is resized from its valid
    cells to its valid size, by gathering, since the weights differ from image to image; what lies
    beyond is finite and means nothing.
    """
    if valid_sizes is not None:
        source, target = valid_sizes(x.shape[1:3]), valid_sizes(size)
        for axis in axes:
            low, fraction = interpolation_positions(
                source[:, axis], target[:, axis], size[axis], grid, step
            )
            x = interpolate(x, low, fraction, axis + 1)
        return x
    if all(x.shape[axis + 1] == size[axis] for axis in axes):
        return x
    if any(map(jax.export.is_symbolic_dim, (*x.shape[1:3], *size))):
        return _resized(x, size, grid, step, axes)
    return _RESIZE[grid](x, size=tuple(size), step=step, axes=tuple(axes))


def _resized(x, size, grid, step, axes):
    for axis in axes:
        sizes = x.shape[axis + 1], size[axis]
        if any(map(jax.export.is_symbolic_dim, sizes)):
            matrix = traced_interpolation_matrix(*sizes, grid, step).astype(x.dtype)
        else:
            matrix = interpolation_matrix(*sizes, grid, step).astype(x.dtype)
        x = along_axis(matrix, x, axis + 1)
    return x


def along_axis(matrix: Any, x: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
    """matrix [o, i] applied to one axis of x, of length i, in full precision; dtype: of the result.

    Or matrix [n, o, i], one for each place on the axis before. One product for each place on the
    leading axes: nothing is transposed, and rows and batch stay apart, for either may be split over
    devices.
    """
    lead, tail = x.shape[:axis], x.shape[axis + 1 :]
    weights = matrix[(None,) * (axis + 2 - matrix.ndim)]
    weights = jnp.broadcast_to(weights, (*lead, *matrix.shape[-2:]))
    y = jnp.einsum(
        "...oi,...ic->...oc",
        weights,
        x.reshape(*lead, x.shape[axis], math.prod(tail)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return y.reshape(*lead, matrix.shape[-2], *tail)


def _named_resize(grid: str) -> Callable:
    """`_resized` with the name `resize_GRID` in a traced network, where the export finds it."""

    def resize(x, size, step, axes):
        return _resized(x, size, grid, step, axes)

    resize.__name__ = f"resize_{grid}"
    return jax.jit(resize, static_argnames=("size", "step", "axes"))


_RESIZE = {grid: _named_resize(grid) for grid in ("corners", "stride", "half_pixel")}


def traced_interpolation_matrix(size_in: Any, size_out: Any, grid: str, step: float) -> jax.Array:
    """`interpolation_matrix` of sizes that are not known yet: symbols."""
    sizes = jnp.asarray([size_in]), jnp.asarray([size_out])
    low, fraction = interpolation_positions(*sizes, size_out, grid, step)
    return weights_of_positions(low, fraction, size_in)[0]


def weights_of_positions(low: jax.Array, fraction: jax.Array, cells: Any) -> jax.Array:
    """[B, n, cells]: the weights that `interpolate` gives the cells, of its positions [B, n]."""
    cell, low, fraction = jnp.arange(cells)[None, None], low[..., None], fraction[..., None]
    return jnp.where(cell == low, 1 - fraction, 0) + jnp.where(cell == low + 1, fraction, 0)


def interpolation_positions(
    size_in: jax.Array, size_out: jax.Array, cells: int, grid: str, step: float
) -> tuple[jax.Array, jax.Array]:
    """`interpolation_matrix` for sizes that are known at run time, int32 [B].

    Returns for `cells` output cells the lower input cell, int32 [B, cells], and the weight of the
    next one, float [B, cells]. Cells from size_out on repeat the last input cell.
    """
    index, last = jnp.arange(cells)[None], size_in[:, None] - 1
    if grid == "corners":  # whole numbers: exact
        divisor = jnp.maximum(size_out[:, None] - 1, 1)
        low, fraction = index * last // divisor, (index * last % divisor) / divisor
    elif grid == "half_pixel":  # likewise
        divisor = 2 * jnp.maximum(size_out[:, None], 1)
        position = jnp.maximum((2 * index + 1) * size_in[:, None] - divisor // 2, 0)
        low, fraction = position // divisor, (position % divisor) / divisor
    else:  # step is a power of 2: exact
        position = index * step
        low = jnp.floor(position).astype(jnp.int32)
        fraction = position - low
    return jnp.minimum(low, last), jnp.where(low < last, fraction, 0)


def interpolate(x: jax.Array, low: jax.Array, fraction: jax.Array, axis: int) -> jax.Array:
    """(1 - fraction) x[low] + fraction x[low + 1] along axis 1 or 2 of x [B, H, W, C].

    low: int [B, n]; fraction: float [B, n], 0 where low is the last cell. As in `resize_bilinear`'s
    matrices the weights are rounded to x's dtype, and their products summed in float32 or wider.
    """
    shape = (x.shape[0], -1, 1, 1) if axis == 1 else (x.shape[0], 1, -1, 1)
    low, fraction, wide = low.reshape(shape), fraction.reshape(shape), parameter_dtype(x.dtype)
    first, second = (
        jnp.take_along_axis(x, cells, axis, mode="clip").astype(wide) for cells in (low, low + 1)
    )
    below, above = (part.astype(x.dtype).astype(wide) for part in (1 - fraction, fraction))
    return (below * first + above * second).astype(x.dtype)
