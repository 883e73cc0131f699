"""The control for DUC: everything that it does but the guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from duc_dlc_jax.models.resizing import resize_bilinear


class Bilinear(nn.Module):
    """I~, DUC's dilated convolution of I_l, brought to I_m's grid and joined to I_m.

    DUC adds three things at once, the 1/8 grid, the skip I_m and the guidance: against this module
    it adds the third alone. `valid_sizes`: as in `resizing.resize_bilinear`.
    """

    width: int  # channels of I~
    dilation: int
    feature_stride: int  # of I_l against the image
    grid: str
    conv: Any
    norm: Any
    valid_sizes: Callable[[Sequence[int]], jax.Array] | None = None

    @nn.compact
    def __call__(self, middle: jax.Array, low: jax.Array) -> jax.Array:
        """I_m [B, H/8, W/8, C] and I_l [B, H/OS, W/OS, D] -> [B, H/8, W/8, width + C]."""
        low = self.conv(self.width, 3, 1, self.dilation, name="low_conv")(low)
        low = nn.relu(self.norm(name="low_bn")(low))
        step = 8 / self.feature_stride
        low = resize_bilinear(low, middle.shape[1:3], self.grid, step, self.valid_sizes)
        return jnp.concatenate([low, middle], axis=-1)
