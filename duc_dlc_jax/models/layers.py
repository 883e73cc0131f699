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
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    bias: bool = False
    init: Any = head_init
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.init, shape, parameter_dtype(self.dtype))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
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

    `valid_cells`: from the grid (h, w) to bool [B, h, w, 1], the cells that enter the statistics
    (`valid_cells` below); n is their number, and the groups' shares in the running statistics are
    proportional to it. All cells are normalised. A group without a valid cell counts all its cells.
    """

    momentum: float = 0.9  # running = momentum * running + (1 - momentum) * batch
    epsilon: float = 1e-5
    groups: int = 1
    running_variance: str = "biased"
    use_running_average: bool = False
    valid_cells: Callable[[Sequence[int]], jax.Array] | None = None
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
        if self.valid_cells is None:
            mean, var, batch_mean, batch_var = self._statistics(values)
        else:
            mask = self.valid_cells(x.shape[1:3]).reshape(*grouped.shape[:-1], 1)
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


def valid_cells(valid: jax.Array, size: Sequence[int], grid: Sequence[int]) -> jax.Array:
    """The cells of a grid that do not lie in the padding of their image: bool [B, *grid, 1].

    valid: int32 [B, 2], height and width of the unpadded part at the top left of each image; size:
    of the padded images (H, W); pixels. A grid of stride s, a power of 2, has ceil(size / s) cells,
    cell i on pixel s * i.
    """

    def along(axis: int) -> jax.Array:  # bool [B, grid[axis]]
        stride = 2 ** math.ceil(math.log2(size[axis] / grid[axis]))
        return stride * np.arange(grid[axis])[None] < valid[:, axis, None]

    return along(0)[:, :, None, None] & along(1)[:, None, :, None]


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


def resize_bilinear(x: jax.Array, size: Sequence[int], grid: str, step: float) -> jax.Array:
    """Bilinear resize of [B, H, W, C] to [B, *size, C] as two matrix products, in x's dtype.

    Highest matrix precision for float32, so that neither TF32 nor bf16 passes move an arg-max.
    """
    if x.shape[1:3] == tuple(size):
        return x
    batch, height, width, channels = x.shape
    highest = jax.lax.Precision.HIGHEST

    def product(matrix: np.ndarray, y: jax.Array) -> jax.Array:  # [out, in], [N, in, C]
        weights = jnp.broadcast_to(matrix.astype(x.dtype)[None], (y.shape[0], *matrix.shape))
        return jnp.einsum("noi,nic->noc", weights, y, precision=highest)

    rows = interpolation_matrix(height, size[0], grid, step)
    columns = interpolation_matrix(width, size[1], grid, step)
    x = product(rows, x.reshape(batch, height, width * channels))
    x = product(columns, x.reshape(batch * size[0], width, channels))
    return x.reshape(batch, *size, channels)
