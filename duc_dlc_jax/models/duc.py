"""Dense upsampling convolution (section III.B, figure 3): a guided filter made of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.layers import resize_bilinear


class DUC(nn.Module):
    """Brings I_l to the grid of I_m, guided by the image; eq. 3: O = a * G~ + b.

    The coefficients a and b come from one linear 1x1 convolution of [G~, I~]. It is kept as its two
    halves: a linear 1x1 commutes with bilinear interpolation, so the I~ half runs on the low
    resolution and its product is upsampled (`commute=False` upsamples first: the same numbers).
    """

    width: int  # channels of G~, I~, a, b, O
    dilation: int
    guidance_width: int
    guidance_kernel: int
    guidance_stride: int  # 1: g(I) on the image; 2: on the image at half its resolution
    commute: bool
    feature_stride: int  # of I_l against the image
    grid: str
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, image: jax.Array, middle: jax.Array, low: jax.Array) -> jax.Array:
        """image I: [B, H, W, 3]; I_m: [B, H/8, W/8, C]; I_l: [B, H/OS, W/OS, D].

        Returns [O, I_m]: [B, H/8, W/8, width + C].
        """
        size = middle.shape[1:3]
        guidance = self._guidance(image, size)
        low = self.conv(self.width, 3, 1, self.dilation, name="low_conv")(low)
        low = nn.relu(self.norm(name="low_bn")(low))

        step = 8 / self.feature_stride
        low_half = self.conv(2 * self.width, name="coefficients_low")
        if self.commute:
            from_low = resize_bilinear(low_half(low), size, self.grid, step)
        else:
            from_low = low_half(resize_bilinear(low, size, self.grid, step))
        from_guidance = self.conv(2 * self.width, bias=True, name="coefficients_guidance")(guidance)
        a, b = jnp.split(from_guidance + from_low, 2, axis=-1)
        return jnp.concatenate([a * guidance + b, middle], axis=-1)

    def _guidance(self, image: jax.Array, size: Sequence[int]) -> jax.Array:
        """G~ [B, *size, width]: g(I), a stride-4 convolution, and a resize to I_m's grid."""
        if self.guidance_stride > 1:
            half = tuple(-(-n // self.guidance_stride) for n in image.shape[1:3])
            image = resize_bilinear(image, half, self.grid, self.guidance_stride)
        g = self.conv(self.guidance_width, name="g_conv1")(image)
        g = nn.relu(self.norm(name="g_bn")(g))
        g = self.conv(self.guidance_width, bias=True, name="g_conv2")(g)
        g = self.conv(self.width, self.guidance_kernel, 4, name="guidance_conv")(g)
        g = self.norm(name="guidance_bn")(g)
        return resize_bilinear(g, size, self.grid, 8 / (4 * self.guidance_stride))
