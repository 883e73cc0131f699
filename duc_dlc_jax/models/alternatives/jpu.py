"""Joint pyramid upsampling of FastFCN (Wu et al., 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.resizing import resize_bilinear

RATES = (1, 2, 4, 8)


class JPU(nn.Module):
    """3x3 -> width of layer2, layer3 and layer4, brought to 1/8, through dilated separable 3x3.

    Each separable convolution: depthwise 3x3 with dilation 1, 2, 4, 8, BN, 1x1 -> width, BN, ReLU,
    all side by side. Published: width 512 for an output stride of 32. `valid_sizes`: as in
    `resizing.resize_bilinear`.
    """

    width: int
    strides: Sequence[int]  # of the three features against the image
    grid: str
    conv: Any
    norm: Any
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
        """[B, H/8, W/8, C], [B, H/16, W/16, D], [B, H/32, W/32, E] -> [B, H/8, W/8, 4 * width]."""
        size, parts = features[0].shape[1:3], []
        for layer, (x, stride) in enumerate(zip(features, self.strides, strict=True), 2):
            x = self.conv(self.width, 3, name=f"layer{layer}_conv")(x)
            x = nn.relu(self.norm(name=f"layer{layer}_bn")(x))
            parts.append(resize_bilinear(x, size, self.grid, 8 / stride, self.valid_sizes))
        x, parts = jnp.concatenate(parts, axis=-1), []
        for rate in RATES:
            channels = x.shape[-1]
            y = self.conv(channels, 3, 1, rate, groups=channels, name=f"d{rate}_depth_conv")(x)
            y = self.conv(self.width, name=f"d{rate}_conv")(self.norm(name=f"d{rate}_depth_bn")(y))
            parts.append(nn.relu(self.norm(name=f"d{rate}_bn")(y)))
        return jnp.concatenate(parts, axis=-1)
