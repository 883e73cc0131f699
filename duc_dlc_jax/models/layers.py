"""Convolution, batch normalisation and bilinear resizing, as the whole network uses them.

Arrays are [batch, height, width, channels]. Parameters and statistics are float32 (float64 when the
compute dtype is float64); activations have the compute dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any
IMAGE_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class NormalInit:
    """Normal with variance `gain` / fan, fan being k * k * channels in ("in") or out ("out")."""

    gain: float
    fan: str

    def std(self, shape: Sequence[int]) -> float:
        receptive, channels_in, channels_out = math.prod(shape[:-2]), shape[-2], shape[-1]
        return math.sqrt(
            self.gain / (receptive * (channels_in if self.fan == "in" else channels_out))
        )

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: Dtype) -> jax.Array:
        return self.std(shape) * jax.random.normal(key, shape, dtype)

    def draw(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """The same distribution from NumPy: nothing to compile."""
        return self.std(shape) * rng.standard_normal(shape)


backbone_init = NormalInit(2.0, "out")  # He et al., 2015
head_init = NormalInit(1 / 3, "in")  # the variance of PyTorch's default


def parameter_dtype(dtype: Dtype) -> Dtype:
    """float32, or float64 for float64 compute: parameters never take a narrower compute dtype."""
    return jnp.promote_types(jnp.float32, dtype)


def normalize(images: jax.Array, dtype: Dtype) -> jax.Array:
    """uint8 RGB [B, H, W, 3] -> (x / 255 - mean) / std in `dtype`; floats pass as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    wide = parameter_dtype(dtype)
    mean = np.asarray(IMAGE_MEAN, wide)[None, None, None]
    std = np.asarray(IMAGE_STD, wide)[None, None, None]
    return ((images.astype(wide) / 255 - mean) / std).astype(dtype)


class Conv(nn.Module):
    """k x k convolution with explicit symmetric padding d (k - 1) / 2, as PyTorch pads.

    (`SAME` pads stride-2 kernels differently on even sizes.) An output grid has ceil(size / stride)
    cells. Where the windows do not overlap (kernel <= stride, and 1x1), the convolution is written
    as one matrix product, which every backend runs and differentiates well.

    `valid_sizes`: from the grid (h, w) to int32 [B, 2] (`valid_sizes` below); cells beyond these
    are set to 0 before a kernel larger than 1 reads them, as if the image ended there.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    bias: bool = False
    init: Any = head_init
    dtype: Dtype = jnp.float32
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.init, shape, parameter_dtype(self.dtype))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.valid_sizes is not None and self.kernel > 1:
            x = zero_beyond(x, self.valid_sizes(x.shape[1:3]))
        if self.kernel == 1:
            x = x[:, :: self.stride, :: self.stride]
            y = jax.lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
        elif self.kernel <= self.stride:
            windows = separate_windows(x, self.kernel, self.stride)
            y = jnp.einsum("bhiwjc,ijcf->bhwf", windows, kernel)
        else:
            pad = self.dilation * (self.kernel - 1) // 2
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                ((pad, pad), (pad, pad)),
                rhs_dilation=(self.dilation, self.dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        if self.bias:
            shape, wide = (self.features,), parameter_dtype(self.dtype)
            bias = self.param("bias", nn.initializers.zeros, shape, wide)
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


def separate_windows(x: jax.Array, kernel: int, stride: int) -> jax.Array:
    """[B, H, W, C] -> windows [B, ceil(H / s), k, ceil(W / s), k, C] of a k x k, stride s >= k."""
    pad = (kernel - 1) // 2
    batch, height, width, channels = x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    ends = rows * stride - height - pad, columns * stride - width - pad  # negative: cut off
    x = jax.lax.pad(
        x,
        jnp.zeros((), x.dtype),
        ((0, 0, 0), (pad, ends[0], 0), (pad, ends[1], 0), (0, 0, 0)),
    )
    x = x.reshape(batch, rows, stride, columns, stride, channels)
    return x[:, :, :kernel, :, :kernel]


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 maximum, stride 2, padding 1: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C].

    Written as comparisons along each axis, whose gradient goes to the first maximum of a window in
    row order, as PyTorch's does; XLA's own gradient (select-and-scatter) is slow and, on GPU, not
    deterministic.
    """
    lowest = jnp.array(-jnp.inf, x.dtype)
    for axis in (2, 1):
        size = x.shape[axis]
        cells = -(-size // 2)
        padding = [(0, 0, 0)] * 4
        padding[axis] = (1, 2 * cells - size, 0)
        padded = jax.lax.pad(x, lowest, padding)
        first, second, third = (
            jax.lax.slice_in_dim(padded, i, i + 2 * cells - 1, 2, axis) for i in range(3)
        )
        x = jnp.where(first >= second, first, second)
        x = jnp.where(x >= third, x, third)
    return x


class BatchNorm(nn.Module):
    """Batch normalisation over (batch, height, width), its statistics in float32 or wider.

    Under `jit` the batch axis is the global one, so `groups=1` is synchronised BN over all devices.
    With `groups=G` the batch splits into G contiguous parts (one per device), each normalised by
    its own statistics; the running variance then holds the mean of the groups' variances plus the
    variance of their means, which is the variance of the whole batch.

    `running_variance`: "biased" stores E[x^2] - E[x]^2 (Flax); "unbiased" stores n / (n - 1) of it
    (PyTorch), n being the values per channel of a group.

    `valid_sizes`: from the grid (h, w) to int32 [B, 2], the part of each image that enters the
    statistics (`valid_sizes` below); n is the number of its cells, and the groups' shares in the
    running statistics are proportional to it. All cells are normalised. A group without a valid
    cell counts all its cells.
    """

    momentum: float = 0.9  # running = momentum * running + (1 - momentum) * batch
    epsilon: float = 1e-5
    groups: int = 1
    running_variance: str = "biased"
    use_running_average: bool = False
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = parameter_dtype(self.dtype)
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), wide)
        bias = self.param("bias", nn.initializers.zeros, (channels,), wide)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide)
        if self.use_running_average:
            mean, var = running_mean.value[None], running_var.value[None]
            return self._affine(x[None], mean, var, scale, bias)[0]

        groups = 1 if self.is_initializing() else self.groups
        grouped = x.reshape(groups, -1, *x.shape[1:])
        values = grouped.astype(wide)
        if self.valid_sizes is None:
            mean, var, batch_mean, batch_var = self._statistics(values)
        else:
            grid = x.shape[1:3]
            mask = cells_within(self.valid_sizes(grid), grid).reshape(*grouped.shape[:-1], 1)
            mean, var, batch_mean, batch_var = self._masked_statistics(values, mask)
        if not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * batch_mean
            running_var.value = keep * running_var.value + (1 - keep) * batch_var
        return self._affine(grouped, mean, var, scale, bias).reshape(x.shape)

    def _statistics(self, values):
        """values [G, B / G, H, W, C] -> mean and variance of each group [G, C] and of all [C].

        The variance of all is the one to store, biased or not.
        """
        mean = values.mean((1, 2, 3))
        var = jnp.maximum((values * values).mean((1, 2, 3)) - mean * mean, 0)
        count = values[0].size // values.shape[-1]
        unbiased = self.running_variance == "unbiased"
        stored = var * (count / max(count - 1, 1)) if unbiased else var
        return mean, var, mean.mean(0), stored.mean(0) + mean.var(0)

    def _masked_statistics(self, values, mask):
        """As `_statistics`, of the cells where mask, bool [G, B / G, H, W, 1], holds."""
        mask = mask | ~mask.any((1, 2, 3), keepdims=True)
        count = mask.sum((1, 2, 3)).astype(values.dtype)  # [G, 1]
        values = jnp.where(mask, values, 0)
        mean = values.sum((1, 2, 3)) / count
        var = jnp.maximum((values * values).sum((1, 2, 3)) / count - mean * mean, 0)
        unbiased = self.running_variance == "unbiased"
        stored = var * (count / jnp.maximum(count - 1, 1)) if unbiased else var
        share = count / count.sum()
        batch_mean = (share * mean).sum(0)
        batch_var = (share * (stored + (mean - batch_mean[None]) ** 2)).sum(0)
        return mean, var, batch_mean, batch_var

    def _affine(self, x, mean, var, scale, bias):
        """x: [groups, B / groups, H, W, C]; mean and var: [groups, C]; scale and bias: [C]."""
        factor = scale[None] * jax.lax.rsqrt(var + self.epsilon)
        shift = bias[None] - factor * mean
        return (x * factor[:, None, None, None] + shift[:, None, None, None]).astype(self.dtype)


