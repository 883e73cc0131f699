"""Convolution and pixel shuffle, the other "DUC" (Wang et al., 2018)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="ratio")  # keeps its name, as `layers.max_pool` does
def pixel_shuffle(x: jax.Array, ratio: int) -> jax.Array:
    """[B, h, w, r * r * C] -> [B, r h, r w, C]: channel (i r + j) C + c goes to cell (i, j)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, ratio, ratio, channels // ratio**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, ratio * height, ratio * width, channels // ratio**2)


class PixelShuffle(nn.Module):
    """I~, as in `Bilinear`, brought to I_m's grid by a 1x1 and a shuffle, and joined to I_m.

    Wang et al. shuffle class scores to the pixels, from features at 1/8. Here features are shuffled
    to 1/8, so that contexts run on the grid of the other modules [I].
    """

    width: int  # channels of I~
    dilation: int
    feature_stride: int  # of I_l against the image
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, middle: jax.Array, low: jax.Array) -> jax.Array:
        """I_m [B, H/8, W/8, C] and I_l [B, H/OS, W/OS, D] -> [B, H/8, W/8, width + C]."""
        low = self.conv(self.width, 3, 1, self.dilation, name="low_conv")(low)
        low = nn.relu(self.norm(name="low_bn")(low))
        ratio = self.feature_stride // 8
        low = self.conv(self.width * ratio**2, bias=True, name="shuffle_conv")(low)
        low = pixel_shuffle(low, ratio)[:, : middle.shape[1], : middle.shape[2]]
        return jnp.concatenate([low, middle], axis=-1)
