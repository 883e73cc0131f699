"""The modules once more in NumPy, after docs/network.md: the reference of test_module_forward.py.

They share no code with the package and do the plain thing. Arrays are float64 [B, H, W, C].
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage


def relu(x):
    return np.maximum(x, 0)


def join(*parts):
    return np.concatenate(parts, -1)


def resize(x, size, grid, step=1.0):
    """Bilinear to `size`; step: source cells per target cell, which grid="stride" reads."""
    for axis, n in zip((1, 2), size, strict=True):
        cells, index = x.shape[axis], np.arange(n)
        position = {
            "corners": np.linspace(0, cells - 1, n),
            "stride": index * step,
            "half_pixel": (index + 0.5) * cells / n - 0.5,
        }[grid]
        along = functools.partial(np.interp, position, np.arange(cells))  # clamps at both ends
        x = np.apply_along_axis(along, axis, x)
    return x


class Layers:
    """Applies the convolutions and BNs of a module, by the names of their variables."""

    def __init__(self, variables):
        self.params, self.stats = (variables.get(kind, {}) for kind in ("params", "batch_stats"))

    def conv(self, name, x, dilation=1, stride=1, depthwise=False):
        kernel = np.asarray(self.params[name]["kernel"])
        pad, (height, width) = dilation * (len(kernel) - 1) // 2, x.shape[1:3]
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        y = np.asarray(self.params[name].get("bias", 0.0))
        for i, j in np.ndindex(kernel.shape[:2]):
            top, left = i * dilation, j * dilation
            read = padded[:, top : top + height : stride, left : left + width : stride]
            y = y + (read * kernel[i, j, 0] if depthwise else read @ kernel[i, j])
        return y

    def bn(self, name, x):
        params, stats = self.params[name], self.stats[name]
        x = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
        return x * np.asarray(params["scale"]) + np.asarray(params["bias"])

    def unit(self, name, x, dilation=1):
        """Convolution NAME_conv, BN NAME_bn, ReLU."""
        return relu(self.bn(f"{name}_bn", self.conv(f"{name}_conv", x, dilation)))


def duc(layers, image, middle, low, *, dilation, guidance_stride, stride, grid, upsampled):
    """Eq. 3; stride: of I_l against the image."""
    size = middle.shape[1:3]
    if guidance_stride == 2:
        image = resize(image, [(n + 1) // 2 for n in image.shape[1:3]], grid, 2)
    g = layers.conv("g_conv2", relu(layers.bn("g_bn", layers.conv("g_conv1", image))))
    guidance = layers.bn("guidance_bn", layers.conv("guidance_conv", g, stride=4))
    guidance = here = resize(guidance, size, grid, 2 / guidance_stride)
    low = layers.unit("low", low, dilation)
    if upsampled == "features":
        low = resize(low, size, grid, 8 / stride)
    else:
        here = resize(guidance, low.shape[1:3], grid, stride / 8)
    halves = (layers.params[f"coefficients_{half}"]["kernel"] for half in ("guidance", "low"))
    weight = np.concatenate([kernel[0, 0] for kernel in halves])  # of one 1x1 on [G~, I~]
    bias = np.asarray(layers.params["coefficients_guidance"]["bias"])
    a, b = np.split(join(here, low) @ weight + bias, 2, -1)
    if upsampled == "coefficients":
        a, b, here = resize(a, size, grid, 8 / stride), resize(b, size, grid, 8 / stride), guidance
    output = a * here + b
    if upsampled == "output":
        output = resize(output, size, grid, 8 / stride)
    return join(output, middle)


def bilinear(layers, middle, low, *, dilation, stride, grid):
    low = layers.unit("low", low, dilation)
    return join(resize(low, middle.shape[1:3], grid, 8 / stride), middle)


def jpu(layers, features, *, strides, grid):
    size, parts = features[0].shape[1:3], []
    for layer, x, stride in zip((2, 3, 4), features, strides, strict=True):
        parts.append(resize(layers.unit(f"layer{layer}", x), size, grid, 8 / stride))
    x, parts = join(*parts), []
    for rate in (1, 2, 4, 8):
        y = layers.conv(f"d{rate}_depth_conv", x, rate, depthwise=True)
        parts.append(layers.unit(f"d{rate}", layers.bn(f"d{rate}_depth_bn", y)))
    return join(*parts)


def dlc(layers, x, *, rates):
    x = layers.unit("reduce", x)
    for rate in rates:
        y = relu(layers.bn(f"d{rate}_bn1", layers.conv(f"d{rate}_conv1", x)))
        y = relu(layers.bn(f"d{rate}_bn2", layers.conv(f"d{rate}_conv2", y, rate)))
        x = join(x, y)
    return x


def dense_aspp(layers, x, *, rates):
    for rate in rates:
        y = x if rate == rates[0] else layers.bn(f"d{rate}_bn1", x)
        y = layers.bn(f"d{rate}_bn2", layers.conv(f"d{rate}_conv1", relu(y)))
        x = join(x, layers.conv(f"d{rate}_conv2", relu(y), rate))
    return x


def ccl(layers, x, *, rates):
    x = layers.unit("reduce", x)
    parts = [x]
    for rate in rates:
        local = layers.bn(f"d{rate}_local_bn", layers.conv(f"d{rate}_local_conv", x))
        context = layers.bn(f"d{rate}_context_bn", layers.conv(f"d{rate}_context_conv", x, rate))
        parts.append(relu(local - context))
        x = relu(local)
    return join(*parts)


def fcn(layers, x):
    return relu(layers.bn("bn", layers.conv("conv", x)))


def aspp(layers, x, *, rates):
    parts = [layers.unit("point", x)]
    parts += [layers.unit(f"rate{i}", x, rate) for i, rate in enumerate(rates, 1)]
    pooled = layers.unit("pool", x.mean((1, 2), keepdims=True))
    parts.append(np.tile(pooled, (1, *x.shape[1:3], 1)))
    return layers.unit("out", layers.unit("project", join(*parts)))


def psp(layers, x):
    parts, size = [x], x.shape[1:3]
    for bins in (1, 2, 3, 6):
        means = np.zeros((len(x), bins, bins, x.shape[-1]))
        for cell in np.ndindex(bins, bins):
            rows, columns = (
                slice(i * n // bins, -(-(i + 1) * n // bins))
                for i, n in zip(cell, size, strict=True)
            )
            means[:, *cell] = x[:, rows, columns].mean((1, 2))
        parts.append(resize(layers.unit(f"bins{bins}", means), size, "corners"))
    return layers.unit("out", join(*parts))


def guided_filter(layers, image, scores, *, radius, epsilon):
    """He et al., 2013, eq. 5, 6 and 8, class by class; boxes end with the image."""
    guide = layers.conv("guide_conv2", relu(layers.conv("guide_conv1", image)))
    box = functools.partial(
        ndimage.uniform_filter, size=(1, 2 * radius + 1, 2 * radius + 1, 1), mode="constant"
    )

    def mean(x):
        return box(x) / box(np.ones_like(x))

    covariance = mean(guide * scores) - mean(guide) * mean(scores)
    a = covariance / (mean(guide**2) - mean(guide) ** 2 + epsilon)
    return mean(a) * guide + mean(mean(scores) - a * mean(guide))


def of_pixels(blocks, size):
    """Scores [B, h, w, r * r * K] of cells -> [B, *size, K], pixel by pixel."""
    ratio = -(-size[0] // blocks.shape[1])
    blocks = blocks.reshape(*blocks.shape[:3], ratio, ratio, -1)
    pixels = np.zeros((len(blocks), *size, blocks.shape[-1]))
    for i, j in np.ndindex(*size):
        pixels[:, i, j] = blocks[:, i // ratio, j // ratio, i % ratio, j % ratio]
    return pixels


def dupsampling(layers, x, *, size):
    scores = layers.conv("w", layers.conv("compress", x))
    return of_pixels(scores, size) * np.asarray(layers.params["scale"])


def pixel_shuffle(layers, x, *, size):
    return of_pixels(layers.conv("scores", x), size)
