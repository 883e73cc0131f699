"""Dense local context (section III.C, figure 4): dilated convolutions, cascaded and in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class DLC(nn.Module):
    """1x1 -> width; per rate d: 1x1 -> growth, 3x3 dilation d -> growth, joined to its input.

    [B, h, w, C] -> [B, h, w, width + len(rates) * growth]. Receptive field of the rates 3, 6, 12,
    18 by eq. 4 and 5: 79.
    """

    width: int
    growth: int
    rates: Sequence[int]
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.norm(name="reduce_bn")(self.conv(self.width, name="reduce_conv")(x)))
        for rate in self.rates:
            y = self.conv(self.growth, name=f"d{rate}_conv1")(x)
            y = nn.relu(self.norm(name=f"d{rate}_bn1")(y))
            y = self.conv(self.growth, 3, 1, rate, name=f"d{rate}_conv2")(y)
            y = nn.relu(self.norm(name=f"d{rate}_bn2")(y))
            x = jnp.concatenate([x, y], axis=-1)
        return x
