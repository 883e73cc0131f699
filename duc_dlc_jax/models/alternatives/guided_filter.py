"""Trainable guided filter on the class scores (Wu et al., 2018; He et al., 2013)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.valid_cells import cells_within

RADIUS, EPSILON = 4, 1e-2  # pixels; of the variance: as published for DeepLab


class GuidedFilter(nn.Module):
    """Filters logits at the pixels, each class guided by its own learned map of the image.

    Guidance: 1x1 -> width, ReLU, 1x1 -> classes, with biases. Boxes end where `valid_sizes` do.
    """

    width: int
    conv: Any
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, image: jax.Array, logits: jax.Array) -> jax.Array:
        """image [B, H, W, 3], logits [B, H, W, K] -> [B, H, W, K] of the logits' dtype."""
        guide = nn.relu(self.conv(self.width, bias=True, name="guide_conv1")(image))
        guide = self.conv(logits.shape[-1], bias=True, name="guide_conv2")(guide)
        size = logits.shape[1:3]
        sizes = jnp.asarray([size]) if self.valid_sizes is None else self.valid_sizes(size)
        guide, mask = guide.astype(logits.dtype), cells_within(sizes, size)
        return guided_filter(guide, logits, mask, RADIUS, EPSILON)


def guided_filter(guide, x, mask, radius: int, epsilon: float) -> jax.Array:
    """Per channel a * guide + b: the least squares of x on guide in each box, averaged.

    guide, x: [B, H, W, K]; mask: bool [B or 1, H, W, 1], the pixels that count.
    """
    count = jnp.maximum(_box_sum(mask.astype(x.dtype), radius), 1)

    def mean(t):
        return _box_sum(jnp.where(mask, t, 0), radius) / count

    mean_guide, mean_x = mean(guide), mean(x)
    variance = mean(guide * guide) - mean_guide * mean_guide
    a = (mean(guide * x) - mean_guide * mean_x) / (variance + epsilon)
    return mean(a) * guide + mean(mean_x - a * mean_guide)


def _box_sum(x: jax.Array, radius: int) -> jax.Array:
    """Sums of the (2 radius + 1)^2 pixels around each."""
    (height, width), side = x.shape[1:3], range(2 * radius + 1)
    x = jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    x = functools.reduce(jnp.add, (x[:, i : i + height] for i in side))
    return functools.reduce(jnp.add, (x[:, :, i : i + width] for i in side))
