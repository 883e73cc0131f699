"""Convolution, batch normalisation and pooling, as the whole network uses them.

Arrays are [batch, height, width, channels]. Parameters and statistics are float32 (float64 when the
compute dtype is float64); activations have the compute dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from duc_dlc_jax.models.valid_cells import cells_within, zero_beyond

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


def _once(*static: int):
    """Of a function that many layers call: traced once for arrays of one shape, which is slow."""
    return functools.partial(jax.jit, static_argnums=static, inline=True)


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
    cells. A 1x1 is written as a matrix product, which every backend runs and differentiates well.

    `groups`: of channels that do not see each other; with as many as channels it is depthwise.

    `valid_sizes`: from the grid (h, w) to int32 [B, 2] (`valid_cells.valid_sizes`); cells beyond
    these are set to 0 before a kernel larger than 1 reads them, as if the image ended there.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    init: Any = head_init
    dtype: Dtype = jnp.float32
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def weights(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """Kernel [k, k, channels, features] and bias [features] or None, in the parameters' dtype.

        For callers that compose convolutions before they run them.
        """
        wide, features = parameter_dtype(self.dtype), self.features
        shape = (self.kernel, self.kernel, channels // self.groups, features)
        # Flax traces it with every application too, to check the shape, for which zeros do.
        draw = self.init if self.is_initializing() else nn.initializers.zeros
        kernel = self.param("kernel", draw, shape, wide)
        if not self.bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (features,), wide)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights(x.shape[-1])
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.valid_sizes is not None and self.kernel > 1:
            x = zero_beyond(x, self.valid_sizes(x.shape[1:3]))
        y: Any = convolve(x, kernel, self.stride, self.dilation, self.groups)
        if bias is not None:
            y = y + bias.astype(self.dtype)[None, None, None]
        return y


WEIGHT_GRADIENTS = ("compiler", "taps", "columns")
CELLS_BY_IMAGE = 900  # from which on a CPU takes "taps" for a 1x1 kernel: docs/performance.md


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    dilation: int,
    groups: int = 1,
    weight_gradient: str = "",
) -> jax.Array:
    """x [B, H, W, C] and kernel [k, k, C / groups, D] -> [B, ceil(H / s), ceil(W / s), D].

    A 1x1 kernel is a matrix product. weight_gradient: how the kernel's gradient is computed; the
    same sums in other orders.
      "compiler": as XLA makes it of the convolution or product.
      "taps": k * k matrix products an image, of the input as each position of the kernel reads it.
      "columns": one matrix product of these inputs side by side.
      "": what was fastest on the platform (docs/performance.md). On GPUs "columns" where
        dilation > 1, for XLA knows no kernel of cuDNN for these. On CPUs "taps" for 1x1 kernels
        from `CELLS_BY_IMAGE` on: XLA transposes the gradient before its own product, over three
        axes. (One product of all images' cells is faster still, but splits rows over no devices.)
    """
    del weight_gradient
    return _plain_convolve(x, kernel, stride, dilation, groups)


def _plain_convolve(x, kernel, stride, dilation, groups):
    # Of a slice of symbolic sizes JAX does not know that it is as long as a strided convolution.
    known = stride == 1 or not any(map(jax.export.is_symbolic_dim, x.shape[1:3]))
    if kernel.shape[0] == 1 and groups == 1 and known:
        x = x[:, ::stride, ::stride]
        return jax.lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    pad = dilation * (kernel.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _convolve_forward(x, kernel, *how):
    return convolve(x, kernel, *how), (x, kernel)


def _convolve_backward(stride, dilation, groups, weight_gradient, saved, dy):
    x, kernel = saved
    plain = functools.partial(_plain_convolve, stride=stride, dilation=dilation, groups=groups)
    by_image = len(kernel) == 1 and dy.shape[1] * dy.shape[2] >= CELLS_BY_IMAGE
    on_cpu = weight_gradient or ("taps" if by_image and groups == 1 else "compiler")
    on_gpu = weight_gradient or ("columns" if dilation > 1 and groups == 1 else "compiler")
    if on_cpu == on_gpu == "compiler":
        return jax.vjp(plain, x, kernel)[1](dy)
    (dx,) = jax.vjp(lambda x: plain(x, kernel), x)[1](dy)

    def gradient(way):
        return functools.partial(_weight_gradient, way, plain, stride, dilation)

    if weight_gradient:
        return dx, gradient(weight_gradient)(x, kernel, dy)
    on_others = gradient("compiler")
    on_cpu, on_gpu = gradient(on_cpu), gradient(on_gpu)
    ways = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu, "default": on_others}
    return dx, jax.lax.platform_dependent(x, kernel, dy, **ways)


def _weight_gradient(way, plain, stride, dilation, x, kernel, dy):
    if way == "compiler":
        return jax.vjp(lambda k: plain(x, k), kernel)[1](dy)[0]
    k, pad = kernel.shape[0], dilation * (kernel.shape[0] - 1) // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    ends = [stride * (n - 1) + 1 for n in dy.shape[1:3]]
    read = [
        padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
        for i in range(0, k * dilation, dilation)
        for j in range(0, k * dilation, dilation)
    ]
    if way == "taps":
        images, wide = len(x), parameter_dtype(x.dtype)

        def cells(values):
            return values.reshape(images, -1, values.shape[-1])

        products = [
            jnp.einsum("bnc,bnd->bcd", cells(tap), cells(dy), preferred_element_type=wide)
            for tap in read
        ]
        taps = jnp.stack([product.sum(0) for product in products])
        return taps.reshape(kernel.shape).astype(kernel.dtype)
    over_cells = (((0, 1, 2), (0, 1, 2)), ((), ()))
    columns = jnp.concatenate(read, -1)
    return jax.lax.dot_general(columns, dy, over_cells).reshape(kernel.shape)


convolve.defvjp(_convolve_forward, _convolve_backward)


@jax.jit  # keeps its name in a traced network, where the export finds it
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
    statistics (`valid_cells.valid_sizes`); n is the number of its cells, and the groups' shares in
    the running statistics are proportional to it. All cells are normalised. A group without a valid
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
    def scale_and_shift(self, x: jax.Array, kernel: jax.Array | None = None):
        """What normalises x [B, H, W, C]: factors [G, C] and offsets [G, C], float32 or wider.

        With `kernel` [D, C] what is normalised is the 1x1 convolution x @ kernel of x [B, H, W, D];
        its statistics follow from the first and second moments of x, without computing it. Updates
        the running statistics. G is 1 with running statistics.
        """
        wide = parameter_dtype(self.dtype)
        channels = x.shape[-1] if kernel is None else kernel.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), wide)
        bias = self.param("bias", nn.initializers.zeros, (channels,), wide)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), wide)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), wide)
        if self.use_running_average:
            mean, var = running_mean.value[None], running_var.value[None]
        else:
            groups = 1 if self.is_initializing() else self.groups
            sizes = self.valid_sizes(x.shape[1:3]) if self.valid_sizes else None
            unbiased = self.running_variance == "unbiased"
            mean, var, batch_mean, batch_var = _statistics(x, kernel, sizes, groups, unbiased, wide)
            if not self.is_initializing():
                running_mean.value = _moved(running_mean.value, batch_mean, self.momentum)
                running_var.value = _moved(running_var.value, batch_var, self.momentum)
        return _factor_and_shift(scale, bias, mean, var, self.epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _scaled_and_shifted(x, *self.scale_and_shift(x), self.dtype)


@_once(3, 4, 5)
def _statistics(x, kernel, sizes, groups, unbiased, wide):
    """Mean and variance of each group [G, C] and of the whole batch [C].

    sizes: of the valid parts, int32 [B, 2], or None. The variance of the batch is the one to store,
    biased or not.
    """
    values = x.reshape(groups, -1, *x.shape[1:]).astype(wide)
    if sizes is None:
        count = values[0].size // values.shape[-1]
        mean, var = _mean_and_variance(values, kernel, lambda v: v.mean((1, 2, 3)))
        stored = _stored(var, count) if unbiased else var
        return mean, var, mean.mean(0), stored.mean(0) + mean.var(0)
    mask = cells_within(sizes, x.shape[1:3]).reshape(*values.shape[:-1], 1)
    mask = mask | ~mask.any((1, 2, 3), keepdims=True)
    count = mask.sum((1, 2, 3)).astype(values.dtype)  # [G, 1]
    mean, var = _mean_and_variance(
        jnp.where(mask, values, 0), kernel, lambda v: v.sum((1, 2, 3)) / count
    )
    share = count / count.sum()
    batch_mean = (share * mean).sum(0)
    stored = _stored(var, count) if unbiased else var
    spread = stored + (mean - batch_mean[None]) ** 2
    return mean, var, batch_mean, (share * spread).sum(0)


def _stored(var, count):
    """The unbiased one, as PyTorch stores it."""
    return var * (count / jnp.maximum(count - 1, 1))


@_once(2)
def _moved(running, batch, keep):
    return keep * running + (1 - keep) * batch


@_once(4)
def _factor_and_shift(scale, bias, mean, var, epsilon):
    factor = scale[None] * jax.lax.rsqrt(var + epsilon)
    return factor, bias[None] - factor * mean


@_once(3)
def _scaled_and_shifted(x, factor, shift, dtype):
    y = x.reshape(len(factor), -1, *x.shape[1:])
    y = (y * factor[:, None, None, None] + shift[:, None, None, None]).astype(dtype)
    return y.reshape(x.shape)


def _mean_and_variance(values, kernel, mean_of):
    """Mean and variance [G, C] of values [G, B / G, H, W, C], or of values @ kernel [D, C].

    mean_of: [G, B / G, H, W, N] -> [G, N], over the cells that count. For y = x W:
    E[y] = E[x] W and Var[y_c] = sum_ij W_ic W_jc Cov[x_i, x_j].
    """
    mean = mean_of(values)
    if kernel is None:
        return mean, jnp.maximum(mean_of(values * values) - mean * mean, 0)
    channels, exact = values.shape[-1], jax.lax.Precision.HIGHEST
    each = [values[..., i, None] for i in range(channels)]
    second = {(i, j): mean_of(each[i] * each[j]) for i in range(channels) for j in range(i + 1)}
    pairs = [second[max(i, j), min(i, j)] for i in range(channels) for j in range(channels)]
    second = jnp.concatenate(pairs, -1).reshape(-1, channels, channels)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    kernel = kernel.astype(values.dtype)
    var = jnp.einsum("gij,ic,jc->gc", covariance, kernel, kernel, precision=exact)
    return jnp.dot(mean, kernel, precision=exact), jnp.maximum(var, 0)


@jax.jit  # keeps its name, as `max_pool` does
def image_mean(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 1, 1, C]."""
    return x.mean((1, 2), keepdims=True)


def mean_of_valid(
    x: jax.Array, valid_sizes: Callable[[Sequence[int]], jax.Array] | None
) -> jax.Array:
    """Mean over the grid, of the valid cells where `valid_sizes` says them: [B, 1, 1, C].

    Summed in float32 or wider; x's dtype.
    """
    wide = x.astype(parameter_dtype(x.dtype))
    if valid_sizes is None:
        return image_mean(wide).astype(x.dtype)
    sizes = valid_sizes(x.shape[1:3])
    total = zero_beyond(wide, sizes).sum((1, 2), keepdims=True)
    return (total / sizes.prod(1)[:, None, None, None]).astype(x.dtype)