def interpolation_matrix(size_in: int, size_out: int, grid: str, step: float) -> np.ndarray:
    """[size_out, size_in] float64 bilinear weights along one axis.

    grid: "corners" maps the end cells onto each other (align_corners=True); "stride" puts output
    cell i at input position i * step, clamped to the last cell, which is where strided convolutions
    with symmetric padding really sample. step: output stride over input stride.
    """
    index = np.arange(size_out)
    if grid == "corners":
        position = index * (size_in - 1) / max(size_out - 1, 1)
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
    an arg-max. With `valid_sizes` (below) each image is resized from its valid cells to its valid
    size, by gathering, since the weights differ from image to image; what lies beyond is finite and
    means nothing.
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
    for axis in axes:  # rows and batch stay apart: either may be split over devices
        lead, tail = x.shape[: axis + 1], x.shape[axis + 2 :]
        matrix = interpolation_matrix(x.shape[axis + 1], size[axis], grid, step).astype(x.dtype)
        y = x.reshape(*lead, x.shape[axis + 1], math.prod(tail))
        weights = jnp.broadcast_to(matrix[(None,) * len(lead)], (*lead, *matrix.shape))
        y = jnp.einsum("...oi,...ic->...oc", weights, y, precision=jax.lax.Precision.HIGHEST)
        x = y.reshape(*lead, size[axis], *tail)
    return x


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
    else:  # step is a power of 2: exact
        position = index * step
        low = jnp.floor(position).astype(jnp.int32)
        fraction = position - low
    return jnp.minimum(low, last), jnp.where(low < last, fraction, 0)


def interpolate(x: jax.Array, low: jax.Array, fraction: jax.Array, axis: int) -> jax.Array:
    """(1 - fraction) x[low] + fraction x[low + 1] along axis 1 or 2 of x [B, H, W, C].

    low: int [B, n]; fraction: float [B, n], 0 where low is the last cell.
    """
    shape = (len(x), -1, 1, 1) if axis == 1 else (len(x), 1, -1, 1)
    low, fraction = low.reshape(shape), fraction.astype(x.dtype).reshape(shape)
    first, second = (jnp.take_along_axis(x, cells, axis, mode="clip") for cells in (low, low + 1))
    return (1 - fraction) * first + fraction * second
